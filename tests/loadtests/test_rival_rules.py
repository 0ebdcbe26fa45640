"""The rules of others, on answers of which it is plain what they say."""

import numpy as np
from numpy.typing import NDArray

from loadtests.equal_versions import Answers, Sample
from loadtests.rival_rules import kayenta, of_answers, of_sample

REQUESTS = 10_000
"""In 20 checks of 500, of which the candidate answers every second request."""


def answers(bad_of_ours: list[int], bad_of_theirs: list[int]) -> Answers:
    """One rollout: so many bad answers of both in each check, the first ones."""
    candidate = np.tile([True, False], REQUESTS // 2)
    bad = np.zeros((20, REQUESTS // 20), np.bool_)
    for check, (ours, theirs) in enumerate(zip(bad_of_ours, bad_of_theirs, strict=True)):
        bad[check, : 2 * ours : 2] = True
        bad[check, 1 : 2 * theirs + 1 : 2] = True
    return Answers(candidate[np.newaxis], bad.reshape(1, -1))


def rolled_back(of: Answers) -> set[str]:
    return {rule for rule, found in of_answers(of, are_errors=True).items() if found[0]}


def series(*values: float) -> NDArray[np.float64]:
    return np.array([values])


def test_nobody_rolls_back_what_never_fails() -> None:
    assert rolled_back(answers([0] * 20, [0] * 20)) == set()


def test_argo_aborts_at_one_failed_check_and_flagger_at_ten() -> None:
    # 2 of 250 are 0.8 %, 3 are 1.2 %.
    assert "Argo" not in rolled_back(answers([2] * 20, [2] * 20))
    assert rolled_back(answers([3] + [0] * 19, [3] + [0] * 19)) == {"Argo"}
    assert "Flagger" not in rolled_back(answers([3] * 9 + [0] * 11, [3] * 20))
    assert "Flagger" in rolled_back(answers([3] * 10 + [0] * 10, [3] * 20))


def test_two_proportions_are_compared_with_what_came_up_to_each_look() -> None:
    # 20 of the first 50 answers of the candidate fail, then none; more of the champion's in all.
    found = rolled_back(answers([20] + [0] * 19, [7] + [15] * 19))
    assert {"z 0.01", "z 0.05"} <= found
    assert not {"z 0.01", "z 0.05"} & rolled_back(answers([1] * 20, [1] * 20))


def test_kayenta_asks_whether_a_series_is_higher_as_a_whole() -> None:
    low = np.linspace(0.001, 0.002, 20)
    assert kayenta(series(*(low + 0.01)), series(*low)).tolist() == [True]
    assert kayenta(series(*low), series(*low)).tolist() == [False]
    assert kayenta(series(*low), series(*(low + 0.01))).tolist() == [False]


def test_a_mean_is_held_against_its_margin_at_each_look() -> None:
    n = np.array([[100.0, 400.0]])
    # The mean is 0.5 and the deviation 0.5: z = 2 after 100 and 0 after 400.
    sample = Sample(n, np.array([[50.0, 160.0]]), np.array([[50.0, 160.0]]), 0.4)
    assert {rule: bool(found[0]) for rule, found in of_sample(sample).items()} == {
        "z 0.01": False,
        "z 0.05": True,
    }
