"""Looks at every release under way and does what the evidence says."""

import asyncio
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Self

import msgspec

from app.errors import Conflict, HikyakuError
from app.events.event import Event, Events, EventType
from app.evidence.counts import WHOLE, Counts
from app.evidence.feasibility import Traffic
from app.evidence.plan import Pace, Plan
from app.evidence.verdict import Verdict, judge
from app.release.state import Chosen, ReleaseState, Rollout, StateUnavailable, WorkerReport
from app.reload.changes import Changes
from app.reload.follower import FollowedModel
from app.reload.verbs import rolled_back
from app.rollout.decision_log import Decision, DecisionLog
from app.rollout.observed import Observations
from app.rollout.stages import ended as watch_ended
from app.rollout.stages import next_share, watched_anew
from app.rollout.verbs import RolloutVerbs, measured_per_s
from app.tasks import ended
from app.telemetry.instruments import Level
from app.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 1.0
_LOG_EVERY_S = 60.0
_BY = "evidence"
_SETTLED_S = 60.0
_AGAIN_S = 60.0
_WATCHED_S = 600.0
_WATCHED_EXPOSURES = 10_000_000
_FOR_EVER_S = 1e18


@dataclass(frozen=True, slots=True)
class Judged:
    """A verdict, and all that it follows from."""

    plan: Plan
    counts: Counts
    pace: Pace | None
    """See `Observed`."""
    verdict: Verdict


