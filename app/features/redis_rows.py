"""Turns the replies of Redis into rows: everything that arrived together is decoded together."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from app.features.plan import FeaturePlan, value_type
from app.features.redis_hash import EntityHash
from app.features.source import MAX_AHEAD_S, FeatureRows, ValueStatus
from app.features.values import Stored, decode_column, decode_times

Places: TypeAlias = NDArray[np.intp] | None
"""For each row, the place of its entity among the replies; None: they are in the rows' order."""

_Index: TypeAlias = slice | NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class HashReplies:
    """What one hash of each entity holds: `replies`, and for each row which of them is its own."""

    replies: Sequence[Sequence[Stored]]
    of_row: Places


class RowDecoder:
    """Decodes rows of a plan.

    All values of one type are decoded at once; what is rare (a value that is missing, too old or
    corrupt) is looked for with one comparison and paid for only where it is found.
    """

    def __init__(self, plan: FeaturePlan, hashes: Sequence[EntityHash]) -> None:
        self._plan = plan
        self._types: dict[str, list[_Block]] = {}
        for number, read in enumerate(hashes):
            for block in read.blocks:
                self._types.setdefault(block.dtype, []).append(
                    _Block(
                        number, slice(block.start, block.stop), _index(block.features), block.width
                    )
                )
        self._stamps = [
            _Block(number, slice(read.stamps, None), _index(read.views), len(read.views))
            for number, read in enumerate(hashes)
        ]
        self._all_numbers = all(value_type(dtype) == "number" for dtype in self._types)
        self._max_age_s = np.array([view.ttl_s or np.inf for view in plan.views])
        self._least_max_age_s = min(self._max_age_s)
        self._view_of_feature = [i for i, view in enumerate(plan.views) for _ in view.features]

    def decode(self, stored: Sequence[HashReplies], rows: int, now_s: float) -> FeatureRows:
        """`stored` has an element for each hash. The arrays are the caller's."""
        table = _Table(len(self._plan.references), rows, numbers=self._all_numbers)
        for dtype, blocks in self._types.items():
            self._decode_type(dtype, blocks, stored, table)
        times, corrupt = self._times(stored, rows)
        # The oldest and the newest of all: usually they say that nothing need be hidden.
        youngest_s = now_s - np.maximum.reduce(times, axis=None)  # NaN with any NaN
        oldest_s = now_s - np.minimum.reduce(times, axis=None)
        if not (youngest_s >= -MAX_AHEAD_S and oldest_s <= self._least_max_age_s):
            self._hide_unusable(table, now_s - times)
            if corrupt:
                unreadable = self._unreadable(corrupt, stored, rows)
                table.hide(unreadable[:, self._view_of_feature], ValueStatus.UNAVAILABLE)
        return FeatureRows(self._plan, table.columns, table.status, times)

    def _decode_type(
        self,
        dtype: str,
        blocks: Sequence["_Block"],
        stored: Sequence[HashReplies],
        table: "_Table",
    ) -> None:
        """The features of one type, of all hashes, in one go."""
        values, corrupt = decode_column(dtype, _flat(blocks, stored))
        null = _nulls(values)
        start = 0
        for block in blocks:
            own = stored[block.hash]
            stop = start + len(own.replies) * block.width
            table.write(block, values[start:stop].reshape(-1, block.width), own.of_row)
            if null is not None:
                status = null[start:stop].astype(np.uint8)  # NULL_VALUE is 1
                status[[i - start for i in corrupt if start <= i < stop]] = ValueStatus.UNAVAILABLE
                table.write_status(block, status.reshape(-1, block.width), own.of_row)
            start = stop

    def _times(
        self, stored: Sequence[HashReplies], rows: int
    ) -> tuple[NDArray[np.float64], list[int]]:
        """Seconds `[rows, views]`, and which of the time stamps cannot be read."""
        seconds, corrupt = decode_times(_flat(self._stamps, stored))
        return self._by_view(seconds, stored, rows), corrupt

    def _unreadable(
        self, corrupt: Sequence[int], stored: Sequence[HashReplies], rows: int
    ) -> NDArray[np.bool_]:
        """`[rows, views]`: whose time stamp cannot be read."""
        stamps = sum(len(stored[block.hash].replies) * block.width for block in self._stamps)
        flags = np.zeros(stamps, dtype=bool)
        flags[corrupt] = True
        return self._by_view(flags, stored, rows)

    def _by_view(
        self, flat: NDArray[Any], stored: Sequence[HashReplies], rows: int
    ) -> NDArray[Any]:
        table = np.empty((rows, len(self._plan.views)), dtype=flat.dtype)
        start = 0
        for block in self._stamps:
            own = stored[block.hash]
            stop = start + len(own.replies) * block.width
            table[:, block.target] = _by_row(flat[start:stop].reshape(-1, block.width), own.of_row)
            start = stop
        return table

    def _hide_unusable(self, table: "_Table", ages_s: NDArray[np.float64]) -> None:
        too_old = ages_s > self._max_age_s
        absent = np.isnan(ages_s) | (ages_s < -MAX_AHEAD_S)
        table.hide(too_old[:, self._view_of_feature], ValueStatus.OUTSIDE_MAX_AGE)
        table.hide(absent[:, self._view_of_feature], ValueStatus.NOT_FOUND)


