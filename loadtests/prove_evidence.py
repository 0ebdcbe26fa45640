"""Shows how often app/evidence is wrong, and how soon it is right.

    python -m loadtests.prove_evidence --rollouts 10000 --observations 50000 --json evidence.json
    python -m loadtests.evidence_plots evidence.json docs/plots

*Equal versions*: releases of a candidate that is no worse, in the ways that mislead tests, looked
at after every block. At most 1 in 1,000 may be rolled back, and 1.5 in 1,000 at the upper 95 %
bound of Clopper and Pearson. Beside it what repeated z-tests and the rules of Argo Rollouts,
Flagger and Kayenta say about the same answers, and cases that are not claimed. *Worse versions*:
how soon they are found. *Promotion*: of a candidate that is worse by the margin, and of one that is
as good. Some rollouts of every case are held against `judge`, number by number.

The seed follows from the commit, or is `--seed`. `--alter margin` judges by a quarter of the
margins, `--alter exposures` counts every exposure of a key: exit status 1 unless that is seen.
Exit status 1 on a violation.
"""

import argparse
import math
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
from numpy.random import Generator, default_rng

from app.evidence.plan import Margins
from loadtests import worse_versions as worse
from loadtests.equal_versions import CASES, MARGINS, UNCLAIMED, Case, Rollouts
from loadtests.evidence_paths import NEVER, Stream, first_reached, path
from loadtests.rival_rules import of_answers, of_sample

MOST_FALSE = 1e-3
MOST_FALSE_AT_95 = 1.5e-3
MOST_PROMOTED = 0.05
LEAST_PROMOTED = 0.9
RULES = ("z 0.01", "z 0.05", "Argo", "Flagger", "Kayenta")
_LN10 = math.log(10)
_CELLS = 10_000_000
_CHECKED = 3
_CLOSE = 1e-6
_BOUNDED_FROM = 2_000


@dataclass(frozen=True)
class Size:
    rollouts: int = 10_000
    observations: int = 50_000
    worse: int = 1_000
    """Rollouts of each worse version."""
    seed: int = 0
    alter: str = ""
    only: str = ""
    """Cases whose names have this in them."""


@dataclass
class FalseRollbacks:
    case: str
    claimed: bool
    rollouts: int
    ours: int
    upper: float
    rules: Mapping[str, float]
    """Shares of the rollouts that each rule rolled back."""
    largest_error: float
    """Of ln E, against `judge`."""


@dataclass
class Found:
    """Of a worse version; blocks and harm are those of the rollouts that were rolled back."""

    case: str
    effect: str
    horizon: int
    rolled_back: float
    promoted: float
    median_blocks: float | None
    p95_blocks: float | None
    median_answers: float | None
    """Of the candidate, or rows that it was shown."""
    median_harmed: float | None
    """Bad answers or harmed rows."""
    answers_by: list[float]
    """After how many of its answers 5 %, 10 % … 95 % of all rollouts were rolled back."""


@dataclass
class Promoted:
    case: str
    what: str
    rollouts: int
    promoted: int
    rolled_back: int
    bound: float


@dataclass
class Report:
    seed: int
    false: list[FalseRollbacks] = field(default_factory=list)
    found: list[Found] = field(default_factory=list)
    promoted: list[Promoted] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)


def prove(size: Size, say: Callable[[str], None] = lambda line: None) -> Report:
    report = Report(size.seed)
    for name, case in {**CASES, **UNCLAIMED}.items():
        if size.only in name:
            of = false_rollbacks(name, case, size)
            report.false.append(of)
            say(_false_line(of))
    for name, effect, draw, horizon, answers in _worse_cases(size.only):
        outcomes = worse.decided(draw, _rng(size, name + effect), size.worse, horizon)
        report.found.append(_found(name, effect, outcomes, answers))
        say(_found_line(report.found[-1]))
    for name, what, draws, horizon, bound in _promotion_cases(size.only):
        rng = _rng(size, name + what)
        if len(draws) > 1:
            counts = worse.promoted_together(draws, rng, size.worse, horizon)
        else:
            of_one = worse.decided(draws[0], rng, size.worse, horizon)
            counts = int(of_one.is_promoted.sum()), int(of_one.is_rolled_back.sum())
        report.promoted.append(Promoted(name, what, size.worse, *counts, bound))
        say(_promoted_line(report.promoted[-1]))
    report.violations = list(_violations(report))
    return report


