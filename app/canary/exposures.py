"""The exposures of one stage in this worker: who was routed where, and how that ended."""

import asyncio
import logging
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from app.canary.first_seen import MARKS, FirstSeen, SeenHere
from app.canary.table import ArmTable, ExposureTable, table_name
from app.evidence.plan import Stage
from app.release.state import BegunStage, Rollout, StateUnavailable
from app.routing_key import Lots
from app.served_model import VersionId
from app.telemetry.metrics import Metrics
from app.telemetry.recorder import Role

log = logging.getLogger(__name__)

ArmName: TypeAlias = Literal["candidate", "against"]
Outside: TypeAlias = Literal[
    "override", "hold_out", "not_open", "disagree", "not_first", "unavailable"
]

_GRACE_S = 5.0
"""A request is answered by its deadline. Whoever has not ended so long after it never will."""
_LONGEST_S = 30.0
# So many exposures take a millisecond at most; then everybody else has a turn.
_AT_ONCE = 256


class Exposure:
    """A request that was routed while a stage went on, until it ends."""

    # Made for every request: a dataclass takes half as long again.
    __slots__ = (
        *("_ended", "began_s", "by", "ended", "is_candidates", "key", "mark", "route", "took_s"),
    )

    def __init__(self, ended: "list[Exposure]", route: Role, by: VersionId, began_s: float) -> None:
        self._ended = ended
        self.route: Role = route
        self.by = by
        """The version that it was led to; once it has answered, the one that did."""
        self.began_s = began_s
        """Monotonic seconds, when its body was read."""
        self.ended: Literal["", "ok", "error", "left", "lost"] = ""
        self.took_s = 0.0
        self.key = ""
        """The routing key, or the request's id where it has none."""
        self.mark: int | None = None
        """Of its key; None where that is its own id, which nobody else has."""
        self.is_candidates = False

    def answered(self, now_s: float, by: VersionId) -> None:
        self.by = by
        self._end("ok", now_s)

    def failed(self, now_s: float) -> None:
        """Whatever was answered, it was no prediction."""
        self._end("error", now_s)

    def left(self, now_s: float) -> None:
        """The caller waits no longer."""
        self._end("left", now_s)

    def _end(self, how: Literal["ok", "error", "left"], now_s: float) -> None:
        self.took_s = now_s - self.began_s
        self.ended = how
        self._ended.append(self)


