"""Intervals of clustered rows, against the formulas' oracles and by how often they hold."""

import numpy as np
import pytest
from scipy import stats

from app.comparison.intervals import ClusterSums, student, wilson


def test_clusters_of_one_row_are_a_plain_mean() -> None:
    values = np.random.default_rng(1).normal(2.0, 3.0, 400)
    sums = ClusterSums.of(values, np.arange(400))
    assert sums.mean() == pytest.approx(values.mean())
    assert sums.standard_error() == pytest.approx(stats.sem(values))
    low, high = sums.interval() or (0, 0)
    half = stats.t.ppf(0.975, 399) * stats.sem(values)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half))


def test_rows_that_repeat_their_cluster_add_no_certainty() -> None:
    values = np.random.default_rng(2).normal(size=60)
    alone = ClusterSums.of(values, np.arange(60))
    repeated = ClusterSums.of(np.repeat(values, 10), np.repeat(np.arange(60), 10))
    assert repeated.standard_error() == pytest.approx(alone.standard_error())


def test_sums_add_as_if_all_were_counted_at_once() -> None:
    random = np.random.default_rng(3)
    values, cluster = random.normal(size=90), np.sort(random.integers(0, 20, 90))
    cut = int(np.flatnonzero(np.diff(cluster))[8]) + 1
    parts = ClusterSums.of(values[:cut], cluster[:cut]).add(values[cut:], cluster[cut:])
    whole = ClusterSums.of(values, cluster)
    for name in ClusterSums.__struct_fields__:
        assert getattr(parts, name) == pytest.approx(getattr(whole, name))


def test_one_cluster_tells_nothing_of_how_they_vary() -> None:
    sums = ClusterSums.of([1.0, 2.0], [7, 7])
    assert (sums.mean(), sums.standard_error(), sums.interval()) == (1.5, None, None)
    assert ClusterSums().mean() is None


@pytest.mark.parametrize("clusters", [3, 8, 60])
def test_the_interval_holds_as_often_as_it_says_where_rows_of_a_cluster_are_alike(
    clusters: int,
) -> None:
    """600 samples of clusters of unequal size whose rows share most of what they are."""
    random = np.random.default_rng(4)
    held = plain = 0
    for _ in range(600):
        sizes = random.integers(1, 12, clusters)
        cluster = np.repeat(np.arange(clusters), sizes)
        shared = np.repeat(random.normal(0.3, 1.0, clusters), sizes)
        values = shared + random.normal(0, 0.3, sizes.sum())
        low, high = ClusterSums.of(values, cluster).interval() or (1, 0)
        held += low <= 0.3 <= high
        half = 1.96 * values.std(ddof=1) / len(values) ** 0.5
        plain += abs(values.mean() - 0.3) <= half
    assert 0.9 <= held / 600 <= 0.975
    assert plain / 600 < 0.7  # what would be said if the rows were taken for independent


@pytest.mark.parametrize(
    ("share", "alike", "clusters"), [(0.05, 5, 10), (0.01, 5, 30), (0.01, 1e9, 30), (0.3, 5, 3)]
)
def test_the_interval_of_a_share_holds_where_few_rows_are_harmed_in_few_clusters(
    share: float, alike: float, clusters: int
) -> None:
    """600 samples; a share of each cluster's own is drawn, the more apart the less `alike`."""
    random = np.random.default_rng(6)
    held = plain = 0
    for _ in range(600):
        cluster = np.repeat(np.arange(clusters), random.integers(1, 33, clusters))
        of_clusters = random.beta(share * alike, (1 - share) * alike, clusters)
        sums = ClusterSums.of(random.random(len(cluster)) < of_clusters[cluster], cluster)
        low, high = sums.share_interval() or (1, 0)
        assert 0 <= low <= sums.s / sums.n + 1e-12 <= high + 2e-12 <= 1 + 3e-12
        held += low <= share <= high
        half = 1.96 * (sums.standard_error() or 0.0)
        plain += abs(sums.s / sums.n - share) <= half
    assert held / 600 >= 0.92
    assert plain / 600 < 0.92


def test_students_quantile_is_that_of_scipy() -> None:
    for degrees, off in ((1, 1e-12), (2, 1e-12), (3, 2e-3), (8, 2e-5), (1e7, 1e-9)):
        exact = stats.t.ppf(0.975, degrees)
        assert student(0.975, round(degrees)) == pytest.approx(exact, rel=off)


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (3, 10), (10, 10), (17, 1000)])
def test_a_share_of_independent_rows(successes: int, n: int) -> None:
    expected = stats.binomtest(successes, n).proportion_ci(0.95, method="wilson")
    assert wilson(successes, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_no_rows_have_no_share() -> None:
    assert wilson(0, 0) is None
