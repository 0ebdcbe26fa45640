"""What counts say, against scipy on the raw rows."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from app.comparison import grid
from app.comparison.descriptors import association, bars, distances, quantile
from app.comparison.document import QUANTILES, comparison_document
from app.comparison.intervals import ClusterSums
from app.comparison.pairs import Pairs
from app.comparison.table import ComparisonTable, Counts
from tests.comparison.drawn_pairs import NAMES, drawn

Scores = NDArray[np.float64]


def on_the_grid(values: Scores, bits: int = grid.FINE_BITS) -> Counts:
    return Counts(*np.unique(grid.codes(values, bits), return_counts=True))


def versions(seed: int, rows: int = 3_000) -> tuple[Scores, Scores]:
    random = np.random.default_rng(seed)
    logit = random.normal(-1.0, 1.2, rows)
    other = logit + random.normal(0.05, 0.3, rows)
    return 1 / (1 + np.exp(-logit)), 1 / (1 + np.exp(-other))


def compared(champion: Scores, candidate: Scores) -> ComparisonTable:
    rows = len(champion)
    table = ComparisonTable.empty((), 2, True)
    table.add(
        Pairs(
            (np.arange(rows) // 16).astype(np.int32),
            champion,
            candidate,
            (champion >= 0.4).astype(np.int32),
            (candidate >= 0.4).astype(np.int32),
            np.zeros(rows, np.bool_),
            np.empty((rows, 0), np.int32),
            np.full(rows, 1e-5),
            np.full(rows, 2e-5),
        ),
        0.0,
    )
    return table


FINITE = st.floats(allow_nan=False, allow_infinity=False)


@given(st.lists(FINITE, min_size=2, max_size=2))
def test_bins_are_in_the_order_of_the_numbers(pair: list[float]) -> None:
    low, high = sorted(pair)
    ours, theirs = grid.codes(np.array([low, high])).tolist()
    assert ours <= theirs
    assert (ours == 0) == (low == 0)


@given(st.floats(-1e30, 1e30).filter(lambda value: abs(value) > 1e-30), st.sampled_from([3, 5]))
def test_a_bin_holds_its_numbers_and_its_middle_is_near(value: float, bits: int) -> None:
    code = grid.codes(np.array([value]), bits)
    low, high = (float(end[0]) for end in grid.edges(code, bits))
    slack = abs(value) * 2**-23  # a float32 is not exactly the number
    assert low - slack <= value <= high + slack
    assert (
        abs(float(grid.middles(code, bits)[0]) - value) <= abs(value) * 2.0 ** -(bits + 1) + slack
    )
    assert (grid.codes(-np.array([value]), bits) == -code).all()


@pytest.mark.parametrize("seed", range(3))
def test_quantiles_are_those_of_the_rows_within_the_grid(seed: int) -> None:
    champion, candidate = versions(seed)
    difference = candidate - champion
    counts = on_the_grid(difference)
    for share in (*QUANTILES, 0.0, 1.0):
        exact = np.quantile(difference, share, method="inverted_cdf")
        told = quantile(counts, share, difference.min(), difference.max())
        assert told == pytest.approx(exact, rel=2**-6 + 1e-6)


def test_correlations_are_those_of_the_binned_scores_and_near_those_of_the_rows() -> None:
    champion, candidate = versions(5)
    told = association(compared(champion, candidate).joint())
    binned = [grid.codes(scores, grid.COARSE_BITS) for scores in (champion, candidate)]
    assert told.spearman == pytest.approx(stats.spearmanr(*binned).statistic, abs=1e-12)
    assert told.kendall_tau_b == pytest.approx(stats.kendalltau(*binned).statistic, abs=1e-12)
    assert told.spearman == pytest.approx(stats.spearmanr(champion, candidate).statistic, abs=0.01)
    assert told.kendall_tau_b == pytest.approx(
        stats.kendalltau(champion, candidate).statistic, abs=0.03
    )


def test_a_constant_orders_nothing() -> None:
    told = association(compared(np.full(50, 0.2), np.linspace(0, 1, 50)).joint())
    assert (told.spearman, told.kendall_tau_b) == (None, None)


def test_distances_are_those_of_the_shares_in_the_champions_tenths() -> None:
    champion, candidate = versions(7)
    ours, theirs = on_the_grid(champion), on_the_grid(candidate)
    told = distances(ours, theirs)
    assert told is not None
    assert told.bins == 10
    assert told.psi == pytest.approx(told.kl_champion_candidate + told.kl_candidate_champion)
    assert told.js_distance**2 == pytest.approx(told.js)
    assert 0 <= told.js <= np.log(2)
    null = stats.chi2.ppf(0.99, told.bins - 1) * (2 / len(champion))
    assert told.psi_null_99 == pytest.approx(null, rel=1e-4)
    assert told.ks == pytest.approx(stats.ks_2samp(champion, candidate).statistic, abs=0.02)
    cut = np.quantile(champion, np.arange(1, 10) / 10)
    shares = [np.bincount(np.searchsorted(cut, of)) / len(of) for of in (champion, candidate)]
    by_the_rows = sum((p - q) * np.log(p / q) for p, q in zip(*shares, strict=True))
    assert told.psi == pytest.approx(by_the_rows, rel=0.25, abs=2e-3)
    assert told.kl_champion_candidate == pytest.approx(stats.entropy(*shares), rel=0.25, abs=1e-3)


def test_distances_where_one_has_nothing_in_a_bin_are_finite() -> None:
    random = np.random.default_rng(8)
    told = distances(on_the_grid(random.random(500)), on_the_grid(random.random(500) / 4))
    assert told is not None
    assert 1 < told.psi < 50
    assert told.ks == pytest.approx(0.75, abs=0.06)
    apart = distances(on_the_grid(np.full(500, 0.1)), on_the_grid(np.full(500, 0.9)))
    assert apart is not None
    assert (apart.bins, apart.psi, apart.ks) == (1, 0.0, 1.0)  # one tenth alone, which all are in
    assert distances(on_the_grid(np.empty(0)), on_the_grid(np.ones(1))) is None


def test_the_same_scores_are_at_no_distance() -> None:
    champion, _ = versions(9)
    told = distances(on_the_grid(champion), on_the_grid(champion))
    assert told is not None
    assert (told.psi, told.js, told.ks) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("scale", [1.0, 1e-4, 3e5])
def test_bars_hold_exactly_the_rows_between_their_edges(scale: float) -> None:
    champion, candidate = (scores * scale for scores in versions(10))
    difference = (candidate - champion).astype(np.float32).astype(np.float64)
    (told,) = bars(on_the_grid(difference))
    edges = told.first + told.width * np.arange(len(told.counts) + 1)
    negative, positive = -difference[difference < 0], difference[difference >= 0]
    expected = np.histogram(positive, edges[edges >= 0])[0]
    mirrored = np.histogram(negative, -edges[edges <= 0][::-1])[0][::-1]
    # The last bar of numpy holds its upper edge, ours does not: no number here is on one.
    assert told.counts == [*mirrored.tolist(), *expected.tolist()]
    assert sum(told.counts) + told.below + told.above == len(difference)
    assert len(told.counts) <= 128
    assert told.below + told.above <= 0.02 * len(difference)


def test_the_document_says_what_the_rows_say() -> None:
    champion, candidate = versions(11)
    told = comparison_document(compared(champion, candidate), (False, True))
    difference = candidate - champion
    flips = (champion >= 0.4) != (candidate >= 0.4)
    assert told["flips"]["share"] == pytest.approx(flips.mean())
    assert told["agreement"] == pytest.approx(1 - flips.mean())
    assert {tuple(cell.values()) for cell in told["decisions"]} == {
        (ours, theirs, int((((champion >= 0.4) == ours) & ((candidate >= 0.4) == theirs)).sum()))
        for ours in (False, True)
        for theirs in (False, True)
    }
    of = told["difference"]
    assert of["mean"] == pytest.approx(difference.mean(), abs=1e-12)
    assert of["mean_absolute"]["mean"] == pytest.approx(np.abs(difference).mean(), abs=1e-12)
    assert of["standard_deviation"] == pytest.approx(difference.std(ddof=1))
    assert (of["min"], of["max"]) == (difference.min(), difference.max())
    blocks = np.arange(len(champion)) // 16
    low, high = ClusterSums.of(difference, blocks).interval() or (0, 0)
    assert (of["low"], of["high"]) == pytest.approx((low, high))
    assert told["champion"]["mean"] == pytest.approx(champion.mean())
    assert told["execution_time"]["ratio_of_means"] == pytest.approx(2.0)


def test_a_share_of_nothing_is_not_known_to_be_nothing() -> None:
    champion, candidate = versions(12, rows=320)
    told = comparison_document(compared(champion, candidate))
    assert told["failed"]["share"] == 0.0
    assert 0 == told["failed"]["low"] < told["failed"]["high"] < 0.2  # of 20 blocks


@pytest.mark.parametrize("pairs", [None, drawn(1, 1), drawn(2, 400, trouble=0.9)])
def test_a_document_is_json_whatever_was_counted(pairs: Pairs | None) -> None:
    table = ComparisonTable.empty(NAMES, 2, True)
    if pairs is not None:
        table.add(pairs, 0.0)
    assert json.loads(json.dumps(comparison_document(table), allow_nan=False))
