"""Opens the models that are to serve, and keeps them what all workers have agreed on."""

import asyncio
import logging
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import AsyncExitStack
from functools import partial
from types import TracebackType
from typing import Self

from app.errors import ConfigurationError, Conflict, HikyakuError, InvalidModel
from app.events.event import Events
from app.release.state import (
    ReleaseState,
    StateStore,
    StateUnavailable,
    WorkerReport,
)
from app.reload.candidates import Candidates
from app.reload.changes import Changes
from app.reload.current_watch import CurrentWatch, Release
from app.reload.follower import FollowedModel, Follower, Routes
from app.reload.residents import READ_WITHIN_S, TAKE_WITHIN_S, Resident, Residents, VersionSource
from app.reload.verbs import ReleaseVerbs, require_no_quarantine
from app.served_model import ServedModel
from app.shadow.shadow import Shadow
from app.tasks import ended
from app.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

_PRUNE_EVERY_S = 600.0


class HotReload:
    """The models of a repository as an async context manager: `models` holds what serves of each,
    from the first moment on under their names and None until they are ready.

    Entering raises `InvalidModel` for a model that cannot serve, `ConfigurationError`, or what the
    repository and the store of the state raise. From then on nothing of it stops the service.
    """

    def __init__(
        self,
        models: MutableMapping[str, ServedModel | None],
        source: VersionSource,
        store: StateStore,
        worker: str,
        poll_s: float,
        shadow_of: Callable[[str], Shadow],
        routes_of: Callable[[str], Routes],
        release: Release,
        events: Events,
        metrics: Metrics,
    ) -> None:
        """`worker` is our name among those of all replicas; `shadow_of` gives what shows a
        model's candidates its answers, `routes_of` what routes its requests; `release` releases a
        version that CURRENT names; `events` are told of what becomes of releases."""
        self._models = models
        self._source = source
        self._store = store
        self._metrics = metrics
        self._shadow_of = shadow_of
        self._routes_of = routes_of
        self._residents: list[Residents] = []
        self._stack = AsyncExitStack()
        self._follower = Follower(worker, store, metrics)
        self.changes = Changes(self._follower, events)
        self.verbs = ReleaseVerbs(self.changes, source, metrics)
        self._follows_current = poll_s > 0
        self._watch = CurrentWatch(
            self._follower, self.verbs, release, source, self._add, poll_s, metrics
        )

    @property
    def followed(self) -> Mapping[str, FollowedModel]:
        """How this worker stands with each model."""
        return self._follower.models

    async def workers(self) -> Sequence[WorkerReport]:
        """How every worker stands that lives. Raises `StateUnavailable`."""
        return await self._follower.workers()

    def trouble(self) -> str:
        """Why the release state cannot be read; empty while it can."""
        return self._follower.unavailable

    async def __aenter__(self) -> Self:
        source = self._source
        names = await source.calls.call(source.repository.models, READ_WITHIN_S)
        if not names:
            raise ConfigurationError("MODEL_REPOSITORY: no folder in it has a model.yaml")
        self._models.update(dict.fromkeys(names))
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self._close)
            states = await self._states(names)
            # From the first moment on, so that whoever loads something waits for this worker.
            await stack.enter_async_context(self._follower)
            is_running = any(state.generation for state in states.values())
            for name in names:
                is_new = is_running and not states[name].generation
                await self._begin(name, states[name], is_new)
            stack.push_async_callback(self.changes.close)
            await stack.enter_async_context(self._watch)
            pruning = asyncio.create_task(self._prune(), name="prune the vault")
            stack.push_async_callback(ended, pruning)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._stack.aclose()

    async def _close(self) -> None:
        for residents in self._residents:
            await residents.close()

    def _add(self, name: str) -> FollowedModel:
        return self._followed(self._made(name))

    def _followed(self, residents: Residents) -> FollowedModel:
        name = residents.name
        candidates = Candidates(name, self._shadow_of(name), self._source, self._metrics)
        return self._follower.add(residents, candidates, self._routes_of(name))

    def _made(self, name: str) -> Residents:
        residents = Residents(name, self._models, self._source, self._metrics)
        self._residents.append(residents)
        return residents

    async def _states(self, names: Sequence[str]) -> Mapping[str, ReleaseState]:
        """As they are, or as this machine knew them last."""
        nothing = WorkerReport(self._follower.worker, {})
        try:
            return await self._store.exchange(nothing, names)
        except StateUnavailable as exc:
            known = await self._store.last_known(names)
            if known.keys() < set(names):
                raise
            log.warning("starting by the last known release state", extra={"reason": str(exc)})
            return known

    async def _begin(self, name: str, state: ReleaseState, is_new: bool) -> None:
        """`is_new`: other models were served before, this one never."""
        residents = self._made(name)
        try:
            if not state.generation:
                state, resident = await self._begun_with_current(residents, state)
            else:
                state, resident = await self._begun_with_champion(residents, state)
        except (InvalidModel, ConfigurationError) as exc:
            if not is_new or not await self._may_wait(name):
                raise
            log.error("a new model cannot serve yet", extra={"model": name, "reason": str(exc)})
            del self._models[name]
            self._followed(residents)
        else:
            self._followed(residents).begin(state, resident)

    async def _may_wait(self, name: str) -> bool:
        """Whether a service that is running goes on without this model: others serve without it,
        as this worker would if it had been here before, or nothing of it is published yet."""
        reports = [
            model
            for report in await self._follower.settled_workers()
            if report.worker != self._follower.worker
            for model in report.models.values()
        ]
        return any(each.serves for each in reports) or await self._source.current(name) is None

    async def _begun_with_champion(
        self, residents: Residents, state: ReleaseState
    ) -> tuple[ReleaseState, Resident]:
        try:
            return state, await _champion(residents, state)
        except InvalidModel as exc:
            current = await self._source.current(residents.name)
            if not self._follows_current or current in {None, state.current}:
                raise
            if await self._is_served(residents.name):
                raise
            extra = {"model": residents.name, "reason": str(exc)}
            log.error("what was decided on cannot serve, and CURRENT names another", extra=extra)
            return await self._begun_with_current(residents, state)

    async def _is_served(self, name: str) -> bool:
        """Whether another worker serves it."""
        reports = await self._follower.settled_workers()
        return any(name in each.models and each.models[name].serves for each in reports)

    async def _begun_with_current(
        self, residents: Residents, before: ReleaseState
    ) -> tuple[ReleaseState, Resident]:
        """Nothing was decided that can serve: what CURRENT names does, and that is a decision."""
        name = residents.name
        current = await self._source.current(name)
        if current is None:
            raise InvalidModel(f"{name}: nothing is published yet; `hikyaku publish` does it")
        try:
            require_no_quarantine(before, current)
        except Conflict as exc:
            raise InvalidModel(
                f"{name}: CURRENT names a version that must not serve: {exc}"
            ) from exc
        resident = await residents.open(current.version)
        decided = before.generation + 1
        state = ReleaseState(
            decided,
            resident.chosen,
            current=current,
            quarantined=before.quarantined,
            decided=decided,
        )
        if await self._store.compare_and_set(name, before.generation, state):
            return state, resident
        # Another worker has decided meanwhile.
        report = WorkerReport(self._follower.worker, {})
        state = (await self._store.exchange(report, [name]))[name]
        return state, await _champion(residents, state)

    async def _prune(self) -> None:
        """Copies of versions that no state names any more are removed, a while after their use."""
        while True:
            states = [model.state for model in self._follower.models.values()]
            named = [
                (
                    state.champion,
                    state.previous,
                    None if state.rollout is None else state.rollout.candidate,
                    *(shadow.chosen for shadow in state.shadows),
                )
                for state in states
            ]
            keep = {chosen.sha256 for each in named for chosen in each if chosen is not None}
            try:
                await self._source.calls.call(
                    partial(self._source.vault.prune, keep), TAKE_WITHIN_S
                )
            except HikyakuError as exc:
                log.error("copies of versions cannot be removed", extra={"reason": str(exc)})
            await asyncio.sleep(_PRUNE_EVERY_S)


async def _champion(residents: Residents, state: ReleaseState) -> Resident:
    if state.champion is None:
        raise InvalidModel(f"{residents.name}: the release state names no champion")
    return await residents.open(state.champion.version, state.champion.sha256)
