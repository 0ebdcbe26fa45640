"""The proof of the evidence, in small: fewer rollouts, and two rules that are altered."""

import pytest

from loadtests.equal_versions import CASES
from loadtests.prove_evidence import Size, false_rollbacks, lower_bound, prove, upper_bound


@pytest.mark.parametrize("case", CASES)
def test_no_candidate_that_is_no_worse_is_rolled_back(case: str) -> None:
    of = false_rollbacks(case, CASES[case], Size(rollouts=30, observations=5_000, seed=8))
    assert of.ours == 0
    assert of.largest_error < 1e-9  # of what `judge` says of the same blocks


@pytest.mark.parametrize(
    ("alter", "case", "observations"),
    [("margin", "shadow: flips", 20_000), ("exposures", "sticky keys, some", 50_000)],
)
def test_an_altered_rule_is_seen(alter: str, case: str, observations: int) -> None:
    size = Size(rollouts=60, observations=observations, worse=1, seed=8, only=case)
    assert prove(size).violations == []
    altered = Size(60, observations, 1, 8, alter, case)
    [violation] = prove(altered).violations
    assert violation.startswith(case)


def test_what_is_worse_is_found_and_what_is_as_good_is_promoted() -> None:
    report = prove(Size(rollouts=2, observations=2_000, worse=20, seed=8, only="labels, buckets"))
    assert report.violations == []
    [found] = report.found
    assert found.rolled_back == 1.0
    by_the_margin, as_good = report.promoted
    assert by_the_margin.promoted <= 3
    assert as_good.promoted == 20


def test_the_bounds_are_those_of_clopper_and_pearson() -> None:
    assert upper_bound(0, 10_000) == pytest.approx(2.9953e-4, rel=1e-3)
    assert upper_bound(8, 10_000) == pytest.approx(1.4431e-3, rel=1e-3)
    assert upper_bound(7, 7) == 1.0
    assert lower_bound(0, 7) == 0.0
    assert lower_bound(7, 7) == pytest.approx(0.05 ** (1 / 7), rel=1e-6)