@dataclass(frozen=True, slots=True)
class _Block:
    """Values of one type in the replies of one hash: where they are, and where in a row they go."""

    hash: int
    places: slice
    target: _Index
    width: int


class _Table:
    """Rows that are being filled. While all values are numbers their columns are one array."""

    def __init__(self, features: int, rows: int, *, numbers: bool) -> None:
        self.status = np.zeros((rows, features), dtype=np.uint8)
        self.columns: Any = np.empty((features, rows)) if numbers else [_NO_COLUMN] * features

    def write(self, block: _Block, values: NDArray[Any], of_row: Places) -> None:
        """`values` `[replies, width of the block]`."""
        by_feature = _by_row(values, of_row).T
        if not isinstance(self.columns, list):
            if values.dtype != object:
                self.columns[block.target] = by_feature
                return
            self.columns = list(self.columns)
        features = (
            range(len(self.columns))[block.target]
            if isinstance(block.target, slice)
            else (block.target.tolist())
        )
        for feature, column in zip(features, by_feature, strict=True):
            self.columns[feature] = column

    def write_status(self, block: _Block, status: NDArray[np.uint8], of_row: Places) -> None:
        self.status[:, block.target] = _by_row(status, of_row)

    def hide(self, hidden: NDArray[np.bool_], status: ValueStatus) -> None:
        """Make these values null, `[rows, features]`, for this reason."""
        self.status[hidden] = status
        if not isinstance(self.columns, list):
            self.columns[hidden.T] = np.nan
            return
        for column, rows in zip(self.columns, hidden.T, strict=True):
            column[rows] = None


_NO_COLUMN: NDArray[Any] = np.empty(0)


def _flat(blocks: Sequence[_Block], stored: Sequence[HashReplies]) -> list[Stored]:
    """The values of these blocks, reply by reply."""
    flat: list[Stored] = []
    for block in blocks:
        places = block.places
        flat += chain.from_iterable([reply[places] for reply in stored[block.hash].replies])
    return flat


def _nulls(values: NDArray[Any]) -> NDArray[np.bool_] | None:
    """Which values are null; None when none is."""
    if values.dtype == object:
        null = np.fromiter((value is None for value in values), dtype=bool, count=len(values))
        return null if null.any() else None
    # A sum is NaN when any of them is, and costs a third of asking each.
    return np.isnan(values) if np.isnan(np.add.reduce(values)) else None


def _by_row(values: NDArray[Any], of_row: Places) -> NDArray[Any]:
    return values if of_row is None else values[of_row]


def _index(places: Sequence[int]) -> _Index:
    """A slice where the places are consecutive: numpy is several times faster with it."""
    first = places[0]
    if list(places) == list(range(first, first + len(places))):
        return slice(first, first + len(places))
    return np.array(places, dtype=np.intp)