class StageExposures:
    """Counts first exposures in blocks, in the order in which they began, once they have ended.

    What is counted when depends on the clock and on that order, never on how a request ended. An
    exposure whose key was seen before, in whatever worker, counts for nothing however it ends.
    """

    def __init__(
        self,
        model: str,
        rollout: Rollout,
        begun: BegunStage,
        store: FirstSeen,
        metrics: Metrics,
        tell: Callable[[], None],
    ) -> None:
        """`tell` is called when there is something to `claim`."""
        self.name = table_name(model, begun.began)
        self.stage: Stage = begun.stage
        self.began = begun.began
        self.longest_s = _LONGEST_S
        """Of the requests: the longest time that a caller may give."""
        self._taken = ExposureTable()
        self._model = model
        self._lots = lots_of(model, rollout)
        self._candidate, self._against = rollout.candidate.sha256, rollout.against.sha256
        self._store = store
        self._metrics = metrics
        self._seen = SeenHere()
        self._tell = tell
        self._claiming = asyncio.Lock()
        self._begun: list[Exposure] = []
        """Whose key is new here, and perhaps seen elsewhere."""
        self._waiting: deque[Exposure] = deque()
        """First exposures, in the order of their beginning."""
        self._handed_over = 0
        """Of these, the first so many are in a table that was taken."""
        self._ended: list[Exposure] = []
        self._outside: Counter[Outside] = Counter()
        self._block = _Block()
        self._table = ExposureTable()
        self._over_s: float | None = None
        self._is_over = False
        self._unavailable = ""
        """Why the last claim failed; empty where it did not."""

    def begin(
        self,
        route: Role,
        by: VersionId,
        began_s: float,
        key: str,
        mark: int | None,
        is_candidates: bool,
    ) -> Exposure:
        """A request that is evidence if it is the first of its key. Without a `mark` it is: then
        the key is the request's own id. `is_candidates`: the key leads to the candidate."""
        exposure = Exposure(self._ended, route, by, began_s)
        if mark is not None:
            exposure.mark = mark & (MARKS - 1)
            if not self._seen.is_new(exposure.mark):
                self._outside["not_first"] += 1
                return exposure
        exposure.key, exposure.is_candidates = key, is_candidates
        if not self._begun:
            self._tell()
        self._begun.append(exposure)
        return exposure

    def pass_by(
        self, route: Role, by: VersionId, began_s: float, reason: Outside | None = None
    ) -> Exposure:
        """A request that is no evidence. Without a `reason` it could not be: nobody is exposed."""
        if reason is not None:
            self._outside[reason] += 1
        return Exposure(self._ended, route, by, began_s)

    def end(self) -> None:
        """Another stage goes on: what has begun in this one is still counted."""
        self._over_s = time.monotonic() + self.longest_s + _GRACE_S

    @property
    def is_over(self) -> bool:
        """Nothing more will come, once what there is is taken."""
        return self._is_over

    async def claim(self) -> None:
        """Find out which of those that have begun are the first of their keys. To be called soon:
        of two workers that saw a key the one that claims it first counts it, and a caller that
        failed may be about to try again elsewhere."""
        async with self._claiming:
            begun, self._begun = self._begun, []
            for at, exposure in enumerate(await self._first(begun)):
                self._assign(exposure)
                if at % _AT_ONCE == _AT_ONCE - 1:
                    await asyncio.sleep(0)

    async def settle(self, is_last: bool = False) -> None:
        """Count what can be counted now. To be called every second, and when the worker ends.

        That an exposure was assigned is taken before how it ended is counted: what a worker did not
        come to tell when it was killed is seen as assigned and never resolved."""
        self._is_over = self._over_s is not None and time.monotonic() >= self._over_s
        await self.claim()
        if self._over_s is not None and not self._begun:
            self._seen = SeenHere()  # the memory of the one before is free
        self._give_up_lost()
        if is_last or self._is_over:
            self._handed_over = len(self._waiting)
        while self._has_ended():
            self._enter_some()
            await asyncio.sleep(0)
        await self._record()

    def take(self) -> ExposureTable | None:
        """What was counted since it was taken the last time; None where nothing was."""
        table, self._table = self._table, ExposureTable()
        self._handed_over = len(self._waiting)
        if table == ExposureTable():
            return None
        self._taken = self._taken + table
        return table

    @property
    def counted(self) -> ExposureTable:
        """All since the stage began in this worker."""
        return self._taken + self._table

    async def _first(self, begun: Sequence[Exposure]) -> Sequence[Exposure]:
        """Those whose keys nobody has seen before, over all workers."""
        keyed = [(exposure, exposure.mark) for exposure in begun if exposure.mark is not None]
        if not keyed:
            return begun
        marks = [mark for _, mark in keyed]
        try:
            is_new = await self._store.claim(self.name, marks, self._seen.bits)
        except StateUnavailable as exc:
            self._tell_unavailable(str(exc))
            self._outside["unavailable"] += len(keyed)
            return [exposure for exposure in begun if exposure.mark is None]
        self._tell_unavailable("")
        seen = {exposure for (exposure, _), new in zip(keyed, is_new, strict=True) if not new}
        if seen:
            self._outside["not_first"] += len(seen)
        return [exposure for exposure in begun if exposure not in seen]

    def _tell_unavailable(self, reason: str) -> None:
        if reason and not self._unavailable:
            extra = {"model": self._model, "reason": reason}
            log.warning("exposures are left out: who was seen elsewhere is not known", extra=extra)
        self._unavailable = reason

    def _assign(self, exposure: Exposure) -> None:
        """Its arm is drawn once more: it was led to that version, or it was misrouted."""
        place, _ = self._lots.draw(exposure.key)
        is_candidates = place < self.stage.share
        if is_candidates is not exposure.is_candidates or not self._is_right(exposure):
            self._misrouted()
            return
        self._arm(exposure).assigned += 1
        self._waiting.append(exposure)

    def _is_right(self, exposure: Exposure) -> bool:
        """Whether it is the version of its arm that it was led to, or that has answered."""
        right = self._candidate if exposure.is_candidates else self._against
        return exposure.by.sha256 == right

    def _give_up_lost(self) -> None:
        before_s = time.monotonic() - self.longest_s - _GRACE_S
        for exposure in self._waiting:
            if exposure.began_s >= before_s:
                break
            if not exposure.ended:
                exposure.ended = "lost"

    def _has_ended(self) -> bool:
        """Whether the first one has, and may be entered."""
        return self._handed_over > 0 and self._waiting[0].ended != ""

    def _enter_some(self) -> None:
        """The first of those that have ended."""
        told = _Told()
        for _ in range(_AT_ONCE):
            if not self._has_ended():
                break
            self._handed_over -= 1
            self._enter(self._waiting.popleft(), told)
        self._table.candidate.answered(told.candidate_s)
        self._table.against.answered(told.against_s)
        for (arm, outcome), exposures in told.outcomes.items():
            self._metrics.canary_exposures.labels(self._model, arm, outcome).inc(exposures)

    def _enter(self, exposure: Exposure, told: "_Told") -> None:
        """Into the ledger of its arm, and into the block."""
        arm, ended = self._arm(exposure), exposure.ended
        if not self._is_right(exposure):
            self._misrouted()  # what it says is of neither
            ended = "lost"
        is_error = ended == "error"
        # What is no answer has not been one in time.
        took_s = math.inf if is_error else 0.0 if ended == "lost" else exposure.took_s
        slow_s, median_s = self.stage.slow_s, self.stage.median_s
        is_slow = slow_s is not None and took_s > slow_s
        if ended == "lost":
            arm.lost += 1
        else:
            arm.resolved += 1
            arm.errors += is_error
            arm.slow += is_slow
        if ended == "ok":
            (told.candidate_s if exposure.is_candidates else told.against_s).append(exposure.took_s)
        name: ArmName = "candidate" if exposure.is_candidates else "against"
        told.outcomes[name, "slow" if is_slow and not is_error else ended] += 1
        block = self._block
        is_late = median_s is not None and took_s > median_s
        block.add(exposure.is_candidates, is_error, is_slow, is_late)
        if block.keys == self.stage.keys:
            _count(self._table.errors, block.errors)
            if slow_s is not None:
                _count(self._table.slow, block.slow)
            if median_s is not None:
                _count(self._table.median, block.median)
            self._block = _Block()

    def _arm(self, exposure: Exposure) -> ArmTable:
        return self._table.candidate if exposure.is_candidates else self._table.against

    def _misrouted(self) -> None:
        self._table.misrouted += 1
        self._metrics.canary_misrouted.labels(self._model).inc()

    async def _record(self) -> None:
        """What callers have had of each route, and what was left out."""
        ended = list(self._ended)
        self._ended.clear()
        for reason, requests in self._outside.items():
            self._table.leave_out(reason, requests)
            self._metrics.canary_outside.labels(self._model, reason).inc(requests)
        self._outside.clear()
        for at in range(0, len(ended), _AT_ONCE):
            self._record_some(ended[at : at + _AT_ONCE])
            await asyncio.sleep(0)

    def _record_some(self, ended: Sequence[Exposure]) -> None:
        if self.stage.share == 0:
            self._table.against.answered([e.took_s for e in ended if e.ended == "ok"])
        for (route, how), requests in Counter((e.route, e.ended) for e in ended).items():
            self._metrics.canary_requests.labels(self._model, route, how).inc(requests)
        for route in {exposure.route for exposure in ended}:
            took_s = [e.took_s for e in ended if e.route == route and e.ended == "ok"]
            self._metrics.canary_request_duration.labels(self._model, route).observe_all(took_s)


