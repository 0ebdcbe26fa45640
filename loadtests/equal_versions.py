"""Rollouts of a candidate that is no worse than the champion, in the ways that mislead a test.

Each case draws `rollouts` releases of `observations` answers and says what app/evidence counts of
them, and for what is routed the answers themselves, so that other rules can judge the same ones.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from app.comparison.table import SHIFT_STEPS
from app.evidence.harms import LOSS_STEPS
from app.evidence.plan import Margins, Stage
from loadtests.evidence_paths import NO_BLOCK, Guardrail, Stream, named

Bools: TypeAlias = NDArray[np.bool_]
Floats: TypeAlias = NDArray[np.float64]

MARGINS = Margins()
TENTH = Stage(share=0.1, keys=20, slow_s=1.0)
HALF = Stage(share=0.5, keys=8, slow_s=1.0)
WATCHED = Stage(share=0.95, keys=40, slow_s=1.0)
LARGE = Stage(share=0.1, keys=250, slow_s=1.0)
_SLOW_FACTOR = 1.2
_MEASURED = 10_000
"""Answers of the champion by which it was fixed before the stage what is slow."""
_KEYS = 20_000
_MOST_ROWS = 32
_BUCKET_ROWS = 25


@dataclass(frozen=True, slots=True)
class Answers:
    """Of every request `[rollouts, observations]`, in order: by whom, and whether it was bad."""

    candidate: Bools
    bad: Bools


@dataclass(frozen=True, slots=True)
class Sample:
    """Of pairs what a test of their mean would take for independent, summed up to each look:
    `[rollouts, looks]`."""

    n: Floats
    sums: Floats
    squares: Floats
    margin: float


@dataclass(frozen=True, slots=True)
class Rollouts:
    """`streams` are all watched: a release is rolled back by whichever reaches its bound."""

    streams: list[Stream]
    answers: Answers | None = None
    sample: Sample | None = None


Make: TypeAlias = Callable[[Generator, int, int], Rollouts]


@dataclass(frozen=True, slots=True)
class Case:
    """`claimed`: false rollbacks are as rare as promised here. The others show what is not claimed,
    and what would go wrong if something else were counted."""

    make: Make
    claimed: bool = True
    alters: Mapping[str, Make] = field(default_factory=dict)
    """By the name of a rule that is altered: what is counted then."""


def exposed(
    answers: Answers, stage: Stage, guardrail: Guardrail, entered: Bools | None = None
) -> Stream:
    """The blocks of the answers, or of those that `entered` names."""
    rollouts, observations = answers.bad.shape
    blocks = observations // stage.keys
    where = np.flatnonzero(answers.bad)
    row, place = np.divmod(where, observations)
    last = np.full(rollouts, blocks)
    if entered is not None:
        where = where[entered.ravel()[where]]
        rank = np.cumsum(entered, axis=1, dtype=np.int32) - 1
        row, place = where // observations, rank.ravel()[where]
        last = (rank[:, -1] + 1) // stage.keys
    cell = place // stage.keys
    inside = cell < blocks
    cell = row[inside] * blocks + cell[inside]
    ours = answers.candidate.ravel()[where[inside]]
    a, b = (
        np.bincount(cell[of], minlength=rollouts * blocks).reshape(rollouts, blocks)
        for of in (ours, ~ours)
    )
    names, kinds = named([a, b])
    kinds[np.arange(blocks) >= last[:, np.newaxis]] = NO_BLOCK
    return Stream(guardrail, names, kinds, stage)


def _below(rng: Generator, shape: tuple[int, ...], share: float | Floats) -> Bools:
    below: Bools = rng.random(shape, np.float32) < share
    return below


def _independent(
    rng: Generator,
    rollouts: int,
    observations: int,
    *,
    ours: float,
    theirs: float,
    stage: Stage = TENTH,
) -> Rollouts:
    shape = rollouts, observations
    candidate = _below(rng, shape, stage.share)
    bad = rng.random(shape, np.float32) < np.where(candidate, np.float32(ours), np.float32(theirs))
    answers = Answers(candidate, bad)
    return Rollouts([exposed(answers, stage, "errors")], answers)


def _lognormal(rng: Generator, rollouts: int, observations: int) -> Rollouts:
    logs = partial(rng.standard_normal, dtype=np.float32)
    measured = np.quantile(logs((rollouts, _MEASURED)), 0.99, axis=1)
    at = measured + np.log(_SLOW_FACTOR) / 0.5
    slow = logs((rollouts, observations)) > at[:, np.newaxis].astype(np.float32)
    return _slow(rng, slow)


def _pareto(rng: Generator, rollouts: int, observations: int) -> Rollouts:
    """Latencies with the exponent 2.1: the higher, the smaller the number drawn."""
    measured = np.quantile(rng.random((rollouts, _MEASURED), np.float32), 0.01, axis=1)
    at = measured * _SLOW_FACTOR**-2.1
    return _slow(rng, _below(rng, (rollouts, observations), at[:, np.newaxis]))


def _load(rng: Generator, rollouts: int, observations: int) -> Rollouts:
    """A load that both share wanders as an AR(1) process; its episodes last for 1,000 requests."""
    every, stays = 10, 0.99
    steps = -(-observations // every)
    pushes = rng.standard_normal((steps, rollouts), np.float32) * np.float32((1 - stays**2) ** 0.5)
    load = rng.standard_normal(rollouts, np.float32)
    loads = np.empty_like(pushes)
    for step in range(steps):
        load = load * np.float32(stays) + pushes[step]
        loads[step] = load
    of_each = np.repeat(loads.T, every, axis=1)[:, :observations]
    own = rng.standard_normal((rollouts, observations), np.float32) * np.float32(0.5)
    slow = of_each + own > 2.326 * 1.25**0.5 + np.log(_SLOW_FACTOR)
    return _slow(rng, slow)


def _slow(rng: Generator, slow: Bools) -> Rollouts:
    answers = Answers(_below(rng, slow.shape, TENTH.share), slow)
    return Rollouts([exposed(answers, TENTH, "slow")], answers)


def bursts(rng: Generator, rollouts: int, observations: int, length: int, share: float) -> Bools:
    """Windows of so many observations, of which a `share` is in one of them; any may begin one."""
    beginnings = rng.poisson(rollouts * observations * share / length)
    row = rng.integers(rollouts, size=beginnings)
    first = rng.integers(1 - length, observations, size=beginnings)
    changes = np.zeros((rollouts, observations + 1), np.int16)
    np.add.at(changes, (row, np.maximum(first, 0)), 1)
    np.add.at(changes, (row, np.minimum(first + length, observations)), -1)
    inside: Bools = np.cumsum(changes[:, :-1], axis=1, dtype=np.int16) > 0
    return inside


def _bursts_of_both(rng: Generator, rollouts: int, observations: int) -> Rollouts:
    fails = np.zeros((rollouts, observations), np.bool_)
    for length in (5, 60, 1_000):
        fails |= bursts(rng, rollouts, observations, length, 0.005)
    fails &= _below(rng, fails.shape, 0.8)
    answers = Answers(_below(rng, fails.shape, TENTH.share), fails)
    return Rollouts([exposed(answers, TENTH, "errors")], answers)


def bursts_of_one(
    rng: Generator,
    rollouts: int,
    observations: int,
    *,
    length: int,
    share: float = 0.01,
    stage: Stage = TENTH,
) -> Rollouts:
    """All answers of one version fail for a while, those of the other at other times."""
    ours, theirs = (bursts(rng, rollouts, observations, length, share) for _ in range(2))
    candidate = _below(rng, ours.shape, stage.share)
    answers = Answers(candidate, np.where(candidate, ours, theirs))
    return Rollouts([exposed(answers, stage, "errors")], answers)


def _sticky(rng: Generator, rollouts: int, observations: int, *, all_exposures: bool) -> Rollouts:
    """Keys as Zipf has them, 2 % of which always fail; a key is always answered by the same."""
    weights = np.arange(1, _KEYS + 1) ** -1.1
    cells = (np.arange(1 << 20) + 0.5) / (1 << 20)
    of_cell = np.searchsorted(np.cumsum(weights) / weights.sum(), cells).astype(np.int32)
    keys = of_cell[rng.integers(1 << 20, size=(rollouts, observations), dtype=np.uint32)]
    is_ours = _below(rng, (rollouts, _KEYS), TENTH.share)
    always = _below(rng, (rollouts, _KEYS), 0.02)
    candidate, bad, first = (np.empty(keys.shape, np.bool_) for _ in range(3))
    place = np.arange(observations, dtype=np.int32)
    seen = np.empty(_KEYS, np.int32)
    for row, of in enumerate(keys):
        candidate[row], bad[row] = is_ours[row, of], always[row, of]
        seen[of[::-1]] = place[::-1]
        first[row] = seen[of] == place
    bad |= _below(rng, keys.shape, 0.002)
    answers = Answers(candidate, bad)
    return Rollouts([exposed(answers, TENTH, "errors", None if all_exposures else first)], answers)


def _steps(rng: Generator, rollouts: int, observations: int) -> Rollouts:
    """The share grows from a tenth to a half while five times as much fails with both."""
    half = observations // 2
    shape = rollouts, observations
    now = np.arange(observations) < half
    candidate = rng.random(shape, np.float32) < np.where(now, 0.1, 0.5).astype(np.float32)
    bad = rng.random(shape, np.float32) < np.where(now, 0.005, 0.025).astype(np.float32)
    streams = [
        exposed(Answers(candidate[:, part], bad[:, part]), stage, "errors")
        for stage, part in ((TENTH, slice(None, half)), (HALF, slice(half, None)))
    ]
    return Rollouts(streams, Answers(candidate, bad))


def _drift(rng: Generator, rollouts: int, observations: int) -> Rollouts:
    """What fails with both goes up and down by the hour, between 0.05 % and 0.95 %."""
    turns = 4 * np.pi * np.arange(observations, dtype=np.float32) / observations
    begins = rng.random((rollouts, 1), np.float32) * np.float32(2 * np.pi)
    bad = _below(rng, (rollouts, observations), 0.005 * (1 + 0.9 * np.sin(turns + begins)))
    answers = Answers(_below(rng, bad.shape, TENTH.share), bad)
    return Rollouts([exposed(answers, TENTH, "errors")], answers)


def _batches(rng: Generator, rollouts: int, observations: int) -> Rollouts:
    """Executions of 1 to 32 rows of which 0.1 % fail whole: as much as the margin allows."""
    n = _rows(rng, rollouts, observations)
    return _rates(n, n * _below(rng, n.shape, MARGINS.errors), "errors", MARGINS.errors)


def _flips(rng: Generator, rollouts: int, observations: int) -> Rollouts:
    """In one of ten executions a tenth of the decisions flips: 1 % in all, as the margin allows."""
    n = _rows(rng, rollouts, observations)
    flipped = rng.binomial(n, 0.1) * _below(rng, n.shape, 10 * MARGINS.flips)
    return _rates(n, flipped, "flips", MARGINS.flips)


def _rows(rng: Generator, rollouts: int, observations: int) -> NDArray[np.int64]:
    blocks = 2 * observations // (1 + _MOST_ROWS)
    return rng.integers(1, _MOST_ROWS, (rollouts, blocks), endpoint=True)


def _rates(
    n: NDArray[np.int64], harmed: NDArray[np.int64], guardrail: Guardrail, margin: float
) -> Rollouts:
    names, kinds = named([n, harmed])
    looks = _looks(n.shape[1])
    rows, bad = (np.cumsum(of, axis=1)[:, looks].astype(np.float64) for of in (n, harmed))
    return Rollouts([Stream(guardrail, names, kinds)], sample=Sample(rows, bad, bad, margin))


def _shift(rng: Generator, rollouts: int, observations: int) -> Rollouts:
    """Executions whose score is higher by 0.01 on average: as much as the margin allows. In half of
    the rollouts it is the same, but for one of fifty executions, where it is higher by 0.5."""
    shape = rollouts, 2 * observations // (1 + _MOST_ROWS)
    means = MARGINS.shift + np.clip(rng.laplace(0.0, 0.04, shape), -0.9, 0.9)
    rare = 0.5 * _below(rng, shape, 2 * MARGINS.shift)
    means[::2] = rare[::2]
    low = np.floor(means * SHIFT_STEPS).astype(np.int64)
    names, kinds = named([low, low + 1])
    return Rollouts([Stream("shift up", names, kinds)], sample=_of_means(means, MARGINS.shift))


def _losses(rng: Generator, rollouts: int, observations: int) -> Rollouts:
    """Buckets of labels whose loss is higher by 0.002 on average: as much as the margin allows.
    All of it comes from one of ten buckets, where both say something else."""
    shape = rollouts, observations // _BUCKET_ROWS
    far = _below(rng, shape, 0.1)
    bound = np.where(far, 0.5, 0.05)
    means = bound * rng.uniform(-0.9, 0.9, shape) + far * (10 * MARGINS.loss)
    return _of_losses(means, bound)


def _labels(rng: Generator, rollouts: int, observations: int, *, as_they_arrive: bool) -> Rollouts:
    """Bad outcomes are known hours later than good ones. The candidate says 0.05 more than the
    champion and the truth lies between: neither has the higher loss."""
    shape = rollouts, observations
    said = 0.05 + 0.3 * rng.random(shape, np.float32)
    more = np.float32(0.05)
    came = rng.random(shape, np.float32) < said + more / 2
    differences = np.where(came, (1 - said - more) ** 2 - (1 - said) ** 2, (2 * said + more) * more)
    bounds = np.maximum((2 * said + more) * more, 2 * (1 - said) * more - more**2)
    if as_they_arrive:
        hours = (
            np.linspace(0, 8, observations)
            + came * rng.standard_exponential(shape, np.float32) * 1.5
        )
        order = np.argsort(hours, axis=1)
        differences, bounds = (np.take_along_axis(of, order, 1) for of in (differences, bounds))
    buckets = observations // _BUCKET_ROWS
    means, bound = (
        of[:, : buckets * _BUCKET_ROWS].reshape(rollouts, buckets, _BUCKET_ROWS).mean(axis=2)
        for of in (differences, bounds)
    )
    return _of_losses(means, bound)


def _of_losses(means: Floats, bound: Floats) -> Rollouts:
    grid = 1_000
    low, high = (of(means * LOSS_STEPS).astype(np.int64) for of in (np.floor, np.ceil))
    most = (np.ceil(bound * LOSS_STEPS / grid) * grid).astype(np.int64)
    names, kinds = named([low, high - low, most])
    bounds = [(first, first + more, of) for first, more, of in names]
    return Rollouts([Stream("loss", bounds, kinds)], sample=_of_means(means, MARGINS.loss))


def _of_means(means: Floats, margin: float) -> Sample:
    looks = _looks(means.shape[1])
    sums, squares = (np.cumsum(of, axis=1)[:, looks] for of in (means, means**2))
    return Sample(np.broadcast_to(looks + 1.0, sums.shape), sums, squares, margin)


def _looks(blocks: int) -> NDArray[np.intp]:
    return np.unique(np.linspace(0, blocks, 101).astype(int)[1:] - 1)


CASES: dict[str, Case] = {
    "independent, 0.01 % fail": Case(partial(_independent, ours=1e-4, theirs=1e-4)),
    "independent, 0.5 % fail": Case(partial(_independent, ours=0.005, theirs=0.005)),
    "independent, 5 % fail": Case(partial(_independent, ours=0.05, theirs=0.05)),
    "0.5 % fail, the candidate's 0.6 %": Case(partial(_independent, ours=0.006, theirs=0.005)),
    "0.5 % fail, share 50 %": Case(partial(_independent, ours=0.005, theirs=0.005, stage=HALF)),
    "0.5 % fail, share 95 %": Case(partial(_independent, ours=0.005, theirs=0.005, stage=WATCHED)),
    "latency, lognormal": Case(_lognormal),
    "latency, Pareto(2.1)": Case(_pareto),
    "latency, load as AR(1)": Case(_load),
    "bursts of both": Case(_bursts_of_both),
    "bursts of one, half a block": Case(partial(bursts_of_one, length=10)),
    "bursts of one, half a block, share 50 %": Case(partial(bursts_of_one, length=4, stage=HALF)),
    "bursts of one, half a large block": Case(partial(bursts_of_one, length=125, stage=LARGE)),
    "sticky keys, some always fail": Case(
        partial(_sticky, all_exposures=False),
        alters={"exposures": partial(_sticky, all_exposures=True)},
    ),
    "10 % to 50 %, five times the failures": Case(_steps),
    "failures by the hour": Case(_drift),
    "shadow: whole executions fail": Case(_batches),
    "shadow: flips in clusters": Case(_flips),
    "shadow: score shifted by the margin": Case(_shift),
    "labels: loss at the margin": Case(_losses),
    "labels: late when bad, at the horizon": Case(partial(_labels, as_they_arrive=False)),
}

UNCLAIMED: dict[str, Case] = {
    "sticky keys, every exposure counted": Case(
        partial(_sticky, all_exposures=True), claimed=False
    ),
    "labels: late when bad, as they arrive": Case(
        partial(_labels, as_they_arrive=True), claimed=False
    ),
    **{
        f"bursts of one, {says} a block": Case(partial(bursts_of_one, length=length), claimed=False)
        for says, length in (
            ("once", 20),
            ("twice", 40),
            ("5 times", 100),
            ("20 times", 400),
        )
    },
    **{
        f"bursts of one, {says} a large block": Case(
            partial(bursts_of_one, length=length, stage=LARGE), claimed=False
        )
        for says, length in (("once", 250), ("twice", 500), ("5 times", 1_250))
    },
}
