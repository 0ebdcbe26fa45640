"""Roll back, promote or hold: a pure function of the plan and the counts."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import msgspec

from app.comparison.table import SHIFT_STEPS
from app.evidence.counts import WHOLE, Arm, Counts, PairedCounts, StageCounts, Triples
from app.evidence.harms import (
    LOSS_STEPS,
    Evidence,
    Exposures,
    of_differences,
    of_losses,
    of_rates,
    turned,
)
from app.evidence.plan import Margins, Plan

Action: TypeAlias = Literal["rollback", "promote", "hold"]

MOST_MISSING = 0.01
"""Of the labels that are due, and of the exposures."""
_RATIO_ALPHA = 1e-6
_TOLD_WITHIN_S = 5.0
# How far the share of the exposures is looked for around the one that was asked for.
_RATIO_PRIOR = 100.0


class Reading(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How one guardrail stands: base-10 logarithms of E, and what they are to reach."""

    guardrail: str
    segment: str
    """Empty for all rows."""
    stage: int | None
    """Of exposures, the number of their stage; None for pairs."""
    decides: bool
    """False for what is shown only."""
    blocks: int
    worse: float
    """Against the claim that the candidate is no worse."""
    rolls_back_at: float
    no_worse: float
    """Against the claim that it is worse by the margin."""
    promotes_at: float


