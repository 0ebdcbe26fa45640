"""Intervals of means and shares of rows that come in clusters: blocks, requests, hours."""

from math import pi, sqrt, tan
from statistics import NormalDist
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray


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
        """Of the mean, by Student's quantile with one degree of freedom less than clusters: it
        holds at about this level, at one instant that was not chosen by looking. None below two
        clusters."""
        error = self.standard_error()
        if error is None:
            return None
        half = student((1 + level) / 2, round(self.clusters) - 1) * error
        mean = self.s / self.n
        return Interval(mean - half, mean + half)

    def share_interval(self, level: float = 0.95) -> Interval | None:
        """The same where the numbers are 0 and 1: within [0, 1], and not too short where few are 1.

        Wilson's, of as many independent rows as would vary so much (Dean and Pagano, *Evaluating
        confidence interval methods for binomial proportions in clustered surveys*, J. Survey
        Statistics and Methodology 3(4), 2015). Rows that are all alike do not vary at all, and that
        tells nothing: then each cluster counts as one row.
        """
        if self.s in {0.0, self.n}:
            return wilson(self.clusters if self.s else 0.0, self.clusters, level)
        error = self.standard_error()
        if error is None:
            return None
        share = self.s / self.n
        rows = min(share * (1 - share) / error**2, self.n) if error else self.n
        normal = NormalDist().inv_cdf((1 + level) / 2)
        rows *= (normal / student((1 + level) / 2, round(self.clusters) - 1)) ** 2
        return wilson(share * rows, rows, level)


def student(p: float, degrees: int) -> float:
    """The quantile of Student's distribution, `p` above 1/2: off by at most 0.2 % for three degrees
    of freedom, by less for more (Abramowitz and Stegun, *Handbook of Mathematical Functions*, 1964,
    26.7.5); exact for fewer."""
    if degrees == 1:
        return tan((p - 0.5) * pi)
    if degrees == 2:
        return (2 * p - 1) * sqrt(2 / (4 * p * (1 - p)))
    z = NormalDist().inv_cdf(p)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92_160,
    )
    return z + sum(term / float(degrees) ** power for power, term in enumerate(terms, 1))


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
