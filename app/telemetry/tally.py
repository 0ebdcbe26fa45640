"""Numbers that outlive the worker that counts them, on memory that all workers read."""

import json
import mmap
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from struct import Struct
from threading import Lock
from typing import TypeAlias
from zlib import crc32

_Labels: TypeAlias = tuple[str, ...]
_Kind: TypeAlias = tuple[str, int, int]
"""Name of the family, and how many labels and cells each of its entries has."""

# Only what is written takes memory: a model's series take 10 kB.
_BYTES_A_WORKER = 16 * 1024 * 1024
_HEADER = 16
_ENTRY = Struct("=IIII")  # checksum and length of the key, cells, nothing


class Tallies:
    """The numbers of each worker of a service, by family and label values.

    A worker adds and changes only its own, from one thread; it reads everyone's. One that takes the
    place of another goes on with its numbers. A worker may be killed at any instant: an entry is
    there once it is whole, and a cell holds the number before or the one after.
    """

    def __init__(self, memory: mmap.mmap, place: int = 0) -> None:
        """`place` says whose memory is ours, counted from 0."""
        whole = memoryview(memory)
        self._places = [
            _Place(whole[at : at + _BYTES_A_WORKER]) for at in range(0, len(whole), _BYTES_A_WORKER)
        ]
        self._ours = self._places[place]
        self._place = place
        self._cells: dict[tuple[_Kind, _Labels], memoryview[float]] = {}
        """Our own."""
        self._families: defaultdict[_Kind, dict[_Labels, dict[int, memoryview[float]]]] = (
            defaultdict(dict)
        )
        """Everyone's, by place."""
        # A scrape may read in another thread.
        self._lock = Lock()
        self._take_in()

    @classmethod
    def shared(cls, descriptor: int, place: int, workers: int) -> "Tallies":
        """On the file in memory that the parent made for all of us; it stays the caller's."""
        size = workers * _BYTES_A_WORKER
        if os.fstat(descriptor).st_size < size:
            os.ftruncate(descriptor, size)
        return cls(mmap.mmap(descriptor, size), place)

    @classmethod
    def private(cls) -> "Tallies":
        """For a process that counts alone."""
        return cls(mmap.mmap(-1, _BYTES_A_WORKER))

    @property
    def place(self) -> int:
        return self._place

    @property
    def workers(self) -> int:
        return len(self._places)

    def ours(self, family: str, labels: Sequence[str], cells: int) -> "memoryview[float]":
        """Our cells of this entry, float64: 0, or what the worker before us left there.

        Raises `MemoryError` beyond 16 MiB.
        """
        key = (family, len(labels), cells), tuple(labels)
        with self._lock:
            if key not in self._cells:
                self._ours.add(json.dumps([family, *labels]).encode(), cells)
                self._take_in()
            return self._cells[key]

    def inherited(
        self, family: str, labels: int, cells: int
    ) -> "Mapping[_Labels, memoryview[float]]":
        """The cells of such entries that the worker before us left, by label values."""
        kind = family, labels, cells
        return {values: own for (of_kind, values), own in self._cells.items() if of_kind == kind}

    def everyones(
        self, family: str, labels: int, cells: int
    ) -> "Mapping[_Labels, Sequence[memoryview[float]]]":
        """The cells of the entries with so many labels and cells, by label values, in the order in
        which we met them; those of one entry in the order of the workers, whoever asks: so all of
        us add them up to the same number."""
        with self._lock:
            self._take_in()
            found = self._families[family, labels, cells].items()
            return {values: [of[place] for place in sorted(of)] for values, of in found}

    def _take_in(self) -> None:
        for number, place in enumerate(self._places):
            for (family, *labels), cells in place.new():
                kind, values = (family, len(labels), len(cells)), tuple(labels)
                self._families[kind].setdefault(values, {})[number] = cells
                if number == self._place:
                    self._cells[kind, values] = cells


class _Place:
    """The memory of one worker: how much of it is used, then the entries, which stay."""

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory
        self._used = memory[:8].cast("q")
        self._seen = _HEADER

    def add(self, key: bytes, cells: int) -> None:
        at = max(self._used[0], _HEADER)
        start = _start_of_cells(at, len(key))
        end = start + 8 * cells
        if end > len(self._memory):
            raise MemoryError(f"no room for {key.decode()}")
        # A worker that was killed at this place may have left something.
        self._memory[at:end] = bytes(end - at)
        _ENTRY.pack_into(self._memory, at, crc32(key), len(key), cells, 0)
        self._memory[at + _ENTRY.size : at + _ENTRY.size + len(key)] = key
        self._used[0] = end

    def new(self) -> "Iterator[tuple[list[str], memoryview[float]]]":
        """The entries that were added since the last time: key and cells."""
        while self._seen < self._used[0]:
            checksum, length, cells, _ = _ENTRY.unpack_from(self._memory, self._seen)
            at = self._seen + _ENTRY.size
            key = bytes(self._memory[at : at + length])
            # Some processors let us see that it is used before they let us see with what.
            if length == 0 or crc32(key) != checksum:
                return
            start = _start_of_cells(self._seen, length)
            self._seen = start + 8 * cells
            yield json.loads(key), self._memory[start : self._seen].cast("d")


def _start_of_cells(entry: int, key_length: int) -> int:
    end_of_key = entry + _ENTRY.size + key_length
    return end_of_key + -end_of_key % 8
