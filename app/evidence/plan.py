"""What a release is decided by, fixed when it starts."""

import math
from typing import Literal, NamedTuple, TypeAlias

import msgspec

Kind: TypeAlias = Literal["retrain", "equivalent"]
AtTheEnd: TypeAlias = Literal["rollback", "hold"]


class Margins(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """So much more harm than the champion's is no harm: shares of answers, and of the score and the
    Brier loss their own units."""

    errors: float = 0.001
    not_finite: float = 0.0
    """0: not a single row."""
    slow: float = 0.01
    median: float = 0.1
    """Of answers that take longer than the champion's median, as `slow` is of its tail."""
    flips: float = 0.01
    shift: float = 0.01
    """Up or down."""
    loss: float = 0.002


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The stages of a release and what decides about them (docs/canary.md)."""

    kind: Kind = "retrain"
    """An `equivalent` version is to say the same: then flips and shifts of the score decide."""
    stages: tuple[float, ...] = (0.0, 0.1, 0.5)
    """The share of the routing keys that the candidate answers in each stage before it answers all:
    0 first, where it is shown requests only, then growing."""
    margins: Margins = Margins()
    rollback_alpha: float = 0.001
    """A candidate that is no worse is rolled back with this probability at most."""
    promotion_alpha: float = 0.05
    """One that is worse by a margin is promoted with this probability at most."""
    least_answers: int = 1_000
    """Of the candidate in each stage."""
    least_s: float = 60.0
    """In each stage."""
    most_s: float = 86_400.0
    """In each stage."""
    at_the_end: AtTheEnd = "rollback"
    """Of a stage that has lasted for `most_s` and cannot be promoted."""
    judges_labels: bool = False
    """Whether the loss is known later."""
    segments: tuple[str, ...] = ()
    """Within which it is judged, too."""


class Pace(NamedTuple):
    """How long answers of the champion take, times what a candidate may take longer."""

    slow_s: float
    """Of the 99th percentile."""
    median_s: float


class Stage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A stage that has begun: what was fixed then."""

    share: float
    """Of the routing keys that the candidate answers."""
    keys: int
    """First exposures in a block."""
    slow_s: float | None
    """An answer that took longer is slow; None where that is not known, and none is."""
    median_s: float | None = None
    """Few answers are to take longer that did not before; None where that is not known."""


def least_keys(share: float) -> int:
    """First exposures that a block is to have for some to be the candidate's."""
    return math.ceil(2 / min(share, 1 - share, 0.25))