class Decider:
    """One worker decides at a time: the first, by their names, of those that live and route by the
    release. The words by which they are known to live expire, so that another one takes over; two
    that take themselves for the first change the state by compare-and-set, on the same counts.

    An async context manager: it decides until it is left.
    """

    def __init__(
        self,
        changes: Changes,
        verbs: RolloutVerbs,
        observations: Observations,
        decision_log: DecisionLog,
        events: Events,
        metrics: Metrics,
    ) -> None:
        self._changes = changes
        self._verbs = verbs
        self._observations = observations
        self._decision_log = decision_log
        self._events = events
        self._metrics = metrics
        self._warned: dict[str, frozenset[str]] = {}
        """Of each model what was told last of what keeps it back."""
        self._told: dict[str, tuple[object, float]] = {}
        """Of each model what was logged last, and when, monotonic."""
        self._shown: dict[str, set[Level]] = {}
        """Of each model the gauges that are told."""
        self._fault: dict[str, str] = {}
        self._since_s: dict[str, float] = {}
        """Of each model, since when this worker looks at its release, monotonic."""
        self._again_s: dict[str, float] = {}
        """Of each model, before which instant workers are not asked once more to have the candidate
        ready."""
        self._looking: dict[str, asyncio.Task[None]] = {}
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """What ends workers is rolled back before this one answers anybody."""
        for model in self._changes.follower.models.values():
            if _is_deadly(model):
                await self._look(model)
        self._task = asyncio.create_task(self._decide_often(), name="decide")
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._task is not None:
            await ended(self._task)
        for look in tuple(self._looking.values()):
            await ended(look)

    async def verdict(self, model: FollowedModel, state: ReleaseState) -> Judged:
        """Of the release under way by this state, and by what is stored now; nothing is done.
        Raises `StateUnavailable`."""
        reports = await self._changes.follower.settled_workers()
        return await self._judged(model, state, reports, is_settled=True)

    async def _decide_often(self) -> None:
        """Each model by itself: none waits for what is done about another one."""
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            for name, model in self._changes.follower.models.items():
                if name not in self._looking:
                    look = asyncio.create_task(self._look(model), name="look at a release")
                    self._looking[name] = look
                    look.add_done_callback(partial(self._looked, name))

    def _looked(self, name: str, _: "asyncio.Task[None]") -> None:
        del self._looking[name]

    async def _look(self, model: FollowedModel) -> None:
        name = model.residents.name
        if model.state.rollout is None:
            self._forget(name)
            return
        try:
            await self._decide(model)
        except (StateUnavailable, Conflict) as exc:
            self._tell_fault(name, str(exc))
        except HikyakuError as exc:
            log.error("a release is not decided now", extra={"model": name}, exc_info=exc)
        except Exception:  # a defect: it must not end what follows
            log.exception("a release could not be decided", extra={"model": name})
        else:
            self._tell_fault(name, "")

    async def _decide(self, model: FollowedModel) -> None:
        name, follower = model.residents.name, self._changes.follower
        if _is_deadly(model):  # whoever decides may not live for as long as that takes
            reports: Sequence[WorkerReport] = [follower.report()]
        else:
            reports = await follower.settled_workers()
            if _decides(name, reports) != follower.worker:
                self._forget(name)
                return
        state = model.state
        rollout = state.rollout
        if rollout is None:
            self._forget(name)
            return
        since_s = self._since_s.setdefault(name, time.monotonic())
        is_settled = time.monotonic() - since_s >= _SETTLED_S
        judged = await self._judged(model, state, reports, is_settled)
        verdict = judged.verdict
        self._measure(name, rollout, verdict)
        if verdict.action == "rollback":
            await self._roll_back(model, state, judged)
        elif rollout.is_watched:
            await self._watch(model, state, judged, reports)
        elif _is_untimed(rollout) and judged.pace is not None:
            await self._time_anew(model, state, judged)
        elif verdict.action == "promote":
            await self._promote(model, state, judged, reports)
        else:
            await self._log(model, state, judged, "")
        self._warn(name, rollout, state.generation, verdict)

    async def _roll_back(self, model: FollowedModel, state: ReleaseState, judged: Judged) -> None:
        """First of all it answers nobody any more."""
        verdict = judged.verdict
        reason = verdict.reasons[0] if verdict.quarantines else None
        await self._changes.change(model, rolled_back(state, reason, time.time()), "rollback", _BY)
        await self._log(model, state, judged, "rolled back")

    def _warn(self, name: str, rollout: Rollout, generation: int, verdict: Verdict) -> None:
        """Others are told once of a guardrail under suspicion, and of a stage whose time is up."""
        candidate = rollout.candidate
        found: dict[str, EventType] = {
            f"{reading.guardrail} {reading.segment}".strip(): "guardrail.suspected"
            for reading in verdict.readings
            if reading.decides and reading.worse >= reading.promotes_at
        }
        last = rollout.stages[-1]
        if verdict.action == "hold" and time.time() - last.began_s >= rollout.plan.most_s:
            found["its time is up"] = "release.held"
        for reason in found.keys() - self._warned.get(name, frozenset()):
            self._events.tell(
                Event(
                    found[reason],
                    name,
                    candidate.version,
                    candidate.sha256,
                    generation,
                    _BY,
                    (reason, *verdict.reasons),
                )
            )
        self._warned[name] = frozenset(found)

    async def _judged(
        self,
        model: FollowedModel,
        state: ReleaseState,
        reports: Sequence[WorkerReport],
        is_settled: bool,
    ) -> Judged:
        rollout = state.rollout
        assert rollout is not None
        observed = await self._observations.observe(model.residents.name, state, reports)
        plan, counts = _plan(rollout, is_settled), observed.counts
        verdict = await asyncio.to_thread(judge, plan, counts)
        return Judged(plan, counts, observed.pace, verdict)

    async def _promote(
        self,
        model: FollowedModel,
        state: ReleaseState,
        judged: Judged,
        reports: Sequence[WorkerReport],
    ) -> None:
        """Once every worker has it ready, which the first such verdict asks them to; it is judged
        anew meanwhile, every second."""
        rollout = state.rollout
        assert rollout is not None
        name, candidate = model.residents.name, rollout.candidate
        if not rollout.stages[-1].stage.share and not _is_ready(name, candidate, reports):
            await self._have_it_ready(model, state, reports)
            return
        share = next_share(rollout.plan, rollout.stages[-1].stage.share)
        await self._verbs.on_to(model, state, share, judged.pace, _BY)
        await self._log(model, state, judged, f"on to {share:.0%}")

    async def _time_anew(self, model: FollowedModel, state: ReleaseState, judged: Judged) -> None:
        """A stage that an operator began too early to know which answers are slow begins again."""
        assert state.rollout is not None
        share = state.rollout.stages[-1].stage.share
        await self._verbs.on_to(model, state, share, judged.pace, _BY)
        await self._log(model, state, judged, f"{share:.0%} begins again: slow answers are known")

    async def _have_it_ready(
        self, model: FollowedModel, state: ReleaseState, reports: Sequence[WorkerReport]
    ) -> None:
        """Where that fails it is tried again a while later."""
        name, preparing = model.residents.name, state.preparing
        assert state.rollout is not None
        now_s = time.monotonic()
        workers = {report.worker for report in reports}
        if preparing is None or preparing.worker not in workers:
            if now_s >= self._again_s.get(name, 0.0):
                await self._verbs.prepare(model, state, _BY)
            return
        failed = _failures(name, state.rollout.candidate, reports)
        if failed:
            self._again_s[name] = now_s + _AGAIN_S
            self._tell_fault(name, f"it cannot be opened: {failed[0]}")
            after = msgspec.structs.replace(state, generation=state.generation + 1, preparing=None)
            await self._changes.decide(model, after, "give up", _BY)

    async def _watch(
        self,
        model: FollowedModel,
        state: ReleaseState,
        judged: Judged,
        reports: Sequence[WorkerReport],
    ) -> None:
        """The candidate is the champion. The test begins again now and then where nothing speaks
        against it, so that harm which comes late is not outweighed by what was before."""
        rollout = state.rollout
        assert rollout is not None
        assert rollout.watched_since_s is not None
        last = judged.counts.stages[-1]
        if time.time() - rollout.watched_since_s >= rollout.watch_s:
            await self._changes.change(model, watch_ended(state), "watched", _BY)
            await self._log(model, state, judged, "watched to the end")
        elif last.seconds >= _WATCHED_S and all(
            reading.worse <= 0 for reading in judged.verdict.readings
        ):
            per_s = max(measured_per_s(model.residents.name, reports), rollout.per_s)
            after = watched_anew(state, Traffic(per_s, len(reports)), time.time())
            await self._changes.change(model, after, "watch", _BY)
            await self._log(model, state, judged, "watched anew")
        else:
            await self._log(model, state, judged, "")

    async def _log(
        self,
        model: FollowedModel,
        state: ReleaseState,
        judged: Judged,
        did: str,
    ) -> None:
        """What is done, and now and then what is not."""
        name = model.residents.name
        rollout = state.rollout
        assert rollout is not None
        verdict = judged.verdict
        now_s = time.monotonic()
        what = (state.generation, verdict.action, len(verdict.reasons))
        before, told_s = self._told.get(name, (None, -math.inf))
        if not did and what == before and now_s - told_s < _LOG_EVERY_S:
            return
        self._told[name] = (what, now_s)
        if did:
            self._metrics.release_decisions.labels(name, verdict.action).inc()
            extra = {"model": name, "version": rollout.candidate.version, "did": did}
            log.info("a release was decided", extra=extra | {"reasons": list(verdict.reasons)})
        await self._decision_log.append(
            Decision(
                time.time(),
                self._changes.follower.worker,
                name,
                rollout.candidate.version,
                rollout.candidate.sha256,
                state.generation,
                judged.plan,
                judged.counts,
                verdict,
                did,
            )
        )

    def _measure(self, name: str, rollout: Rollout, verdict: Verdict) -> None:
        """What a dashboard shows of it, of all rows."""
        gauges: dict[Level, float] = {}
        now = len(rollout.stages) - 1
        for reading in verdict.readings:
            if reading.segment == WHOLE and reading.stage in {None, now}:
                where = "" if reading.stage is None else "exposures "
                evidence = partial(
                    self._metrics.release_evidence.labels, name, where + reading.guardrail
                )
                gauges[evidence("no_worse")] = reading.worse
                gauges[evidence("worse")] = reading.no_worse
        for gauge, value in gauges.items():
            gauge.set(value)
        shown = self._shown.setdefault(name, set())
        for gauge in shown - gauges.keys():
            gauge.forget()
        self._shown[name] = set(gauges)

    def _forget(self, name: str) -> None:
        """Nothing of it is told any more."""
        self._told.pop(name, None)
        self._since_s.pop(name, None)
        self._warned.pop(name, None)
        for gauge in self._shown.pop(name, ()):
            gauge.forget()

    def _tell_fault(self, name: str, reason: str) -> None:
        if reason and reason != self._fault.get(name):  # it is tried again every second
            log.warning("a release waits", extra={"model": name, "reason": reason})
        self._fault[name] = reason


