"""The judge of a reload proof knows which version may answer when."""

import pytest

from loadtests.checked_load import LOST, Asked
from loadtests.spells import Change, judge

CHANGES = (Change(2, 10.0, 10.5, worker=7), Change(1, 20.0, 20.5, worker=8))
WORKERS = {700: 7, 800: 8}
NOT_IN_CHARGE = {"of a version that could not serve": 1}


def answer(version: int, sent_s: float, done_s: float, connection: int = 700) -> Asked:
    return Asked(sent_s, sent_s, done_s, version, connection)


@pytest.mark.parametrize(
    "asked",
    [
        answer(1, 9.0, 9.1),
        answer(1, 10.2, 10.3),
        answer(2, 9.9, 10.1),
        answer(1, 10.4, 11.0),
        answer(2, 10.6, 10.7),
        answer(2, 20.4, 30.0),
        answer(1, 25.0, 25.1),
        answer(LOST, 10.0, 20.0),
    ],
)
def test_old_and_new_may_answer_what_overlaps_a_change(asked: Asked) -> None:
    assert not judge([asked], 1, CHANGES, WORKERS).unlawful


@pytest.mark.parametrize(
    "asked",
    [
        answer(2, 9.0, 9.1),
        answer(3, 10.2, 10.3),
        answer(1, 10.6, 10.7),
        answer(1, 11.6, 11.7, connection=800),
        answer(1, 19.0, 19.9),
    ],
)
def test_a_version_that_is_not_in_charge_may_not(asked: Asked) -> None:
    assert judge([asked], 1, CHANGES, WORKERS).unlawful == NOT_IN_CHARGE


def test_another_worker_may_lag_for_a_second_which_is_measured() -> None:
    lagging = [answer(1, sent_s, sent_s + 0.1, connection=800) for sent_s in (10.7, 11.0)]
    verdict = judge(lagging, 1, CHANGES, WORKERS)
    assert not verdict.unlawful
    assert verdict.late_s == {0: pytest.approx(0.5)}


def test_a_worker_never_goes_back() -> None:
    new, old = answer(2, 10.1, 10.2), answer(1, 10.3, 10.4)
    assert judge([new, old], 1, CHANGES, WORKERS).unlawful == {
        "older than one before, of the same worker": 1
    }
    elsewhere = old._replace(connection=800)
    overlapping = old._replace(sent_s=10.15)
    for lawful in (elsewhere, overlapping):
        assert not judge([new, lawful], 1, CHANGES, WORKERS).unlawful
