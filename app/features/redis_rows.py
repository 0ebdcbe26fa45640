"""Turns the replies of Redis into rows: everything that arrived together is decoded together."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from app.features.plan import FeaturePlan, value_type
from app.features.redis_hash import EntityHash, Row
from app.features.source import MAX_AHEAD_S, Columns, FeatureRows, ValueStatus
from app.features.values import Stored, decode_column, decode_times

Places: TypeAlias = NDArray[np.intp] | None
"""For each row asked for, the place of its entity; None: entities are in the order of the rows."""

_Index: TypeAlias = slice | NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class HashRows:
    """What one hash of each entity holds: `rows`, at least one, and for each row of the request
    which of them is its own."""

    rows: Sequence[Row]
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
                    _Block(number, slice(block.start, block.stop), _index(block.features))
                )
        self._stamps = [
            _Block(number, slice(read.stamps, None), _index(read.views))
            for number, read in enumerate(hashes)
        ]
        self._all_numbers = all(value_type(dtype) == "number" for dtype in self._types)
        self._in_order = len(self._types) == 1 and _is_in_order(hashes)
        self._max_age_s = np.array([view.ttl_s or np.inf for view in plan.views])
        self._least_max_age_s = min(self._max_age_s)
        self._view_of_feature = [i for i, view in enumerate(plan.views) for _ in view.features]

    def decode(self, stored: Sequence[HashRows], rows: int, now_s: float) -> FeatureRows:
        """`stored` has an element for each hash. The arrays are the caller's."""
        seconds, corrupt = decode_times(_flat(self._stamps, stored))
        if self._in_order and (rows == 1 or len(stored) == 1) and _all_in_order(stored):
            # One after the other they are the rows asked for already.
            ((dtype, blocks),) = self._types.items()
            values, status = _decoded(dtype, _flat(blocks, stored))
            columns = values.reshape(rows, -1).T
            table = _Table(
                columns if values.dtype != object else list(columns), status.reshape(rows, -1)
            )
            times = seconds.reshape(rows, -1)
        else:
            table = _empty_table(rows, len(self._plan.references), numbers=self._all_numbers)
            for dtype, blocks in self._types.items():
                _fill(table, dtype, blocks, stored)
            times = self._by_view(seconds, stored, rows)
        # The oldest and the newest of all: usually they say that nothing need be hidden.
        youngest_s = now_s - np.maximum.reduce(times, axis=None)  # NaN with any NaN
        oldest_s = now_s - np.minimum.reduce(times, axis=None)
        if not (youngest_s >= -MAX_AHEAD_S and oldest_s <= self._least_max_age_s):
            self._hide_unusable(table, now_s - times)
            if corrupt:
                unreadable = self._unreadable(corrupt, stored, rows)
                table.hide(unreadable[:, self._view_of_feature], ValueStatus.UNAVAILABLE)
        return FeatureRows(self._plan, table.columns, table.status, times)

    def _unreadable(
        self, corrupt: Sequence[int], stored: Sequence[HashRows], rows: int
    ) -> NDArray[np.bool_]:
        """`[rows, views]`: whose time stamp cannot be read."""
        flags = np.zeros(len(_flat(self._stamps, stored)), dtype=bool)
        flags[corrupt] = True
        return self._by_view(flags, stored, rows)

    def _by_view(self, flat: NDArray[Any], stored: Sequence[HashRows], rows: int) -> NDArray[Any]:
        table = np.empty((rows, len(self._plan.views)), dtype=flat.dtype)
        start = 0
        for block in self._stamps:
            own, stop = stored[block.hash], start + block.count(stored)
            table[:, block.target] = _by_row(_by_entity(flat[start:stop], own), own.of_row)
            start = stop
        return table

    def _hide_unusable(self, table: "_Table", ages_s: NDArray[np.float64]) -> None:
        too_old = ages_s > self._max_age_s
        absent = np.isnan(ages_s) | (ages_s < -MAX_AHEAD_S)
        table.hide(too_old[:, self._view_of_feature], ValueStatus.OUTSIDE_MAX_AGE)
        table.hide(absent[:, self._view_of_feature], ValueStatus.NOT_FOUND)


