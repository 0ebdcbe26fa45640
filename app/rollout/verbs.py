"""What an operator may ask of a release: start, pause, resume, promote. A rollback is a verb of its
own, with and without one (app/reload/verbs.py)."""

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import Literal

import msgspec

from app.contract import Contract
from app.errors import Conflict, InvalidInput
from app.evidence.feasibility import Need, Traffic, needs
from app.evidence.plan import Pace, Plan
from app.release.state import Chosen, Preparation, ReleaseState, Rollout, WorkerReport
from app.reload.changes import Changes, Overtaken, overtaken, told
from app.reload.follower import FollowedModel
from app.reload.residents import READ_WITHIN_S, VersionSource
from app.reload.verbs import (
    MOST_CANDIDATES,
    Outcome,
    outcome_of,
    require_no_quarantine,
    require_no_rollout,
)
from app.rollout.observed import Observations
from app.rollout.plan import plan_of, watch_s_of
from app.rollout.stages import (
    advanced,
    ended,
    next_share,
    paused,
    resumed,
    started,
    taken_over,
)


class Started(msgspec.Struct, frozen=True):
    """What a start has come to."""

    outcome: Outcome
    needs: Sequence[Need]
    """Of each stage."""


class RolloutVerbs:
    """Changes the release under way, each change in one step that all workers follow.

    Every verb raises `NotFound`, `Conflict`, `InvalidInput` and `ModelNotReady` as those of
    `ReleaseVerbs` do.
    """

    def __init__(
        self,
        changes: Changes,
        source: VersionSource,
        observations: Observations,
        *,
        keeps_labels: bool,
        replays: bool,
    ) -> None:
        """`keeps_labels`: whether predictions are kept until their labels come. `replays`: feature
        time is as fast as somebody likes."""
        self._changes = changes
        self._source = source
        self._observations = observations
        self._keeps_labels = keeps_labels
        self._replays = replays

    async def start(
        self,
        name: str,
        version: int,
        per_s: float | None = None,
        generation: int | None = None,
        *,
        by: str,
        despite_quarantine: bool = False,
    ) -> Started:
        """Release a version by the plan of model.yaml: from now on it is shown requests.

        `per_s` are the requests that are expected, by default those of the last half minute. Raises
        `InvalidInput` for a plan that could not finish with so many.
        """
        model = self._changes.model(name)
        with self._changes.alone(name, "a release"), told():
            state = await self._changes.state(model, generation)
            require_no_rollout(name, state)
            await self._changes.require_none_prepared(state)
            chosen = await self._chosen(name, version)
            if state.champion is None or state.champion == chosen:
                raise Conflict(f"version {version} of {name!r} serves already")
            if not despite_quarantine:
                require_no_quarantine(state, chosen)
            if len([each for each in state.shadows if each.chosen != chosen]) >= MOST_CANDIDATES:
                raise Conflict(f"{MOST_CANDIDATES} versions are shown requests: unload one")
            contract = await model.candidates.contract()
            if contract.labels is not None and not self._keeps_labels:
                raise InvalidInput(
                    "release: model.yaml has `labels`, and they are kept in the state Redis only: "
                    "set STATE_REDIS_URL",
                    field="release",
                )
            rollout = _rollout(contract, chosen, state.champion, by)
            traffic = await self._traffic(model, contract, per_s)
            needed = _feasible(rollout.plan, traffic)
            rollout = msgspec.structs.replace(rollout, per_s=traffic.per_s)
            after = started(state, rollout, contract.shadow.share, time.time())
            async with AsyncExitStack() as stack:
                if chosen not in [each.chosen for each in state.shadows]:
                    await stack.enter_async_context(model.candidates.prepared(chosen))
                await self._changes.change(model, after, "release", by)
            return Started(outcome_of(model, after, converged=False), needed)

    async def pause(self, name: str, generation: int | None = None, *, by: str) -> Outcome:
        """No stage is promoted until it is resumed; the candidate answers whom it answered, and is
        rolled back where there is evidence."""
        return await self._changed(name, generation, "pause", by, lambda rollout: rollout.paused)

    async def resume(self, name: str, generation: int | None = None, *, by: str) -> Outcome:
        """The end of a pause."""
        return await self._changed(
            name, generation, "resume", by, lambda rollout: not rollout.paused
        )

    async def _changed(
        self,
        name: str,
        generation: int | None,
        verb: Literal["pause", "resume"],
        by: str,
        is_so: Callable[[Rollout], object],
    ) -> Outcome:
        model = self._changes.model(name)
        with told():
            state = await self._changes.state(model, generation)
            candidate = _under_way(name, state).candidate
            while not is_so(_under_way(name, state)):
                now_s = time.time()
                after = paused(state, by, now_s) if verb == "pause" else resumed(state, now_s)
                try:
                    await self._changes.change(model, after, verb, by)
                    return outcome_of(model, after, converged=False)
                except Overtaken:
                    state = model.state
                    if generation is not None or _under_way(name, state).candidate != candidate:
                        raise
            return outcome_of(model, state, changed=False)

    async def promote(
        self, name: str, share: float | None = None, generation: int | None = None, *, by: str
    ) -> Outcome:
        """On to the next stage, or to the share, whatever the evidence says: at 1 the candidate is
        the champion. Of one that is watched it is the end of the watch."""
        model = self._changes.model(name)
        with self._changes.alone(name, "a promotion"), told():
            state = await self._changes.state(model, generation)
            rollout = _under_way(name, state)
            if rollout.is_watched:
                if share not in {None, 1}:
                    raise Conflict(f"version {rollout.candidate.version} is the champion already")
                after = ended(state)
                await self._changes.change(model, after, "promote", by)
                return outcome_of(model, after, converged=False)
            before = rollout.stages[-1].stage.share
            following = next_share(rollout.plan, before) if share is None else share
            if following <= before:
                raise Conflict(f"version {rollout.candidate.version} answers {before:.0%} already")
            await self._changes.require_none_prepared(state)
            candidate = rollout.candidate
            resident = model.residents.find(candidate) or await model.residents.open(
                candidate.version, candidate.sha256, workers=self._source.opener.workers
            )
            preparing = Preparation(candidate, self._changes.follower.worker)
            is_new = not before
            with model.pinned(resident):
                ready = self._changes.ready_everywhere(model, state, preparing, is_new, by)
                async with ready as found:
                    if found.rollout != rollout:
                        raise overtaken(name, found)
                    pace = await self._observations.pace(name, rollout)
                    return await self.on_to(model, found, following, pace, by)

    async def on_to(
        self, model: FollowedModel, state: ReleaseState, share: float, pace: Pace | None, by: str
    ) -> Outcome:
        """The stage of this share, by a change of this very state: every worker has the candidate
        open."""
        rollout = _under_way(model.residents.name, state)
        reports = await self._changes.follower.settled_workers()
        measured = measured_per_s(model.residents.name, reports)
        traffic = Traffic(max(measured, rollout.per_s), len(reports))
        if share < 1:
            after = advanced(state, share, pace, traffic, time.time())
        else:
            after = taken_over(state, pace, traffic, time.time())
        await self._changes.change(model, after, "promote", by)
        return outcome_of(model, after, converged=await self._changes.converged(model, after))

    async def prepare(self, model: FollowedModel, state: ReleaseState, by: str) -> None:
        """Every worker is to open the candidate, so that it can answer: by a change of this very
        state, which says so until the candidate goes on."""
        rollout = _under_way(model.residents.name, state)
        after = msgspec.structs.replace(
            state,
            generation=state.generation + 1,
            preparing=Preparation(rollout.candidate, self._changes.follower.worker),
        )
        await self._changes.decide(model, after, "prepare", by)

    async def _chosen(self, name: str, version: int) -> Chosen:
        read = partial(self._source.repository.manifest, name, version)
        manifest = await self._source.calls.call(read, READ_WITHIN_S)
        return Chosen(version, hashlib.sha256(manifest).hexdigest())

    async def _traffic(
        self, model: FollowedModel, contract: Contract, per_s: float | None
    ) -> Traffic:
        """What is expected, else what was asked lately."""
        reports = await self._changes.follower.settled_workers()
        if per_s is None:
            per_s = measured_per_s(model.residents.name, reports)
        rows = min(contract.shadow.block_rows, 1 + per_s / len(reports) * _held_s(contract))
        traffic = Traffic(per_s, len(reports), rows, shown=contract.shadow.share)
        labels = contract.labels
        if labels is None:
            return traffic
        return msgspec.structs.replace(
            traffic,
            labelled=labels.share,
            labels_after_s=0.0 if self._replays else labels.horizon.after_s,
        )


