"""Follows what CURRENT of the repository names, and finds models that are new there."""

import asyncio
import logging
import time
from collections.abc import Callable
from types import TracebackType
from typing import NamedTuple, Self

import msgspec

from app.errors import HikyakuError, RequestError
from app.release.state import Chosen
from app.reload.follower import FollowedModel, Follower
from app.reload.residents import READ_WITHIN_S, VersionSource
from app.reload.verbs import ReleaseVerbs
from app.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

_FIRST_PAUSE_S = 5.0
_LONGEST_PAUSE_S = 300.0


class _Refusal(NamedTuple):
    """A version that could not be loaded, and when it is tried again."""

    chosen: Chosen
    pause_s: float
    again_at_s: float


class CurrentWatch:
    """Looks at the repository every `every_s`, never with 0.

    CURRENT that names another version than when the champion was decided on is a newer word: that
    version is loaded. Of all workers one does so, the first by name. What cannot be read changes
    nothing: nothing is unloaded because it is not there.
    """

    def __init__(
        self,
        follower: Follower,
        verbs: ReleaseVerbs,
        source: VersionSource,
        add: Callable[[str], FollowedModel],
        every_s: float,
        metrics: Metrics,
    ) -> None:
        self._follower = follower
        self._verbs = verbs
        self._source = source
        self._add = add
        self._every_s = every_s
        self._metrics = metrics
        self._refusals: dict[str, _Refusal] = {}
        self._trouble = ""
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
            self._task.cancel()
            await asyncio.wait({self._task})

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._every_s)
            await self._look()

    async def _look(self) -> None:
        """What goes wrong is logged once, and counted."""
        try:
            await self._follow()
        except HikyakuError as exc:
            self._metrics.repository_failures.inc()
            self._tell_trouble(str(exc))
        except Exception:  # a defect: this worker must not stop looking for it
            self._metrics.repository_failures.inc()
            log.exception("the repository could not be looked at")
        else:
            self._tell_trouble("")

    async def _follow(self) -> None:
        repository = self._source.repository
        for name in await self._source.calls.call(repository.models, READ_WITHIN_S):
            if name not in self._follower.models:
                log.info("a new model", extra={"model": name})
                self._add(name)
        if not await self._is_first():
            return
        for name, model in tuple(self._follower.models.items()):
            current = await self._source.current(name)
            await self._give_up_orphan(name, model)
            if current is not None and self._is_due(name, model, current):
                await self._load(name, model, current)

    async def _is_first(self) -> bool:
        workers = sorted(report.worker for report in await self._follower.settled_workers())
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

    async def _load(self, name: str, model: FollowedModel, current: Chosen) -> None:
        try:
            await self._verbs.load(name, current.version, by="CURRENT")
        except RequestError as exc:
            if exc.retryable or exc.code == "conflict":
                return  # at the next look
            before = self._refusals.get(name)
            pause_s = _FIRST_PAUSE_S
            if before is not None and before.chosen == current:
                pause_s = min(2 * before.pause_s, _LONGEST_PAUSE_S)
            self._refusals[name] = _Refusal(current, pause_s, time.monotonic() + pause_s)
            model.refused = str(exc)
            named = {"model": name, "version": current.version, "again_in_s": pause_s}
            log.error(
                "CURRENT names a version that must not serve", extra=named | {"reason": str(exc)}
            )
        else:
            self._refusals.pop(name, None)
            model.refused = ""

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

    def _tell_trouble(self, reason: str) -> None:
        if reason and reason != self._trouble:
            log.error("the repository cannot be looked at", extra={"reason": reason})
        elif self._trouble and not reason:
            log.info("the repository can be looked at again")
        self._trouble = reason