@dataclass(frozen=True, slots=True)
class _Block:
    """Values of one type: where in the rows of which hash they are, and where in the plan."""

    hash: int
    places: slice
    target: _Index

    def count(self, stored: Sequence[HashRows]) -> int:
        """Its values in all rows of the hash."""
        rows = stored[self.hash].rows
        return len(rows) * len(rows[0][self.places])


class _Table:
    """Rows that are being filled: `columns` as in `FeatureRows`, `status` `[rows, features]`."""

    def __init__(self, columns: Columns, status: NDArray[np.uint8]) -> None:
        self.columns = columns
        self.status = status

    def write(self, target: _Index, values: NDArray[Any]) -> None:
        """`values` `[rows, features of the target]`."""
        if isinstance(self.columns, np.ndarray):
            if values.dtype != object:
                self.columns[target] = values.T
                return
            self.columns = list(self.columns)
        columns = cast("list[NDArray[Any]]", self.columns)
        for feature, column in zip(np.arange(len(columns))[target], values.T, strict=True):
            columns[feature] = column

    def hide(self, hidden: NDArray[np.bool_], status: ValueStatus) -> None:
        """Make these values null, `[rows, features]`, for this reason."""
        self.status[hidden] = status
        if isinstance(self.columns, np.ndarray):
            self.columns[hidden.T] = np.nan
            return
        for column, rows in zip(self.columns, hidden.T, strict=True):
            column[rows] = None


def _empty_table(rows: int, features: int, *, numbers: bool) -> _Table:
    """While all values are numbers their columns are one array."""
    columns: Columns = np.empty((features, rows)) if numbers else [np.empty(0)] * features
    return _Table(columns, np.empty((rows, features), dtype=np.uint8))


def _fill(table: _Table, dtype: str, blocks: Sequence[_Block], stored: Sequence[HashRows]) -> None:
    """The features of one type, of all hashes, in one go."""
    values, status = _decoded(dtype, _flat(blocks, stored))
    start = 0
    for block in blocks:
        own, stop = stored[block.hash], start + block.count(stored)
        table.write(block.target, _by_row(_by_entity(values[start:stop], own), own.of_row))
        table.status[:, block.target] = _by_row(_by_entity(status[start:stop], own), own.of_row)
        start = stop


def _decoded(dtype: str, flat: Sequence[Stored]) -> tuple[NDArray[Any], NDArray[np.uint8]]:
    """The values and what is known about each."""
    values, corrupt = decode_column(dtype, flat)
    if values.dtype == object:
        null = np.fromiter((value is None for value in values), dtype=np.uint8, count=len(values))
    # A sum is NaN when any of them is, and costs a third of asking each.
    elif math.isnan(np.add.reduce(values)):
        null = np.isnan(values).view(np.uint8)
    else:
        return values, np.zeros(len(values), dtype=np.uint8)
    null[corrupt] = ValueStatus.UNAVAILABLE  # the others are 1, NULL_VALUE
    return values, null


def _flat(blocks: Sequence[_Block], stored: Sequence[HashRows]) -> list[Stored]:
    """The values of these blocks, row by row."""
    flat: list[Stored] = []
    for block in blocks:
        places = block.places
        flat += chain.from_iterable([row[places] for row in stored[block.hash].rows])
    return flat


def _by_entity(flat: NDArray[Any], own: HashRows) -> NDArray[Any]:
    return flat.reshape(len(own.rows), -1)


def _by_row(values: NDArray[Any], of_row: Places) -> NDArray[Any]:
    return values if of_row is None else values[of_row]


def _all_in_order(stored: Sequence[HashRows]) -> bool:
    return all([own.of_row is None for own in stored])


def _is_in_order(hashes: Sequence[EntityHash]) -> bool:
    """Whether the values and the time stamps of all hashes are in the order of the plan."""
    features = [feature for read in hashes for block in read.blocks for feature in block.features]
    views = [view for read in hashes for view in read.views]
    return features == sorted(features) and views == sorted(views)


def _index(places: Sequence[int]) -> _Index:
    """A slice where the places are consecutive: numpy is several times faster with it."""
    first = places[0]
    if list(places) == list(range(first, first + len(places))):
        return slice(first, first + len(places))
    return np.array(places, dtype=np.intp)
