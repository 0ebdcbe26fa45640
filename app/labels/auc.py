"""The area under the ROC curve from counts, which add."""

from statistics import NormalDist
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

MOST_SCORES = 131_072
_SIGN = np.uint32(1 << 31)
_PAIR = np.dtype([("key", "<u4"), ("negatives", "<u4"), ("positives", "<u4")])


class Auc(NamedTuple):
    """`low` and `high` are a 95 % interval (DeLong, DeLong and Clarke-Pearson, Biometrics 44,
    1988), None where a side has fewer than two rows. Where scores were made coarser, the area of
    the scores as they were lies within `least` and `most`; else these are the value."""

    value: float
    low: float | None
    high: float | None
    least: float
    most: float


class ScoreCounts(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """How many rows of either truth have each score, as float32: all that the area depends on.

    Exact up to `MOST_SCORES` different scores. Of more, the last `shift` bits of the scores are
    dropped, so that neighbours count as equal.
    """

    shift: int = 0
    content: bytes = b""
    """`_PAIR`s by growing key."""

    @classmethod
    def of(cls, scores: NDArray[np.float64], truths: NDArray[np.bool_]) -> "ScoreCounts":
        """Of finite scores."""
        keys = _ordered(scores.astype(np.float32))
        pairs = np.zeros(len(keys), _PAIR)
        pairs["key"], pairs["positives"], pairs["negatives"] = keys, truths, ~truths
        return _counted(0, pairs)

    def __add__(self, other: "ScoreCounts") -> "ScoreCounts":
        if not (self.content and other.content):
            return self if self.content else other
        return _counted(max(self.shift, other.shift), np.concatenate([self._pairs, other._pairs]))

    @property
    def _pairs(self) -> NDArray[np.void]:
        return np.frombuffer(self.content, _PAIR)

    def auc(self) -> Auc | None:
        """None where all truths are the same."""
        negatives = self._pairs["negatives"].astype(np.int64)
        positives = self._pairs["positives"].astype(np.int64)
        n, p = int(negatives.sum()), int(positives.sum())
        if not n or not p:
            return None
        # Twice as many, so that they are whole numbers: the area is exact but for one division.
        below = 2 * np.cumsum(negatives) - negatives
        above = 2 * (p - np.cumsum(positives)) + positives
        value = int((positives * below).sum()) / (2 * n * p)
        ties = int((positives * negatives).sum()) / (2 * n * p) if self.shift else 0.0
        half = _half_width(value, below / (2 * n), positives, above / (2 * p), negatives)
        if half is None:
            return Auc(value, None, None, value - ties, value + ties)
        low, high = max(value - half, 0.0), min(value + half, 1.0)
        return Auc(value, low, high, value - ties, value + ties)


def _half_width(
    value: float,
    of_positive: NDArray[np.float64],
    positives: NDArray[np.int64],
    of_negative: NDArray[np.float64],
    negatives: NDArray[np.int64],
) -> float | None:
    """`of_positive`: for a positive row of each score, the share of negatives below; `of_negative`:
    for a negative one, the share of positives above. DeLong's structural components."""
    p, n = positives.sum(), negatives.sum()
    if p < 2 or n < 2:
        return None
    s10 = (positives * (of_positive - value) ** 2).sum() / (p - 1)
    s01 = (negatives * (of_negative - value) ** 2).sum() / (n - 1)
    return float(NormalDist().inv_cdf(0.975) * np.sqrt(s10 / p + s01 / n))


def _counted(shift: int, pairs: NDArray[np.void]) -> ScoreCounts:
    """Each key once, coarser until there are few enough."""
    while True:
        keys, places = np.unique(pairs["key"] >> np.uint32(shift), return_inverse=True)
        if len(keys) <= MOST_SCORES:
            break
        shift += 1
    counted = np.zeros(len(keys), _PAIR)
    counted["key"] = keys << np.uint32(shift)
    for truth in ("negatives", "positives"):
        counted[truth] = np.bincount(places, weights=pairs[truth], minlength=len(keys))
    return ScoreCounts(shift, counted.tobytes())


def _ordered(scores: NDArray[np.float32]) -> NDArray[np.uint32]:
    """Numbers in the order of the scores: the bits of a float32 grow with its size."""
    bits = (scores + np.float32(0)).view(np.uint32)  # minus nought is nought
    return np.where(bits & _SIGN, ~bits, bits | _SIGN)
