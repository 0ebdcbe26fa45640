"""Blocks of answers as the numbers that are bet on, for each design (docs/canary.md).

Of every kind of harm there are two claims. *No worse*: the candidate's harm exceeds the champion's
by the margin at most; evidence against it has a candidate rolled back. *Worse*: it exceeds it by
the margin at least; evidence against that is what a promotion needs. Numbers on a grid are rounded
towards what the evidence is against.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from app.evidence.bets import BOLD, EVEN, FloatArray, Mixture

BadCounts: TypeAlias = Mapping[tuple[int, int], int]
"""Of blocks of exposures: how many had so many bad answers of the candidate and of the champion."""
RateCounts: TypeAlias = Mapping[tuple[int, int], int]
"""Of executions: how many had so many rows, of which so many were harmed."""
StepCounts: TypeAlias = Mapping[tuple[int, int], int]
"""Of blocks: how many have a mean between these two whole numbers of steps."""

LOSS_STEPS = 20_000
"""Of the grid on which block means of the difference of a loss are counted."""
_USUAL_LOSS = 0.1

# Above it a block is counted as this: what many bad answers at once would win more is not needed.
_MOST_EXCESS = 4.0


@dataclass(frozen=True, slots=True)
class Evidence:
    """Natural logarithms of E."""

    worse: float
    """Against the claim that the candidate is no worse than the margin."""
    no_worse: float
    """Against the claim that it is worse by the margin or more."""
    blocks: int


@dataclass(frozen=True, slots=True)
class Bets:
    """Numbers, how often each was seen, and the least that they can be."""

    values: FloatArray
    counts: FloatArray
    least: float
    mixture: Mixture

    def log_evidence(self) -> float:
        return self.mixture.log_evidence(self.values, self.counts, self.least)


def of_rates(blocks: RateCounts, margin: float) -> Evidence:
    """Executions of a candidate that is shown requests: the share of their rows that it harms.

    The champion has answered them all. `margin` above 0 and below 1.
    """
    share, counts = _shares(blocks)
    worse = Bets(share - margin, counts, -2 * margin, EVEN)
    no_worse = Bets(margin - share, counts, margin - 1, BOLD)
    return Evidence(worse.log_evidence(), no_worse.log_evidence(), int(counts.sum()))


def of_differences(blocks: StepCounts, steps: int, margin: float) -> Evidence:
    """Block means of a paired difference in -1 … 1, of which more is worse, on a grid of
    1 / `steps`: a loss, or how far the score is shifted."""
    low, high, counts = _means(blocks, steps)
    worse = Bets(low - margin, counts, -1 - margin, EVEN)
    no_worse = Bets(margin - high, counts, margin - 1, BOLD)
    return Evidence(worse.log_evidence(), no_worse.log_evidence(), int(counts.sum()))


def of_losses(blocks: Sequence[tuple[int, int, int, int]], steps: int, margin: float) -> Evidence:
    """Block means of the difference of a loss as `(low, high, most, blocks)`, of which `most`
    bounds the absolute value and follows from what both said, before the label is known.

    A bet may be as large as that allows, which is some ten times as large as where nothing but
    -1 … 1 were known: labels are few. It is the same for all blocks whose bound is `_USUAL_LOSS` at
    most, and smaller for the others.
    """
    low, high, most, counts = np.array(blocks, np.float64).reshape(-1, 4).T
    bound = np.maximum(most / steps, _USUAL_LOSS)
    worse = Bets((low / steps - margin) / (bound + margin), counts, -1.0, EVEN)
    no_worse = Bets((margin - high / steps) / (bound + margin), counts, -1.0, BOLD)
    return Evidence(worse.log_evidence(), no_worse.log_evidence(), int(counts.sum()))


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
        worse, no_worse = self.worse(blocks, margin), self.no_worse(blocks, margin)
        return Evidence(worse.log_evidence(), no_worse.log_evidence(), int(worse.counts.sum()))

    def worse(self, blocks: BadCounts, margin: float) -> Bets:
        excess, counts = self._excess(blocks)
        allowed = self._allowed(margin)
        values = np.minimum(excess, _MOST_EXCESS) - allowed
        return Bets(values, counts, -self.share * self.keys - allowed, EVEN)

    def no_worse(self, blocks: BadCounts, margin: float) -> Bets:
        excess, counts = self._excess(blocks)
        allowed = self._allowed(margin)
        return Bets(allowed - excess, counts, allowed - (1 - self.share) * self.keys, BOLD)

    def _allowed(self, margin: float) -> float:
        return self.keys * self.share * (1 - self.share) * margin

    def _excess(self, blocks: BadCounts) -> tuple[FloatArray, FloatArray]:
        bad = np.array(list(blocks), np.float64).reshape(-1, 2)
        excess = (1 - self.share) * bad[:, 0] - self.share * bad[:, 1]
        return excess, np.array(list(blocks.values()), np.float64)


def _shares(blocks: RateCounts) -> tuple[FloatArray, FloatArray]:
    sizes = np.array(list(blocks), np.float64).reshape(-1, 2)
    return sizes[:, 1] / sizes[:, 0], np.array(list(blocks.values()), np.float64)


def _means(blocks: StepCounts, steps: int) -> tuple[FloatArray, FloatArray, FloatArray]:
    bounds = np.array(list(blocks), np.float64).reshape(-1, 2) / steps
    return bounds[:, 0], bounds[:, 1], np.array(list(blocks.values()), np.float64)
