"""All that a verdict rests on, as it is logged: counts."""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import msgspec

from app.evidence.plan import Stage

Triples: TypeAlias = Sequence[tuple[int, int, int]]
"""Rows and those harmed, bad answers of both, or bounds of a mean in steps; and how many blocks."""

WHOLE = ""


class PairedCounts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of rows that the champion answered and the candidate was shown: of all, or of a segment.

    `errors`, `not_finite`, `flips`: executions by their rows and how many of them were harmed.
    `shift`: by the bounds of the mean difference of the score in steps of 1 / `SHIFT_STEPS`.
    `loss`: by the bounds of the mean difference of the Brier loss in steps of 1 / `LOSS_STEPS`, and
    by the most that it could have been, known before the labels were, in the same steps.
    """

    rows: int = 0
    errors: Triples = ()
    not_finite: Triples = ()
    flips: Triples = ()
    shift: Triples = ()
    loss: Sequence[tuple[int, int, int, int]] = ()
    labels_due: int = 0
    labels_missing: int = 0


class Arm(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The ledger of one version in a stage: first exposures."""

    assigned: int = 0
    resolved: int = 0
    lost: int = 0
    """Of which the end is not known."""
    errors: int = 0
    slow: int = 0


class StageCounts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of the first exposures of a stage: blocks by the bad answers of both."""

    stage: Stage
    candidate: Arm = Arm()
    champion: Arm = Arm()
    errors: Triples = ()
    slow: Triples = ()
    median: Triples = ()
    """Answers that took longer than `median_s` of the stage."""
    misrouted: int = 0
    """Answers whose route is not the one that follows from the key."""
    seconds: float = 0.0
    """Since it began."""


class Counts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was counted since the release began."""

    paired: Mapping[str, PairedCounts]
    """By segment; `WHOLE` are all."""
    stages: Sequence[StageCounts]
    """Those that have begun; the last one goes on."""
    trips: Sequence[str] = ()
    """What forbids the candidate at once, in words."""
    blocked: Sequence[str] = ()
    """What forbids a promotion now, in words."""
