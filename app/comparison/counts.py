"""How often each number was seen, by group: additive, and small where few numbers are."""

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Keys = NDArray[np.int64]

Packed: TypeAlias = tuple[list[int], list[int], list[int]]
"""The keys, the places of counts above 0 in a table of groups by keys, and these counts. Of keys
and places each is less the one before it."""

_CLOSE = 1 << 15


class GroupedCounts:
    """For each of `groups` groups, how often each key, any integer, was counted in it."""

    __slots__ = ("_counts", "_keys")

    def __init__(self, groups: int) -> None:
        self._keys: Keys = np.empty(0, dtype=np.int64)
        """Ascending: of all groups."""
        self._counts = np.zeros((groups, 0), dtype=np.int64)

    def add(self, keys: Keys, groups: NDArray[np.integer]) -> None:
        """Count each key once in its group; of `groups` `[m, len(keys)]` in `m` of them."""
        if not len(keys):
            return
        distinct, which = _distinct(keys)
        places = self._places(distinct)
        cells = groups * len(self._keys) + places[which]
        in_cells = np.bincount(cells.ravel(), minlength=self._counts.size)
        self._counts += in_cells.reshape(self._counts.shape)

    def add_counted(self, group: int, keys: Keys, counts: NDArray[np.int64]) -> None:
        """Count keys, ascending, so many times each in this group."""
        places = self._places(keys)
        self._counts[group, places] += counts

    def of(self, group: int) -> tuple[Keys, NDArray[np.int64]]:
        """The keys that were counted in a group, ascending, and how often."""
        there = np.flatnonzero(self._counts[group])
        return self._keys[there], self._counts[group, there]

    def __add__(self, other: "GroupedCounts") -> "GroupedCounts":
        total = GroupedCounts(len(self._counts))
        for part in (self, other):
            places = total._places(part._keys)
            total._counts[:, places] += part._counts
        return total

    def packed(self) -> Packed:
        """In lists of numbers that are small, and so is what msgpack makes of them."""
        flat = self._counts.ravel()
        there = np.flatnonzero(flat)
        return _steps(self._keys), _steps(there), flat[there].tolist()

    @classmethod
    def unpacked(cls, groups: int, packed: Packed) -> "GroupedCounts":
        """Raises `ValueError` or `IndexError` for what `packed` has not made of so many groups."""
        steps, cell_steps, of_cells = (np.array(part, dtype=np.int64) for part in packed)
        rising = (
            (steps[1:] > 0).all() and (cell_steps[1:] > 0).all() and (cell_steps[:1] >= 0).all()
        )
        if not rising or (of_cells < 1).any():
            raise ValueError("no keys in order with their counts")
        unpacked = cls(groups)
        unpacked._keys = np.cumsum(steps)
        flat = np.zeros(groups * len(steps), dtype=np.int64)
        flat[np.cumsum(cell_steps)] = of_cells
        unpacked._counts = flat.reshape(groups, len(steps))
        return unpacked

    def _places(self, keys: Keys) -> NDArray[np.intp]:
        """Where the keys, ascending, are; those that are new have been taken in."""
        places = np.searchsorted(self._keys, keys)
        if len(places) and (
            places[-1] == len(self._keys) or not np.array_equal(self._keys[places], keys)
        ):
            self._take_in(keys)
            places = np.searchsorted(self._keys, keys)
        return places

    def _take_in(self, new: Keys) -> None:
        before, counts = self._keys, self._counts
        self._keys = new if not len(before) else np.union1d(before, new)
        self._counts = np.zeros((len(counts), len(self._keys)), dtype=np.int64)
        if len(before):
            self._counts[:, np.searchsorted(self._keys, before)] = counts


def counted(keys: Keys) -> tuple[Keys, NDArray[np.int64]]:
    """The distinct keys, ascending, and how often each is there."""
    if not len(keys):
        return keys, keys
    low = keys.min()
    above = keys - low
    if above.max() > _CLOSE:
        distinct, counts = np.unique(keys, return_counts=True)
        return distinct, counts
    # To sort them takes longer.
    of_all = np.bincount(above)
    there = np.flatnonzero(of_all)
    return there + low, of_all[there]


def _distinct(keys: Keys) -> tuple[Keys, NDArray[np.intp]]:
    """The distinct keys, ascending, and which of them each key is."""
    low = keys.min()
    above = keys - low
    span = int(above.max()) + 1
    if span > _CLOSE:
        distinct, which = np.unique(keys, return_inverse=True)
        return distinct, which
    seen = np.zeros(span, dtype=np.bool_)
    seen[above] = True
    there = np.flatnonzero(seen)
    place = np.empty(span, dtype=np.intp)
    place[there] = np.arange(len(there))
    return there + low, place[above]


def _steps(ascending: Keys) -> list[int]:
    steps = ascending.copy()
    steps[1:] -= ascending[:-1]
    told: list[int] = steps.tolist()
    return told
