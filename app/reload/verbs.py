"""What an operator may ask for: load a version, roll back, unload."""

import asyncio
import hashlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from functools import partial

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
from app.release.state import (
    Chosen,
    ModelReport,
    Preparation,
    ReleaseState,
    ShadowState,
    StateUnavailable,
    WorkerReport,
)
from app.reload.follower import FollowedModel, Follower
from app.reload.residents import READ_WITHIN_S, VersionSource
from app.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

_PREPARED_WITHIN_S = 300.0
_SERVED_WITHIN_S = 10.0
_CONVERGED_WITHIN_S = 2.0
# Each worker starts a process.
_SHOWN_WITHIN_S = 15.0
_LOOK_EVERY_S = 0.05
_GIVE_UP_AGAIN_S = 1.0
MOST_CANDIDATES = 4
"""Of one model that are shown requests: each is a process of its own in every worker."""


class Outcome(msgspec.Struct, frozen=True):
    """What a verb has come to."""

    model: str
    version: str
    """Which serves now."""
    sha256: str
    generation: int
    changed: bool
    """False where it was so already."""
    shadows: tuple[ShadowState, ...]
    """The candidates that are shown requests."""
    converged: bool
    """Whether every worker serves it already; the others will within a second."""


class ReleaseVerbs:
    """Changes the release state, each change in one step that all workers follow.

    Every verb raises `NotFound` for a model that is not served, `Conflict` when something else is
    under way or has changed the state first, `InvalidInput` with the reason for a version that must
    not serve, and `ModelNotReady` while the state or the repository cannot be read. A `generation`
    makes it a change of that state only. `by` says who asked, for the log.
    """

    def __init__(self, follower: Follower, source: VersionSource, metrics: Metrics) -> None:
        self._follower = follower
        self._source = source
        self._metrics = metrics
        self._under_way: dict[str, str] = {}
        # A reference: the loop holds tasks only weakly (asyncio docs, create_task).
        self._giving_up: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        for task in self._giving_up:
            task.cancel()
        if self._giving_up:
            await asyncio.wait(self._giving_up)

    async def load(
        self, name: str, version: int | None = None, generation: int | None = None, *, by: str
    ) -> Outcome:
        """Have a version serve, CURRENT's where none is named: first every worker gets it ready,
        then all turn to it. The one before it stays ready."""
        model = self._model(name)
        began_s = time.monotonic()
        outcome = "failed"
        try:
            with self._alone(name, "a load"), _told():
                done = await self._load(model, version, generation, by)
            outcome = "loaded" if done.changed else "unchanged"
            return done
        except InvalidInput:
            outcome = "refused"
            raise
        except Conflict:
            outcome = "conflict"
            raise
        except ModelNotReady:
            outcome = "unavailable"
            raise
        finally:
            self._metrics.loads.labels(name, outcome).inc()
            self._metrics.load_duration.labels(name).observe(time.monotonic() - began_s)

    async def rollback(self, name: str, generation: int | None = None, *, by: str) -> Outcome:
        """Have the version serve that served before, which every worker keeps ready."""
        model = self._model(name)
        with _told():
            state = await self._state(model, generation)
            if state.previous is None:
                raise Conflict(f"model {name!r} has no earlier version to go back to")
            after = msgspec.structs.replace(
                state,
                generation=state.generation + 1,
                champion=state.previous,
                previous=None,
                preparing=None,
                shadows=_without(state.shadows, state.previous),
                decided=state.generation + 1,
            )
            await self._change(model, after, "rollback", by)
            return _outcome(model, after, converged=False)

    async def shadow(
        self,
        name: str,
        version: int,
        share: float | None = None,
        generation: int | None = None,
        *,
        by: str,
    ) -> Outcome:
        """Show a version a share of the requests from now on, by default model.yaml's; the champion
        goes on answering them. Of a version that is shown some already the share is changed."""
        model = self._model(name)
        with self._alone(name, "a shadow"), _told():
            state = await self._state(model, generation)
            chosen, after = await self._shown(model, state, version, share, by)

        def shows(report: ModelReport) -> bool:
            return report.candidates.get(chosen.sha256) == ""

        changed = after is not state
        within_s = _SHOWN_WITHIN_S if changed else 0
        converged = await self._converged(model, after, shows, within_s)
        return _outcome(model, after, changed=changed, converged=converged)

    async def unload(
        self, name: str, version: int, generation: int | None = None, *, by: str
    ) -> Outcome:
        """Free a version that is ready and does not serve, is being prepared or shown requests."""
        model = self._model(name)
        with _told():
            state = await self._state(model, generation)
            if state.champion is None:
                raise Conflict(f"no version of {name!r} serves yet: load one first")
            shadows = tuple(each for each in state.shadows if each.chosen.version != version)
            if state.champion.version == version and shadows == state.shadows:
                raise Conflict(f"version {version} of {name!r} serves: load another one first")
            after = msgspec.structs.replace(state, generation=state.generation + 1, shadows=shadows)
            if state.previous is not None and state.previous.version == version:
                after = msgspec.structs.replace(after, previous=None)
            if state.preparing is not None and state.preparing.chosen.version == version:
                after = msgspec.structs.replace(after, preparing=None)
            if msgspec.structs.replace(after, generation=state.generation) == state:
                return _outcome(model, state, changed=False)
            await self._change(model, after, "unload", by)
            return _outcome(model, after, converged=False)

    async def _shown(
        self,
        model: FollowedModel,
        state: ReleaseState,
        version: int,
        share: float | None,
        by: str,
    ) -> tuple[Chosen, ReleaseState]:
        """The candidate, and the state by which it is shown requests: the same one, where that is
        so already."""
        name, source = model.residents.name, self._source
        read = partial(source.repository.manifest, name, version)
        manifest = await source.calls.call(read, READ_WITHIN_S)
        chosen = Chosen(version, hashlib.sha256(manifest).hexdigest())
        if share is None:
            share = await model.candidates.usual_share()
        shown = {each.chosen: each for each in state.shadows}
        before = shown.get(chosen)
        if before is not None and before.share == share:
            return chosen, state
        if before is None and len(shown) >= MOST_CANDIDATES:
            raise Conflict(
                f"{len(shown)} versions of {name!r} are shown requests already: unload one"
            )
        generation = state.generation + 1
        shown[chosen] = ShadowState(chosen, share, generation if before is None else before.began)
        after = msgspec.structs.replace(state, generation=generation, shadows=tuple(shown.values()))
        async with AsyncExitStack() as stack:
            if before is None:
                await stack.enter_async_context(model.candidates.prepared(chosen))
            await self._change(model, after, "shadow", by)
        return chosen, after

    async def _load(
        self, model: FollowedModel, version: int | None, generation: int | None, by: str
    ) -> Outcome:
        name = model.residents.name
        state = await self._state(model, generation)
        await self._require_none_prepared(state)
        current = await self._current(name, version, state)
        if version is None and current is None:
            raise InvalidInput(f"{name}: CURRENT names no version", field="version")
        wanted = current.version if version is None and current is not None else version
        assert wanted is not None
        # The others will ask for room for themselves only, as some of them have opened it by then.
        resident = await model.residents.open(wanted, workers=self._source.opener.workers)
        with model.pinned(resident):
            is_new = model.residents.serving is not resident
            if not is_new and state.champion == resident.chosen and state.current == current:
                return _outcome(model, state, changed=False)
            preparing = Preparation(resident.chosen, self._follower.worker)
            async with self._ready_everywhere(model, state, preparing, is_new, by) as found:
                after = await self._take_over(model, found, preparing, current, by)
        return _outcome(model, after, converged=await self._converged(model, after))

    async def _current(self, name: str, version: int | None, state: ReleaseState) -> Chosen | None:
        """What CURRENT names. Where that is no number, and a version is asked for, it is what
        it named before: whatever it names once it is put right is a newer word."""
        try:
            return await self._source.current(name)
        except InvalidModel:
            if version is None:
                raise
            return state.current

    @asynccontextmanager
    async def _ready_everywhere(
        self,
        model: FollowedModel,
        state: ReleaseState,
        preparing: Preparation,
        is_new: bool,
        by: str,
    ) -> AsyncIterator[ReleaseState]:
        """The state in which every worker that lives has the version ready. When the block does not
        end well, nobody need prepare it any more."""
        if not is_new or len(await self._follower.settled_workers()) < 2:
            yield state
            return
        prepared = msgspec.structs.replace(
            state, generation=state.generation + 1, preparing=preparing
        )
        try:
            await self._decide(model, prepared, "prepare", by)
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
                if await self._follower.change(model.residents.name, after):
                    return
                await self._follower.exchange()
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
        found = [report.models.get(name) for report in await self._follower.settled_workers()]
        if model.state.preparing != preparing:
            raise _overtaken(name, model.state)
        # What another one tells yet is of an earlier attempt.
        done = [
            each for each in found if each is not None and each.generation >= prepared.generation
        ]
        for report in done:
            if sha256 in report.failed:
                raise InvalidModel(f"one of the workers: {report.failed[sha256]}")
        return len(done) == len(found)

    async def _take_over(
        self,
        model: FollowedModel,
        state: ReleaseState,
        preparing: Preparation,
        current: Chosen | None,
        by: str,
    ) -> ReleaseState:
        """The state by which it serves. A change that leaves what is prepared as it is, an unload,
        may be first."""
        while True:
            before = state.champion
            after = ReleaseState(
                state.generation + 1,
                champion=preparing.chosen,
                previous=state.previous if before == preparing.chosen else before,
                current=current,
                shadows=_without(state.shadows, preparing.chosen),
                decided=state.generation + 1,
            )
            try:
                await self._change(model, after, "load", by)
            except Conflict:
                if model.state.preparing != preparing:
                    raise
                state = model.state
            else:
                return after

    async def _converged(
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
                reports = await self._follower.workers()
            except StateUnavailable:
                return False  # what was asked for is done, whatever is not known now
            if all(_follows(report, model, state, holds) for report in reports):
                return True
            if time.monotonic() >= until_s:
                return False
            await asyncio.sleep(_LOOK_EVERY_S)

    async def _change(self, model: FollowedModel, after: ReleaseState, verb: str, by: str) -> None:
        """This worker serves what the state says when it returns, unless that takes long."""
        await self._decide(model, after, verb, by)
        try:
            async with asyncio.timeout(_SERVED_WITHIN_S):
                await model.served(after.generation)
        except TimeoutError as exc:
            name = model.residents.name
            raise ModelNotReady(f"{name}: decided, and not yet done in this worker") from exc

    async def _decide(self, model: FollowedModel, after: ReleaseState, verb: str, by: str) -> None:
        """Raises `Conflict` where another change was first."""
        name = model.residents.name
        if not await self._follower.change(name, after):
            await self._follower.exchange()
            raise _overtaken(name, model.state)
        log.info("the release state was changed", extra=_described(name, after, verb, by))

    async def _state(self, model: FollowedModel, generation: int | None) -> ReleaseState:
        """What all have agreed on, just now."""
        await self._follower.exchange()
        state = model.state
        if generation is not None and generation != state.generation:
            raise Conflict(
                f"the release state of {model.residents.name!r} is of generation "
                f"{state.generation}, not {generation}"
            )
        return state

    async def _require_none_prepared(self, state: ReleaseState) -> None:
        if state.preparing is None or state.preparing.worker == self._follower.worker:
            return
        if state.preparing.worker in {
            each.worker for each in await self._follower.settled_workers()
        }:
            raise Conflict(
                f"version {state.preparing.chosen.version} is being loaded by another worker"
            )

    def _model(self, name: str) -> FollowedModel:
        if name not in self._follower.models:
            raise NotFound(f"no model is named {name[:64]!r}")
        return self._follower.models[name]

    @contextmanager
    def _alone(self, name: str, what: str) -> Iterator[None]:
        if name in self._under_way:
            raise Conflict(f"{self._under_way[name]} of {name!r} is under way")
        self._under_way[name] = what
        try:
            yield
        finally:
            del self._under_way[name]


@contextmanager
def _told() -> Iterator[None]:
    """What keeps a version from serving, as whoever asked for it is told."""
    try:
        yield
    except (InvalidModel, ConfigurationError) as exc:
        raise InvalidInput(f"version: {exc}", field="version") from exc
    except StateUnavailable as exc:
        raise ModelNotReady(f"the release state is not to be had: {exc}") from exc
    except RepositoryUnavailable as exc:
        raise ModelNotReady(f"the repository is not to be had: {exc}") from exc


def _outcome(
    model: FollowedModel, state: ReleaseState, *, changed: bool = True, converged: bool = True
) -> Outcome:
    """What a verb has come to by the state that it has made or found."""
    champion = state.champion
    assert champion is not None  # a model that is followed serves
    return Outcome(
        model.residents.name,
        str(champion.version),
        champion.sha256,
        state.generation,
        changed,
        state.shadows,
        converged,
    )


def _follows(
    report: WorkerReport,
    model: FollowedModel,
    state: ReleaseState,
    holds: Callable[[ModelReport], bool],
) -> bool:
    of_model = report.models.get(model.residents.name)
    return of_model is not None and of_model.generation >= state.generation and holds(of_model)


def _without(shadows: Sequence[ShadowState], champion: Chosen) -> tuple[ShadowState, ...]:
    """Who serves from now on is a candidate no more."""
    return tuple(shadow for shadow in shadows if shadow.chosen != champion)


def _overtaken(name: str, state: ReleaseState) -> Conflict:
    return Conflict(
        f"the release state of {name!r} was changed first: generation {state.generation}"
    )


def _described(name: str, state: ReleaseState, verb: str, by: str) -> dict[str, object]:
    champion: Sequence[object] = () if state.champion is None else (state.champion.version,)
    return {
        "model": name,
        "verb": verb,
        "by": by,
        "generation": state.generation,
        "version": next(iter(champion), None),
    }
