"""Turns the replies of Redis into rows: everything that arrived together is decoded together."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from operator import itemgetter
from typing import Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from app.features.plan import FeaturePlan, value_type
from app.features.redis_hash import EntityHash, Found, Row
from app.features.redis_record import Stretch
from app.features.source import MAX_AHEAD_S, Columns, FeatureRows, ValueStatus
from app.features.values import Stored, decode_column, decode_times

Places: TypeAlias = NDArray[np.intp] | None
"""For each row asked for, the place of its entity; None: entities are in the order of the rows."""

# Of more values BLAS would start threads to make a dot product.
_FEW = 4096

_Index: TypeAlias = slice | NDArray[np.intp]
_Pick: TypeAlias = Callable[[Sequence[Stored]], Sequence[Stored]]


class HashRows:
    """What one hash of each entity holds: `found`, of at least one, and for each row of the request
    which of them is its own.

    `loose` are those that are still to be decoded; the others are in stretches.
    """

    def __init__(
        self, found: Sequence[Found], of_row: Places, *, in_stretches: bool = True
    ) -> None:
        """`in_stretches` is False where none is."""
        self.of_row = of_row
        self._count = len(found)
        self.whole: Stretch | None = None
        """The stretch that they are, one and all."""
        self._loose_places: list[int] = []
        self._stretches: dict[Stretch, tuple[list[int], list[int]]] = {}
        if not in_stretches:
            self.loose = cast("Sequence[Row]", found)
            return
        self.loose = []
        stretch = _stretch_of(found[0])
        if stretch is not None and _is_whole(found, stretch):
            self.whole = stretch
        else:
            self.loose = self._split(found)

    def together(
        self, loose: NDArray[Any], of_stretch: Callable[[Stretch], NDArray[Any]]
    ) -> NDArray[Any]:
        """`[rows, values]`, from the values of those that are loose and of those in stretches."""
        if self.whole is not None:
            values = of_stretch(self.whole)
            # Others that read the same entities have the stretch too.
            return values.copy() if self.of_row is None else values[self.of_row]
        if not self._stretches:
            return _by_row(loose, self.of_row)
        parts = [(of_stretch(stretch), own) for stretch, own in self._stretches.items()]
        values = np.empty((self._count, loose.shape[1]), dtype=loose.dtype)
        values[self._loose_places] = loose
        for part, (places, indexes) in parts:
            values[places] = part[indexes]
        return _by_row(values, self.of_row)

    def _split(self, found: Sequence[Found]) -> Sequence[Row]:
        """Those that are loose; the places of the others."""
        loose: list[Row] = []
        for place, one in enumerate(found):
            stretch = _stretch_of(one)
            if stretch is None:
                loose.append(cast("Row", one))
                self._loose_places.append(place)
            else:
                places, indexes = self._stretches.setdefault(stretch, ([], []))
                places.append(place)
                indexes.append(cast("int", one[1]))
        return loose


def _stretch_of(found: Found) -> Stretch | None:
    """The stretch of which it is a member."""
    first = found[0]
    return first if type(first) is Stretch else None


def _is_whole(found: Sequence[Found], stretch: Stretch) -> bool:
    """Whether these are the members of the stretch, in its order."""
    count = len(stretch.times_s)
    members = zip(repeat(stretch, count), range(count), strict=True)
    return len(found) == count and found == list(members)


class RowDecoder:
    """Decodes rows of a plan.

    All values of one type are decoded at once; what is rare (a value that is missing, too old or
    corrupt) is looked for with one comparison and paid for only where it is found.
    """

    def __init__(self, plan: FeaturePlan, hashes: Sequence[EntityHash]) -> None:
        self._plan = plan
        self._types: dict[str, list[_Block]] = {}
        for number, read in enumerate(hashes):
            for cell, block in enumerate(read.blocks):
                self._types.setdefault(block.dtype, []).append(
                    _Block(
                        number,
                        slice(block.start, block.stop),
                        _index(block.features),
                        len(block.features),
                        cell,
                    )
                )
        self._stamps = [
            _Block(number, slice(read.stamps, None), _index(read.views), len(read.views))
            for number, read in enumerate(hashes)
        ]
        self._all_numbers = all(value_type(dtype) == "number" for dtype in self._types)
        self._max_ages_s = [view.ttl_s or math.inf for view in plan.views]
        self._max_age_s = min(self._max_ages_s, default=math.inf)
        self._view_of_feature = [i for i, view in enumerate(plan.views) for _ in view.features]
        self._picks = _picks(hashes)
        self._pick_stamps = _pick_stamps(hashes)

    def decode(self, stored: Sequence[HashRows], rows: int, now_s: float) -> FeatureRows:
        """`stored` has an element for each hash. The arrays are the caller's."""
        if all([own.whole is not None for own in stored]):
            return self._decode_stretches(stored, rows, now_s)
        table = _empty_table(rows, len(self._plan.references), numbers=self._all_numbers)
        for dtype, blocks in self._types.items():
            _fill(table, dtype, blocks, stored)
        seconds, corrupt = decode_times(_flat(self._stamps, stored))
        times = self._by_view(seconds, stored, rows, lambda stretch: stretch.times_s)
        # The oldest and the newest of all: usually they say that nothing need be hidden.
        youngest_s = now_s - np.maximum.reduce(times, axis=None)  # NaN with any NaN
        oldest_s = now_s - np.minimum.reduce(times, axis=None)
        if not (youngest_s >= -MAX_AHEAD_S and oldest_s <= self._max_age_s):
            self._hide_unusable(table, now_s - times)
            if corrupt:
                unreadable = self._unreadable(corrupt, stored, rows)
                table.hide(unreadable[:, self._view_of_feature], ValueStatus.UNAVAILABLE)
        return FeatureRows(self._plan, table.columns, table.status, times)

    def _decode_stretches(self, stored: Sequence[HashRows], rows: int, now_s: float) -> FeatureRows:
        """As `decode`, where nothing is loose: then all values are numbers."""
        columns = np.empty((len(self._plan.references), rows))
        times = np.empty((rows, len(self._plan.views)))
        for blocks in self._types.values():
            for block in blocks:
                own = stored[block.hash]
                columns[block.target] = _by_row(
                    block.cell_of(cast("Stretch", own.whole)), own.of_row
                ).T
        for block in self._stamps:
            own = stored[block.hash]
            times[:, block.target] = _by_row(cast("Stretch", own.whole).times_s, own.of_row)
        smallest = columns.min()  # NaN with any NaN
        known = smallest == smallest
        status = (
            np.zeros((rows, len(columns)), dtype=np.uint8) if known else _is_null(columns).T.copy()
        )
        if not (now_s - times.max() >= -MAX_AHEAD_S and now_s - times.min() <= self._max_age_s):
            self._hide_unusable(_Table(columns, status), now_s - times)
        return FeatureRows(self._plan, columns, status, times)

    def decode_row(self, stored: Sequence[Row], now_s: float) -> FeatureRows:
        """One row, as `decode` would, at half the cost: `stored` is what each hash has of it."""
        values = list(chain.from_iterable(stored))
        table = self._row_table(values)
        times, corrupt = decode_times(self._pick_stamps(values))
        for seconds, max_age_s in zip(times.tolist(), self._max_ages_s, strict=True):
            if not -MAX_AHEAD_S <= now_s - seconds <= max_age_s:  # NaN is neither
                self._hide_unusable(table, now_s - times[np.newaxis])
                unreadable = np.zeros((1, len(times)), dtype=bool)
                unreadable[0, corrupt] = True
                table.hide(unreadable[:, self._view_of_feature], ValueStatus.UNAVAILABLE)
                break
        return FeatureRows(self._plan, table.columns, table.status, times[np.newaxis])

    def _row_table(self, values: Sequence[Stored]) -> "_Table":
        if len(self._picks) == 1:
            ((dtype, pick, _),) = self._picks
            column, status = _decoded(dtype, pick(values))
            columns = column.reshape(-1, 1)
            return _Table(
                list(columns) if columns.dtype.hasobject else columns, status.reshape(1, -1)
            )
        table = _empty_table(1, len(self._plan.references), numbers=self._all_numbers)
        for dtype, pick, target in self._picks:
            column, status = _decoded(dtype, pick(values))
            table.write(target, column.reshape(1, -1))
            table.status[0, target] = status
        return table

    def _unreadable(
        self, corrupt: Sequence[int], stored: Sequence[HashRows], rows: int
    ) -> NDArray[np.bool_]:
        """`[rows, views]`: whose time stamp cannot be read."""
        flags = np.zeros(len(_flat(self._stamps, stored)), dtype=bool)
        flags[corrupt] = True
        return self._by_view(flags, stored, rows, lambda stretch: np.zeros_like(stretch.times_s))

    def _by_view(
        self,
        flat: NDArray[Any],
        stored: Sequence[HashRows],
        rows: int,
        of_stretch: Callable[[Stretch], NDArray[Any]],
    ) -> NDArray[Any]:
        table = np.empty((rows, len(self._plan.views)), dtype=flat.dtype)
        for block, values in _by_block(self._stamps, flat, stored):
            table[:, block.target] = stored[block.hash].together(values, of_stretch)
        return table

    def _hide_unusable(self, table: "_Table", ages_s: NDArray[np.float64]) -> None:
        too_old = ages_s > np.array(self._max_ages_s)
        absent = np.isnan(ages_s) | (ages_s < -MAX_AHEAD_S)
        table.hide(too_old[:, self._view_of_feature], ValueStatus.OUTSIDE_MAX_AGE)
        table.hide(absent[:, self._view_of_feature], ValueStatus.NOT_FOUND)


