"""What all workers of all replicas have counted of a release, as a verdict takes it."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import TypeAlias, TypeVar

import msgspec

from app.canary.table import KIND as EXPOSURES
from app.canary.table import ExposureTable
from app.comparison.table import ComparisonTable, Group
from app.evidence.counts import WHOLE, Counts, PairedCounts, StageCounts
from app.labels.losses import Losses
from app.release.state import Chosen, ReleaseState, Rollout, WorkerReport
from app.release.tables import Additive, TableStore
from app.shadow.comparisons import KIND as COMPARISON
from app.shadow.trial import TrialId

_Table = TypeVar("_Table", bound=Additive)

LossesOf: TypeAlias = Callable[[str, Chosen, Chosen, int], Awaitable[Mapping[str, Losses]]]
"""Of a model, its champion and a candidate in a trial (`app.labels.keeper.Labels.losses`)."""


@dataclass(frozen=True, slots=True)
class Observed:
    counts: Counts
    slow_s: float | None
    """What the next stage is to call slow: the champion's 99th percentile while the candidate was
    shown requests, times the factor of the release; None where nothing is known."""


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
            return Observed(Counts({}, stages[-1:]), rollout.stages[-1].stage.slow_s)
        shown = await self._shown(model, rollout)
        paired = await asyncio.to_thread(_paired, shown)
        losses = await self._losses(model, rollout.against, rollout.candidate, rollout.began)
        for segment, loss in losses.items():
            known = paired.get(segment, PairedCounts())
            paired[segment] = msgspec.structs.replace(known, **loss._asdict())
        stages, first = await self._stages(model, rollout, now_s)
        counts = Counts(
            paired,
            stages,
            tuple(_trips(model, rollout, reports, shown)),
            tuple(_blocked(model, rollout, reports)),
        )
        slow_s = None if first is None else first.against.quantile_s(0.99)
        return Observed(counts, None if slow_s is None else slow_s * rollout.slow_factor)

    async def _shown(self, model: str, rollout: Rollout) -> ComparisonTable | None:
        """Of the trial that began with the release; of several, by different contracts, the one
        that was counted last."""
        trial = TrialId.prefix(rollout.against, rollout.candidate, rollout.began)
        stored = await self._tables.read(f"{COMPARISON}:{model}:{trial}")
        tables = [
            await asyncio.to_thread(_total, ComparisonTable.decode, table.contents)
            for table in stored.values()
        ]
        return max(tables, key=lambda table: table.last_s, default=None)

    async def _stages(
        self, model: str, rollout: Rollout, now_s: float
    ) -> tuple[Sequence[StageCounts], ExposureTable | None]:
        """Of each stage that has begun, and the table of the first one."""
        found: list[StageCounts] = []
        first: ExposureTable | None = None
        for number, begun in enumerate(rollout.stages):
            stored = await self._tables.read(f"{EXPOSURES}:{model}:{begun.began}")
            contents = [content for table in stored.values() for content in table.contents]
            table = None
            if contents:
                table = await asyncio.to_thread(_total, ExposureTable.decode, contents)
            is_last = number == len(rollout.stages) - 1
            until_s = now_s if is_last else rollout.stages[number + 1].began_s
            seconds = max(until_s - begun.began_s, 0.0)
            if table is None:
                found.append(StageCounts(begun.stage, seconds=seconds))
            else:
                found.append(table.counts(begun.stage, seconds))
            first = table if not number else first
        return found, first


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