def measured_per_s(name: str, reports: Sequence[WorkerReport]) -> float:
    """Requests that all workers were asked of the model lately."""
    return sum(report.models[name].per_s for report in reports if name in report.models)


def _held_s(contract: Contract) -> float:
    """So long rows are gathered for an execution of a candidate that is shown them."""
    return contract.shadow.hold_ms / 1000


def _rollout(contract: Contract, candidate: Chosen, against: Chosen, by: str) -> Rollout:
    release = contract.release
    return Rollout(
        candidate,
        against,
        plan_of(contract),
        release.hold_out,
        release.control,
        watch_s_of(release),
        release.slow_factor,
        0.0,
        0,
        by,
        (),
        routing_key=contract.routing_key,
    )


def _under_way(name: str, state: ReleaseState) -> Rollout:
    if state.rollout is None:
        raise Conflict(f"no version of {name!r} is being released")
    return state.rollout


def _feasible(plan: Plan, traffic: Traffic) -> Sequence[Need]:
    """Raises `InvalidInput` naming the stage that cannot finish, and what would change it."""
    if traffic.per_s <= 0:
        raise InvalidInput(
            "expected_per_s: no requests came lately: say how many are expected",
            field="expected_per_s",
        )
    needed = needs(plan, traffic)
    for need in needed:
        if need.seconds > plan.most_s:
            how_many = "more requests than there are"
            if math.isfinite(need.requests):
                how_many = f"some {need.requests:,.0f} requests"
            raise InvalidInput(
                f"release: the stage of {need.share:.0%} needs {how_many} "
                f"(for `{need.because_of}`), which at {traffic.per_s:,.3g} a second takes longer "
                f"than most_hours ({plan.most_s / 3600:g}): widen that margin, or allow more time",
                field="release",
            )
    return needed