@dataclass(frozen=True, slots=True)
class _Block:
    """Values of one type: where in the rows of which hash they are, and where in the plan."""

    hash: int
    places: slice
    target: _Index
    width: int
    """Values of a row."""
    cell: int = 0
    """Which cell of a stretch it is."""

    def cell_of(self, stretch: Stretch) -> NDArray[Any]:
        return stretch.cells[self.cell]

    def status_in(self, stretch: Stretch) -> NDArray[np.uint8]:
        cell = self.cell_of(stretch)
        smallest = cell.min()  # NaN with any NaN
        return np.zeros(cell.shape, dtype=np.uint8) if smallest == smallest else _is_null(cell)


class _Table:
    """Rows that are being filled: `columns` as in `FeatureRows`, `status` `[rows, features]`."""

    def __init__(self, columns: Columns, status: NDArray[np.uint8]) -> None:
        self.columns = columns
        self.status = status

    def write(self, target: _Index, values: NDArray[Any]) -> None:
        """`values` `[rows, features of the target]`."""
        if isinstance(self.columns, np.ndarray):
            if not values.dtype.hasobject:
                self.columns[target] = values.T
                return
            self.columns = list(self.columns)
        columns = cast("list[NDArray[Any]]", self.columns)
        for feature, column in zip(np.arange(len(columns))[target], values.T, strict=True):
            columns[feature] = column

    def hide(self, hidden: NDArray[np.bool_], status: ValueStatus) -> None:
        """Make these values null, `[rows, features]`, for this reason."""
        self.status[hidden] = int(status)  # numpy is slow with an IntEnum
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
    for block, own in _by_block(blocks, values, stored):
        table.write(block.target, stored[block.hash].together(own, block.cell_of))
    for block, known in _by_block(blocks, status, stored):
        table.status[:, block.target] = stored[block.hash].together(known, block.status_in)


