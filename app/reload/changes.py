"""How the release state of a model is changed: in one step that all workers follow."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager

import msgspec

from app.errors import (
    ConfigurationError,
    Conflict,
    InvalidInput,
    InvalidModel,
    ModelNotReady,
    NotFound,
    RepositoryUnavailable,
)
from app.events.event import Events
from app.release.state import (
    ModelReport,
    Preparation,
    ReleaseState,
    StateUnavailable,
    WorkerReport,
)
from app.reload.follower import FollowedModel, Follower
from app.reload.told import events_of

log = logging.getLogger(__name__)

_PREPARED_WITHIN_S = 300.0
_SERVED_WITHIN_S = 10.0
_CONVERGED_WITHIN_S = 2.0
_LOOK_EVERY_S = 0.05
_GIVE_UP_AGAIN_S = 1.0


class Changes:
    """What verbs do to the state. Everything raises `StateUnavailable` when that is not to be had,
    and `Conflict` when another change was first. `by` says who asked, for the log."""

    def __init__(self, follower: Follower, events: Events) -> None:
        """`events` are told of what becomes of releases."""
        self.follower = follower
        self._events = events
        self._under_way: dict[str, str] = {}
        # A reference: the loop holds tasks only weakly (asyncio docs, create_task).
        self._giving_up: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        for task in self._giving_up:
            task.cancel()
        if self._giving_up:
            await asyncio.wait(self._giving_up)

    @asynccontextmanager
    async def ready_everywhere(
        self,
        model: FollowedModel,
        state: ReleaseState,
        preparing: Preparation,
        is_new: bool,
        by: str,
    ) -> AsyncIterator[ReleaseState]:
        """The state in which every worker that lives has the version ready. When the block does not
        end well, nobody need prepare it any more."""
        if not is_new or len(await self.follower.settled_workers()) < 2:
            yield state
            return
        prepared = msgspec.structs.replace(
            state, generation=state.generation + 1, preparing=preparing
        )
        try:
            await self.decide(model, prepared, "prepare", by)
            yield await self._prepared(model, prepared, preparing)
        except BaseException:
            giving_up = asyncio.create_task(
                self._give_up(model, prepared, preparing), name="give up a load"
            )
            self._giving_up.add(giving_up)
            giving_up.add_done_callback(self._giving_up.discard)
            await asyncio.wait({giving_up}, timeout=_CONVERGED_WITHIN_S)
            raise

    async def _give_up(
        self, model: FollowedModel, prepared: ReleaseState, preparing: Preparation
    ) -> None:
        """Nobody need prepare it any more. Until that could be said nothing else can be loaded.

        A change of which nothing is known may be made yet: what follows it now makes it void."""
        while model.state.preparing == preparing or model.state.generation < prepared.generation:
            state = model.state
            after = msgspec.structs.replace(state, generation=state.generation + 1, preparing=None)
            try:
                if await self.follower.change(model.residents.name, after):
                    return
                await self.follower.exchange()
                await asyncio.sleep(_LOOK_EVERY_S)
            except StateUnavailable:
                await asyncio.sleep(_GIVE_UP_AGAIN_S)

    async def _prepared(
        self, model: FollowedModel, prepared: ReleaseState, preparing: Preparation
    ) -> ReleaseState:
        """The state in which all have it ready, be it a later one that leaves what is prepared as
        it is. Raises `ModelNotReady` when that takes too long."""
        try:
            async with asyncio.timeout(_PREPARED_WITHIN_S):
                # No event is set by another worker.
                while not await self._is_prepared(model, prepared, preparing):  # noqa: ASYNC110
                    await asyncio.sleep(_LOOK_EVERY_S)
        except TimeoutError as exc:
            raise ModelNotReady(
                f"not every worker had version {preparing.chosen.version} ready within "
                f"{_PREPARED_WITHIN_S:g} s"
            ) from exc
        return model.state

    async def _is_prepared(
        self, model: FollowedModel, prepared: ReleaseState, preparing: Preparation
    ) -> bool:
        """Raises `InvalidModel` as soon as a worker says that it cannot have it ready, `Conflict`
        when it is not to be prepared any more."""
        name, sha256 = model.residents.name, preparing.chosen.sha256
        found = [report.models.get(name) for report in await self.follower.settled_workers()]
        if model.state.preparing != preparing:
            raise overtaken(name, model.state)
        # What another one tells yet is of an earlier attempt.
        done = [
            each for each in found if each is not None and each.generation >= prepared.generation
        ]
        for report in done:
            if sha256 in report.failed:
                raise InvalidModel(f"one of the workers: {report.failed[sha256]}")
        return len(done) == len(found)

    async def converged(
        self,
        model: FollowedModel,
        state: ReleaseState,
        holds: Callable[[ModelReport], bool] = lambda report: True,
        within_s: float = _CONVERGED_WITHIN_S,
    ) -> bool:
        """Whether every worker that lives has done what the state says, so that this holds, or soon
        has."""
        until_s = time.monotonic() + within_s
        while True:
            try:
                reports = await self.follower.workers()
            except StateUnavailable:
                return False  # what was asked for is done, whatever is not known now
            if all(_follows(report, model, state, holds) for report in reports):
                return True
            if time.monotonic() >= until_s:
                return False
            await asyncio.sleep(_LOOK_EVERY_S)

    async def change(self, model: FollowedModel, after: ReleaseState, verb: str, by: str) -> None:
        """This worker serves what the state says when it returns, unless that takes long."""
        await self.decide(model, after, verb, by)
        try:
            async with asyncio.timeout(_SERVED_WITHIN_S):
                await model.served(after.generation)
        except TimeoutError as exc:
            name = model.residents.name
            raise ModelNotReady(f"{name}: decided, and not yet done in this worker") from exc

    async def decide(self, model: FollowedModel, after: ReleaseState, verb: str, by: str) -> None:
        """Raises `Overtaken`."""
        name, before = model.residents.name, model.state
        if not await self.follower.change(name, after):
            await self.follower.exchange()
            raise overtaken(name, model.state)
        for event in events_of(name, before, after, by):
            self._events.tell(event)
        log.info("the release state was changed", extra=described(name, after, verb, by))

    async def state(self, model: FollowedModel, generation: int | None) -> ReleaseState:
        """What all have agreed on, just now."""
        await self.follower.exchange()
        state = model.state
        if generation is not None and generation != state.generation:
            raise Conflict(
                f"the release state of {model.residents.name!r} is of generation "
                f"{state.generation}, not {generation}"
            )
        return state

    async def require_none_prepared(self, state: ReleaseState) -> None:
        if state.preparing is None or state.preparing.worker == self.follower.worker:
            return
        if state.preparing.worker in {
            each.worker for each in await self.follower.settled_workers()
        }:
            raise Conflict(
                f"version {state.preparing.chosen.version} is being loaded by another worker"
            )

    def model(self, name: str) -> FollowedModel:
        if name not in self.follower.models:
            raise NotFound(f"no model is named {name[:64]!r}")
        return self.follower.models[name]

    @contextmanager
    def alone(self, name: str, what: str) -> Iterator[None]:
        if name in self._under_way:
            raise Conflict(f"{self._under_way[name]} of {name!r} is under way")
        self._under_way[name] = what
        try:
            yield
        finally:
            del self._under_way[name]


def _follows(
    report: WorkerReport,
    model: FollowedModel,
    state: ReleaseState,
    holds: Callable[[ModelReport], bool],
) -> bool:
    of_model = report.models.get(model.residents.name)
    return of_model is not None and of_model.generation >= state.generation and holds(of_model)


class Overtaken(Conflict):
    """Another change was first."""


def overtaken(name: str, state: ReleaseState) -> Overtaken:
    return Overtaken(
        f"the release state of {name!r} was changed first: generation {state.generation}"
    )


def described(name: str, state: ReleaseState, verb: str, by: str) -> dict[str, object]:
    champion: Sequence[object] = () if state.champion is None else (state.champion.version,)
    return {
        "model": name,
        "verb": verb,
        "by": by,
        "generation": state.generation,
        "version": next(iter(champion), None),
    }


@contextmanager
def told() -> Iterator[None]:
    """What keeps a version from serving, as whoever asked for it is told."""
    try:
        yield
    except (InvalidModel, ConfigurationError) as exc:
        raise InvalidInput(f"version: {exc}", field="version") from exc
    except StateUnavailable as exc:
        raise ModelNotReady(f"the release state is not to be had: {exc}") from exc
    except RepositoryUnavailable as exc:
        raise ModelNotReady(f"the repository is not to be had: {exc}") from exc
