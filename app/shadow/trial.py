"""What a champion and a candidate said about the same rows, counted by this worker."""

import hashlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from app.comparison.pairs import NO_DECISION, FloatArray, Pairs
from app.comparison.segments import SegmentReader
from app.comparison.table import ComparisonTable
from app.contract import Contract
from app.release.state import Chosen
from app.served_model import Candidate, ServedModel, VersionId
from app.shadow.block import Block, Said, decision_numbers, pairs_of
from app.shadow.pair_log import PairLog, Rows
from app.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

# So many rows take less than a millisecond to count.
_ROWS_AT_ONCE = 512


@dataclass(frozen=True, slots=True)
class TrialId:
    """Who is compared, by which contracts, since which generation of the release state: what is
    counted under one id can be added up."""

    champion: VersionId
    candidate: VersionId
    began: int
    contracts: str
    """A digest of both contracts."""

    @classmethod
    def of(cls, champion: ServedModel, candidate: Candidate, began: int) -> "TrialId":
        contracts = _digest(champion.contract, candidate.contract)
        return cls(champion.id, candidate.id, began, contracts)

    def __str__(self) -> str:
        """Short, and of no other trial of the model."""
        return f"{self.prefix(self.champion, self.candidate, self.began)}{self.contracts}"

    @staticmethod
    def began_of(text: str) -> int:
        """The generation in a text that ends with such an id."""
        return int(text.rsplit("-", 2)[1])

    @staticmethod
    def prefix(champion: VersionId | Chosen, candidate: VersionId | Chosen, began: int) -> str:
        """How the trials of these two begin, whatever their contracts."""
        versions = (f"{each.version}.{each.sha256[:12]}" for each in (champion, candidate))
        return f"{'-'.join(versions)}-{began}-"


class Judged(Protocol):
    """Is told what candidates say, to judge it when the truth is known."""

    def compared(
        self,
        model: str,
        request_id: str,
        candidate: VersionId,
        began: int,
        first: int,
        numbers: NDArray[np.float64],
    ) -> None:
        """About the instances of a request from `first` on: `[rows]`, or `[rows, labels]` of
        labelled numbers, NaN where it said nothing; the trial `began` in that generation of the
        release state. Neither raises nor blocks."""
        ...


@dataclass(frozen=True, slots=True)
class Records:
    """Where what was compared is told, beside the tables."""

    metrics: Metrics
    pair_log: PairLog
    judged: Judged


class Trial:
    """Counts pairs, many at a time."""

    def __init__(
        self, trial: TrialId, contract: Contract, segments: SegmentReader, records: Records
    ) -> None:
        self.id = trial
        self._records = records
        self._has_labels = contract.labels is not None
        self._segments = segments
        numbers = decision_numbers(contract) or {None: NO_DECISION}
        self._decisions = sorted(numbers, key=lambda decision: numbers[decision] % len(numbers))
        """By their numbers; the last is none."""
        self._empty = partial(
            ComparisonTable.empty,
            segments.names,
            len(numbers) - 1,
            contract.score_is_probability,
        )
        self._table: ComparisonTable | None = None
        self._answered: list[tuple[Block, Said]] = []
        self._rows = 0
        self._metrics = _TrialMetrics(records.metrics, trial.candidate.model, contract.score)

    def count(self, block: Block, said: Said) -> None:
        """What both say about the rows of a block."""
        self._answered.append((block, said))
        self._rows += block.rows
        self._metrics.executed(said.took_s)
        if self._rows >= _ROWS_AT_ONCE:
            self._settle()

    def drop(self, reason: str, rows: int) -> None:
        self._counted().drop(reason, rows)
        self._metrics.dropped(reason, rows)

    def take(self) -> ComparisonTable | None:
        """What was counted since it was taken the last time; None where nothing was."""
        self._settle()
        table, self._table = self._table, None
        return table

    def _settle(self) -> None:
        """What was kept back is counted."""
        if self._answered:
            answered, self._answered, self._rows = self._answered, [], 0
            try:
                pairs = self._told(answered)
            except Exception as exc:  # a defect: what others have counted must be told
                log.error("pairs are not counted", extra={"trial": str(self.id)}, exc_info=exc)
                self.drop("defect", sum(block.rows for block, _ in answered))
                return
            self._counted().add(pairs, time.time())
            self._metrics.compared(pairs)

    def _told(self, answered: Sequence[tuple[Block, Said]]) -> Pairs:
        """The pairs, of which others know now."""
        pairs = pairs_of(answered, self._segments)
        self._records.pair_log.note(pairs, partial(self._logged, answered))
        if self._has_labels:
            self._tell_judge(answered)
        return pairs

    def _tell_judge(self, answered: Sequence[tuple[Block, Said]]) -> None:
        judged, trial = self._records.judged, self.id
        model = trial.candidate.model
        for block, said in answered:
            row = 0
            for asker, _, start, stop in block.offered:
                numbers = said.numbers[row : row + stop - start]
                judged.compared(
                    model, asker.request_id, trial.candidate, trial.began, start, numbers
                )
                row += stop - start

    def _logged(self, answered: Sequence[tuple[Block, Said]]) -> Rows:
        offered = [each for block, _ in answered for each in block.offered]
        return Rows(
            self.id.candidate.model,
            str(self.id),
            [o.asker.request_id for o in offered for _ in range(o.start, o.stop)],
            [instance for o in offered for instance in range(o.start, o.stop)],
            self._segments.names,
            self._decisions,
        )

    def _counted(self) -> ComparisonTable:
        if self._table is None:
            self._table = self._empty()
        return self._table


class _TrialMetrics:
    """Its series, looked up once."""

    def __init__(self, metrics: Metrics, model: str, output: str) -> None:
        self._rows = metrics.shadow_rows
        self._model = model
        self._compared = metrics.shadow_rows.labels(model, "compared")
        self._failed = metrics.shadow_rows.labels(model, "failed")
        self._not_finite = metrics.shadow_rows.labels(model, "not_finite")
        self._flips = metrics.shadow_flips.labels(model)
        self._difference = metrics.shadow_difference.labels(model)
        self._prediction = metrics.prediction.labels(model, "candidate", output)
        self._execution = metrics.shadow_execution_duration.labels(model)

    def executed(self, took_s: float) -> None:
        self._execution.observe(took_s)

    def dropped(self, reason: str, rows: int) -> None:
        self._rows.labels(self._model, reason).inc(rows)

    def compared(self, pairs: Pairs) -> None:
        answered = ~pairs.failed
        finite = np.isfinite(pairs.candidate)
        self._failed.inc(int(pairs.failed.sum()))
        self._not_finite.inc(int((answered & ~finite).sum()))
        self._compared.inc(int((answered & finite).sum()))
        self._prediction.observe_all(pairs.candidate[finite])
        decided = (pairs.champion_decision != NO_DECISION) & finite
        self._flips.inc(
            int((decided & (pairs.champion_decision != pairs.candidate_decision)).sum())
        )
        difference: FloatArray = (pairs.candidate - pairs.champion)[finite]
        self._difference.observe_all(difference[np.isfinite(difference)])


def _digest(*contracts: Contract) -> str:
    digest = hashlib.sha256()
    for contract in contracts:
        digest.update(contract.model_dump_json(by_alias=True).encode())
    return digest.hexdigest()[:8]
