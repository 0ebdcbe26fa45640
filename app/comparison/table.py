"""What is counted of the pairs of one trial: sums and counts, so that the tables of workers add."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import chain
from math import isqrt
from typing import Literal, TypeAlias, get_args

import msgspec
import numpy as np
from numpy.typing import NDArray

from app.comparison import grid
from app.comparison.counts import GroupedCounts, Keys, Packed, counted
from app.comparison.intervals import ClusterSums
from app.comparison.pairs import NO_DECISION, Pairs
from app.errors import HikyakuError

Names: TypeAlias = tuple[tuple[str, ...], ...]
Guardrail: TypeAlias = Literal["error", "not_finite", "flip"]
Clustered: TypeAlias = Literal["error", "not_finite", "flip", "difference", "absolute_difference"]
Distribution: TypeAlias = Literal["difference", "champion", "candidate"]

WHOLE = ""
SHIFT_STEPS = 2_000
"""The block mean of the difference is counted on a grid of 1 / SHIFT_STEPS."""
MOST_DECISIONS = 32
"""Of labelled outputs the decisions from the last of so many on are counted as one; `flips` are of
all."""

_FORM = 1
GUARDRAILS: Sequence[Guardrail] = get_args(Guardrail)
CLUSTERED: Sequence[Clustered] = get_args(Clustered)
DISTRIBUTIONS: Sequence[Distribution] = get_args(Distribution)
_CLUSTER_SUMS = len(ClusterSums.__struct_fields__)
_JOINT_CODES = 1 << 16
_KINDS_BY_GROUP = {
    "distributions": len(DISTRIBUTIONS),
    "decided": 1,
    "harmed": len(GUARDRAILS),
    "shift": 1,
}
_OF_ALL = ("joint", "champion_s", "candidate_s")


class UnreadableTable(HikyakuError):
    """A table of another form than this release of the software reads, or of other segments."""


class _Sum(IntEnum):
    """The sums of a group."""

    ROWS = 0
    FAILED = 1
    CHAMPION_NOT_FINITE = 2
    CANDIDATE_NOT_FINITE = 3
    COMPARED = 4
    FLIPS = 5
    DIFFERENCE_2 = 6
    CHAMPION = 7
    CHAMPION_2 = 8
    CANDIDATE = 9
    CANDIDATE_2 = 10


class _Kind(IntEnum):
    """What a row counts as. Where the champion's number is not finite the candidate is not judged:
    nothing can be said of what it does to that row."""

    FAILED = 0
    NOT_FINITE = 1
    AGREED = 2
    FLIPPED = 3
    UNJUDGED_FAILED = 4
    UNJUDGED_NOT_FINITE = 5
    UNJUDGED = 6


_COUNTED: Mapping[_Sum, Sequence[_Kind]] = {
    _Sum.ROWS: list(_Kind),
    _Sum.FAILED: [_Kind.FAILED, _Kind.UNJUDGED_FAILED],
    _Sum.CHAMPION_NOT_FINITE: [_Kind.UNJUDGED_FAILED, _Kind.UNJUDGED_NOT_FINITE, _Kind.UNJUDGED],
    _Sum.CANDIDATE_NOT_FINITE: [_Kind.NOT_FINITE, _Kind.UNJUDGED_NOT_FINITE],
    _Sum.COMPARED: [_Kind.AGREED, _Kind.FLIPPED],
    _Sum.FLIPS: [_Kind.FLIPPED],
}
"""Which kinds of rows each sum counts."""


@dataclass(frozen=True, slots=True)
class Counts:
    """How often each key was counted: `keys` ascend, `counts` are above 0."""

    keys: NDArray[np.int64]
    counts: NDArray[np.int64]

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    def as_dict(self) -> dict[int, int]:
        return dict(zip(self.keys.tolist(), self.counts.tolist(), strict=True))


@dataclass(frozen=True, slots=True)
class Group:
    """What was counted of all rows, or of those of one segment.

    `compared` rows have a finite number from both; the sums, distributions, decisions and flips
    are of those. `distributions` are counts on the fine grid (app/comparison/grid.py). `blocks`:
    for each guardrail by `(n, harmed)` how many blocks had `n` rows of which so many were harmed.
    `shift`: by `k` how many blocks have a mean difference from `k / SHIFT_STEPS` to below
    `(k + 1) / SHIFT_STEPS`; None where the output is no probability.
    """

    name: str
    rows: int
    failed: int
    champion_not_finite: int
    candidate_not_finite: int
    compared: int
    flips: int
    decisions: Mapping[tuple[int, int], int]
    """By the numbers of the champion's and the candidate's decision."""
    difference_2: float
    champion: float
    champion_2: float
    candidate: float
    candidate_2: float
    least: float
    """Difference; infinite where no row was compared."""
    largest: float
    distributions: Mapping[Distribution, Counts]
    clustered: Mapping[Clustered, ClusterSums]
    blocks: Mapping[Guardrail, Mapping[tuple[int, int], int]]
    shift: Counts | None


@dataclass(frozen=True, slots=True)
class ExecutionTime:
    """Seconds of execution a row, of `rows` rows of which both are known: their sums, and counts on
    the fine grid."""

    rows: int
    champion_s: float
    candidate_s: float
    champion: Counts
    candidate: Counts


class _Wire(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    form: int
    names: Names
    decisions: int
    bounded: bool
    blocks: int
    first_s: float
    last_s: float
    dropped: dict[str, int]
    time_sums: tuple[float, float]
    present: list[int]
    """The groups that have any row."""
    numbers: list[float]
    """Of each of these: sums, sums over clusters, extremes."""
    counted: list[Packed]


class _Form(msgspec.Struct, array_like=True):
    form: int


@dataclass(slots=True, eq=False)
class ComparisonTable:
    """Counts and sums of the pairs of one trial, of all rows and of each segment.

    `names`: for each dimension the names of its segments. `decisions`: how many there are, 0 where
    the contract decides nothing. `bounded`: the compared output is a probability.

    Tables of the same trial add, in any order: counts exactly, sums to rounding.
    """

    names: Names
    decisions: int
    bounded: bool
    blocks: int = 0
    """Of which at least one row was counted."""
    first_s: float = np.inf
    """Instants, seconds since 1970, at which pairs were added first and last."""
    last_s: float = -np.inf
    dropped: dict[str, int] = field(default_factory=dict)
    """Rows that were offered and never compared, by reason."""
    _sums: NDArray[np.float64] = field(init=False)
    _clustered: NDArray[np.float64] = field(init=False)
    _extremes: NDArray[np.float64] = field(init=False)
    _by_group: dict[str, GroupedCounts] = field(init=False)
    """By what is counted: of each of its kinds all groups, then those of the next kind."""
    _of_all: dict[str, GroupedCounts] = field(init=False)
    """What is not told apart by segments."""
    _time_sums: NDArray[np.float64] = field(init=False)
    _first_group: NDArray[np.int64] = field(init=False)
    """Of each dimension; group 0 is all rows."""

    def __post_init__(self) -> None:
        sizes = [len(dimension) for dimension in self.names]
        groups = 1 + sum(sizes)
        self._first_group = 1 + np.cumsum([0, *sizes[:-1]], dtype=np.int64)[: len(sizes)]
        # Whole numbers among them are exact up to 2^53.
        self._sums = np.zeros((groups, len(_Sum)))
        self._clustered = np.zeros((groups, len(CLUSTERED), _CLUSTER_SUMS))
        self._extremes = np.tile([np.inf, -np.inf], (groups, 1))
        self._by_group = {
            what: GroupedCounts(groups * kinds) for what, kinds in _KINDS_BY_GROUP.items()
        }
        self._of_all = {what: GroupedCounts(1) for what in _OF_ALL}
        self._time_sums = np.zeros(2)

    @classmethod
    def empty(cls, names: Names, decisions: int, bounded: bool) -> "ComparisonTable":
        return cls(names, decisions, bounded)

    def drop(self, reason: str, rows: int) -> None:
        """Count rows that were offered and will not be compared."""
        self.dropped[reason] = self.dropped.get(reason, 0) + rows

    def add(self, pairs: Pairs, now_s: float) -> None:
        """Count the pairs of whole blocks: of a block that is added in parts, each part would count
        as a block."""
        if not len(pairs):
            return
        self.first_s, self.last_s = min(self.first_s, now_s), max(self.last_s, now_s)
        groups = np.zeros((1 + len(self.names), len(pairs)), dtype=np.int64)
        groups[1:] = pairs.segments.T + self._first_group[:, np.newaxis]
        block = np.cumsum(np.diff(pairs.block, prepend=pairs.block[0]) != 0)
        rows = _Rows.of(pairs, decides=self.decisions > 0)
        self._add_blocks(rows, groups, block, int(block[-1]) + 1)
        self._add_scores(rows, pairs, groups[:, rows.compared])
        self._add_times(pairs)

    def _add_blocks(
        self, rows: "_Rows", groups: NDArray[np.int64], block: NDArray[np.intp], blocks: int
    ) -> None:
        """All that is summed within blocks: the counts of groups are the sums of these."""
        self.blocks += blocks
        count = len(self._sums)
        cells = block * count + groups
        kinds = np.bincount(
            (cells * len(_Kind) + rows.kind).ravel(), minlength=blocks * count * len(_Kind)
        )
        of = kinds.reshape(blocks, count, len(_Kind))
        in_group = of.sum(axis=0)
        for place, members in _COUNTED.items():
            self._sums[:, place] += in_group[:, members].sum(axis=1)

        failed, not_finite, flips = (
            of[:, :, kind].astype(np.float64)
            for kind in (_Kind.FAILED, _Kind.NOT_FINITE, _Kind.FLIPPED)
        )
        compared = flips + of[:, :, _Kind.AGREED]
        answered = compared + not_finite
        flat = cells[:, rows.compared].ravel()
        difference, absolute = (
            np.bincount(flat, np.tile(values, len(groups)), minlength=blocks * count)
            .reshape(blocks, count)
            .astype(np.float64)
            for values in (rows.difference, np.abs(rows.difference))
        )
        judged = answered + failed
        # In the order of CLUSTERED, which begins with the GUARDRAILS.
        n = np.stack([judged, answered, compared, compared, compared])
        sums = np.stack([failed, not_finite, flips, difference, absolute])
        self._clustered += _cluster_sums(n, sums)
        guarded = len(GUARDRAILS) if self.decisions > 0 else GUARDRAILS.index("flip")
        sizes, harmed = n[:guarded], sums[:guarded]
        self._count_blocks("harmed", sizes, sizes * (sizes + 1) / 2 + harmed)
        if self.bounded:
            means = difference / np.maximum(compared, 1)
            steps = np.clip(np.floor(means * SHIFT_STEPS), -SHIFT_STEPS, SHIFT_STEPS - 1)
            self._count_blocks("shift", compared[np.newaxis], steps[np.newaxis])

    def _count_blocks(self, what: str, n: NDArray[np.float64], keys: NDArray[np.float64]) -> None:
        """Count the keys `[kinds, blocks, groups]` of the blocks that have any rows, `n`, in a
        group."""
        kinds, _, groups = there = np.nonzero(n)
        self._by_group[what].add(keys[there].astype(np.int64), kinds * len(self._sums) + groups)

    def _add_scores(self, rows: "_Rows", pairs: Pairs, groups: NDArray[np.int64]) -> None:
        """Of the rows that were compared, in these groups."""
        champion, candidate = pairs.champion[rows.compared], pairs.candidate[rows.compared]
        flat, count = groups.ravel(), len(self._sums)
        for place, values in (
            (_Sum.DIFFERENCE_2, rows.difference * rows.difference),
            (_Sum.CHAMPION, champion),
            (_Sum.CHAMPION_2, champion * champion),
            (_Sum.CANDIDATE, candidate),
            (_Sum.CANDIDATE_2, candidate * candidate),
        ):
            self._sums[:, place] += np.bincount(flat, _repeated(values, groups), minlength=count)
        differences = _repeated(rows.difference, groups)
        np.minimum.at(self._extremes[:, 0], flat, differences)
        np.maximum.at(self._extremes[:, 1], flat, differences)
        # In the order of DISTRIBUTIONS.
        every = np.concatenate([rows.difference, champion, candidate])
        kinds = np.concatenate([groups, groups + count, groups + 2 * count], axis=1)
        self._by_group["distributions"].add(grid.codes(every), kinds)
        self._of_all["joint"].add_counted(0, *_joint_counts(champion, candidate))
        if self.decisions > 0:
            ours, theirs = (
                np.minimum(decision[rows.compared], MOST_DECISIONS - 1) - NO_DECISION
                for decision in (pairs.champion_decision, pairs.candidate_decision)
            )
            keys = ours.astype(np.int64) * (MOST_DECISIONS + 1) + theirs
            self._by_group["decided"].add(keys, groups)

    def _add_times(self, pairs: Pairs) -> None:
        known = np.isfinite(pairs.champion_s) & np.isfinite(pairs.candidate_s) & ~pairs.failed
        for place, (what, of_rows) in enumerate(
            (("champion_s", pairs.champion_s), ("candidate_s", pairs.candidate_s))
        ):
            seconds = of_rows[known]
            self._time_sums[place] += seconds.sum()
            self._of_all[what].add_counted(0, *counted(grid.codes(seconds)))

    def __add__(self, other: "ComparisonTable") -> "ComparisonTable":
        """Both together; neither changes. Raises `UnreadableTable` for one of another trial."""
        if (self.names, self.decisions, self.bounded) != (
            other.names,
            other.decisions,
            other.bounded,
        ):
            raise UnreadableTable("the tables are of other segments or decisions")
        total = ComparisonTable(self.names, self.decisions, self.bounded)
        total.blocks = self.blocks + other.blocks
        total.first_s = min(self.first_s, other.first_s)
        total.last_s = max(self.last_s, other.last_s)
        for one in (self, other):
            for reason, rows in one.dropped.items():
                total.drop(reason, rows)
        total._sums = self._sums + other._sums
        total._clustered = self._clustered + other._clustered
        total._time_sums = self._time_sums + other._time_sums
        total._extremes[:, 0] = np.minimum(self._extremes[:, 0], other._extremes[:, 0])
        total._extremes[:, 1] = np.maximum(self._extremes[:, 1], other._extremes[:, 1])
        total._by_group = {
            what: counts + other._by_group[what] for what, counts in self._by_group.items()
        }
        total._of_all = {
            what: counts + other._of_all[what] for what, counts in self._of_all.items()
        }
        return total

    def encode(self) -> bytes:
        """As msgpack, with the number of its form. Groups without a row are left out."""
        present = np.flatnonzero(self._sums[:, _Sum.ROWS])
        numbers = np.concatenate(
            [self._sums, self._clustered.reshape(len(self._sums), -1), self._extremes], axis=1
        )
        return msgspec.msgpack.encode(
            _Wire(
                _FORM,
                self.names,
                self.decisions,
                self.bounded,
                self.blocks,
                self.first_s,
                self.last_s,
                self.dropped,
                (float(self._time_sums[0]), float(self._time_sums[1])),
                present.tolist(),
                numbers[present].ravel().tolist(),
                [counts.packed() for counts in (*self._by_group.values(), *self._of_all.values())],
            )
        )

    @classmethod
    def decode(cls, content: bytes) -> "ComparisonTable":
        """Raises `UnreadableTable` for what `encode` of this release has not made."""
        try:
            form = msgspec.msgpack.decode(content, type=_Form).form
            if form != _FORM:
                raise UnreadableTable(
                    f"a comparison table of form {form}; this release of the software reads form "
                    f"{_FORM}"
                )
            return cls._of_wire(msgspec.msgpack.decode(content, type=_Wire))
        except (msgspec.MsgspecError, ValueError, IndexError, OverflowError) as exc:
            raise UnreadableTable(f"no comparison table: {exc}") from exc

    @classmethod
    def _of_wire(cls, wire: _Wire) -> "ComparisonTable":
        table = cls(wire.names, wire.decisions, wire.bounded)
        table.blocks, table.dropped = wire.blocks, wire.dropped
        table.first_s, table.last_s = wire.first_s, wire.last_s
        table._time_sums = np.array(wire.time_sums)
        sums, clusters = len(_Sum), len(CLUSTERED) * _CLUSTER_SUMS
        numbers = np.array(wire.numbers).reshape(len(wire.present), sums + clusters + 2)
        table._sums[wire.present] = numbers[:, :sums]
        table._clustered[wire.present] = numbers[:, sums : sums + clusters].reshape(
            -1, len(CLUSTERED), _CLUSTER_SUMS
        )
        table._extremes[wire.present] = numbers[:, sums + clusters :]
        groups = len(table._sums)
        *by_group, joint, champion_s, candidate_s = wire.counted
        for (what, kinds), packed in zip(_KINDS_BY_GROUP.items(), by_group, strict=True):
            table._by_group[what] = GroupedCounts.unpacked(groups * kinds, packed)
        for what, packed in zip(_OF_ALL, (joint, champion_s, candidate_s), strict=True):
            table._of_all[what] = GroupedCounts.unpacked(1, packed)
        return table

    def _of(self, what: str, kind: int, group: int) -> Counts:
        return Counts(*self._by_group[what].of(kind * len(self._sums) + group))

    def groups(self) -> list[Group]:
        """All rows first, by the name `WHOLE`; then the segments that occurred, in the order of
        `names`."""
        names = [WHOLE, *chain.from_iterable(self.names)]
        rows = self._sums[:, _Sum.ROWS]
        return [self._group(g, name) for g, name in enumerate(names) if not g or rows[g]]

    def joint(self) -> Counts:
        """Of all rows that were compared: counts of both scores on the coarse grid. A key is made
        by `joint_bins`."""
        return Counts(*self._of_all["joint"].of(0))

    def execution_time(self) -> ExecutionTime:
        champion, candidate = (
            Counts(*self._of_all[what].of(0)) for what in ("champion_s", "candidate_s")
        )
        return ExecutionTime(
            champion.total,
            float(self._time_sums[0]),
            float(self._time_sums[1]),
            champion,
            candidate,
        )

    def _group(self, group: int, name: str) -> Group:
        sums = self._sums[group]
        decided = self._of("decided", 0, group).as_dict()
        return Group(
            name=name,
            rows=int(sums[_Sum.ROWS]),
            failed=int(sums[_Sum.FAILED]),
            champion_not_finite=int(sums[_Sum.CHAMPION_NOT_FINITE]),
            candidate_not_finite=int(sums[_Sum.CANDIDATE_NOT_FINITE]),
            compared=int(sums[_Sum.COMPARED]),
            flips=int(sums[_Sum.FLIPS]),
            decisions={_decisions_of(key): count for key, count in decided.items()},
            difference_2=float(sums[_Sum.DIFFERENCE_2]),
            champion=float(sums[_Sum.CHAMPION]),
            champion_2=float(sums[_Sum.CHAMPION_2]),
            candidate=float(sums[_Sum.CANDIDATE]),
            candidate_2=float(sums[_Sum.CANDIDATE_2]),
            least=float(self._extremes[group, 0]),
            largest=float(self._extremes[group, 1]),
            distributions={
                name: self._of("distributions", kind, group)
                for kind, name in enumerate(DISTRIBUTIONS)
            },
            clustered={
                kind: ClusterSums(*self._clustered[group, place].tolist())
                for place, kind in enumerate(CLUSTERED)
            },
            blocks={
                name: _by_size(self._of("harmed", kind, group))
                for kind, name in enumerate(GUARDRAILS)
            },
            shift=self._of("shift", 0, group) if self.bounded else None,
        )


def joint_bins(keys: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The champion's and the candidate's bin on the coarse grid of each key of `joint`."""
    half = _JOINT_CODES // 2
    return keys // _JOINT_CODES - half, keys % _JOINT_CODES - half


