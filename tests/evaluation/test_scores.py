"""Scores against numbers computed by hand."""

import json
import math

import numpy as np
import pytest

from app.evaluation.scores import BinaryScores, CalibrationBin, RegressionScores, score


def _binary(predicted: list[float], truth: list[bool]) -> BinaryScores:
    scores = score(np.array(predicted), np.array(truth))
    assert isinstance(scores, BinaryScores)
    return scores


def test_probabilities_are_scored_against_truths() -> None:
    scores = _binary([0.9, 0.6, 0.4, 0.1], [True, False, True, False])
    assert (scores.rows, scores.true_share) == (4, 0.5)
    assert scores.auc == pytest.approx(3 / 4)  # of the four pairs one is in the wrong order
    assert scores.brier == pytest.approx((0.01 + 0.36 + 0.36 + 0.01) / 4)
    assert scores.log_loss == pytest.approx(-(2 * math.log(0.9) + 2 * math.log(0.4)) / 4)


def test_calibration_compares_what_was_said_with_what_came_true_in_each_tenth() -> None:
    scores = _binary([0.62, 0.64, 0.66, 0.05], [True, False, True, False])
    assert scores.calibration == (
        CalibrationBin(1, 0.05, 0.0),
        CalibrationBin(3, pytest.approx(0.64), pytest.approx(2 / 3)),
    )
    expected = 1 / 4 * 0.05 + 3 / 4 * (2 / 3 - 0.64)
    assert scores.calibration_error == pytest.approx(expected)


def test_probabilities_of_zero_and_one_belong_to_the_first_and_the_last_tenth() -> None:
    scores = _binary([0.0, 0.05, 0.95, 1.0], [False, False, True, True])
    assert [part.rows for part in scores.calibration] == [2, 2]
    assert scores.calibration_error == pytest.approx(0.025)
    assert scores.auc == 1.0


def test_certainty_that_comes_true_is_perfect() -> None:
    scores = _binary([0.0, 1.0], [False, True])
    assert (scores.brier, scores.calibration_error) == (0.0, 0.0)
    assert scores.log_loss == pytest.approx(0.0)


def test_a_window_in_which_nothing_came_true_is_scored_too() -> None:
    scores = _binary([0.2, 0.4], [False, False])
    assert scores.true_share == 0.0
    assert scores.brier == pytest.approx((0.04 + 0.16) / 2)
    assert scores.log_loss == pytest.approx(-(math.log(0.8) + math.log(0.6)) / 2)
    assert math.isnan(scores.auc)  # there is no pair to order


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int64])
def test_numbers_are_scored_by_their_errors(dtype: type[np.generic]) -> None:
    truth = np.array([1, 2, 3], dtype=dtype)
    assert score(np.array([1.0, 4.0, 0.0]), truth) == RegressionScores(
        rows=3,
        mean_absolute_error=pytest.approx(5 / 3),
        root_mean_squared_error=pytest.approx(math.sqrt(13 / 3)),
    )


def test_scores_are_json() -> None:
    binary = _binary([0.25, 0.75], [False, True]).to_json()
    assert json.loads(json.dumps(binary))["calibration"] == [
        {"rows": 1, "mean_probability": 0.25, "true_share": 0.0},
        {"rows": 1, "mean_probability": 0.75, "true_share": 1.0},
    ]
    regression = score(np.array([1.0]), np.array([3.0])).to_json()
    assert json.loads(json.dumps(regression))["mean_absolute_error"] == 2.0
