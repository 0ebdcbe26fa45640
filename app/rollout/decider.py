"""Looks at every release under way and does what the evidence says."""

import asyncio
import logging
import math
import time
from collections.abc import Sequence
from functools import partial
from types import TracebackType
from typing import Self

import msgspec

from app.errors import Conflict, HikyakuError, InvalidModel
from app.events.event import Event, Events, EventType
from app.evidence.counts import WHOLE
from app.evidence.feasibility import Traffic
from app.evidence.plan import Plan
from app.evidence.verdict import Verdict, judge
from app.release.state import ReleaseState, Rollout, StateUnavailable, WorkerReport
from app.reload.changes import Changes
from app.reload.follower import FollowedModel
from app.reload.verbs import rolled_back
from app.rollout.decision_log import Decision, DecisionLog
from app.rollout.observed import Observations, Observed
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
# With the alpha of a release of 1e-3, a version that is as good as the one before is rolled back
# once in ten million exposures.
_WATCH_WINDOW = 10_000


class Decider:
    """One worker decides at a time: the first of those that live, by their names. The words by
    which they are known to live expire, so that another one takes over; two that take themselves
    for the first change the state by compare-and-set, on the same counts.

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
        self._fault = ""
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
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

    async def verdict(self, model: FollowedModel, state: ReleaseState) -> tuple[Observed, Verdict]:
        """Of the release under way by this state, and by what is stored now; nothing is done.
        Raises `StateUnavailable`."""
        reports = await self._changes.follower.settled_workers()
        return await self._judged(model, state, reports)

    async def _decide_often(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            for model in tuple(self._changes.follower.models.values()):
                if model.state.rollout is None:
                    self._forget(model.residents.name)
                    continue
                try:
                    await self._decide(model)
                except (StateUnavailable, Conflict) as exc:
                    self._tell_fault(str(exc))
                except HikyakuError as exc:
                    log.error("a release is not decided now", exc_info=exc)
                except Exception:  # a defect: it must not end what follows
                    log.exception("a release could not be decided")
                else:
                    self._tell_fault("")

    async def _decide(self, model: FollowedModel) -> None:
        follower = self._changes.follower
        reports = await follower.settled_workers()
        if [report.worker for report in reports][:1] != [follower.worker]:
            self._forget(model.residents.name)
            return
        state = model.state
        rollout = state.rollout
        if rollout is None:
            return
        observed, verdict = await self._judged(model, state, reports)
        self._measure(model.residents.name, rollout, verdict)
        if verdict.action == "rollback":
            after = rolled_back(state, verdict.reasons[0], time.time())
            await self._log(model, state, observed, verdict, "rolled back")
            await self._changes.change(model, after, "rollback", _BY)
        elif rollout.is_watched:
            await self._watch(model, state, observed, verdict, reports)
        elif verdict.action == "promote":
            await self._promote(model, state, observed, verdict)
        else:
            await self._log(model, state, observed, verdict, "")
        self._warn(model.residents.name, rollout, state.generation, verdict)

    def _warn(self, name: str, rollout: Rollout, generation: int, verdict: Verdict) -> None:
        """Others are told once of a guardrail under suspicion, and of a stage whose time is up."""
        candidate = rollout.candidate
        found: dict[str, EventType] = {
            f"{reading.guardrail} {reading.segment}".strip(): "guardrail.suspected"
            for reading in verdict.readings
            if reading.decides and reading.worse >= reading.promotes_at
        }
        last = rollout.stages[-1]
        if verdict.action == "hold" and time.time() - last.began_s >= _plan(rollout).most_s:
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
        self, model: FollowedModel, state: ReleaseState, reports: Sequence[WorkerReport]
    ) -> tuple[Observed, Verdict]:
        rollout = state.rollout
        assert rollout is not None
        observed = await self._observations.observe(model.residents.name, state, reports)
        return observed, await asyncio.to_thread(judge, _plan(rollout), observed.counts)

    async def _promote(
        self, model: FollowedModel, state: ReleaseState, observed: Observed, verdict: Verdict
    ) -> None:
        rollout = state.rollout
        assert rollout is not None
        share = next_share(rollout.plan, rollout.stages[-1].stage.share)
        slow_s = observed.slow_s if not rollout.stages[-1].stage.share else None
        await self._log(model, state, observed, verdict, f"on to {share:.0%}")
        try:
            await self._verbs.on_to(model, state, share, slow_s, _BY)
        except InvalidModel as exc:
            # It cannot answer where it is to: that is a verdict of its own.
            reason = f"it cannot serve: {exc}"
            await self._log(model, state, observed, verdict, f"rolled back: {reason}")
            await self._changes.change(
                model, rolled_back(model.state, reason, time.time()), "rollback", _BY
            )

    async def _watch(
        self,
        model: FollowedModel,
        state: ReleaseState,
        observed: Observed,
        verdict: Verdict,
        reports: Sequence[WorkerReport],
    ) -> None:
        """The candidate is the champion: the test begins again and again, until it is over."""
        rollout = state.rollout
        assert rollout is not None
        assert rollout.watched_since_s is not None
        last = observed.counts.stages[-1]
        if time.time() - rollout.watched_since_s >= rollout.watch_s:
            await self._log(model, state, observed, verdict, "watched to the end")
            await self._changes.change(model, watch_ended(state), "watched", _BY)
        elif last.candidate.resolved + last.champion.resolved >= _WATCH_WINDOW:
            per_s = measured_per_s(model.residents.name, reports)
            traffic = Traffic(per_s, len(reports))
            await self._log(model, state, observed, verdict, "watched anew")
            await self._changes.change(
                model, watched_anew(state, traffic, time.time()), "watch", _BY
            )
        else:
            await self._log(model, state, observed, verdict, "")

    async def _log(
        self,
        model: FollowedModel,
        state: ReleaseState,
        observed: Observed,
        verdict: Verdict,
        did: str,
    ) -> None:
        """What is done, and now and then what is not."""
        name = model.residents.name
        rollout = state.rollout
        assert rollout is not None
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
                _plan(rollout),
                observed.counts,
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
        self._warned.pop(name, None)
        for gauge in self._shown.pop(name, ()):
            gauge.forget()

    def _tell_fault(self, reason: str) -> None:
        if reason and reason != self._fault:  # it is tried again every second
            log.warning("a release waits", extra={"reason": reason})
        self._fault = reason


def _plan(rollout: Rollout) -> Plan:
    """While it is watched no time is up."""
    if rollout.is_watched:
        return msgspec.structs.replace(rollout.plan, most_s=1e18)
    return rollout.plan
