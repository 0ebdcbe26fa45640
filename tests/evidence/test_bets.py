"""Bets win no more than the claim allows, and only counts matter."""

import math
from collections.abc import Sequence
from itertools import product

import numpy as np
import pytest

from app.evidence.bets import BOLD, BROAD, EVEN, Bets, Mixture
from app.evidence.harms import Evidence, Exposures, of_differences, of_losses, of_rates, turned

MIXTURES = [EVEN, BOLD, BROAD]


def bets(values: Sequence[float], counts: Sequence[float], least: float, mixture: Mixture) -> Bets:
    return Bets(np.array(values), np.array(counts, float), least, least, mixture)


def evidence(values: Sequence[float], counts: Sequence[float], mixture: Mixture = EVEN) -> float:
    return bets(values, counts, -1.0, mixture).log_evidence()


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("up", [0.2, 1.0, 3.0])
def test_the_mean_of_e_is_one_where_the_mean_of_the_numbers_is_0(
    mixture: Mixture, up: float
) -> None:
    chance = 1 / (1 + up)  # of the number `up`; else it is -1
    values = [up, -1.0]
    means = []
    for n in range(1, 7):
        mean = 0.0
        for seen in product((0, 1), repeat=n):
            ups = n - sum(seen)
            mean += (
                chance**ups
                * (1 - chance) ** (n - ups)
                * math.exp(bets(values, [ups, n - ups], -1.0, mixture).log_evidence())
            )
        means.append(mean)
    assert means == pytest.approx([1.0] * 6, rel=1e-12)


@pytest.mark.parametrize("mixture", MIXTURES)
def test_e_falls_where_the_mean_is_below_0(mixture: Mixture) -> None:
    chance = 0.4
    after_one = [math.exp(evidence([value], [1], mixture)) for value in (1.0, -1.0)]
    assert chance * after_one[0] + (1 - chance) * after_one[1] < 1


def test_e_is_reached_no_more_often_than_its_inverse_by_whoever_looks_after_each_number() -> None:
    # All orders of 14 fair numbers of 1 and -1: the share of those that ever reach 1 / alpha.
    logs = np.array([[evidence([1.0, -1.0], [u, d]) for d in range(15)] for u in range(15)])
    for bound in (2.0, 3.0, 5.0):
        ever = 0
        for seen in product((0, 1), repeat=14):
            ups = np.cumsum(seen)
            downs = np.arange(1, 15) - ups
            ever += bool((logs[ups, downs] >= math.log(bound)).any())
        assert 0 < ever / 2**14 <= 1 / bound


def test_nothing_seen_is_no_evidence() -> None:
    assert evidence([], []) == 0.0
    assert of_rates({}, 0.01) == Evidence(0.0, 0.0, 0)
    assert of_differences({}, 100, 0.01) == Evidence(0.0, 0.0, 0)
    assert of_losses((), 100, 0.01) == Evidence(0.0, 0.0, 0)
    assert Exposures(8, 0.5).evidence({}, 0.01) == Evidence(0.0, 0.0, 0)


def test_neither_the_order_nor_the_parts_in_which_numbers_were_counted_matter() -> None:
    whole = evidence([0.5, -0.2], [7, 9])
    assert evidence([-0.2, 0.5], [9, 7]) == pytest.approx(whole, rel=1e-12)
    assert evidence([0.5, -0.2, 0.5, -0.2], [3, 4, 4, 5]) == pytest.approx(whole, rel=1e-12)


def test_no_number_that_was_provided_for_takes_all_of_the_capital() -> None:
    assert math.isfinite(evidence([-1.0], [1_000]))


def test_large_winnings_do_not_overflow() -> None:
    assert evidence([1.0], [100_000]) == pytest.approx(100_000 * math.log(1.95), rel=1e-3)


def test_a_bet_that_could_lose_too_much_is_given_up_with_its_capital() -> None:
    mixture = Mixture([1.0, 0.5], [3.0, 1.0])
    value = np.array([0.1])
    kept = Bets(value, np.ones(1), -2.0, -1.0, mixture)
    assert kept.log_factors()[0, 0] == -np.inf
    assert kept.log_evidence() == pytest.approx(math.log(0.25 * (1 + 0.475 * 0.1)))


def test_differences_turned_round_are_those_of_the_other_direction() -> None:
    assert turned({(-3, -2): 5, (1, 2): 1}) == {(2, 3): 5, (-2, -1): 1}
