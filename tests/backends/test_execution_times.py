"""What is predicted of an execution's duration, and the batches that follow from it."""

import numpy as np
import pytest

from app.backends.execution_times import ExecutionTimes, warm_up_batches


def test_a_measured_size_is_predicted_as_measured() -> None:
    times = ExecutionTimes({1: 0.001, 8: 0.004})
    assert times.predicted_s(1) == 0.001
    assert times.predicted_s(8) == 0.004


def test_sizes_between_are_in_proportion_and_larger_ones_cost_what_the_largest_does_a_row() -> None:
    times = ExecutionTimes({2: 0.002, 4: 0.006})
    assert times.predicted_s(3) == pytest.approx(0.004)
    assert times.predicted_s(8) == pytest.approx(0.012)


def test_nothing_is_known_before_the_warm_up() -> None:
    assert ExecutionTimes({}).predicted_s(1000) == pytest.approx(0, abs=1e-3)
    assert ExecutionTimes({}, unknown_s=float("inf")).predicted_s(1) == float("inf")


def test_the_prediction_follows_what_executions_take() -> None:
    times = ExecutionTimes({1: 0.001, 8: 0.004, 64: 0.02})
    for _ in range(100):
        times.observe(8, 0.008)
    assert times.predicted_s(8) == pytest.approx(0.008, rel=0.01)
    assert (times.predicted_s(1), times.predicted_s(64)) == (0.001, 0.02)


def test_both_measured_sizes_follow_what_lies_between_them_takes() -> None:
    times = ExecutionTimes({1: 0.001, 8: 0.004, 64: 0.02})
    for _ in range(200):
        times.observe(32, 0.03)
    assert times.predicted_s(32) == pytest.approx(0.03, rel=0.01)
    assert times.predicted_s(8) > 0.008
    assert times.predicted_s(64) > 0.04


def test_one_pause_is_not_taken_for_the_pace() -> None:
    times = ExecutionTimes({8: 0.001})
    times.observe(8, 60.0)
    assert times.predicted_s(8) < 0.002


@pytest.mark.parametrize(
    ("measured", "most", "best"),
    [
        # A row costs least in the largest batch, all of them within the event loop's millisecond.
        ({1: 10e-6, 8: 40e-6, 64: 200e-6}, 64, 64),
        # The cost of a row jumps after 32.
        ({1: 10e-6, 32: 160e-6, 64: 800e-6}, 64, 32),
        # Longer than the event loop's millisecond, and hardly cheaper a row: cut to what is not.
        ({1: 80e-6, 8: 640e-6, 64: 5120e-6}, 64, 8),
        # What pays off for a thread: 16 times as many rows in twice the time.
        ({1: 900e-6, 16: 1800e-6}, 16, 16),
        # Nothing fits into the millisecond.
        ({1: 5e-3, 16: 10e-3}, 16, 16),
        # The limit lies between the sizes.
        ({1: 10e-6, 8: 40e-6, 16: 70e-6}, 12, 12),
    ],
)
def test_the_batch_is_as_large_as_makes_a_row_cheapest(
    measured: dict[int, float], most: int, best: int
) -> None:
    assert ExecutionTimes(measured, in_loop=True).best_rows(most) == best


def test_what_runs_elsewhere_is_not_cut_to_the_event_loops_millisecond() -> None:
    times = ExecutionTimes({1: 0.0009, 8: 0.006, 64: 0.04})
    assert times.best_rows(64) == 64


def test_a_warm_up_runs_every_size() -> None:
    example = {"x": np.array([[1.0], [2.0], [3.0]])}
    batches = dict(warm_up_batches(example, 6))
    assert list(batches) == [1, 2, 4, 6]
    assert batches[1]["x"].tolist() == [[1.0]]
    assert batches[6]["x"].tolist() == [[1.0], [2.0], [3.0]] * 2
