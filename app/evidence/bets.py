"""Betting on the mean of a bounded number: how much a gambler would have won who doubts a claim.

Waudby-Smith & Ramdas, *Estimating means of bounded random variables by betting* (JRSS B, 2023),
with a fixed mixture of bets instead of a learnt one: then the winnings are a function of how often
each number was seen, whatever the order.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

_MOST = 0.95
"""Of the largest bet that cannot lose everything."""


class Mixture:
    """Bets as parts of the largest one, each with its part of the capital."""

    def __init__(self, parts: Sequence[float], capital: Sequence[float]) -> None:
        self.parts: FloatArray = np.asarray(parts, np.float64)
        self._log_capital = np.log(np.asarray(capital, np.float64) / sum(capital))

    def log_winnings(self, of_each: FloatArray) -> float:
        """Of all bets together, from the logarithms of what each has won."""
        of_all = of_each + self._log_capital
        most = of_all.max()
        return float(most + math.log(np.exp(of_all - most).sum()))

    def growth(self, values: FloatArray, shares: FloatArray, least: float) -> tuple[float, float]:
        """Of the bet that grows fastest where the numbers come in these shares: the mean and the
        standard deviation of the logarithm of its factor, a block."""
        factors = np.log1p(self._bets(least)[:, np.newaxis] * values)
        means = factors @ shares
        best = int(means.argmax())
        deviation = math.sqrt(max(float(factors[best] ** 2 @ shares - means[best] ** 2), 0.0))
        return float(means[best]), deviation

    def log_evidence(self, values: FloatArray, counts: FloatArray, least: float) -> float:
        """ln E against the claim that the mean of the numbers is at most 0, whatever came before
        each of them.

        `values` `[k]` were seen `counts` `[k]` times; none is below `least`, which is negative.
        Where the claim is true E ever reaches 1/alpha with a probability of alpha at most (Ville).
        """
        if not len(values):
            return 0.0
        return self.log_winnings(np.log1p(self._bets(least)[:, np.newaxis] * values) @ counts)

    def _bets(self, least: float) -> FloatArray:
        return self.parts * (_MOST / -least)


EVEN = Mixture([2.0**-step for step in range(12)], [1.0] * 12)
"""Where nothing is known of how large the mean may be: the same capital for each size."""
BOLD = Mixture([2.0**-step for step in range(6)], [2.0**-step for step in range(6)])
"""Where little harm is expected: half of the capital on the largest bet."""