def _by_block(
    blocks: Sequence[_Block], flat: NDArray[Any], stored: Sequence[HashRows]
) -> Iterator[tuple[_Block, NDArray[Any]]]:
    """Takes apart what `_flat` has put together: `[loose rows, values]` of each block."""
    start = 0
    for block in blocks:
        loose = stored[block.hash].loose
        stop = start + len(loose) * block.width
        yield block, flat[start:stop].reshape(len(loose), block.width)
        start = stop


def _decoded(dtype: str, flat: Sequence[Stored]) -> tuple[NDArray[Any], NDArray[np.uint8]]:
    """The values and what is known about each."""
    if not flat:
        return np.empty(0), np.empty(0, dtype=np.uint8)
    values, corrupt = decode_column(dtype, flat)
    if values.dtype.hasobject:
        null = np.fromiter((value is None for value in values), dtype=np.uint8, count=len(values))
    elif _some_nan(values):
        null = _is_null(values)
    else:
        return values, np.zeros(len(values), dtype=np.uint8)
    null[corrupt] = int(ValueStatus.UNAVAILABLE)  # the others are 1, NULL_VALUE
    return values, null


def _is_null(values: NDArray[np.float64]) -> NDArray[np.uint8]:
    """PRESENT or NULL_VALUE for each number."""
    null: NDArray[np.bool_] = np.isnan(values)
    return null.view(np.uint8)


def _some_nan(values: NDArray[np.float64]) -> bool:
    """Asked of every column, so at the price of one call: what is made of a NaN is NaN."""
    mixed = values.dot(values) if len(values) < _FEW else np.add.reduce(values)
    return bool(mixed != mixed)


def _flat(blocks: Sequence[_Block], stored: Sequence[HashRows]) -> list[Stored]:
    """The values of these blocks, row by row."""
    flat: list[Stored] = []
    for block in blocks:
        places = block.places
        flat += chain.from_iterable([row[places] for row in stored[block.hash].loose])
    return flat


def _by_row(values: NDArray[Any], of_row: Places) -> NDArray[Any]:
    return values if of_row is None else values[of_row]


def _picks(hashes: Sequence[EntityHash]) -> list[tuple[str, _Pick, _Index]]:
    """For each type, what takes its values out of the rows of all hashes, one after the other, in
    the order of the plan, and where they go."""
    places: dict[str, dict[int, int]] = {}
    first = 0
    for read in hashes:
        for block in read.blocks:
            of_type = places.setdefault(block.dtype, {})
            of_type |= {
                feature: first + block.start + n for n, feature in enumerate(block.features)
            }
        first += len(read.nothing)
    return [
        (dtype, _pick([of_type[feature] for feature in sorted(of_type)]), _index(sorted(of_type)))
        for dtype, of_type in places.items()
    ]


def _pick_stamps(hashes: Sequence[EntityHash]) -> _Pick:
    """Takes the time stamps out of the rows of all hashes, in the order of the plan's views."""
    places: dict[int, int] = {}
    first = 0
    for read in hashes:
        places |= {view: first + read.stamps + number for number, view in enumerate(read.views)}
        first += len(read.nothing)
    return _pick([places[view] for view in sorted(places)])


def _pick(places: Sequence[int]) -> _Pick:
    if len(places) == 1:
        return lambda values: (values[places[0]],)
    return itemgetter(*places)


def _index(places: Sequence[int]) -> _Index:
    """A slice where the places are consecutive: numpy is several times faster with it."""
    first = places[0]
    if list(places) == list(range(first, first + len(places))):
        return slice(first, first + len(places))
    return np.array(places, dtype=np.intp)
