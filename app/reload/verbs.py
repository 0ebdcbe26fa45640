"""What an operator may ask for: load a version, roll back, unload."""

import hashlib
import logging
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from functools import partial

import msgspec

from app.errors import (
    Conflict,
    InvalidInput,
    InvalidModel,
    ModelNotReady,
)
from app.release.state import (
    Chosen,
    ModelReport,
    Preparation,
    Quarantined,
    ReleaseState,
    ShadowState,
)
from app.reload.changes import Changes, Overtaken, told
from app.reload.follower import FollowedModel
from app.reload.residents import READ_WITHIN_S, VersionSource
from app.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

# Who asks for a rollback so long after another one has not seen that one.
_AGAIN_S = 60.0
# Each worker starts a process.
_SHOWN_WITHIN_S = 15.0
MOST_QUARANTINED = 64
"""Of one model; the one that was rolled back first is forgotten for another one."""
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
    share: float | None
    """Of the routing keys that the version under release answers; None where none is."""
    converged: bool
    """Whether every worker serves it already; the others will within a second."""


class ReleaseVerbs:
    """Changes the release state, each change in one step that all workers follow.

    Every verb raises `NotFound` for a model that is not served, `Conflict` when something else is
    under way or has changed the state first, `InvalidInput` with the reason for a version that must
    not serve, and `ModelNotReady` while the state or the repository cannot be read. A `generation`
    makes it a change of that state only. `by` says who asked, for the log.
    """

    def __init__(self, changes: Changes, source: VersionSource, metrics: Metrics) -> None:
        self._changes = changes
        self._source = source
        self._metrics = metrics

    async def load(
        self,
        name: str,
        version: int | None = None,
        generation: int | None = None,
        *,
        by: str,
        despite_quarantine: bool = False,
    ) -> Outcome:
        """Have a version serve, CURRENT's where none is named: first every worker gets it ready,
        then all turn to it. The one before it stays ready. A version that a release was rolled back
        of is loaded only `despite_quarantine`, and none while a release is under way."""
        model = self._changes.model(name)
        began_s = time.monotonic()
        outcome = "failed"
        try:
            with self._changes.alone(name, "a load"), told():
                done = await self._load(model, version, generation, by, despite_quarantine)
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

    async def rollback(
        self,
        name: str,
        generation: int | None = None,
        *,
        by: str,
        version: int | None = None,
        quarantine: bool = True,
    ) -> Outcome:
        """Have the version serve that served before, which every worker keeps ready. While another
        one is released, that is the one which it was to replace, and the new one is quarantined,
        unless that is not wanted.

        `version` is the one that is to go: `Conflict` where it is neither released nor serves. It
        must be named within a minute after another rollback: who asks twice means one. Where
        another change is first that leaves this version, and no `generation` was named, it is done
        on top of that one.
        """
        model = self._changes.model(name)
        with told():
            reason = f"by {by}" if quarantine else None
            state = await self._changes.state(model, generation)
            goes = _goes(name, state)
            while True:
                after = _without_latest(name, state, version, reason)
                try:
                    await self._changes.change(model, after, "rollback", by)
                    return outcome_of(model, after, converged=False)
                except Overtaken:
                    state = model.state
                    if generation is not None or _goes(name, state) != goes:
                        raise

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
        model = self._changes.model(name)
        with self._changes.alone(name, "a shadow"), told():
            state = await self._changes.state(model, generation)
            chosen, after = await self._shown(model, state, version, share, by)

        def shows(report: ModelReport) -> bool:
            return report.candidates.get(chosen.sha256) == ""

        changed = after is not state
        within_s = _SHOWN_WITHIN_S if changed else 0
        converged = await self._changes.converged(model, after, shows, within_s)
        return outcome_of(model, after, changed=changed, converged=converged)

    async def unload(
        self, name: str, version: int, generation: int | None = None, *, by: str
    ) -> Outcome:
        """Free a version that is ready and does not serve, is being prepared or shown requests."""
        model = self._changes.model(name)
        with told():
            state = await self._changes.state(model, generation)
            if state.champion is None:
                raise Conflict(f"no version of {name!r} serves yet: load one first")
            if state.rollout is not None and version in {
                state.rollout.candidate.version,
                state.rollout.against.version,
            }:
                raise Conflict(f"version {version} of {name!r} is part of a release: roll it back")
            shadows = tuple(each for each in state.shadows if each.chosen.version != version)
            if state.champion.version == version and shadows == state.shadows:
                raise Conflict(f"version {version} of {name!r} serves: load another one first")
            after = msgspec.structs.replace(state, generation=state.generation + 1, shadows=shadows)
            if state.previous is not None and state.previous.version == version:
                after = msgspec.structs.replace(after, previous=None)
            if state.preparing is not None and state.preparing.chosen.version == version:
                after = msgspec.structs.replace(after, preparing=None)
            if msgspec.structs.replace(after, generation=state.generation) == state:
                return outcome_of(model, state, changed=False)
            await self._changes.change(model, after, "unload", by)
            return outcome_of(model, after, converged=False)

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
        name = model.residents.name
        chosen = await self._named(name, version)
        if share is None:
            share = (await model.candidates.contract()).shadow.share
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
            await self._changes.change(model, after, "shadow", by)
        return chosen, after

    async def _load(
        self,
        model: FollowedModel,
        version: int | None,
        generation: int | None,
        by: str,
        despite_quarantine: bool,
    ) -> Outcome:
        name = model.residents.name
        state = await self._changes.state(model, generation)
        require_no_rollout(name, state)
        await self._changes.require_none_prepared(state)
        current = await self._current(name, version, state)
        if version is None and current is None:
            raise InvalidInput(f"{name}: CURRENT names no version", field="version")
        wanted = current.version if version is None and current is not None else version
        assert wanted is not None
        if state.quarantined and not despite_quarantine:
            require_no_quarantine(state, await self._named(name, wanted))
        # The others will ask for room for themselves only, as some of them have opened it by then.
        resident = await model.residents.open(wanted, workers=self._source.opener.workers)
        with model.pinned(resident):
            is_new = model.residents.serving is not resident
            if not is_new and state.champion == resident.chosen and state.current == current:
                return outcome_of(model, state, changed=False)
            preparing = Preparation(resident.chosen, self._changes.follower.worker)
            async with self._changes.ready_everywhere(model, state, preparing, is_new, by) as found:
                after = await self._take_over(model, found, preparing, current, by)
        return outcome_of(model, after, converged=await self._changes.converged(model, after))

    async def _named(self, name: str, version: int) -> Chosen:
        """By its manifest as it is now; nothing is opened."""
        read = partial(self._source.repository.manifest, name, version)
        manifest = await self._source.calls.call(read, READ_WITHIN_S)
        return Chosen(version, hashlib.sha256(manifest).hexdigest())

    async def _current(self, name: str, version: int | None, state: ReleaseState) -> Chosen | None:
        """What CURRENT names. Where that is no number, and a version is asked for, it is what
        it named before: whatever it names once it is put right is a newer word."""
        try:
            return await self._source.current(name)
        except InvalidModel:
            if version is None:
                raise
            return state.current

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
            require_no_rollout(model.residents.name, state)
            before = state.champion
            after = ReleaseState(
                state.generation + 1,
                champion=preparing.chosen,
                previous=state.previous if before == preparing.chosen else before,
                current=current,
                shadows=_without(state.shadows, preparing.chosen),
                quarantined=without_quarantine(state, preparing.chosen),
                decided=state.generation + 1,
            )
            try:
                await self._changes.change(model, after, "load", by)
            except Conflict:
                if model.state.preparing != preparing:
                    raise
                state = model.state
            else:
                return after


