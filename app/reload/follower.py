"""Keeps this worker on the versions that all workers have agreed on."""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Protocol, Self

from app.errors import HikyakuError
from app.release.state import (
    Chosen,
    ModelReport,
    ReleaseState,
    Rollout,
    StateStore,
    StateUnavailable,
    WorkerReport,
)
from app.reload.candidates import Candidates
from app.reload.residents import Resident, Residents
from app.served_model import ServedModel
from app.tasks import ended
from app.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

EXCHANGE_EVERY_S = 0.2
# A rollback is to reach every worker within a tenth of a second.
_EXCHANGE_IN_ROLLOUT_S = 0.05
_SETTLED_WITHIN_S = 5.0
_RATE_OVER_S = 30.0
_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 60.0


class Routes(Protocol):
    """Decides which version answers a request while a release is under way."""

    def follow(
        self,
        rollout: Rollout | None,
        candidate: ServedModel | None,
        against: ServedModel | None,
    ) -> None:
        """From now on by this one; a version that is None is not open here, and the champion
        answers for it."""
        ...


class Follower:
    """Tells how this worker stands and reads the release state, a few times a second and whenever
    something was done, and has each model do what its state says.

    A worker that cannot read the state keeps what it serves.
    """

    def __init__(self, worker: str, store: StateStore, metrics: Metrics) -> None:
        self.worker = worker
        """Its name among all workers of all replicas."""
        self.unavailable = ""
        """Why the state could not be read the last time; empty when it could."""
        self._store = store
        self._metrics = metrics
        self._models: dict[str, FollowedModel] = {}
        self._read_s = time.monotonic()
        self._due = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def models(self) -> Mapping[str, "FollowedModel"]:
        """By their names."""
        return self._models

    def add(self, residents: Residents, candidates: Candidates, routes: Routes) -> "FollowedModel":
        """Follow one more model."""
        model = FollowedModel(residents, candidates, routes, self._due.set, self._metrics)
        self._models[residents.name] = model
        return model

    def report(self) -> WorkerReport:
        """How this worker stands."""
        reports = {name: model.report() for name, model in self._models.items()}
        return WorkerReport(self.worker, reports)

    async def exchange(self) -> None:
        """Tell and read now. Raises `StateUnavailable`."""
        told = self.report()
        try:
            states = await self._store.exchange(told, tuple(told.models))
        except StateUnavailable as exc:
            self._tell_unavailable(str(exc))
            raise
        self._tell_unavailable("")
        for name, state in states.items():
            self._models[name].learn(state)
        self._read_s = time.monotonic()

    async def change(self, name: str, state: ReleaseState) -> bool:
        """Have this state follow the one of the generation before it; false when another one has
        done so. Raises `StateUnavailable`."""
        if not await self._store.compare_and_set(name, state.generation - 1, state):
            return False
        self._models[name].learn(state)
        self._due.set()
        return True

    async def workers(self) -> Sequence[WorkerReport]:
        """All that live. Raises `StateUnavailable`."""
        return await self._store.workers()

    async def settled_workers(self) -> Sequence[WorkerReport]:
        """All that live, once that is known: after an interruption it takes a moment. Raises
        `StateUnavailable` when it takes longer."""
        until_s = time.monotonic() + _SETTLED_WITHIN_S
        while True:
            try:
                return await self._store.workers()
            except StateUnavailable:
                if time.monotonic() > until_s:
                    raise
            await asyncio.sleep(EXCHANGE_EVERY_S)

    async def __aenter__(self) -> Self:
        """All know of this worker when it is entered, unless nobody can be told now."""
        await self._exchange_if_possible()
        self._task = asyncio.create_task(self._follow(), name="release state")
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._task is not None:
            await ended(self._task)
        for model in self._models.values():
            await model.close()
        try:
            await self._store.leave(self.worker)
        except StateUnavailable as unavailable:
            log.warning("nobody could be told of this end", extra={"reason": str(unavailable)})

    async def _follow(self) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._exchange_every_s()):
                    await self._due.wait()
            self._due.clear()
            await self._exchange_if_possible()

    def _exchange_every_s(self) -> float:
        is_releasing = any(model.state.rollout is not None for model in self._models.values())
        return _EXCHANGE_IN_ROLLOUT_S if is_releasing else EXCHANGE_EVERY_S

    async def _exchange_if_possible(self) -> None:
        try:
            await self.exchange()
        except StateUnavailable:
            pass  # it was told
        except Exception:  # a defect: this worker must not stop following for it
            log.exception("the release state could not be followed")
            self.unavailable = "a defect, which the log has"
        self._metrics.release_state_age.set(time.monotonic() - self._read_s)

    def _tell_unavailable(self, reason: str) -> None:
        if reason and not self.unavailable:
            log.error("the release state cannot be read", extra={"reason": reason})
        elif self.unavailable and not reason:
            log.info("the release state can be read again")
        self.unavailable = reason


