"""How many answers each stage of a plan needs, and how long that takes: known before it starts."""

import math
from collections.abc import Iterator, Sequence
from itertools import product

import msgspec
import numpy as np

from app.evidence.bets import BOLD
from app.evidence.harms import Exposures
from app.evidence.plan import Plan, least_keys

# Of a standard normal: with a probability of 95 % no more is needed.
_SURENESS = 1.645
_MOST_SECONDS_A_BLOCK = 0.25


class Traffic(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is expected, of all workers together."""

    per_s: float
    """Requests, of as many routing keys."""
    workers: int = 1
    rows: float = 1.0
    """Of an execution of a candidate that is shown requests."""
    bad_share: float = 0.005
    """Of the champion's answers."""
    slow_share: float = 0.01


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
    in_time = traffic.per_s / traffic.workers * _MOST_SECONDS_A_BLOCK
    return max(least_keys(share), math.ceil(in_time))


def blocks_needed(growth: float, deviation: float, threshold: float) -> float:
    """After how many blocks a capital whose logarithm grows so, a block, has reached the threshold,
    with a probability of 95 %: infinite where it does not grow."""
    if growth <= 0:
        return math.inf
    # growth n - sureness deviation sqrt(n) = threshold
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
    """Of a candidate that harms no row: what has to be labelled comes later, and is not known."""
    margins = plan.margins
    rates = {"errors": margins.errors}
    if margins.not_finite > 0:
        rates["not_finite"] = margins.not_finite
    if plan.kind == "equivalent":
        rates |= {"flips": margins.flips, "shift": margins.shift}
    for name, margin in rates.items():
        growth = BOLD.growth(np.array([margin]), np.ones(1), margin - 1)
        yield name, blocks_needed(*growth, _threshold(plan)) * traffic.rows


def _exposed(plan: Plan, share: float, keys: int, traffic: Traffic) -> Iterator[tuple[str, float]]:
    for name, margin, bad in (
        ("errors", plan.margins.errors, traffic.bad_share),
        ("slow", plan.margins.slow, traffic.slow_share),
    ):
        growth = _growth(Exposures(keys, share), margin, bad)
        yield name, blocks_needed(*growth, _threshold(plan)) * keys


def _growth(exposures: Exposures, margin: float, bad: float) -> tuple[float, float]:
    """Of the capital that is bet against a worse candidate, where both are as bad."""
    ours = _binomial(exposures.keys, exposures.share * bad)
    theirs = _binomial(exposures.keys, (1 - exposures.share) * bad)
    shares = {
        (a, b): one * two
        for (a, one), (b, two) in product(enumerate(ours), enumerate(theirs))
        if one * two > 1e-12
    }
    bets = exposures.no_worse(dict.fromkeys(shares, 1), margin)
    parts = np.array(list(shares.values()))
    return bets.mixture.growth(bets.values, parts / parts.sum(), bets.least)


def _binomial(n: int, share: float) -> Sequence[float]:
    log = [
        math.lgamma(n + 1)
        - math.lgamma(k + 1)
        - math.lgamma(n - k + 1)
        + k * math.log(share)
        + (n - k) * math.log1p(-share)
        for k in range(min(n, 64) + 1)
    ]
    return [math.exp(each) for each in log]


def _threshold(plan: Plan) -> float:
    """Half of the capital is on the largest bet."""
    return math.log(1 / plan.promotion_alpha) + math.log(2)
