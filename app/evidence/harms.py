"""Blocks of answers as the numbers that are bet on, for each design (docs/canary.md).

Of every kind of harm there are two claims. *No worse*: the candidate's harm exceeds the champion's
by the margin at most; evidence against it has a candidate rolled back. *Worse*: it exceeds it by
the margin at least; evidence against that is what a promotion needs. Numbers on a grid are rounded
towards what the evidence is against.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import numpy as np

from app.evidence.bets import BOLD, BROAD, EVEN, Bets, FloatArray

BadCounts: TypeAlias = Mapping[tuple[int, int], float]
"""Of blocks of exposures: how many had so many bad answers of the candidate and of the champion."""
RateCounts: TypeAlias = Mapping[tuple[int, int], int]
"""Of executions: how many had so many rows, of which so many were harmed."""
StepCounts: TypeAlias = Mapping[tuple[int, int], int]
"""Of blocks: how many have a mean between these two whole numbers of steps."""

LossCounts: TypeAlias = Sequence[tuple[int, int, int, int]]
"""Two such numbers, what bounds the absolute value of the mean, in steps, and how many blocks."""

LOSS_STEPS = 20_000
"""Of the grid on which block means of the difference of a loss are counted."""
USUAL_LOSS = 0.1

# Of the margin: what cutting a block may add to its mean, and is taken off again.
_GIVEN = 0.05
_LEAST_EXCESS = 4.0


@dataclass(frozen=True, slots=True)
class Evidence:
    """Natural logarithms of E."""

    worse: float
    """Against the claim that the candidate is no worse than the margin."""
    no_worse: float
    """Against the claim that it is worse by the margin or more."""
    blocks: int


@dataclass(frozen=True, slots=True)
class Claims:
    """What is bet on the same blocks against both claims."""

    worse: Bets
    """Against the claim that the candidate is no worse than the margin."""
    no_worse: Bets

    def evidence(self) -> Evidence:
        blocks = int(self.worse.counts.sum())
        return Evidence(self.worse.log_evidence(), self.no_worse.log_evidence(), blocks)


def of_rates(blocks: RateCounts, margin: float) -> Evidence:
    """Executions of a candidate that is shown requests: the share of their rows that it harms.

    The champion has answered them all. `margin` above 0 and below 1.
    """
    return rate_bets(blocks, margin).evidence()


def rate_bets(blocks: RateCounts, margin: float) -> Claims:
    share, counts = _shares(blocks)
    return Claims(
        worse=Bets(share - margin, counts, -margin, -2 * margin, EVEN),
        no_worse=Bets(margin - share, counts, margin - 1, margin - 1, BOLD),
    )


def of_differences(blocks: StepCounts, steps: int, margin: float) -> Evidence:
    """Block means of a paired difference in -1 … 1, of which more is worse, on a grid of
    1 / `steps`: how far the score is shifted."""
    return difference_bets(blocks, steps, margin).evidence()


def difference_bets(blocks: StepCounts, steps: int, margin: float) -> Claims:
    low, high, counts = _means(blocks, steps)
    return Claims(
        worse=Bets(low - margin, counts, -1 - margin, -1 - margin, BOLD),
        no_worse=Bets(margin - high, counts, margin - 1, margin - 1, BOLD),
    )


def of_losses(blocks: LossCounts, steps: int, margin: float) -> Evidence:
    """Block means of the difference of a loss as `(low, high, most, blocks)`, of which `most`
    bounds the absolute value and follows from what both said, before the label is known.

    The largest bet is what a bound of `USUAL_LOSS` allows, some ten times what -1 … 1 would:
    labels are few. Blocks whose bound is higher have the bets given up that are too large for them.
    To make those smaller in such blocks alone would count little where the two say something else,
    which is where harm is.
    """
    return loss_bets(sorted(blocks), steps, margin).evidence()


def loss_bets(blocks: LossCounts, steps: int, margin: float) -> Claims:
    low, high, most, counts = np.array(blocks, np.float64).reshape(-1, 4).T
    least, usual = -most / steps - margin, -USUAL_LOSS - margin
    return Claims(
        worse=Bets(low / steps - margin, counts, least, usual, BROAD),
        no_worse=Bets(margin - high / steps, counts, least, usual, BROAD),
    )


def turned(blocks: StepCounts) -> StepCounts:
    """The same differences with the other sign."""
    return {(-high, -low): count for (low, high), count in blocks.items()}


@dataclass(frozen=True, slots=True)
class Exposures:
    """Blocks of `keys` first exposures each, one after the other in one worker, of which each had
    its answer from the candidate with the probability `share`.

    With a and b bad answers of both, (1 - share) a - share b has the mean
    keys share (1 - share) (harm of the candidate - harm of the champion), whatever bursts there
    are inside the block: who is answered by whom was drawn independently of them.
    """

    keys: int
    share: float

    def evidence(self, blocks: BadCounts, margin: float) -> Evidence:
        return self.bets(blocks, margin).evidence()

    def bets(self, blocks: BadCounts, margin: float) -> Claims:
        return Claims(self.worse(blocks, margin), self.no_worse(blocks, margin))

    def worse(self, blocks: BadCounts, margin: float) -> Bets:
        excess, counts = self._excess(blocks)
        allowed = self._allowed(margin)
        # What is cut above only costs power: an outage of the candidate is hardly cut.
        most = max(_LEAST_EXCESS, self.keys * self.share * (1 - self.share))
        cut = _cut(self.keys, 1 - self.share, self.share, allowed)
        values = cut.of(np.minimum(excess, most) - allowed)
        return Bets(values, counts, cut.least, cut.least, BOLD)

    def no_worse(self, blocks: BadCounts, margin: float) -> Bets:
        excess, counts = self._excess(blocks)
        allowed = self._allowed(margin)
        cut = _cut(self.keys, self.share, 1 - self.share, -allowed)
        return Bets(cut.of(allowed - excess), counts, cut.least, cut.least, BOLD)

    def _allowed(self, margin: float) -> float:
        return self.keys * self.share * (1 - self.share) * margin

    def _excess(self, blocks: BadCounts) -> tuple[FloatArray, FloatArray]:
        bad = np.array(list(blocks), np.float64).reshape(-1, 2)
        excess = (1 - self.share) * bad[:, 0] - self.share * bad[:, 1]
        return excess, np.array(list(blocks.values()), np.float64)


@dataclass(frozen=True, slots=True)
class _Cut:
    """Numbers are cut at `-most`, and `given` less: what that adds to their mean at most."""

    most: float
    given: float

    @property
    def least(self) -> float:
        return -self.most - self.given

    def of(self, values: FloatArray) -> FloatArray:
        return np.maximum(values, -self.most) - self.given


@lru_cache(maxsize=1024)
def _cut(keys: int, share: float, weight: float, offset: float) -> _Cut:
    """Of numbers that are at least -(weight n + offset), where n of `keys` were drawn, each with
    the probability `share`, whatever else happens.

    That all of them are drawn is next to impossible: to provide for it would make every bet small.
    What the cut adds to the mean is weight E[max(n - k, 0)] at most, for the cut at n = k.
    """
    drawn = _binomial(keys, share)
    more = np.cumsum(drawn[:0:-1])[::-1]  # [k]: the probability that n > k, for k < keys
    given = np.append(weight * np.cumsum(more[::-1])[::-1], 0.0)
    k = int(np.argmax(given <= _GIVEN * abs(offset)))
    return _Cut(weight * k + offset, float(given[k]))


def _binomial(n: int, share: float) -> FloatArray:
    k = np.arange(n + 1)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    log = log_factorial[n] - log_factorial[k] - log_factorial[n - k]
    chances: FloatArray = np.exp(log + k * np.log(share) + (n - k) * np.log1p(-share))
    return chances


def _shares(blocks: RateCounts) -> tuple[FloatArray, FloatArray]:
    sizes = np.array(list(blocks), np.float64).reshape(-1, 2)
    return sizes[:, 1] / sizes[:, 0], np.array(list(blocks.values()), np.float64)


def _means(blocks: StepCounts, steps: int) -> tuple[FloatArray, FloatArray, FloatArray]:
    bounds = np.array(list(blocks), np.float64).reshape(-1, 2) / steps
    return bounds[:, 0], bounds[:, 1], np.array(list(blocks.values()), np.float64)
