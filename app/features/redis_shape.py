"""Takes replies of one known shape off the stream, many at once, without making objects of their
parts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import repeat
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from app.features.values import TIME_LENGTHS, FixedWidth, time_bits, times_from_bits


class Varying(Enum):
    """A part of a reply whose length is not always the same."""

    TIME = "a serialized `google.protobuf.Timestamp`"
    ANYTHING = "at most 99 bytes"


Word: TypeAlias = bytes | FixedWidth | Varying
"""One part of a reply: a text that is always the same, a number of fixed width, or one that
varies."""

FEW = 8
"""For fewer replies hiredis is faster."""

# And so it is for fewer that are not all alike, or of which fewer are.
_FEW_MIXED, _FEW_ALIKE = 32, 3

_MOST_KNOWN_VARIANTS = 256
# After a scan of which little was of use, so many are not made.
_PAUSE = 32
_LENGTHS: Mapping[bytes, int] = {b"%d" % length: length for length in range(100)}


@dataclass(frozen=True, slots=True, eq=False)
class Stretch:
    """What `n` replies hold: `cells`, an array `[n, numbers]` of each block, NaN where NaN is
    stored, and `times_s` `[n, times]`."""

    cells: Sequence[NDArray[np.float64]]
    times_s: NDArray[np.float64]


Member: TypeAlias = tuple[Stretch, int]
"""A reply as a row of a stretch."""


class Shape:
    """Replies that are an array of these words and nothing else.

    Where the lengths of what varies are known too, such a reply is known byte for byte, but for
    the values; many of them are compared with that at once, and their numbers taken out as columns.
    A reply that is different in any byte (a null, an error, another order, another type, a part of
    a reply) is left to a parser that knows all of the protocol.

    `blocks` says which words, of one type each, make the cells of a stretch, `times` which are its
    times.
    """

    def __init__(
        self, words: Sequence[Word], blocks: Sequence[Sequence[int]], times: Sequence[int]
    ) -> None:
        self._words = list(words)
        self._blocks = [list(block) for block in blocks]
        self._times = list(times)
        self._variants: dict[tuple[int, ...], _Variant] = {}
        self._paused = 0
        text, self._pieces = bytearray(b"*%d\r\n" % len(words)), []
        for word in words:
            text += _before(word)
            if isinstance(word, Varying):
                self._pieces.append(len(text))
                text.clear()
            text += _content(word, 0) + b"\r\n"
        self.head = _head(words)
        """What every such reply begins with."""

    def scan(
        self, data: bytes, position: int, most: int
    ) -> "tuple[list[Member] | list[Member | None], Sequence[int]]":
        """The replies that seem to begin at this position, at most so many: what each is, None if
        it is not of this shape, and where it ends, which is where the next one seems to begin.
        Nothing where there are too few.

        A member is right if its reply does begin where it seems to.
        """
        if self._paused:
            self._paused -= 1
            return [], []
        variant = self._variant_at(data, position)
        if variant is None:
            end = data.find(self.head, position + 1)
            if end < 0:
                return [], []
            first: list[Member | None] = [None]
            return first, [end]
        count = min(most, (len(data) - position) // variant.size)
        if count < FEW:
            return [], []
        last = position + (count - 1) * variant.size
        if data.startswith(self.head, last):
            stretch, fits = variant.read(data, position, count)
            if fits is None:
                members = zip(repeat(stretch, count), range(count), strict=True)
                stop = last + variant.size
                return list(members), range(position + variant.size, stop + 1, variant.size)
        if most < _FEW_MIXED:
            self._paused = _PAUSE
            return [], []
        return self._mixed(data, position, most)

    def _mixed(
        self, data: bytes, position: int, most: int
    ) -> "tuple[list[Member | None], Sequence[int]]":
        """As `scan`, where not all are alike: those of each length are read by themselves."""
        ends = self._ends(data, position, most)
        count = len(ends)
        starts = [position, *ends][:count]
        stretch = Stretch(
            [np.empty((count, len(block))) for block in self._blocks],
            np.empty((count, len(self._times))),
        )
        members: list[Member | None] = [None] * count
        of_size: dict[int, list[int]] = {}
        for index, (start, end) in enumerate(zip(starts, ends, strict=True)):
            of_size.setdefault(end - start, []).append(index)
        for size, indexes in of_size.items():
            variant = self._variant_at(data, starts[indexes[0]])
            if variant is None or variant.size != size or len(indexes) < _FEW_ALIKE:
                continue
            part, fits = variant.read_anywhere(data, [starts[index] for index in indexes])
            for cell, own in zip(stretch.cells, part.cells, strict=True):
                cell[indexes] = own
            stretch.times_s[indexes] = part.times_s
            for index, fit in zip(indexes, fits or repeat(True, len(indexes)), strict=True):
                members[index] = (stretch, index) if fit else None
        if 2 * members.count(None) > count:
            self._paused = _PAUSE
        return members, ends

    def _ends(self, data: bytes, position: int, most: int) -> list[int]:
        """Where heads are, after the first, and the end of the last reply, if it is there."""
        head = self.head
        ends: list[int] = []
        usual = 0
        for _ in range(most - 1):
            end = position + usual
            if not usual or not data.startswith(head, end):
                end = data.find(head, position + 1)
                if end < 0:
                    break
                usual = end - position
            ends.append(end)
            position = end
        last = self._variant_at(data, position)
        if last is not None and position + last.size <= len(data):
            ends.append(position + last.size)
        return ends

    def _variant_at(self, data: bytes, position: int) -> "_Variant | None":
        """By the lengths of what varies in the reply that begins here, if it is of this shape."""
        lengths = []
        for piece in self._pieces:
            position += piece
            stop = data.find(b"\r\n", position, position + 4)
            length = _LENGTHS.get(data[position:stop])
            if length is None:
                return None
            lengths.append(length)
            position = stop + 2 + length
        return self._variant(tuple(lengths))

    def _variant(self, lengths: tuple[int, ...]) -> "_Variant | None":
        variant = self._variants.get(lengths)
        if variant is None and self._are_possible(lengths):
            if len(self._variants) >= _MOST_KNOWN_VARIANTS:
                self._variants.clear()
            variant = _Variant(self._words, self._blocks, self._times, lengths)
            self._variants[lengths] = variant
        return variant

    def _are_possible(self, lengths: tuple[int, ...]) -> bool:
        varying = [word for word in self._words if isinstance(word, Varying)]
        return all(
            kind is Varying.ANYTHING or length in TIME_LENGTHS
            for kind, length in zip(varying, lengths, strict=True)
        )


class _Variant:
    """The replies of a shape in which what varies has these lengths: all are equally long."""

    def __init__(
        self,
        words: Sequence[Word],
        blocks: Sequence[Sequence[int]],
        times: Sequence[int],
        lengths: Sequence[int],
    ) -> None:
        text, known = bytearray(b"*%d\r\n" % len(words)), bytearray()
        places: dict[int, int] = {}
        sizes: dict[int, int] = {}
        length_of = iter(lengths)
        for index, word in enumerate(words):
            text += _before(word)
            if isinstance(word, Varying):
                sizes[index] = next(length_of)
                text += b"%d\r\n" % sizes[index]
            known += b"\xff" * (len(text) - len(known))
            places[index] = len(text)
            content = _content(word, sizes.get(index, 0))
            mask = (b"\xff" if isinstance(word, bytes) else b"\x00") * len(content)
            if word is Varying.TIME:
                mask, content = time_bits(sizes[index])
            text += content + b"\r\n"
            known += mask
        known += b"\xff\xff"
        self.size = len(text)
        self._text = bytes(text)
        self._known = np.frombuffer(bytes(known), np.uint8)
        self._cells = [
            (_layout(words, block), np.array([places[index] for index in block], dtype=np.intp))
            for block in blocks
        ]
        self._times = [slice(places[index], places[index] + sizes[index]) for index in times]

    def read(self, data: bytes, first: int, count: int) -> tuple[Stretch, list[bool] | None]:
        """So many replies from the one that begins at `first` on, without a gap, and which of them
        are what they must be; None: all."""
        return self._read(np.ndarray((count, self.size), np.uint8, data, first))

    def read_anywhere(
        self, data: bytes, starts: Sequence[int]
    ) -> tuple[Stretch, list[bool] | None]:
        """The same for replies that begin here and end within the data."""
        anywhere = np.ndarray((len(data) - self.size + 1, self.size), np.uint8, data, 0, (1, 1))
        return self._read(anywhere[np.array(starts)])

    def _read(self, records: NDArray[np.uint8]) -> tuple[Stretch, list[bool] | None]:
        count, size = records.shape
        cells = []
        with np.errstate(invalid="ignore"):  # a stored NaN may be of the signalling kind
            for layout, at in self._cells:
                shape = (count, size - layout.itemsize + 1)
                numbers: NDArray[Any] = np.ndarray(shape, layout, records, 0, (size, 1))
                cells.append(numbers[:, at].astype(np.float64))
        times_s = np.empty((count, len(self._times)))
        corrupt: NDArray[np.bool_] | bool = False
        for index, place in enumerate(self._times):
            times_s[:, index], wrong = times_from_bits(records[:, place])
            corrupt = corrupt | wrong
        stretch = Stretch(cells, times_s)
        found = records & self._known
        if found.tobytes() == self._text * count and not _any(corrupt):
            return stretch, None
        fits = (found == np.frombuffer(self._text, np.uint8)).all(axis=1) & ~np.asarray(corrupt)
        return stretch, fits.tolist()


def _any(flags: NDArray[np.bool_] | bool) -> bool:
    return flags if isinstance(flags, bool) else bool(flags.any())


def _before(word: Word) -> bytes:
    """What comes before the content of a word, as far as it is always the same."""
    if isinstance(word, Varying):
        return b"$"
    if isinstance(word, bytes):
        return b"$%d\r\n" % len(word)
    return b"$%d\r\n%c" % (word.width, word.tag)


def _content(word: Word, size: int) -> bytes:
    """Zeros where it is not known; `size` is that of a word that varies."""
    if isinstance(word, bytes):
        return word
    return bytes(size if isinstance(word, Varying) else word.layout.itemsize)


def _head(words: Sequence[Word]) -> bytes:
    head = b"*%d\r\n" % len(words)
    for word in words:
        head += _before(word)
        if not isinstance(word, bytes):
            break
        head += word + b"\r\n"
    return head


def _layout(words: Sequence[Word], block: Sequence[int]) -> np.dtype[Any]:
    first = words[block[0]]
    assert isinstance(first, FixedWidth)
    return first.layout
