"""How good the answers were, once the truth is known."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score

_BINS = 10


@dataclass(frozen=True)
class CalibrationBin:
    """Rows whose probability lies in one tenth: what was said and what came true, on average."""

    rows: int
    mean_probability: float
    true_share: float


@dataclass(frozen=True)
class BinaryScores:
    """Scores of probabilities against truths.

    `auc` is NaN where all truths are the same. `calibration_error` is the expected calibration
    error over ten equal-width bins (Naeini, Cooper and Hauskrecht, 2015).
    """

    rows: int
    true_share: float
    auc: float
    log_loss: float
    brier: float
    calibration_error: float
    calibration: tuple[CalibrationBin, ...]

    def to_json(self) -> Mapping[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class RegressionScores:
    """Errors of numbers against truths, in the label's unit."""

    rows: int
    mean_absolute_error: float
    root_mean_squared_error: float

    def to_json(self) -> Mapping[str, Any]:
        return asdict(self)


def score(predicted: NDArray[np.float64], truth: NDArray[Any]) -> BinaryScores | RegressionScores:
    """Boolean truths are scored as probabilities, any other as numbers."""
    if truth.dtype != bool:
        error = predicted - truth.astype(np.float64)
        return RegressionScores(
            len(error), float(np.abs(error).mean()), float(np.sqrt((error**2).mean()))
        )
    calibration = _calibration(predicted, truth)
    return BinaryScores(
        rows=len(truth),
        true_share=float(truth.mean()),
        auc=float(roc_auc_score(truth, predicted)) if 0 < truth.mean() < 1 else math.nan,
        log_loss=float(log_loss(truth, predicted, labels=[False, True])),
        brier=float(brier_score_loss(truth, predicted)),
        calibration_error=sum(
            part.rows / len(truth) * abs(part.mean_probability - part.true_share)
            for part in calibration
        ),
        calibration=calibration,
    )


def _calibration(
    predicted: NDArray[np.float64], truth: NDArray[np.bool_]
) -> tuple[CalibrationBin, ...]:
    bins = np.minimum((predicted * _BINS).astype(int), _BINS - 1)
    members = [bins == index for index in np.unique(bins)]
    return tuple(
        CalibrationBin(int(m.sum()), float(predicted[m].mean()), float(truth[m].mean()))
        for m in members
    )
