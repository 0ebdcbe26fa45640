"""What is bet on has a mean of 0 at most where the claim is true, whatever happens in a block."""

from itertools import product
from math import comb, exp

import numpy as np
import pytest

from app.evidence.bets import FloatArray
from app.evidence.harms import Exposures, of_differences, of_losses, of_rates, turned

MARGIN = 0.05
STEPS = 1_000


def drawn(n: int, share: float) -> FloatArray:
    k = np.arange(n + 1)
    return np.array([comb(n, i) for i in k]) * share**k * (1 - share) ** (n - k)


def mean_of(exposures: Exposures, both: int, ours: int, theirs: int, *, worse: bool) -> float:
    """Of the number of a block in which so many keys are bad with both versions, only with the
    candidate, and only with the champion: over all ways to draw who is answered by whom."""
    mean = 0.0
    share = exposures.share
    for (k, p_k), (a, p_a), (b, p_b) in product(
        enumerate(drawn(both, share)),
        enumerate(drawn(ours, share)),
        enumerate(drawn(theirs, 1 - share)),
    ):
        bad = {(k + a, both - k + b): 1}
        bets = exposures.worse(bad, MARGIN) if worse else exposures.no_worse(bad, MARGIN)
        mean += p_k * p_a * p_b * bets.values[0]
    return mean


@pytest.mark.parametrize(("keys", "share"), [(6, 0.5), (8, 0.1), (7, 0.9)])
def test_whatever_fails_in_a_block_of_exposures_the_bet_is_no_better_than_the_excess(
    keys: int, share: float
) -> None:
    exposures = Exposures(keys, share)
    scale = keys * share * (1 - share)
    for both, ours, theirs in product(range(keys + 1), repeat=3):
        if both + ours + theirs > keys:
            continue
        excess = (ours - theirs) / keys - MARGIN
        mean = mean_of(exposures, both, ours, theirs, worse=True)
        assert mean <= scale * excess + 1e-12
        mean = mean_of(exposures, both, ours, theirs, worse=False)
        assert mean <= -scale * excess + 1e-12


@pytest.mark.parametrize(("keys", "share"), [(20, 0.1), (8, 0.5), (250, 0.1), (250, 0.95)])
def test_no_block_of_exposures_is_below_the_least_that_is_provided_for(
    keys: int, share: float
) -> None:
    blocks = {(a, b): 1 for a in range(keys + 1) for b in (0, 1, keys - a) if a + b <= keys}
    exposures = Exposures(keys, share)
    for bets in (exposures.worse(blocks, MARGIN), exposures.no_worse(blocks, MARGIN)):
        assert (bets.values >= bets.least - 1e-12).all()
        assert np.isfinite(bets.log_factors()).all()


def test_a_candidate_that_is_worse_is_found_so_and_one_that_is_not_is_not() -> None:
    exposures = Exposures(8, 0.5)
    worse = exposures.evidence({(3, 0): 200, (0, 0): 200}, MARGIN)
    assert worse.worse > 9 > 0 > worse.no_worse
    equal = exposures.evidence({(1, 0): 500, (0, 1): 500, (0, 0): 4_000}, MARGIN)
    assert equal.no_worse > 3 > 0 > equal.worse
    assert equal.blocks == 5_000


def test_what_both_do_alike_is_evidence_of_no_excess() -> None:
    alike = Exposures(8, 0.5).evidence({(2, 2): 5_000}, MARGIN)
    assert alike.worse < 0 < alike.no_worse


def test_half_of_the_harm_that_the_margin_allows_is_evidence_for_the_candidate() -> None:
    within = of_rates({(40, 1): 4_000}, MARGIN)
    assert within.worse < 0 < within.no_worse
    beyond = of_rates({(40, 4): 4_000}, MARGIN)
    assert beyond.no_worse < 0 < beyond.worse


def test_harm_that_is_the_margin_wins_nothing_either_way() -> None:
    # Whole executions fail, of another size each.
    blocks = {(1, 1): 5, (1, 0): 95, (32, 32): 5, (32, 0): 95, (7, 7): 5, (7, 0): 95}
    evidence = of_rates(blocks, MARGIN)
    assert evidence.worse < 0
    assert evidence.no_worse < 0


def test_a_difference_on_the_grid_is_rounded_towards_what_the_evidence_is_against() -> None:
    at_the_margin = {(49, 50): 10_000}
    below, above = {(48, 49): 10_000}, {(51, 52): 10_000}
    assert of_differences(at_the_margin, STEPS, MARGIN).worse < 0
    assert of_differences(at_the_margin, STEPS, MARGIN).no_worse == pytest.approx(0.0, abs=1e-12)
    assert of_differences({(50, 51): 10_000}, STEPS, MARGIN).worse == pytest.approx(0.0, abs=1e-12)
    assert of_differences({(50, 51): 10_000}, STEPS, MARGIN).no_worse < 0
    assert of_differences(below, STEPS, MARGIN).no_worse > 0
    assert of_differences(above, STEPS, MARGIN).worse > 0
    assert of_losses([(*pair, 100, n) for pair, n in above.items()], STEPS, MARGIN).worse > 0
    assert of_losses([(50, 51, 100, 9)], STEPS, MARGIN).worse == pytest.approx(0.0, abs=1e-12)
    assert of_losses([(49, 50, 100, 9)], STEPS, MARGIN).no_worse == pytest.approx(0.0, abs=1e-12)


def test_a_shift_up_and_a_shift_down_are_told_apart() -> None:
    up = {(80, 81): 400}
    assert of_differences(up, STEPS, MARGIN).worse > 1
    assert of_differences(turned(up), STEPS, MARGIN).worse < -1


def test_a_loss_whose_bound_is_known_is_found_sooner_than_one_of_minus_1_to_1() -> None:
    known = of_losses([(90, 91, 100, 150)], STEPS, MARGIN)
    unknown = of_differences({(90, 91): 150}, STEPS, MARGIN)
    assert known.worse > 3 * unknown.worse > 0


def test_harm_where_both_say_something_else_counts_as_much_as_anywhere() -> None:
    # In one of ten blocks they differ much; there the candidate is worse by 0.6, in all by 0.06.
    small, large = (0, 0, 100, 9_000), (600, 600, 1_000, 1_000)
    evidence = of_losses([small, large], STEPS, MARGIN)
    assert evidence.no_worse < 0
    # And by less than the margin where the candidate makes up for it elsewhere.
    better = (-20, -20, 100, 9_000)
    assert of_losses([better, large], STEPS, MARGIN).worse < 0


def test_the_evidence_of_loss_is_fair_whatever_the_bounds() -> None:
    """By enumeration: three blocks, each with a bound of 0.1 or 1 and a mean at the margin."""
    kinds = []
    for most in (100, 1_000):
        margin = int(STEPS * MARGIN)
        for value in (most, -most):
            chance = (most + margin) / (2 * most) if value > 0 else (most - margin) / (2 * most)
            kinds.append(((value, value, most, 1), 0.5 * chance))
    mean_worse = mean_no_worse = 0.0
    for blocks in product(kinds, repeat=3):
        chance = float(np.prod([share for _, share in blocks]))
        evidence = of_losses([block for block, _ in blocks], STEPS, MARGIN)
        mean_worse += chance * exp(evidence.worse)
        mean_no_worse += chance * exp(evidence.no_worse)
    assert mean_worse <= 1 + 1e-12
    assert mean_no_worse <= 1 + 1e-12
