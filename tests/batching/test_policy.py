"""How long batches wait for company, and how many rows they take."""

import pytest

from app.batching.policy import Greedy, Hold


def test_greedy_waits_for_nobody() -> None:
    assert Greedy(8).hold_s(1, 0.0) == 0
    assert Greedy(8).batch_rows(3) == 8


@pytest.mark.parametrize(
    ("queued_rows", "waited_s", "hold_s"), [(1, 0.0, 0.5), (7, 0.3, 0.2), (8, 0.0, 0), (9, 0.0, 0)]
)
def test_a_hold_ends_with_a_full_batch_or_by_time(
    queued_rows: int, waited_s: float, hold_s: float
) -> None:
    assert Hold(0.5, 8).hold_s(queued_rows, waited_s) == pytest.approx(hold_s)


def test_a_batch_of_the_largest_preferred_size_starts_at_once() -> None:
    policy = Hold(0.5, 64, (16, 8))
    assert policy.hold_s(15, 0.0) > 0
    assert policy.hold_s(16, 0.0) == 0


@pytest.mark.parametrize(("queued_rows", "taken"), [(40, 16), (16, 16), (15, 8), (8, 8), (7, 64)])
def test_a_batch_takes_the_largest_preferred_size_that_is_there(
    queued_rows: int, taken: int
) -> None:
    assert Hold(0.5, 64, (16, 8)).batch_rows(queued_rows) == taken
