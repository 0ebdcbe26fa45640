"""Rollouts of a candidate that is worse, or as good, until its release is decided."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from app.comparison.table import SHIFT_STEPS
from app.evidence.feasibility import Traffic, bad_counts, needs
from app.evidence.harms import LOSS_STEPS, Exposures
from app.evidence.plan import Margins, Plan, Stage
from loadtests.evidence_paths import NEVER, SHADOW, Guardrail, Stream, first_reached, named, path

Draw: TypeAlias = Callable[[Generator, int, int], Stream]
"""Blocks of so many rollouts, so many each."""

MARGINS = Margins()
BASE = 0.005
SLOW_BASE = 0.01
_LN10 = math.log(10)
_CELLS = 2_000_000
_BUCKET_ROWS = 25
_SCORE_NOISE = 0.05
"""Standard deviation of the difference of the scores of a row."""


@dataclass(frozen=True, slots=True)
class Outcomes:
    """Of rollouts that are each looked at after every block, up to `horizon` blocks."""

    horizon: int
    rolled_back: NDArray[np.int64]
    """After how many blocks; `NEVER`."""
    promoted: NDArray[np.int64]
    harmed: NDArray[np.int64]
    """Bad answers or harmed rows of the candidate up to its rollback, where they are counted."""

    @property
    def is_rolled_back(self) -> NDArray[np.bool_]:
        return (self.rolled_back < NEVER) & (self.rolled_back <= self.promoted)

    @property
    def is_promoted(self) -> NDArray[np.bool_]:
        return self.promoted < self.rolled_back


def decided(draw: Draw, rng: Generator, rollouts: int, horizon: int) -> Outcomes:
    """By one guardrail alone."""
    parts = [_decided(draw(rng, some, horizon)) for some in _parts(rollouts, horizon)]
    of = [np.concatenate(columns) for columns in zip(*parts, strict=True)]
    return Outcomes(horizon, *of)


def _decided(stream: Stream) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    claims = stream.claims(MARGINS)
    reading = stream.reading(MARGINS)
    rolled_back = first_reached(claims.worse, stream.kinds, reading.rolls_back_at * _LN10)
    promoted = first_reached(claims.no_worse, stream.kinds, reading.promotes_at * _LN10)
    harm = np.array([name[0 if stream.stage.share else 1] for name in stream.names])
    harm *= stream.guardrail in {"errors", "slow", "flips"}
    harmed = np.zeros(len(stream.kinds), np.int64)
    for rollout in np.flatnonzero(rolled_back < NEVER):
        harmed[rollout] = harm[stream.kinds[rollout, : rolled_back[rollout]]].sum()
    return rolled_back, promoted, harmed


def promoted_together(
    draws: Sequence[Draw], rng: Generator, rollouts: int, horizon: int
) -> tuple[int, int]:
    """How many were promoted, all of these guardrails being within their margins at some block, and
    how many were rolled back before."""
    promotions = rollbacks = 0
    for some in _parts(rollouts, horizon):
        streams = [draw(rng, some, horizon) for draw in draws]
        bounds = [stream.reading(MARGINS) for stream in streams]
        claims = [stream.claims(MARGINS) for stream in streams]
        for rollout in range(some):
            within = np.ones(horizon, np.bool_)
            beyond = np.zeros(horizon, np.bool_)
            for stream, bets, at in zip(streams, claims, bounds, strict=True):
                kinds = stream.kinds[rollout]
                within &= path(bets.no_worse, kinds) >= at.promotes_at * _LN10
                beyond |= path(bets.worse, kinds) >= at.rolls_back_at * _LN10
            first, harm = (int(of.argmax()) if of.any() else NEVER for of in (within, beyond))
            promotions += first < harm
            rollbacks += harm <= first and harm < NEVER
    return promotions, rollbacks


def _parts(rollouts: int, horizon: int) -> Iterator[int]:
    size = max(1, _CELLS // horizon)
    for first in range(0, rollouts, size):
        yield min(size, rollouts - first)


def stage_of(share: float, per_s: float) -> tuple[Stage, int]:
    """As a plan with this stage has it at this traffic in one worker, and the blocks it needs."""
    [need] = needs(Plan(stages=(share,), least_answers=0, least_s=0), Traffic(per_s=per_s))
    return Stage(share, need.keys, slow_s=1.0), math.ceil(need.requests / need.keys)


def exposed(stage: Stage, ours: float, theirs: float, guardrail: Guardrail = "errors") -> Draw:
    of = bad_counts(Exposures(stage.keys, stage.share), ours, theirs)
    # The commonest first: it is found soonest.
    names = sorted(of, key=lambda name: -of[name])
    cumulative = np.cumsum([of[name] for name in names])

    def draw(rng: Generator, rollouts: int, blocks: int) -> Stream:
        kinds = np.searchsorted(cumulative, rng.random((rollouts, blocks)), "right")
        kinds = np.minimum(kinds, len(names) - 1).astype(np.int32)
        return Stream(guardrail, names, kinds, stage)

    return draw


def rates(rows: int, harm: float, guardrail: Guardrail, *, whole: bool = False) -> Draw:
    """Executions of so many rows, each of them harmed by itself, or all of an execution."""

    def draw(rng: Generator, rollouts: int, blocks: int) -> Stream:
        shape = rollouts, blocks
        if whole:
            harmed = rows * (rng.random(shape) < harm).astype(np.int64)
        else:
            harmed = rng.binomial(rows, harm, shape)
        names, kinds = named([np.full(shape, rows), harmed])
        return Stream(guardrail, names, kinds, SHADOW)

    return draw


def shifted(rows: int, shift: float) -> Draw:
    def draw(rng: Generator, rollouts: int, blocks: int) -> Stream:
        means = rng.normal(shift, _SCORE_NOISE / rows**0.5, (rollouts, blocks))
        low = np.floor(np.clip(means, -0.99, 0.99) * SHIFT_STEPS).astype(np.int64)
        names, kinds = named([low, low + 1])
        return Stream("shift up", names, kinds, SHADOW)

    return draw


def lost(loss: float) -> Draw:
    """Buckets of 25 labels of versions whose scores differ by 0.05 or so."""

    def draw(rng: Generator, rollouts: int, blocks: int) -> Stream:
        bound = 0.06
        spread = rng.normal(0.0, 0.04 / _BUCKET_ROWS**0.5, (rollouts, blocks))
        means = np.clip(loss + spread, -bound, bound)
        low, high = (of(means * LOSS_STEPS).astype(np.int64) for of in (np.floor, np.ceil))
        names, kinds = named([low, high - low])
        most = math.ceil(bound * LOSS_STEPS)
        return Stream("loss", [(of, of + more, most) for of, more in names], kinds, SHADOW)

    return draw
