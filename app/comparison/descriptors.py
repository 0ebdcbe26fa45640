"""What counts of two versions' scores say: shown, and never deciding.

All are pure functions of counts on the grid of app/comparison/grid.py. Distances between the two
distributions of scores say nothing about single rows: both may be alike though every prediction has
changed. In a shadow the rows are the same, and the paired difference is what counts.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.comparison import grid
from app.comparison.table import Counts, joint_bins

PSI_BINS = 10
PSI_PRACTICAL = 0.1
"""The customary threshold above which two distributions count as different in practice."""

_MOST_CELLS = 1 << 22
_SMALLEST = float(np.finfo(np.float32).tiny)

# The 99 % quantile of chi-squared with 1 to 9 degrees of freedom.
_CHI2_99 = (6.6349, 9.2103, 11.3449, 13.2767, 15.0863, 16.8119, 18.4753, 20.0902, 21.6660)


def quantile(counts: Counts, share: float, least: float, largest: float) -> float | None:
    """The smallest number that at least this share of the numbers is not above, off by at most
    1.6 % (2^-6) of itself; None of no numbers. `least` and `largest` of them, so far as known."""
    if not len(counts.keys):
        return None
    reached = np.cumsum(counts.counts)
    rank = max(np.ceil(share * float(reached[-1])), 1.0)
    place = int(np.searchsorted(reached, rank))
    middle = float(grid.middles(counts.keys[place]))
    return float(np.clip(middle, least, largest))


@dataclass(frozen=True, slots=True)
class Distances:
    """How far apart two distributions of scores are, over `bins` bins at the champion's deciles.

    `psi`: the population stability index, the sum of (p - q) ln(p / q), which is the sum of both
    Kullback-Leibler divergences. Between independent samples of one distribution it is below
    `psi_null_99` in 99 % of cases: (1/n + 1/m) times a chi-squared with bins - 1 degrees of freedom
    (Yurdakul & Naranjo, *Statistical properties of the population stability index*, J. Risk Model
    Validation 14(4), 2020). The two samples here are of the same rows, so that it is no test.
    `kl_champion_candidate`: Kullback-Leibler divergence of the champion's distribution from the
    candidate's, in nats; `kl_candidate_champion` the other way round. `js`: Jensen-Shannon
    divergence, ln 2 at most (Lin, *Divergence measures based on the Shannon entropy*, IEEE Trans.
    Inf. Theory 37(1), 1991); `js_distance` its root, a metric. `ks`: Kolmogorov-Smirnov distance,
    the largest difference of the shares below any edge of the fine grid.

    A bin in which one has nothing counts as half a row of it.
    """

    bins: int
    psi: float
    psi_null_99: float
    kl_champion_candidate: float
    kl_candidate_champion: float
    js: float
    js_distance: float
    ks: float


def distances(champion: Counts, candidate: Counts) -> Distances | None:
    """None where either has no rows."""
    n, m = champion.total, candidate.total
    if not n or not m:
        return None
    keys = np.union1d(champion.keys, candidate.keys)
    ours, theirs = (_on(keys, counts) for counts in (champion, candidate))
    ks = np.abs(np.cumsum(ours) / n - np.cumsum(theirs) / m).max()

    bin_of = _deciles(ours)
    bins = int(bin_of[-1]) + 1
    p, q = (_shares(np.bincount(bin_of, of, minlength=bins)) for of in (ours, theirs))
    middle = (p + q) / 2
    js = max((_divergence(p, middle) + _divergence(q, middle)) / 2, 0.0)
    one, other = _divergence(p, q), _divergence(q, p)
    null = _CHI2_99[bins - 2] * (1 / n + 1 / m) if bins > 1 else 0.0
    return Distances(bins, one + other, null, one, other, js, js**0.5, float(ks))


@dataclass(frozen=True, slots=True)
class Association:
    """How alike two versions order the same rows, from counts of both scores on the coarse grid.

    `spearman`: the correlation of ranks, those that tie having the mean of theirs. `kendall_tau_b`:
    of pairs of rows, by how much more often both order them alike than otherwise (Kendall, *The
    treatment of ties in ranking problems*, Biometrika 33(3), 1945). Scores in one bin of the coarse
    grid, up to 12.5 % apart, tie: the pairs that are left are ordered alike a little more often.
    """

    spearman: float | None
    kendall_tau_b: float | None


def association(joint: Counts) -> Association:
    """None where all scores of one version are alike, or bins are too many to be counted."""
    if not len(joint.keys):
        return Association(None, None)
    bins = joint_bins(joint.keys)
    (ours, row), (theirs, column) = (np.unique(of, return_inverse=True) for of in bins)
    if len(ours) < 2 or len(theirs) < 2 or len(ours) * len(theirs) > _MOST_CELLS:
        return Association(None, None)
    cells = np.zeros((len(ours), len(theirs)))
    cells[row, column] = joint.counts
    return Association(_spearman(cells), _kendall(cells))


def _spearman(cells: NDArray[np.float64]) -> float:
    n = cells.sum()
    ranks = []
    for axis in (1, 0):
        of_bins = cells.sum(axis=axis)
        ranks.append(np.cumsum(of_bins) - of_bins / 2 - n / 2)  # about their mean
    ours, theirs = ranks
    covariance = ours @ cells @ theirs
    scale = (ours**2 @ cells.sum(axis=1)) * (theirs**2 @ cells.sum(axis=0))
    return float(covariance / scale**0.5)


def _kendall(cells: NDArray[np.float64]) -> float:
    below = np.zeros((cells.shape[0] + 1, cells.shape[1] + 1))
    below[1:, 1:] = cells.cumsum(axis=0).cumsum(axis=1)
    columns = below[-1]
    alike = (cells * below[:-1, :-1]).sum()
    # Fewer of the champion's score, more of the candidate's.
    otherwise = (cells * (below[:-1, -1:] - below[:-1, 1:])).sum()
    n = columns[-1]
    pairs = n * (n - 1) / 2
    tied = [(of * (of - 1) / 2).sum() for of in (cells.sum(axis=1), cells.sum(axis=0))]
    scale = (pairs - tied[0]) * (pairs - tied[1])
    return float((alike - otherwise) / scale**0.5)


@dataclass(frozen=True, slots=True)
class Bars:
    """Counts for a plot: of `counts[i]` numbers between `first + i * width` and one `width` more.
    `below` and `above` are further out."""

    width: float
    first: float
    counts: list[int]
    below: int
    above: int


def bars(*counted: Counts) -> list[Bars]:
    """The same bars for all, at most 64 on either side of 0, as wide as 99 % of the numbers need.

    Their width is a power of two, and so the edges of the bars are edges of the grid: the counts
    are exact.
    """
    keys = np.unique(np.concatenate([counts.keys for counts in counted]))
    if not len(keys):
        return [Bars(1.0, 0.0, [], 0, 0) for _ in counted]
    total = np.stack([_on(keys, counts) for counts in counted]).sum(axis=0)
    reached = np.cumsum(total) / total.sum()
    inner = keys[np.searchsorted(reached, 0.005) : np.searchsorted(reached, 0.995) + 1]
    low, high = grid.edges(inner)
    reach = max(abs(float(low[0])), abs(float(high[-1])), _SMALLEST)
    width = 2.0 ** np.ceil(np.log2(reach / 64))
    places = _bar(inner, width)
    first, last = int(places.min()), int(places.max())
    told = []
    for counts in counted:
        of = _bar(counts.keys, width)
        inside = (of >= first) & (of <= last)
        in_bars = np.bincount(of[inside] - first, counts.counts[inside], minlength=last - first + 1)
        told.append(
            Bars(
                float(width),
                first * float(width),
                in_bars.astype(np.int64).tolist(),
                int(counts.counts[of < first].sum()),
                int(counts.counts[of > last].sum()),
            )
        )
    return told


def _bar(keys: NDArray[np.int64], width: float) -> NDArray[np.int64]:
    """The bar of each bin: those of negative numbers mirror the others, 0 is with the positive."""
    low, high = grid.edges(keys)
    inner = np.where(keys < 0, -high, low)
    # More than this is further out whatever the width.
    away = np.minimum(np.floor(inner / width), 1 << 40).astype(np.int64)
    return np.where(keys < 0, -1 - away, away)


def _on(keys: NDArray[np.int64], counts: Counts) -> NDArray[np.float64]:
    """The counts of these keys, of which they are all."""
    of = np.zeros(len(keys))
    of[np.searchsorted(keys, counts.keys)] = counts.counts
    return of


def _deciles(counts: NDArray[np.float64]) -> NDArray[np.int64]:
    """Which of the champion's tenths each key is in: it goes up as soon as a tenth is full. There
    are fewer where a key alone fills more than one."""
    own = counts[counts > 0]
    filled = np.floor((np.cumsum(own) - own) * PSI_BINS / own.sum())
    begins = np.zeros(len(counts), dtype=np.int64)
    # A key without any row of the champion begins none.
    begins[counts > 0] = np.diff(filled, prepend=0.0) > 0
    bin_of: NDArray[np.int64] = np.cumsum(begins)
    return bin_of


def _shares(counts: NDArray[Any]) -> NDArray[np.float64]:
    filled = np.where(counts > 0, counts, 0.5)
    shares: NDArray[np.float64] = filled / filled.sum()
    return shares


def _divergence(p: NDArray[np.float64], q: NDArray[np.float64]) -> float:
    return float((p * np.log(p / q)).sum())
