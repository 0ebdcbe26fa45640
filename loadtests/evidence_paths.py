"""What app/evidence says after every block of many rollouts at once: its bets, summed in numpy."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from app.comparison.table import SHIFT_STEPS
from app.evidence.bets import Bets
from app.evidence.counts import Arm, Counts, PairedCounts, StageCounts
from app.evidence.harms import (
    LOSS_STEPS,
    Claims,
    Exposures,
    difference_bets,
    loss_bets,
    rate_bets,
)
from app.evidence.plan import Margins, Plan, Stage
from app.evidence.verdict import Reading, judge

Guardrail: TypeAlias = Literal["errors", "slow", "flips", "shift up", "loss"]
Kinds: TypeAlias = NDArray[np.int32]

NO_BLOCK = -1
NEVER = np.iinfo(np.int64).max
SHADOW = Stage(share=0.0, keys=1, slow_s=None)
_LONG = 1e9


@dataclass(frozen=True, slots=True)
class Stream:
    """Blocks of one guardrail in many rollouts: `kinds` `[rollouts, blocks]` are places in `names`,
    the numbers by which app/evidence counts a block."""

    guardrail: Guardrail
    names: Sequence[tuple[int, ...]]
    kinds: Kinds
    stage: Stage = SHADOW

    def claims(self, margins: Margins) -> Claims:
        """Of each kind of block as though it had been seen once."""
        margin = {
            "errors": margins.errors,
            "slow": margins.slow,
            "flips": margins.flips,
            "shift up": margins.shift,
            "loss": margins.loss,
        }[self.guardrail]
        once = [(*name, 1) for name in self.names]
        if self.stage.share > 0:
            exposures = Exposures(self.stage.keys, self.stage.share)
            return exposures.bets({(a, b): 1 for a, b, _ in once}, margin)
        if self.guardrail == "loss":
            return loss_bets(
                [(low, high, most, 1) for low, high, most, _ in once], LOSS_STEPS, margin
            )
        pairs = {(one, two): 1 for one, two, _ in once}
        if self.guardrail == "shift up":
            return difference_bets(pairs, SHIFT_STEPS, margin)
        return rate_bets(pairs, margin)

    def plan(self, margins: Margins) -> Plan:
        """The plan that has this guardrail and as few others as can be: its bound is the lowest."""
        share = self.stage.share
        return Plan(
            kind="equivalent" if self.guardrail in {"flips", "shift up"} else "retrain",
            stages=(0.0, share) if share else (0.0,),
            margins=margins,
            least_answers=0,
            least_s=0.0,
            most_s=_LONG,
            judges_labels=self.guardrail == "loss",
        )

    def reading(self, margins: Margins, rollout: int = 0, blocks: int = 0) -> Reading:
        """What `judge` says of the first so many blocks of a rollout."""
        kinds = self.kinds[rollout, :blocks]
        seen, counts = np.unique(kinds[kinds != NO_BLOCK], return_counts=True)
        of = tuple(
            (*self.names[kind], int(count)) for kind, count in zip(seen, counts, strict=True)
        )
        field = self.guardrail.split(" ")[0]
        stages = [StageCounts(SHADOW)]
        paired = PairedCounts()
        if self.stage.share > 0:
            arm = Arm(1, 1)
            stages.append(StageCounts(self.stage, arm, arm, **{field: of}))
        else:
            paired = PairedCounts(**{field: of})
        verdict = judge(self.plan(margins), Counts({"": paired}, stages))
        number = 1 if self.stage.share > 0 else None
        [reading] = [
            each
            for each in verdict.readings
            if (each.guardrail, each.stage) == (self.guardrail, number)
        ]
        return reading


def named(numbers: Sequence[NDArray[np.int64]]) -> tuple[list[tuple[int, ...]], Kinds]:
    """The distinct tuples at the places of arrays of one shape, and which of them is at each."""
    code = np.zeros(numbers[0].shape, np.int64)
    bases = []
    for of in numbers:
        low, high = int(of.min()), int(of.max())
        bases.append((low, high - low + 1))
        code = code * bases[-1][1] + (of - low)
    found, kinds = _distinct(code)
    names = []
    for value in found.tolist():
        name = []
        for low, size in reversed(bases):
            value, place = divmod(value, size)
            name.append(place + low)
        names.append(tuple(reversed(name)))
    return names, kinds


def _distinct(code: NDArray[np.int64]) -> tuple[NDArray[np.int64], Kinds]:
    if code.max() > 1 << 22:
        found, kinds = np.unique(code, return_inverse=True)
        return found, kinds.reshape(code.shape).astype(np.int32)
    there = np.bincount(code.ravel()) > 0
    place = np.cumsum(there, dtype=np.int32) - 1
    return np.flatnonzero(there), place[code]


def path(bets: Bets, kinds: Kinds) -> NDArray[np.float64]:
    """ln E after each block of one rollout: `bets.values` are of the kinds."""
    return bets.mixture.log_winnings(np.cumsum(_factors(bets)[:, kinds], axis=1))


def first_reached(bets: Bets, kinds: Kinds, bound: float) -> NDArray[np.int64]:
    """`[rollouts]`: after how many blocks ln E first reached the bound; `NEVER`."""
    factors = _factors(bets)
    highest = np.full(len(kinds), -np.inf)
    for of_bet, capital in zip(factors, bets.mixture.log_capital, strict=True):
        won = np.cumsum(of_bet[kinds], axis=1).max(axis=1) + capital
        np.maximum(highest, won, out=highest)
    reached = np.full(len(kinds), NEVER)
    # All bets together have won at most so many times what the best one has.
    for rollout in np.flatnonzero(highest >= bound - np.log(len(factors))):
        there = path(bets, kinds[rollout]) >= bound
        if there.any():
            reached[rollout] = int(there.argmax()) + 1
    return reached


def _factors(bets: Bets) -> NDArray[np.float64]:
    """`[bets, kinds + 1]`: the last is where there is no block."""
    factors = bets.log_factors()
    return np.concatenate([factors, np.zeros((len(factors), 1))], axis=1)
