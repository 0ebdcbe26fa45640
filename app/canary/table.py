"""What is counted of the exposures of one stage of a release, so that the tables of workers add."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

import msgspec
import numpy as np

from app.comparison import grid
from app.errors import HikyakuError
from app.evidence.counts import Arm, StageCounts
from app.evidence.plan import Stage

Bad: TypeAlias = tuple[int, int]
"""How many of a block's exposures were bad: of the candidate's, and of those of whom it is against.
"""

_Key = TypeVar("_Key")

KIND = "canary"
_FORM = 2


class UnreadableExposures(HikyakuError):
    """A table of another form than this release of the software reads."""


def table_name(model: str, began: int) -> str:
    """Of the stage that began in this generation of the release state."""
    return f"{KIND}:{model}:{began}"


def began_of(name: str) -> int:
    """The generation in such a name."""
    return int(name.rsplit(":", 1)[1])


@dataclass(slots=True)
class ArmTable:
    """First exposures of one version, and how long its answers took: seconds, counted on the fine
    grid (app/comparison/grid.py)."""

    assigned: int = 0
    """Whose key was counted for the first time."""
    resolved: int = 0
    """Of these, whose end is known."""
    lost: int = 0
    """Whose end will not be known."""
    errors: int = 0
    slow: int = 0
    latencies: dict[int, int] = field(default_factory=dict)

    def __add__(self, other: "ArmTable") -> "ArmTable":
        return ArmTable(
            self.assigned + other.assigned,
            self.resolved + other.resolved,
            self.lost + other.lost,
            self.errors + other.errors,
            self.slow + other.slow,
            _sum(self.latencies, other.latencies),
        )

    def answered(self, took_s: Sequence[float]) -> None:
        """So long each of some answers took."""
        if took_s:
            codes, counts = np.unique(grid.codes(np.array(took_s)), return_counts=True)
            for code, count in zip(codes.tolist(), counts.tolist(), strict=True):
                self.latencies[code] = self.latencies.get(code, 0) + count

    def quantile_s(self, q: float) -> float | None:
        """Seconds that a share `q` of the answers took at most, to 3 %; None without answers."""
        total = sum(self.latencies.values())
        if not total:
            return None
        codes = np.array(sorted(self.latencies))
        below = np.cumsum([self.latencies[code] for code in codes.tolist()])
        place = int(np.searchsorted(below, q * total))
        return float(grid.edges(codes[min(place, len(codes) - 1)])[1])

    def as_json(self) -> dict[str, Any]:
        """What a person wants to know."""
        ledger = {name: getattr(self, name) for name in Arm.__struct_fields__}
        return ledger | {f"p{q * 100:g}_s": self.quantile_s(q) for q in (0.5, 0.99)}

    def arm(self) -> Arm:
        return Arm(self.assigned, self.resolved, self.lost, self.errors, self.slow)


class _Wire(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    form: int
    candidate: tuple[int, int, int, int, int, dict[int, int]]
    against: tuple[int, int, int, int, int, dict[int, int]]
    errors: list[tuple[int, int, int]]
    slow: list[tuple[int, int, int]]
    median: list[tuple[int, int, int]]
    misrouted: int
    outside: dict[str, int]


class _Form(msgspec.Struct, array_like=True):
    form: int


@dataclass(slots=True)
class ExposureTable:
    """Counts of one stage; two of them add, in any order.

    `errors`, `slow` and `median`: blocks of first exposures by how many were bad. `outside`:
    requests that are no evidence, by the reason. While the stage shows the candidate requests only,
    there are no exposures, and `against` has the latencies of all answers.
    """

    candidate: ArmTable = field(default_factory=ArmTable)
    against: ArmTable = field(default_factory=ArmTable)
    errors: dict[Bad, int] = field(default_factory=dict)
    slow: dict[Bad, int] = field(default_factory=dict)
    median: dict[Bad, int] = field(default_factory=dict)
    misrouted: int = 0
    """First exposures that another version answered than the one that follows from their key."""
    outside: dict[str, int] = field(default_factory=dict)

    def __add__(self, other: "ExposureTable") -> "ExposureTable":
        return ExposureTable(
            self.candidate + other.candidate,
            self.against + other.against,
            _sum(self.errors, other.errors),
            _sum(self.slow, other.slow),
            _sum(self.median, other.median),
            self.misrouted + other.misrouted,
            _sum(self.outside, other.outside),
        )

    def leave_out(self, reason: str, requests: int = 1) -> None:
        self.outside[reason] = self.outside.get(reason, 0) + requests

    def as_json(self) -> dict[str, Any]:
        """What a person wants to know."""
        return {
            "candidate": self.candidate.as_json(),
            "against": self.against.as_json(),
            "blocks": sum(self.errors.values()),
            "misrouted": self.misrouted,
            "outside": self.outside,
        }

    def counts(self, stage: Stage, seconds: float) -> StageCounts:
        """What a verdict about the stage rests on, `seconds` after it began."""
        return StageCounts(
            stage,
            self.candidate.arm(),
            self.against.arm(),
            _triples(self.errors),
            _triples(self.slow),
            _triples(self.median),
            self.misrouted,
            seconds,
        )

    def encode(self) -> bytes:
        return msgspec.msgpack.encode(
            _Wire(
                _FORM,
                _wired(self.candidate),
                _wired(self.against),
                _triples(self.errors),
                _triples(self.slow),
                _triples(self.median),
                self.misrouted,
                self.outside,
            )
        )

    @classmethod
    def decode(cls, content: bytes) -> "ExposureTable":
        """Raises `UnreadableExposures`."""
        try:
            form = msgspec.msgpack.decode(content, type=_Form).form
            if form != _FORM:
                raise UnreadableExposures(
                    f"exposures of form {form}; this release of the software reads form {_FORM}"
                )
            wire = msgspec.msgpack.decode(content, type=_Wire)
        except msgspec.MsgspecError as exc:
            raise UnreadableExposures(f"exposures cannot be read: {exc}") from exc
        return cls(
            ArmTable(*wire.candidate),
            ArmTable(*wire.against),
            _blocks(wire.errors),
            _blocks(wire.slow),
            _blocks(wire.median),
            wire.misrouted,
            wire.outside,
        )


def _sum(one: Mapping[_Key, int], other: Mapping[_Key, int]) -> dict[_Key, int]:
    return dict(one) | {key: one.get(key, 0) + count for key, count in other.items()}


def _wired(arm: ArmTable) -> tuple[int, int, int, int, int, dict[int, int]]:
    return arm.assigned, arm.resolved, arm.lost, arm.errors, arm.slow, arm.latencies


def _triples(blocks: Mapping[Bad, int]) -> list[tuple[int, int, int]]:
    return [(*bad, count) for bad, count in sorted(blocks.items())]


def _blocks(triples: Iterable[tuple[int, int, int]]) -> dict[Bad, int]:
    return {(a, b): count for a, b, count in triples}
