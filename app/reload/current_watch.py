"""Follows what CURRENT of the repository names, and finds models that are new there."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from functools import partial
from types import TracebackType
from typing import NamedTuple, Self, TypeAlias

import msgspec

from app.errors import Conflict, HikyakuError, InvalidInput, InvalidModel, RequestError
from app.release.state import Chosen, ReleaseState
from app.reload.follower import FollowedModel, Follower
from app.reload.residents import READ_WITHIN_S, VersionSource
from app.reload.verbs import ReleaseVerbs, require_no_quarantine
from app.tasks import ended
from app.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

_REFUSED = "CURRENT names a version that must not serve"
_FIRST_PAUSE_S = 5.0
_LONGEST_PAUSE_S = 300.0


class _Refusal(NamedTuple):
    """A version that could be neither loaded nor released, and when it is tried again."""

    chosen: Chosen
    pause_s: float
    again_at_s: float


Release: TypeAlias = Callable[[str, int], Awaitable[None]]
"""Starts a release of a version of a model, by the plan of model.yaml. Raises a `RequestError` that
says why there is none."""


class CurrentWatch:
    """Looks at the repository every `every_s`, never with 0.

    CURRENT that names another version than when the champion was decided on is a newer word: that
    version is loaded, or released where model.yaml says so and another one serves. Of all workers
    one does so, the first by name. What cannot be read changes nothing: nothing is unloaded because
    it is not there.
    """

    def __init__(
        self,
        follower: Follower,
        verbs: ReleaseVerbs,
        release: Release,
        source: VersionSource,
        add: Callable[[str], FollowedModel],
        every_s: float,
        metrics: Metrics,
    ) -> None:
        self._follower = follower
        self._verbs = verbs
        self._release = release
        self._source = source
        self._add = add
        self._every_s = every_s
        self._metrics = metrics
        self._refusals: dict[str, _Refusal] = {}
        self._troubles: dict[str, str] = {}
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        if self._every_s:
            await self._look()
            self._task = asyncio.create_task(self._watch(), name="CURRENT")
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._task is not None:
            await ended(self._task)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._every_s)
            await self._look()

    async def _look(self) -> None:
        """What is wrong with one model keeps no other from being followed."""
        if await self._tried("the repository", self._find_models):
            for name, model in tuple(self._follower.models.items()):
                await self._tried(name, partial(self._follow, name, model))

    async def _tried(self, what: str, work: Callable[[], Awaitable[bool]]) -> bool:
        """What it returns. False where it goes wrong, which is counted, and logged once."""
        try:
            found = await work()
        except HikyakuError as exc:
            self._metrics.repository_failures.inc()
            self._tell_trouble(what, str(exc))
            return False
        except Exception:  # a defect: this worker must not stop looking for it
            self._metrics.repository_failures.inc()
            log.exception("the repository could not be looked at", extra={"at": what})
            return False
        self._tell_trouble(what, "")
        return found

    async def _find_models(self) -> bool:
        """Whether it is for this worker to have loaded what CURRENT names."""
        for name in await self._source.calls.call(self._source.repository.models, READ_WITHIN_S):
            if name not in self._follower.models:
                log.info("a new model", extra={"model": name})
                self._add(name)
        return await self._is_first()

    async def _follow(self, name: str, model: FollowedModel) -> bool:
        """Whether CURRENT names something."""
        await self._give_up_orphan(name, model)
        current = await self._source.current(name)
        if current is None:
            return False
        kept_back = _kept_back(model.state, current)
        if kept_back:
            self._tell_kept_back(name, model, current, kept_back)
        elif self._is_due(name, model, current):
            if _is_candidate(model.state, current):
                await self._note(name, model.state, current)  # the release decides on it
            else:
                await self._have_serve(name, model, current)
        return True

    async def _is_first(self) -> bool:
        reports = await self._follower.settled_workers()
        workers = sorted(report.worker for report in reports if report.knows_releases)
        return workers[:1] == [self._follower.worker]

    def _is_due(self, name: str, model: FollowedModel, current: Chosen) -> bool:
        if model.state.generation and model.state.current == current:
            self._refusals.pop(name, None)
            model.refused = ""
            return False
        refusal = self._refusals.get(name)
        if refusal is None or refusal.chosen != current:
            return True
        return time.monotonic() >= refusal.again_at_s

    async def _have_serve(self, name: str, model: FollowedModel, current: Chosen) -> None:
        champion = model.state.champion
        is_release = False
        try:
            is_release = await self._is_to_be_released(model, current)
            if is_release:
                await self._release(name, current.version)
            else:
                await self._verbs.load(name, current.version, by="CURRENT")
        except Conflict as exc:
            if model.state.champion != champion:
                # An operator has decided what serves meanwhile: that is the newer word.
                await self._note(name, model.state, current)
            elif is_release and model.state.rollout is None:
                self._refuse(name, model, current, str(exc))
        except RequestError as exc:
            if not exc.retryable:  # else at the next look
                self._refuse(name, model, current, str(exc))
        else:
            self._refusals.pop(name, None)
            model.refused = ""

    async def _is_to_be_released(self, model: FollowedModel, current: Chosen) -> bool:
        """Against what serves: where nothing does, or that version does, it is loaded. Raises
        `InvalidInput` for a model.yaml that cannot be read."""
        if model.state.champion in {None, current}:
            return False
        try:
            contract = await model.candidates.contract()
        except InvalidModel as exc:
            raise InvalidInput(str(exc), field="version") from exc
        return contract.release.of_current == "release"

    def _refuse(self, name: str, model: FollowedModel, current: Chosen, reason: str) -> None:
        """Until a pause is over, which is longer each time."""
        before = self._refusals.get(name)
        pause_s = _FIRST_PAUSE_S
        if before is not None and before.chosen == current:
            pause_s = min(2 * before.pause_s, _LONGEST_PAUSE_S)
        self._refusals[name] = _Refusal(current, pause_s, time.monotonic() + pause_s)
        model.refused = reason
        named = {"model": name, "version": current.version, "again_in_s": pause_s}
        log.error(_REFUSED, extra=named | {"reason": reason})

    async def _note(self, name: str, state: ReleaseState, current: Chosen) -> None:
        """What CURRENT names is no newer word any more."""
        await self._follower.change(
            name, msgspec.structs.replace(state, generation=state.generation + 1, current=current)
        )

    def _tell_kept_back(
        self, name: str, model: FollowedModel, current: Chosen, reason: str
    ) -> None:
        """It is found again at each look, and logged once."""
        if model.refused != reason:
            extra = {"model": name, "version": current.version, "reason": reason}
            log.error(_REFUSED, extra=extra)
        model.refused = reason

    async def _give_up_orphan(self, name: str, model: FollowedModel) -> None:
        """Nothing will come of what a worker prepared that is not there any more."""
        preparing = model.state.preparing
        if preparing is None:
            return
        if preparing.worker not in {
            report.worker for report in await self._follower.settled_workers()
        }:
            state = model.state
            await self._follower.change(
                name,
                msgspec.structs.replace(state, generation=state.generation + 1, preparing=None),
            )

    def _tell_trouble(self, what: str, reason: str) -> None:
        before = self._troubles.pop(what, "")
        if reason:
            self._troubles[what] = reason
        if reason and reason != before:
            log.error("the repository cannot be looked at", extra={"at": what, "reason": reason})
        elif before and not reason:
            log.info("the repository can be looked at again", extra={"at": what})


def _kept_back(state: ReleaseState, current: Chosen) -> str:
    """Why the version that CURRENT names is not even tried by this state; empty where it may be."""
    try:
        require_no_quarantine(state, current)
    except Conflict as exc:
        return str(exc)
    is_newer_word = state.current != current
    if state.rollout is not None and is_newer_word and not _is_candidate(state, current):
        return f"a release is under way, of version {state.rollout.candidate.version}"
    return ""


def _is_candidate(state: ReleaseState, chosen: Chosen) -> bool:
    return state.rollout is not None and state.rollout.candidate == chosen