@dataclass(slots=True)
class _Told:
    """Of exposures that are counted: how long answers took, and how each has ended."""

    candidate_s: list[float] = field(default_factory=list)
    against_s: list[float] = field(default_factory=list)
    outcomes: Counter[tuple[ArmName, str]] = field(default_factory=Counter)


class _Block:
    """Bad ones among some first exposures, of the candidate's and of the others."""

    __slots__ = ("_errors", "_median", "_slow", "keys")

    def __init__(self) -> None:
        self.keys = 0
        self._errors = [0, 0]
        self._slow = [0, 0]
        self._median = [0, 0]

    def add(self, is_candidates: bool, is_error: bool, is_slow: bool, is_late: bool) -> None:
        self.keys += 1
        arm = 0 if is_candidates else 1
        self._errors[arm] += is_error
        self._slow[arm] += is_slow
        self._median[arm] += is_late

    @property
    def errors(self) -> tuple[int, int]:
        return self._errors[0], self._errors[1]

    @property
    def slow(self) -> tuple[int, int]:
        return self._slow[0], self._slow[1]

    @property
    def median(self) -> tuple[int, int]:
        return self._median[0], self._median[1]


def lots_of(model: str, rollout: Rollout) -> Lots:
    """Of this release: another one draws anew."""
    return Lots("canary", model, rollout.candidate.sha256, str(rollout.began))


def _count(blocks: dict[tuple[int, int], int], bad: tuple[int, int]) -> None:
    blocks[bad] = blocks.get(bad, 0) + 1