class Verdict(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is to be done now, and why in words."""

    action: Action
    reasons: tuple[str, ...]
    readings: tuple[Reading, ...]
    quarantines: bool = False
    """Of a rollback: whether the candidate has done harm, and is not to come back by itself."""


def judge(plan: Plan, counts: Counts) -> Verdict:
    """The same for the same counts, whoever asks and how often."""
    readings = tuple(_readings(plan, counts))
    stage = counts.stages[-1]
    against = [*counts.trips, *_harms(readings, plan, counts)]
    if against:
        return Verdict("rollback", tuple(against), readings, quarantines=True)
    missing = [*counts.blocked, *_missing(readings, plan, counts)]
    if not missing:
        return Verdict("promote", (_passed(plan, stage),), readings)
    if stage.seconds >= plan.most_s:
        late = f"the stage has lasted {stage.seconds:,.0f} s of {plan.most_s:,.0f} s"
        if plan.at_the_end == "rollback":
            return Verdict("rollback", (late, *missing), readings)
        missing.insert(0, late)
    return Verdict("hold", tuple(missing), readings)


def guardrails(plan: Plan, begun: int = 0) -> tuple[int, int]:
    """How many of them can have a candidate rolled back: of all rows, and within segments.

    `begun`: stages with a share that are judged; while the candidate is watched there is one, also
    of a plan without any.
    """
    paired = 1 + (plan.margins.not_finite > 0) + plan.judges_labels
    in_segments = 1 + plan.judges_labels
    if plan.kind == "equivalent":
        paired += 3
        in_segments += 3
    stages = max(begun, sum(share > 0 for share in plan.stages))
    return paired + 3 * stages, in_segments * len(plan.segments)


@dataclass(frozen=True, slots=True)
class _Bounds:
    """Natural logarithms."""

    whole: float
    segment: float
    promotion: float

    @classmethod
    def of(cls, plan: Plan, counts: Counts) -> "_Bounds":
        begun = sum(stage.stage.share > 0 for stage in counts.stages)
        whole, segments = guardrails(plan, begun)
        parts = 2 if segments else 1
        return cls(
            math.log(parts * whole / plan.rollback_alpha),
            math.log(parts * max(segments, 1) / plan.rollback_alpha),
            math.log(1 / plan.promotion_alpha),
        )


def _readings(plan: Plan, counts: Counts) -> Iterator[Reading]:
    bounds = _Bounds.of(plan, counts)
    for segment in (WHOLE, *plan.segments):
        paired = counts.paired.get(segment, PairedCounts())
        for name, evidence, decides in _paired(plan, paired):
            if segment == WHOLE or name != "not_finite":
                yield _reading(name, segment, None, decides, evidence, bounds)
    margins = plan.margins
    for number, stage in enumerate(counts.stages):
        if stage.stage.share > 0:
            exposures = Exposures(stage.stage.keys, stage.stage.share)
            for name, blocks, margin in _exposed(stage, margins):
                evidence = exposures.evidence(_pairs(blocks), margin)
                yield _reading(name, WHOLE, number, True, evidence, bounds)


def _exposed(stage: StageCounts, margins: Margins) -> Iterator[tuple[str, Triples, float]]:
    yield "errors", stage.errors, margins.errors
    if stage.stage.slow_s is not None:
        yield "slow", stage.slow, margins.slow
    if stage.stage.median_s is not None:
        yield "median", stage.median, margins.median


def _paired(plan: Plan, paired: PairedCounts) -> Iterator[tuple[str, Evidence, bool]]:
    margins = plan.margins
    same = plan.kind == "equivalent"
    yield "errors", of_rates(_pairs(paired.errors), margins.errors), True
    if margins.not_finite > 0:
        yield "not_finite", of_rates(_pairs(paired.not_finite), margins.not_finite), True
    if plan.judges_labels:
        yield "loss", of_losses(paired.loss, LOSS_STEPS, margins.loss), True
    if paired.flips or same:
        yield "flips", of_rates(_pairs(paired.flips), margins.flips), same
    if paired.shift or same:
        shift = _pairs(paired.shift)
        yield "shift up", of_differences(shift, SHIFT_STEPS, margins.shift), same
        yield "shift down", of_differences(turned(shift), SHIFT_STEPS, margins.shift), same


def _reading(
    name: str, segment: str, stage: int | None, decides: bool, evidence: Evidence, bounds: _Bounds
) -> Reading:
    at = bounds.whole if segment == WHOLE else bounds.segment
    logs = (evidence.worse, at, evidence.no_worse, bounds.promotion)
    worse, rolls_back_at, no_worse, promotes_at = (each / math.log(10) for each in logs)
    return Reading(
        name,
        segment,
        stage,
        decides,
        evidence.blocks,
        worse,
        rolls_back_at,
        no_worse,
        promotes_at,
    )


def _harms(readings: Sequence[Reading], plan: Plan, counts: Counts) -> Iterator[str]:
    """What has the candidate rolled back, in words."""
    if plan.margins.not_finite == 0:
        whole = counts.paired.get(WHOLE, PairedCounts())
        rows = sum(harmed * blocks for _, harmed, blocks in whole.not_finite)
        if rows:
            yield f"{rows} answers of the candidate are no finite numbers"
    for reading in readings:
        if reading.decides and reading.worse >= reading.rolls_back_at:
            yield (
                f"{_named(reading)}: more than the margin: E is 10^{reading.worse:.1f}, which "
                f"10^{reading.rolls_back_at:.1f} decides"
            )


def _missing(readings: Sequence[Reading], plan: Plan, counts: Counts) -> Iterator[str]:
    """What a promotion waits for, in words."""
    now = len(counts.stages) - 1
    stage = counts.stages[-1]
    answers = _answers(counts)
    if answers < plan.least_answers:
        yield f"{answers:,} answers of the candidate in this stage of {plan.least_answers:,}"
    if stage.seconds < plan.least_s:
        yield f"the stage has lasted {stage.seconds:,.0f} s of {plan.least_s:,.0f} s"
    for reading in readings:
        if not reading.decides:
            continue
        is_needed = reading.segment == WHOLE and reading.stage in {None, now}
        if is_needed and reading.no_worse < reading.promotes_at:
            yield (
                f"{_named(reading)}: not yet shown to be within the margin: E is "
                f"10^{reading.no_worse:.1f} of 10^{reading.promotes_at:.1f}"
            )
        elif reading.worse >= reading.promotes_at:
            yield f"{_named(reading)}: under suspicion: E is 10^{reading.worse:.1f}"
    yield from _outweighed(plan, counts)
    yield from _unbalanced(stage)
    whole = counts.paired.get(WHOLE, PairedCounts())
    if whole.labels_missing > MOST_MISSING * whole.labels_due:
        yield f"{whole.labels_missing:,} of {whole.labels_due:,} labels are missing"


def _outweighed(plan: Plan, counts: Counts) -> Iterator[str]:
    """Harm that large executions have more of than small ones: each of them counts alike above."""
    whole = counts.paired.get(WHOLE, PairedCounts())
    rates = [("errors", whole.errors, plan.margins.errors)]
    if plan.margins.not_finite > 0:
        rates.append(("not_finite", whole.not_finite, plan.margins.not_finite))
    if plan.kind == "equivalent":
        rates.append(("flips", whole.flips, plan.margins.flips))
    for name, blocks, margin in rates:
        rows = sum(n * count for n, _, count in blocks)
        harmed = sum(harmed * count for _, harmed, count in blocks)
        if harmed > margin * rows:
            yield f"{name}: {harmed:,} of {rows:,} rows, a larger share than {margin:.3%}"


def _answers(counts: Counts) -> int:
    """Of the candidate in the stage that goes on; while it is shown requests only, what was
    compared."""
    stage = counts.stages[-1]
    if stage.stage.share > 0:
        return stage.candidate.resolved
    return counts.paired.get(WHOLE, PairedCounts()).rows


def _unbalanced(stage: StageCounts) -> Iterator[str]:
    """What does not add up."""
    if stage.misrouted:
        yield f"{stage.misrouted:,} answers came by another route than their key says"
    for name, arm in (("candidate", stage.candidate), ("champion", stage.champion)):
        # Those that died with their worker among them; of the last seconds it is not told yet.
        unknown = arm.assigned - arm.resolved
        of_late = min(_TOLD_WITHIN_S / max(stage.seconds, 1.0), 1.0)
        unknown = max(arm.lost, unknown - int(of_late * arm.assigned))
        if unknown > MOST_MISSING * arm.assigned:
            yield f"of {unknown:,} of {arm.assigned:,} exposures of the {name} the end is unknown"
    if stage.stage.share > 0:
        log_e = ratio_evidence(stage.candidate, stage.champion, stage.stage.share)
        if log_e >= -math.log(_RATIO_ALPHA):
            yield (
                f"{stage.candidate.assigned:,} of "
                f"{stage.candidate.assigned + stage.champion.assigned:,} first exposures are the "
                f"candidate's, which is not {stage.stage.share:.0%}"
            )


def ratio_evidence(candidate: Arm, champion: Arm, share: float) -> float:
    """ln E against the claim that each first exposure was the candidate's with this probability:
    a Beta mixture around it (Lindon & Malek, *Anytime-Valid Inference for Multinomial Count Data*,
    NeurIPS 2022)."""
    k, rest = candidate.assigned, champion.assigned
    a, b = _RATIO_PRIOR * share, _RATIO_PRIOR * (1 - share)
    if not 0 < share < 1:
        return 0.0
    mixed = _log_beta(a + k, b + rest) - _log_beta(a, b)
    return mixed - k * math.log(share) - rest * math.log1p(-share)


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def _pairs(blocks: Triples) -> dict[tuple[int, int], int]:
    """In order, so that the last digit of a sum does not depend on where the counts came from."""
    pairs: dict[tuple[int, int], int] = {}
    for one, two, count in sorted(blocks):
        pairs[one, two] = pairs.get((one, two), 0) + count
    return pairs


def _named(reading: Reading) -> str:
    where = "" if reading.segment == WHOLE else f" in {reading.segment}"
    stage = "" if reading.stage is None else f" of exposures in stage {reading.stage}"
    return f"{reading.guardrail}{where}{stage}"


def _passed(plan: Plan, stage: StageCounts) -> str:
    return f"every guardrail is within its margin at a share of {stage.stage.share:.0%}"
