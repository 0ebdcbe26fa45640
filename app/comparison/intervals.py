"""Intervals of means and shares of rows that come in clusters: blocks, requests, hours."""

from statistics import NormalDist
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

FEW_CLUSTERS = 30
"""With fewer, the normal quantile makes intervals too short."""


class Interval(NamedTuple):
    """Bounds, `low` at most `high`."""

    low: float
    high: float


class ClusterSums(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What is needed of clustered numbers for their mean and its interval; sums, so they add.

    Over clusters c with `n_c` rows whose numbers add up to `s_c`: how many there are, and the sums
    of n, n^2, s, s^2 and n s.
    """

    clusters: float = 0
    n: float = 0
    n2: float = 0
    s: float = 0
    s2: float = 0
    ns: float = 0

    @classmethod
    def of(cls, values: ArrayLike, cluster: ArrayLike) -> "ClusterSums":
        """Of rows: their numbers, and integers of which the same ones are the same cluster."""
        numbers = np.asarray(values, dtype=np.float64)
        _, members = np.unique(np.asarray(cluster), return_inverse=True)
        n = np.bincount(members).astype(np.float64)
        return cls.of_clusters(n, np.bincount(members, weights=numbers))

    @classmethod
    def of_clusters(cls, n: NDArray[Any], s: NDArray[Any]) -> "ClusterSums":
        """Of clusters with so many rows each, which add up to `s`."""
        return cls(
            float(np.count_nonzero(n)),
            *(float(numbers.sum()) for numbers in (n, n * n, s, s * s, n * s)),
        )

    def add(self, values: ArrayLike, cluster: ArrayLike) -> "ClusterSums":
        """With these rows too, whose clusters are others than those before."""
        return self + ClusterSums.of(values, cluster)

    def __add__(self, other: "ClusterSums") -> "ClusterSums":
        both = zip(msgspec.structs.astuple(self), msgspec.structs.astuple(other), strict=True)
        return ClusterSums(*(one + two for one, two in both))

    def mean(self) -> float | None:
        """Of the rows; None where there are none."""
        return self.s / self.n if self.n else None

    def standard_error(self) -> float | None:
        """Of the mean, however much alike the rows of a cluster are; None below two clusters.

        The mean is a ratio of sums over clusters. Linearised (Cochran, *Sampling Techniques*, 3rd
        edition, 1977, 6.4 and 9A.2), its variance is c/(c-1) times the sum of (s_c - mean n_c)^2,
        over n^2.
        """
        if self.clusters < 2 or not self.n:
            return None
        mean = self.s / self.n
        # Rounding may leave a little below nothing.
        squares = max(self.s2 - 2 * mean * self.ns + mean * mean * self.n2, 0.0)
        return float((squares * self.clusters / (self.clusters - 1)) ** 0.5 / self.n)

    def interval(self, level: float = 0.95) -> Interval | None:
        """Of the mean, by the normal quantile: it holds at about this level from `FEW_CLUSTERS`
        on, at one instant that was not chosen by looking. None below two clusters."""
        error = self.standard_error()
        if error is None:
            return None
        half = NormalDist().inv_cdf((1 + level) / 2) * error
        mean = self.s / self.n
        return Interval(mean - half, mean + half)


def wilson(successes: float, n: float, level: float = 0.95) -> Interval | None:
    """Of a share of independent rows (Wilson, *Probable inference, the law of succession, and
    statistical inference*, JASA 22, 1927); None where there are no rows."""
    if not n:
        return None
    z = NormalDist().inv_cdf((1 + level) / 2)
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    return Interval(max(centre - half, 0.0), min(centre + half, 1.0))