def outcome_of(
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
        None if state.rollout is None else state.rollout.stages[-1].stage.share,
        converged,
    )


def rolled_back(state: ReleaseState, reason: str | None, now_s: float) -> ReleaseState:
    """The state after it: the version under release answers nobody, and does not come back by
    itself where there is a reason. `now_s`: seconds since 1970."""
    rollout = state.rollout
    assert rollout is not None
    quarantined = state.quarantined
    if reason is not None:
        bad = Quarantined(rollout.candidate, reason, now_s)
        quarantined = (*without_quarantine(state, rollout.candidate), bad)[-MOST_QUARANTINED:]
    generation = state.generation + 1
    after = msgspec.structs.replace(
        state,
        generation=generation,
        preparing=None,
        previous=None if state.previous == rollout.candidate else state.previous,
        shadows=_without(state.shadows, rollout.candidate),
        rollout=None,
        quarantined=quarantined,
    )
    if state.champion != rollout.candidate:
        return after
    return msgspec.structs.replace(
        after, champion=rollout.against, previous=None, decided=generation
    )


def _without_latest(
    name: str, state: ReleaseState, version: int | None, reason: str | None
) -> ReleaseState:
    """The state after a rollback of what goes, to be quarantined where there is a reason."""
    goes = _goes(name, state)
    if version is not None and version != goes.version:
        raise Conflict(f"version {version} of {name!r} does not serve: it is gone already")
    if state.rollout is not None:
        return rolled_back(state, reason, time.time())
    if version is None:
        _require_no_rollback(state, time.time())
    return _back(name, state)


def _goes(name: str, state: ReleaseState) -> Chosen:
    """The version that a rollback takes away."""
    if state.rollout is not None:
        return state.rollout.candidate
    if state.champion is None:
        raise Conflict(f"no version of {name!r} serves yet: load one first")
    return state.champion


def _back(name: str, state: ReleaseState) -> ReleaseState:
    """The state in which the version before serves."""
    if state.previous is None:
        raise Conflict(f"model {name!r} has no earlier version to go back to")
    require_no_quarantine(state, state.previous)
    generation = state.generation + 1
    return msgspec.structs.replace(
        state,
        generation=generation,
        champion=state.previous,
        previous=None,
        preparing=None,
        shadows=_without(state.shadows, state.previous),
        decided=generation,
    )


def _require_no_rollback(state: ReleaseState, now_s: float) -> None:
    for each in state.quarantined[-1:]:
        if now_s - each.at_s < _AGAIN_S:
            raise Conflict(
                f"version {each.chosen.version} was rolled back just now: to have the champion go, "
                "too, name its `version`"
            )


def require_no_rollout(name: str, state: ReleaseState) -> None:
    """Raises `Conflict` while a release is under way."""
    if state.rollout is not None:
        version = state.rollout.candidate.version
        raise Conflict(f"version {version} of {name!r} is being released: roll it back first")


def require_no_quarantine(state: ReleaseState, chosen: Chosen) -> None:
    """Raises `Conflict` for a version that was rolled back."""
    for each in state.quarantined:
        if each.chosen.sha256 == chosen.sha256:
            raise Conflict(
                f"version {chosen.version} was rolled back ({each.reason}): it comes back only "
                "with `despite_quarantine`"
            )


def without_quarantine(state: ReleaseState, chosen: Chosen) -> tuple[Quarantined, ...]:
    """Of the others."""
    return tuple(each for each in state.quarantined if each.chosen.sha256 != chosen.sha256)


def _without(shadows: Sequence[ShadowState], champion: Chosen) -> tuple[ShadowState, ...]:
    """Who serves from now on is a candidate no more."""
    return tuple(shadow for shadow in shadows if shadow.chosen != champion)