def false_rollbacks(name: str, case: Case, size: Size) -> FalseRollbacks:
    rollouts = size.rollouts if case.claimed else max(size.rollouts // 10, 1)
    make = case.alters.get(size.alter, case.make)
    rng = _rng(size, name)
    margins = _judged_by(size.alter)
    ours, error, rules = 0, 0.0, Counter[str]()
    chunk = max(1, _CELLS // size.observations)
    for first in range(0, rollouts, chunk):
        some = make(rng, min(chunk, rollouts - first), size.observations)
        rolled_back = np.zeros(len(some.streams[0].kinds), np.bool_)
        for stream in some.streams:
            bound = stream.reading(margins).rolls_back_at * _LN10
            reached = first_reached(stream.claims(margins).worse, stream.kinds, bound)
            rolled_back |= reached < NEVER
            if not first:
                error = max(error, largest_error(stream, margins, rng))
        ours += int(rolled_back.sum())
        for rule, found in _by_rules(some).items():
            rules[rule] += int(found.sum())
    shares = {rule: count / rollouts for rule, count in rules.items()}
    return FalseRollbacks(
        name, case.claimed, rollouts, ours, upper_bound(ours, rollouts), shares, error
    )


def largest_error(stream: Stream, margins: Margins, rng: Generator) -> float:
    """Of ln E of both claims, against what `judge` says of the same blocks."""
    claims = stream.claims(margins)
    worst = 0.0
    for rollout in range(min(_CHECKED, len(stream.kinds))):
        kinds = stream.kinds[rollout]
        paths = path(claims.worse, kinds), path(claims.no_worse, kinds)
        blocks = len(kinds)
        for after in {blocks, *rng.integers(1, blocks, 3, endpoint=True).tolist()}:
            reading = stream.reading(margins, rollout, after)
            for ours, theirs in zip(paths, (reading.worse, reading.no_worse), strict=True):
                worst = max(worst, abs(ours[after - 1] - theirs * _LN10))
    return float(worst)


def upper_bound(found: int, of: int, level: float = 0.95) -> float:
    """Of a probability, by Clopper and Pearson: with it so few are found in 5 % of all series."""
    if found >= of:
        return 1.0
    low, high = found / of, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _at_most(found, of, middle) > 1 - level else (low, middle)
    return high


def lower_bound(found: int, of: int, level: float = 0.95) -> float:
    return 1 - upper_bound(of - found, of, level)


def _at_most(found: int, of: int, share: float) -> float:
    """The probability of so many or fewer."""
    log = [
        math.lgamma(of + 1)
        - math.lgamma(k + 1)
        - math.lgamma(of - k + 1)
        + (k * math.log(share) if k else 0.0)
        + (of - k) * math.log1p(-share)
        for k in range(found + 1)
    ]
    return math.fsum(math.exp(each) for each in log)


def _by_rules(some: Rollouts) -> Mapping[str, np.ndarray]:
    if some.answers is not None:
        return of_answers(some.answers, are_errors=some.streams[0].guardrail == "errors")
    return {} if some.sample is None else of_sample(some.sample)


def _judged_by(alter: str) -> Margins:
    if alter != "margin":
        return MARGINS
    quarter = {name: of / 4 for name, of in msgspec.structs.asdict(MARGINS).items()}
    return Margins(**quarter)


_WorseCase = tuple[str, str, worse.Draw, int, float]


def _worse_cases(only: str) -> Iterator[_WorseCase]:
    """Name, effect, what is drawn, the horizon in blocks, and the candidate's answers a block."""
    for case in (*_worse_exposures(), *_worse_pairs()):
        if only in case[0]:
            yield case


def _worse_exposures() -> Iterator[_WorseCase]:
    some = ((0.05, 40.0), (0.1, 40.0), (0.5, 40.0), (0.1, 400.0), (0.1, 1_000.0), (0.5, 1_000.0))
    for share, per_s in some:
        stage, horizon = worse.stage_of(share, per_s)
        for times in (1.5, 2.0, 5.0):
            draw = worse.exposed(stage, times * worse.BASE, worse.BASE)
            name = f"canary {share:.0%}, blocks of {stage.keys}"
            yield name, f"errors {times:g} x", draw, horizon, stage.keys * share


def _worse_pairs() -> Iterator[_WorseCase]:
    for rows, horizon in ((1, 20_000), (32, 5_000)):
        name = f"shadow, executions of {rows}"
        for times in (1.5, 2.0, 5.0):
            draw = worse.rates(rows, times * worse.BASE, "errors")
            yield name, f"errors {times * worse.BASE:.2%}", draw, horizon, rows
        for flips in (0.02, 0.05):
            yield name, f"flips {flips:.0%}", worse.rates(rows, flips, "flips"), horizon, rows
        for shift in (0.02, 0.1):
            yield name, f"score +{shift:g}", worse.shifted(rows, shift), horizon, rows
    yield "labels, buckets of 25", "loss +0.005", worse.lost(0.005), 20_000, 25


_PromotionCase = tuple[str, str, Sequence[worse.Draw], int, float]


def _promotion_cases(only: str) -> Iterator[_PromotionCase]:
    """The last number is the most that may be promoted; below 0 the least."""
    for case in (*_promoted_exposures(), *_promoted_pairs()):
        if only in case[0]:
            yield case


def _promoted_exposures() -> Iterator[_PromotionCase]:
    for share, per_s in ((0.1, 40.0), (0.5, 40.0), (0.1, 1_000.0), (0.5, 1_000.0)):
        stage, horizon = worse.stage_of(share, per_s)
        name = f"canary {share:.0%}, blocks of {stage.keys}"
        base, slow, margins = worse.BASE, worse.SLOW_BASE, worse.MARGINS
        equal = [worse.exposed(stage, base, base), worse.exposed(stage, slow, slow, "slow")]
        yield name, "as good", equal, horizon, -LEAST_PROMOTED
        at = [worse.exposed(stage, base + margins.errors, base)]
        yield name, "errors worse by the margin", at, 2 * horizon, MOST_PROMOTED
        at = [worse.exposed(stage, slow + margins.slow, slow, "slow")]
        yield name, "slow worse by the margin", at, 2 * horizon, MOST_PROMOTED
        at = [worse.exposed(stage, base + 2 * margins.errors, base)]
        yield name, "errors by twice the margin", at, 2 * horizon, MOST_PROMOTED


def _promoted_pairs() -> Iterator[_PromotionCase]:
    margins, by = worse.MARGINS, "worse by the margin"
    for rows in (1, 32):
        name = f"shadow, executions of {rows}"
        errors = worse.rates(rows, margins.errors, "errors", whole=True)
        yield name, f"errors {by}", [errors], 10_000, MOST_PROMOTED
        flips = worse.rates(rows, margins.flips, "flips", whole=True)
        yield name, f"flips {by}", [flips], 10_000, MOST_PROMOTED
        shifted = worse.shifted(rows, margins.shift)
        yield name, f"score {by}", [shifted], 10_000, MOST_PROMOTED
    yield "labels, buckets of 25", f"loss {by}", [worse.lost(margins.loss)], 10_000, MOST_PROMOTED
    good = [worse.lost(0.0)]
    yield "labels, buckets of 25", "as good", good, 2_000, -LEAST_PROMOTED


def _found(name: str, effect: str, outcomes: worse.Outcomes, answers: float) -> Found:
    ended = outcomes.is_rolled_back
    blocks = np.sort(outcomes.rolled_back[ended]).astype(np.float64)
    median, p95, harmed = (
        (*np.quantile(blocks, [0.5, 0.95]).tolist(), float(np.median(outcomes.harmed[ended])))
        if len(blocks)
        else (None, None, None)
    )
    places = [math.ceil(share * len(ended)) - 1 for share in np.arange(0.05, 0.96, 0.05)]
    return Found(
        name,
        effect,
        outcomes.horizon,
        float(ended.mean()),
        float(outcomes.is_promoted.mean()),
        median,
        p95,
        median and median * answers,
        harmed or None,
        [float(blocks[place]) * answers for place in places if place < len(blocks)],
    )


def _violations(report: Report) -> Iterator[str]:
    for of in report.false:
        if of.largest_error > _CLOSE:
            yield f"{of.case}: ln E differs by {of.largest_error:.2g} from what `judge` says"
        # Of fewer not even none would do: then the bound is left out.
        is_bounded = of.rollouts < _BOUNDED_FROM or of.upper <= MOST_FALSE_AT_95
        if of.claimed and (of.ours > MOST_FALSE * of.rollouts or not is_bounded):
            yield f"{of.case}: {of.ours} of {of.rollouts:,} were rolled back"
    for each in report.promoted:
        share = each.promoted / each.rollouts
        if each.bound > 0 and lower_bound(each.promoted, each.rollouts) > each.bound:
            yield f"{each.case}, {each.what}: {share:.1%} were promoted"
        if each.bound < 0 and upper_bound(each.promoted, each.rollouts) < -each.bound:
            yield f"{each.case}, {each.what}: only {share:.1%} were promoted"


def _false_line(of: FalseRollbacks) -> str:
    rules = "".join(f"{of.rules[rule]:9.2%}" if rule in of.rules else f"{'':9}" for rule in RULES)
    claimed = " " if of.claimed else "-"
    return f"{claimed} {of.case:42} {of.ours:5d} of {of.rollouts:6,} < {of.upper:7.3%} {rules}"


def _found_line(of: Found) -> str:
    numbers = (of.median_blocks, of.p95_blocks, of.median_answers, of.median_harmed)
    blocks, p95, answers, harmed = ("-" if each is None else f"{each:,.0f}" for each in numbers)
    return (
        f"  {of.case:32} {of.effect:14} {of.rolled_back:7.1%} back {of.promoted:6.1%} on, blocks "
        f"{blocks:>8} {p95:>8} of {of.horizon:7,}, answers {answers:>9}, harmed {harmed:>6}"
    )


def _promoted_line(of: Promoted) -> str:
    bound = f"at most {of.bound:.0%}" if of.bound > 0 else f"at least {-of.bound:.0%}"
    return (
        f"  {of.case:32} {of.what:28} {of.promoted:5d} of {of.rollouts:,} on ({bound}), "
        f"{of.rolled_back} back"
    )


def _rng(size: Size, name: str) -> Generator:
    return default_rng([size.seed, zlib.crc32(name.encode())])


def _commit_seed() -> int:
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout
    return int(commit[:12], 16)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rollouts", type=int, default=Size.rollouts)
    parser.add_argument("--observations", type=int, default=Size.observations)
    parser.add_argument("--worse", type=int, default=Size.worse, help="rollouts of worse versions")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--alter", choices=("margin", "exposures"), default="")
    parser.add_argument("--only", default="", help="cases whose names have this in them")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    seed = _commit_seed() if args.seed is None else args.seed
    size = Size(args.rollouts, args.observations, args.worse, seed, args.alter, args.only)
    started = time.monotonic()

    def say(line: str) -> None:
        print(f"{time.monotonic() - started:6.0f} s {line}", flush=True)

    say(f"seed {seed}; false rollbacks of equal versions, and by {', '.join(RULES)}")
    report = prove(size, say)
    if args.json:
        args.json.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1))
    for violation in report.violations:
        print(f"VIOLATION {violation}")
    return 1 if bool(report.violations) != bool(size.alter) else 0


if __name__ == "__main__":
    sys.exit(main())
