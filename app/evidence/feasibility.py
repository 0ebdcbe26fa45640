"""How many answers each stage of a plan needs, and how long that takes: known before it starts."""

import math
from collections.abc import Iterator, Sequence

import msgspec
import numpy as np

from app.comparison.table import SHIFT_STEPS
from app.evidence.bets import BOLD, Bets
from app.evidence.harms import LOSS_STEPS, USUAL_LOSS, Exposures, loss_bets
from app.evidence.plan import Plan, least_keys
from app.request_ids import IDS_IN_BUCKET

LEAST_SECONDS_A_BLOCK = 0.25
"""What fails together, a batch say, is to be over within a block."""
# Of a standard normal: with a probability of 95 % no more is needed.
_SURENESS = 1.645
_RARE = 1e-12
_NEVER = 1e-300


class Traffic(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is expected, of all workers together."""

    per_s: float
    """Requests, of as many routing keys."""
    workers: int = 1
    rows: float = 1.0
    """Of an execution of a candidate that is shown requests."""
    shown: float = 1.0
    """Share of the requests that it is shown."""
    labelled: float = 1.0
    """Share of these that are kept until their labels come."""
    labels_after_s: float = 0.0
    """Until a label is due."""
    bad_share: float = 0.005
    """Of the champion's answers."""
    slow_share: float = 0.01
    median_share: float = 0.5
    """Of them take longer than their median times what a candidate may take longer: fewer."""


class Need(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of one stage, where the candidate is as good as the champion."""

    share: float
    keys: int
    """First exposures of a block."""
    requests: float
    """Of the champion and the candidate together; infinite where it can never be promoted."""
    seconds: float
    because_of: str
    """What takes longest."""


def needs(plan: Plan, traffic: Traffic) -> Sequence[Need]:
    """Of each stage, with a probability of 95 %."""
    return [_need(plan, share, traffic) for share in plan.stages]


def keys_of(share: float, traffic: Traffic) -> int:
    """First exposures of a block: a burst is to be over within one, and some of them are to be the
    candidate's."""
    if share == 0:
        return 1
    in_time = traffic.per_s / traffic.workers * LEAST_SECONDS_A_BLOCK
    return max(least_keys(share), math.ceil(in_time))


def blocks_needed(bets: Bets, threshold: float) -> float:
    """After how many blocks that come in the shares `bets.counts` ln E has reached the threshold,
    with a probability of 95 %: infinite where nothing that is bet grows."""
    factors = bets.log_factors()
    growth = factors @ bets.counts
    variance = factors**2 @ bets.counts - growth**2
    # growth n - sureness deviation sqrt(n) = threshold, for one bet with its part of the capital
    needed = [
        _crossing(float(mean), math.sqrt(max(of, 0.0)), float(threshold - capital))
        for mean, of, capital in zip(growth, variance, bets.mixture.log_capital, strict=True)
    ]
    return min(needed)


def _crossing(growth: float, deviation: float, threshold: float) -> float:
    if growth <= 0:
        return math.inf
    half = _SURENESS * deviation / (2 * growth)
    return (half + math.sqrt(half * half + threshold / growth)) ** 2


def _need(plan: Plan, share: float, traffic: Traffic) -> Need:
    keys = keys_of(share, traffic)
    reasons = dict(_shown(plan, traffic) if share == 0 else _exposed(plan, share, keys, traffic))
    # Only some of them are answered by the candidate.
    reasons["least_answers"] = plan.least_answers / (share or 1.0)
    if math.isfinite(plan.least_s):
        reasons["least_s"] = plan.least_s * traffic.per_s
    because_of = max(reasons, key=lambda name: reasons[name])
    requests = reasons[because_of]
    seconds = requests / traffic.per_s if traffic.per_s > 0 else math.inf
    return Need(share, keys, requests, seconds, because_of)


def _shown(plan: Plan, traffic: Traffic) -> Iterator[tuple[str, float]]:
    """Of a candidate that harms no row, and says as much as the champion about the labels."""
    margins = plan.margins
    rates = {"errors": margins.errors}
    if margins.not_finite > 0:
        rates["not_finite"] = margins.not_finite
    if plan.kind == "equivalent":
        # Of what is counted on a grid the upper end counts.
        rates |= {"flips": margins.flips, "shift": margins.shift - 1 / SHIFT_STEPS}
    for name, margin in rates.items():
        bets = Bets(np.array([margin]), np.ones(1), margin - 1, margin - 1, BOLD)
        yield name, blocks_needed(bets, _threshold(plan)) * traffic.rows / traffic.shown
    if plan.judges_labels:
        alike = [(-1, 1, round(USUAL_LOSS * LOSS_STEPS), 1)]
        bets = loss_bets(alike, LOSS_STEPS, margins.loss).no_worse
        blocks = blocks_needed(bets, _threshold(plan))
        kept = traffic.shown * traffic.labelled
        yield "loss", blocks * IDS_IN_BUCKET / kept + traffic.labels_after_s * traffic.per_s


def _exposed(plan: Plan, share: float, keys: int, traffic: Traffic) -> Iterator[tuple[str, float]]:
    """Of a candidate that does as much harm as the champion."""
    exposures = Exposures(keys, share)
    for name, margin, bad in (
        ("errors", plan.margins.errors, traffic.bad_share),
        ("slow", plan.margins.slow, traffic.slow_share),
        ("median", plan.margins.median, traffic.median_share),
    ):
        bets = exposures.no_worse(bad_counts(exposures, bad, bad), margin)
        yield name, blocks_needed(bets, _threshold(plan)) * keys


def bad_counts(
    exposures: Exposures, candidate: float, champion: float
) -> dict[tuple[int, int], float]:
    """The shares of blocks by the bad answers of both, of which such shares are bad, each answer by
    itself: those that are not next to impossible."""
    keys = exposures.keys
    is_bad, is_other = exposures.share * candidate, (1 - exposures.share) * champion
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, keys + 1)))])
    ours = np.arange(_most_of(keys, is_bad) + 1)[:, np.newaxis]
    theirs = np.arange(_most_of(keys, is_other) + 1)
    rest = keys - ours - theirs
    log = (
        log_factorial[keys]
        - log_factorial[ours]
        - log_factorial[theirs]
        - log_factorial[np.maximum(rest, 0)]
        + ours * math.log(max(is_bad, _NEVER))
        + theirs * math.log(max(is_other, _NEVER))
        + rest * math.log1p(-is_bad - is_other)
    )
    shares = np.where(rest >= 0, np.exp(np.minimum(log, 0.0)), 0.0)
    common = np.argwhere(shares > _RARE)
    of_common = shares[shares > _RARE]
    of_common /= of_common.sum()
    return {(int(a), int(b)): float(of) for (a, b), of in zip(common, of_common, strict=True)}


def _most_of(keys: int, share: float) -> int:
    """More of them than this are next to impossible."""
    mean = keys * share
    return min(keys, math.ceil(mean + 10 * math.sqrt(mean) + 20))


def _threshold(plan: Plan) -> float:
    return math.log(1 / plan.promotion_alpha)
