"""What all workers of all replicas have counted of a release, as a verdict takes it."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import TypeAlias, TypeVar

import msgspec

from app.canary.table import ExposureTable, table_name
from app.comparison.table import ComparisonTable, Group
from app.evidence.counts import WHOLE, Counts, PairedCounts, StageCounts
from app.evidence.plan import Pace
from app.evidence.verdict import MOST_MISSING
from app.labels.losses import Losses
from app.release.state import BegunStage, Chosen, ModelReport, ReleaseState, Rollout, WorkerReport
from app.release.tables import Additive, TableStore
from app.shadow.comparisons import KIND as COMPARISON
from app.shadow.trial import TrialId

_LEAST_TIMED = 100
# Of a candidate's processes: one may be chance.
_MOST_ENDED = 1
# Reasons for which rows are dropped that may be the candidate's own doing.
_ITS_OWN = ("timed_out", "not_ready", "defect")
_Table = TypeVar("_Table", bound=Additive)

LossesOf: TypeAlias = Callable[[str, Chosen, Chosen, int], Awaitable[Mapping[str, Losses]]]
"""Of a model, its champion and a candidate in a trial (`app.labels.keeper.Labels.losses`)."""


@dataclass(frozen=True, slots=True)
class Observed:
    counts: Counts
    pace: Pace | None
    """What the next stage is to hold answers against: how long the champion's took in the first
    stage that timed enough of them, times the factor of the release; None where none has."""


class Observations:
    """Reads the tables of workers."""

    def __init__(self, tables: TableStore, losses: LossesOf) -> None:
        self._tables = tables
        self._losses = losses

    async def observe(
        self, model: str, state: ReleaseState, reports: Sequence[WorkerReport]
    ) -> Observed:
        """Of the release under way. Raises `StateUnavailable`."""
        rollout = state.rollout
        assert rollout is not None
        now_s = time.time()
        if rollout.is_watched:
            stages, _ = await self._stages(model, rollout, now_s)
            trips = tuple(_trips(model, rollout, reports, None))
            return Observed(Counts({}, stages[-1:], trips), None)
        trials = await self._trials(model, rollout)
        shown = trials[-1] if trials else None
        paired = await asyncio.to_thread(_paired, shown)
        losses = await self._losses(model, rollout.against, rollout.candidate, rollout.began)
        for segment, loss in losses.items():
            known = paired.get(segment, PairedCounts())
            paired[segment] = msgspec.structs.replace(known, **loss._asdict())
        stages, tables = await self._stages(model, rollout, now_s)
        pace = _pace(rollout, tables)
        blocked = [*_blocked(model, rollout, reports), *_unseen(shown)]
        if len(trials) > 1:
            blocked.append("model.yaml has changed since the release began: counts do not add up")
        if rollout.stages[-1].stage.slow_s is None and pace is None:
            blocked.append("it is not known yet how long the champion's answers take")
        trips = tuple(_trips(model, rollout, reports, shown))
        counts = Counts(paired, stages, trips, tuple(blocked))
        return Observed(counts, pace)

    async def pace(self, model: str, rollout: Rollout) -> Pace | None:
        """See `Observed`. Raises `StateUnavailable`."""
        tables = [await self._exposed(model, begun) for begun in rollout.stages]
        return _pace(rollout, [table for table in tables if table is not None])

    async def _trials(self, model: str, rollout: Rollout) -> Sequence[ComparisonTable]:
        """That began with the release, those that add up together, the latest last. There are
        several where model.yaml was changed in what is counted."""
        trial = TrialId.prefix(rollout.against, rollout.candidate, rollout.began)
        stored = await self._tables.read(f"{COMPARISON}:{model}:{trial}")
        tables: dict[object, ComparisonTable] = {}
        for table in (each for each in stored.values() if each.contents):
            counted = await asyncio.to_thread(_total, ComparisonTable.decode, table.contents)
            kind = (counted.names, counted.decisions, counted.bounded)
            tables[kind] = tables[kind] + counted if kind in tables else counted
        return sorted(tables.values(), key=lambda table: table.last_s)

    async def _exposed(self, model: str, begun: BegunStage) -> ExposureTable | None:
        """In this stage."""
        name = table_name(model, begun.began)
        stored = (await self._tables.read(name)).get(name)
        if stored is None or not stored.contents:
            return None
        return await asyncio.to_thread(_total, ExposureTable.decode, stored.contents)

    async def _stages(
        self, model: str, rollout: Rollout, now_s: float
    ) -> tuple[Sequence[StageCounts], Sequence[ExposureTable]]:
        """Of each stage that has begun, and the tables of those that have any."""
        found: list[StageCounts] = []
        tables: list[ExposureTable] = []
        for number, begun in enumerate(rollout.stages):
            table = await self._exposed(model, begun)
            is_last = number == len(rollout.stages) - 1
            until_s = now_s if is_last else rollout.stages[number + 1].began_s
            seconds = max(until_s - begun.began_s, 0.0)
            if table is None:
                found.append(StageCounts(begun.stage, seconds=seconds))
            else:
                tables.append(table)
                found.append(table.counts(begun.stage, seconds))
        return found, tables


def _total(decode: Callable[[bytes], _Table], contents: Sequence[bytes]) -> _Table:
    return reduce(add, map(decode, contents))


def _paired(table: ComparisonTable | None) -> dict[str, PairedCounts]:
    if table is None:
        return {}
    return {group.name or WHOLE: _paired_of(group) for group in table.groups()}


def _paired_of(group: Group) -> PairedCounts:
    shift = {} if group.shift is None else group.shift.as_dict()
    return PairedCounts(
        rows=group.rows,
        errors=_triples(group.blocks["error"]),
        not_finite=_triples(group.blocks["not_finite"]),
        flips=_triples(group.blocks["flip"]),
        shift=[(step, step + 1, count) for step, count in shift.items()],
    )


def _triples(blocks: Mapping[tuple[int, int], int]) -> Sequence[tuple[int, int, int]]:
    return [(rows, harmed, count) for (rows, harmed), count in sorted(blocks.items())]


def _trips(
    model: str,
    rollout: Rollout,
    reports: Sequence[WorkerReport],
    shown: ComparisonTable | None,
) -> Iterator[str]:
    """What no release goes on with."""
    sha256 = rollout.candidate.sha256
    for report in reports:
        of_model = report.models.get(model)
        if of_model is not None and sha256 in of_model.tripped:
            yield f"in worker {report.worker}: {of_model.tripped[sha256]}"
    # Each worker of a service tells of all of them.
    deadly = [each.died[sha256] for each in _of(model, reports) if rollout.is_deadly(each.died)]
    if deadly:
        yield f"{max(deadly)} workers have died while they executed it"
    if shown is not None and shown.dropped.get("not_comparable"):
        yield "what the candidate answers cannot be compared with what the champion does"


def _blocked(model: str, rollout: Rollout, reports: Sequence[WorkerReport]) -> Iterator[str]:
    """What a promotion waits for beside the counts."""
    if rollout.paused:
        yield f"paused by {rollout.paused}"
    last = rollout.stages[-1]
    sha256 = rollout.candidate.sha256
    for report in reports:
        of_model = report.models.get(model)
        if of_model is None:
            yield f"worker {report.worker} does not serve the model"
        elif of_model.routes != last.began:
            yield f"worker {report.worker} does not route by this stage yet"
        elif reason := of_model.candidates.get(sha256, ""):
            yield f"worker {report.worker} does not show it requests: {reason}"
    ended = sum(of_model.ended.get(sha256, 0) for of_model in _of(model, reports))
    if ended > _MOST_ENDED:
        yield f"its processes have died {ended} times while it was shown requests"


def _of(model: str, reports: Sequence[WorkerReport]) -> Sequence[ModelReport]:
    return [report.models[model] for report in reports if model in report.models]


def _unseen(shown: ComparisonTable | None) -> Iterator[str]:
    """Rows that the candidate was to say something about, and did not."""
    if shown is None:
        return
    offered = shown.groups()[0].rows + sum(shown.dropped.values())
    for reason in _ITS_OWN:
        rows = shown.dropped.get(reason, 0)
        if rows > MOST_MISSING * offered:
            yield f"{rows:,} of {offered:,} rows were not compared: {reason}"


def _pace(rollout: Rollout, tables: Sequence[ExposureTable]) -> Pace | None:
    """By the first stage in which enough answers of the champion were timed."""
    for table in tables:
        p99_s, p50_s = (table.against.quantile_s(q) for q in (0.99, 0.5))
        is_timed = sum(table.against.latencies.values()) >= _LEAST_TIMED
        if is_timed and p99_s is not None and p50_s is not None:
            return Pace(p99_s * rollout.slow_factor, p50_s * rollout.slow_factor)
    return None