def _plan(rollout: Rollout, is_settled: bool) -> Plan:
    """No time is up while it is watched or paused, nor for who has not looked at it for a while:
    nobody may have.

    While it is watched, a version that is as good as the one before is to be rolled back once in
    `_WATCHED_EXPOSURES` exposures. A test that begins again only while E is at most 1 is below the
    e-CUSUM, which raises a false alarm once in 1 / alpha blocks (Shin, Ramdas & Rinaldo,
    *E-detectors*, 2022).
    """
    plan = rollout.plan
    if rollout.is_watched:
        keys = rollout.stages[-1].stage.keys
        alpha = min(plan.rollback_alpha, keys / _WATCHED_EXPOSURES)
        plan = msgspec.structs.replace(plan, rollback_alpha=alpha)
    if rollout.is_watched or rollout.paused or not is_settled:
        plan = msgspec.structs.replace(plan, most_s=_FOR_EVER_S)
    return plan


def _is_untimed(rollout: Rollout) -> bool:
    """Whether the candidate answers and nobody knows which answers are slow."""
    last = rollout.stages[-1].stage
    return last.share > 0 and last.slow_s is None


def _is_deadly(model: FollowedModel) -> bool:
    rollout = model.state.rollout
    return rollout is not None and rollout.is_deadly(model.died())


def _decides(name: str, reports: Sequence[WorkerReport]) -> str | None:
    """The first of the workers that route by the release: one that starts does not yet."""
    for report in reports:
        of_model = report.models.get(name)
        if of_model is not None and of_model.routes:
            return report.worker
    return None


def _is_ready(name: str, candidate: Chosen, reports: Sequence[WorkerReport]) -> bool:
    """In every worker that serves."""
    found = [report.models[name] for report in reports if name in report.models]
    return all(candidate in each.ready for each in found if each.serves is not None)


def _failures(name: str, candidate: Chosen, reports: Sequence[WorkerReport]) -> Sequence[str]:
    """Why workers cannot have it ready."""
    found = [report.models[name].failed for report in reports if name in report.models]
    return [failed[candidate.sha256] for failed in found if candidate.sha256 in failed]
