"""What a champion and a candidate said about the same rows, counted by this worker."""

import hashlib
import time
from dataclasses import dataclass
from functools import partial

import numpy as np

from app.comparison.pairs import NO_DECISION, FloatArray, Pairs, joined
from app.comparison.table import ComparisonTable, Names
from app.contract import Contract
from app.release.state import Chosen
from app.served_model import Candidate, ServedModel, VersionId
from app.shadow.block import decision_numbers
from app.telemetry.metrics import Metrics

# So many rows cost less than half a millisecond to count.
_ROWS_AT_ONCE = 1_024


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


class Trial:
    """Counts pairs, many at a time."""

    def __init__(self, trial: TrialId, contract: Contract, names: Names, metrics: Metrics) -> None:
        """`names` of the segments, by dimension."""
        self.id = trial
        self.names = names
        numbers = decision_numbers(contract) or {None: NO_DECISION}
        self.decisions = sorted(numbers, key=lambda decision: numbers[decision] % len(numbers))
        """By their numbers; the last is none."""
        self._empty = partial(
            ComparisonTable.empty, names, len(numbers) - 1, contract.score_is_probability
        )
        self._table: ComparisonTable | None = None
        self._pairs: list[Pairs] = []
        self._rows = 0
        self._metrics = _TrialMetrics(metrics, trial.candidate.model, contract.score)

    def count(self, pairs: Pairs, took_s: float) -> None:
        """Of one block."""
        self._pairs.append(pairs)
        self._rows += len(pairs)
        self._metrics.executed(took_s)
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
        if self._pairs:
            pairs = joined(self._pairs)
            self._pairs.clear()
            self._rows = 0
            self._counted().add(pairs, time.time())
            self._metrics.compared(pairs)

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