class FollowedModel:
    """One model: what its state says is done by one task, which a later state ends.

    `tell` is called when there is something to report.
    """

    def __init__(
        self,
        residents: Residents,
        candidates: Candidates,
        routes: Routes,
        tell: Callable[[], None],
        metrics: Metrics,
    ) -> None:
        self.residents = residents
        self.candidates = candidates
        self._routes = routes
        self._rate = _Rate(time.monotonic())
        self._routed = 0
        """The generation in which the stage began by which requests are routed."""
        self.state = ReleaseState()
        """The latest that is known."""
        self.refused = ""
        """Why the version that CURRENT names does not serve, as far as this worker has tried it."""
        self._tell = tell
        self._black_box = metrics.black_box
        self._generation = metrics.release_generation.labels(residents.name)
        self._carried_out = 0
        self._served = 0
        """The latest generation whose champion has served here."""
        self._decided = 0
        """The generation in which what serves here was decided on."""
        self._serves = asyncio.Event()
        self._failed: Mapping[str, str] = {}
        self._task: asyncio.Task[None] | None = None

    def report(self) -> ModelReport:
        """How this worker stands with the model."""
        serving = self.residents.serving
        return ModelReport(
            self._carried_out,
            None if serving is None else serving.chosen,
            self.residents.ready,
            self._failed,
            self.refused,
            self.candidates.report(),
            self.candidates.tripped(),
            self._rate.per_s(self.residents.begun, time.monotonic()),
            self._routed,
            self.died(),
            self.candidates.ended(),
        )

    def died(self) -> Mapping[str, int]:
        """See `ModelReport`."""
        rollout = self.state.rollout
        if rollout is None:
            return {}
        name, began_s = self.residents.name, rollout.stages[0].began_s
        return {
            chosen.sha256: deaths
            for chosen in (rollout.candidate, rollout.against)
            if (deaths := self._black_box.deaths(name, chosen.version, chosen.sha256, began_s))
        }

    def begin(self, state: ReleaseState, resident: Resident) -> None:
        """It is open already, and what the state says is to serve."""
        self.residents.serve(resident)
        self.learn(state)

    def learn(self, state: ReleaseState) -> None:
        """Do what the state says, unless that is known or overtaken: serve at once what is ready,
        the rest as it gets ready."""
        if state.generation <= self.state.generation:
            return
        self.state = state
        self.candidates.follow(state.shadows, state.decided)
        if self._task is not None:
            self._task.cancel()
        if state.champion is not None and (ready := self._ready(state, state.champion)):
            self._serve(state, ready)
        self._route(state)
        self._task = asyncio.create_task(self._carry_out(state), name="release")

    @contextmanager
    def pinned(self, resident: Resident) -> Iterator[None]:
        """Until the block ends it stays open; then what the state does not name is freed."""
        try:
            with self.residents.pinned(resident):
                yield
        finally:
            self.residents.keep(_besides(self.state))

    async def served(self, generation: int) -> None:
        """Wait until this worker serves by the state of this generation or a later one."""
        while self._served < generation:
            await self._serves.wait()

    async def close(self) -> None:
        if self._task is not None:
            await ended(self._task)
        await self.candidates.close()

    async def _carry_out(self, state: ReleaseState) -> None:
        if state.champion is not None and self._served < state.generation:
            self._serve(state, await self._opened(state.champion))
        self._failed = await self._prepared(state)
        self._carried_out = state.generation
        self._generation.set(state.generation)
        self._tell()
        for chosen in _answering(state):
            await self._opened(chosen)
        if state.rollout is not None:
            self._route(state)
            self._tell()
        if state.previous is not None:  # last: it may not be there any more
            await self._opened(state.previous)

    def _route(self, state: ReleaseState) -> None:
        """Requests that begin from now on are routed by this state."""
        rollout = state.rollout
        if rollout is None:
            self._routes.follow(None, None, None)
            self._routed = 0
            return
        found = [self.residents.find(each) for each in (rollout.candidate, rollout.against)]
        candidate, against = (None if each is None else each.model for each in found)
        if rollout.is_deadly(self.died()):
            candidate = None
        self._routes.follow(rollout, candidate, against)
        last = rollout.stages[-1]
        is_open = None not in found or (against is not None and not last.stage.share)
        self._routed = last.began if is_open else 0

    def _ready(self, state: ReleaseState, champion: Chosen) -> Resident | None:
        """What serves already, unless the same version was decided on anew: then of several by
        different contracts the one opened last."""
        serving = self.residents.serving
        if serving is not None and serving.chosen == champion and state.decided <= self._decided:
            return serving
        return self.residents.find(champion)

    def _serve(self, state: ReleaseState, resident: Resident) -> None:
        """By this state, and free what it does not name."""
        self.residents.serve(resident)
        self.residents.keep(_besides(state))
        self._served = state.generation
        self._decided = state.decided
        # Whoever waits now has waited for it; whoever comes later waits for the next one.
        self._serves.set()
        self._serves = asyncio.Event()

    async def _prepared(self, state: ReleaseState) -> Mapping[str, str]:
        """Get ready what is to be prepared; why it cannot serve here, by its digest."""
        if state.preparing is None:
            return {}
        chosen = state.preparing.chosen
        try:
            await self.residents.open(chosen.version, chosen.sha256)
        except Exception as exc:  # of what is not ours, too: others wait for a word of us
            return {chosen.sha256: self._failure(chosen, exc)}
        return {}

    async def _opened(self, chosen: Chosen) -> Resident:
        """Once it is open, however often that fails."""
        pause_s = _FIRST_PAUSE_S
        while True:
            found = self.residents.find(chosen)
            if found is not None:
                return found
            try:
                return await self.residents.open(chosen.version, chosen.sha256)
            except Exception as exc:  # whatever it is, it may be over the next time
                self._failure(chosen, exc)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _failure(self, chosen: Chosen, exc: Exception) -> str:
        """What others are told of it; the log has the rest."""
        known = isinstance(exc, HikyakuError)
        reason = str(exc) if known else f"{type(exc).__name__}: {exc}"
        log.error(
            "a version cannot serve here",
            extra={"model": self.residents.name, "version": chosen.version, "reason": reason},
            exc_info=None if known else exc,
        )
        return reason


class _Rate:
    """How often something happens that is counted, over the last half minute or so."""

    def __init__(self, now_s: float) -> None:
        self._count = 0
        self._at_s = now_s
        self._per_s = 0.0

    def per_s(self, count: int, now_s: float) -> float:
        """By the count of now. One that is less was begun anew."""
        passed_s = now_s - self._at_s
        if passed_s > 0:
            of_late = max(count - self._count, 0) / passed_s
            part = 1 - math.exp(-passed_s / _RATE_OVER_S)
            self._per_s += part * (of_late - self._per_s)
            self._count, self._at_s = count, now_s
        return self._per_s


def _besides(state: ReleaseState) -> list[Chosen]:
    """The versions that the state asks for, besides the one that serves."""
    preparing = None if state.preparing is None else state.preparing.chosen
    others = [chosen for chosen in (state.previous, preparing) if chosen is not None]
    return [*_answering(state), *others]


def _answering(state: ReleaseState) -> list[Chosen]:
    """Those that answer requests by the release under way."""
    rollout = state.rollout
    if rollout is None:
        return []
    candidate = [rollout.candidate] if rollout.stages[-1].stage.share else []
    return [rollout.against, *candidate]
