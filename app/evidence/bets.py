"""Betting on the mean of a bounded number: how much a gambler would have won who doubts a claim.

Waudby-Smith & Ramdas, *Estimating means of bounded random variables by betting* (JRSS B, 2023),
with a fixed mixture of bets instead of a learnt one: then the winnings are a function of how often
each number was seen, whatever the order.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

_MOST = 0.95
"""Of its capital, what the largest bet can lose by one number."""
_ROUNDING = 1e-9


class Mixture:
    """Bets as parts of the largest one, each with its part of the capital."""

    def __init__(self, parts: Sequence[float], capital: Sequence[float]) -> None:
        self.parts: FloatArray = np.asarray(parts, np.float64)
        self.log_capital: FloatArray = np.log(np.asarray(capital, np.float64) / sum(capital))

    def log_winnings(self, of_each: FloatArray) -> FloatArray:
        """Of all bets together, from the logarithms of what each has won, `[bets, …]`."""
        winnings: FloatArray = np.logaddexp.reduce((of_each.T + self.log_capital).T, axis=0)
        return winnings


@dataclass(frozen=True, slots=True)
class Bets:
    """Numbers `values` `[k]`, how often each was seen, and what is bet on them against the claim
    that their mean is at most 0, whatever came before each of them."""

    values: FloatArray
    counts: FloatArray
    least: FloatArray | float
    """What each could have been at least, below 0: of all alike, or known before it was."""
    usual: float
    """The `least` for which the largest bet is made."""
    mixture: Mixture

    def log_evidence(self) -> float:
        """ln E. Where the claim is true E ever reaches 1/alpha with a probability of alpha at most
        (Ville)."""
        if not len(self.values):
            return 0.0
        return float(self.mixture.log_winnings(self.log_factors() @ self.counts))

    def log_factors(self) -> FloatArray:
        """`[bets, k]`: by what each number multiplies the capital of each bet.

        A bet that could lose more than it has by a number is given up before it, with its capital,
        and not made smaller: the mean that is bet on would be another one.
        """
        bets = self.mixture.parts[:, np.newaxis] * (_MOST / -self.usual)
        factors = np.log1p(np.maximum(bets * self.values, -_MOST))
        return np.where(bets * -np.asarray(self.least) <= _MOST + _ROUNDING, factors, -np.inf)


EVEN = Mixture([2.0**-step for step in range(12)], [1.0] * 12)
"""Where nothing is known of how large the mean may be: the same capital for each size."""
BOLD = Mixture([2.0**-step for step in range(6)], [2.0**-step for step in range(6)])
"""Where what is to be seen is small against what a number may be: half of the capital on the
largest bet."""
BROAD = Mixture([2.0**-step for step in range(6)], [1.0] * 6)
"""Where the largest bets may have to be given up."""