def _joint_counts(
    champion: NDArray[np.float64], candidate: NDArray[np.float64]
) -> tuple[Keys, NDArray[np.int64]]:
    """The keys of `joint` that these rows have, ascending, and how many have them."""
    if not len(champion):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    ours, theirs = (grid.codes(scores, grid.COARSE_BITS) for scores in (champion, candidate))
    # Numbers that are close together are counted faster.
    low, least = ours.min(), theirs.min()
    span = theirs.max() - least + 1
    cells, counts = counted((ours - low) * span + theirs - least)
    half = _JOINT_CODES // 2
    ours, theirs = cells // span + low, cells % span + least
    return (ours + half) * _JOINT_CODES + theirs + half, counts


@dataclass(frozen=True, slots=True)
class _Rows:
    """`kind`: what each row counts as. `compared`: which of them are compared, and of those the
    `difference`."""

    kind: NDArray[np.int64]
    compared: NDArray[np.bool_]
    difference: NDArray[np.float64]

    @classmethod
    def of(cls, pairs: Pairs, *, decides: bool) -> "_Rows":
        judged, finite = grid.is_finite(pairs.champion), grid.is_finite(pairs.candidate)
        flipped = judged & (pairs.champion_decision != pairs.candidate_decision) & decides
        answered = np.where(
            finite, np.where(flipped, _Kind.FLIPPED, _Kind.AGREED), _Kind.NOT_FINITE
        )
        kind = np.where(pairs.failed, _Kind.FAILED, answered)
        kind[~judged] += _Kind.UNJUDGED_FAILED  # those follow in the same order
        compared = judged & finite & ~pairs.failed
        return cls(kind, compared, pairs.candidate[compared] - pairs.champion[compared])


def _repeated(values: NDArray[np.float64], groups: NDArray[np.int64]) -> NDArray[np.float64]:
    """Once for each dimension of the groups."""
    return np.broadcast_to(values, groups.shape).ravel()


def _by_size(counts: Counts) -> dict[tuple[int, int], int]:
    """Blocks by how many rows `n` they have and how many of those were harmed: the keys are the
    harmed ones after the n (n + 1) / 2 keys of smaller blocks."""
    sizes = {}
    for key, count in counts.as_dict().items():
        n = (isqrt(8 * key + 1) - 1) // 2
        sizes[n, key - n * (n + 1) // 2] = count
    return sizes


def _decisions_of(key: int) -> tuple[int, int]:
    ours, theirs = divmod(key, MOST_DECISIONS + 1)
    return ours + NO_DECISION, theirs + NO_DECISION


def _cluster_sums(n: NDArray[np.float64], s: NDArray[np.float64]) -> NDArray[np.float64]:
    """`[groups, kinds, 6]`, in the order of `ClusterSums`, of blocks `[kinds, blocks, groups]`."""
    sums = [of.sum(axis=1) for of in (n > 0, n, n * n, s, s * s, n * s)]
    return np.stack(sums, axis=2).transpose(1, 0, 2)
