"""Replies of which all but the values is known, byte for byte: many are compared with that at once,
and their numbers taken out as columns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from app.features.values import (
    LONGEST_TIME,
    TIME_ENDS,
    TIME_LENGTHS,
    FixedWidth,
    time_bits,
    times_from_bits,
)


class Varying(Enum):
    """A part of a reply whose length is not always the same."""

    TIME = "a serialized `google.protobuf.Timestamp`"
    ANYTHING = "at most 99 bytes"


Word: TypeAlias = bytes | FixedWidth | Varying
"""One part of a reply: a text that is always the same, a number of fixed width, or one that
varies."""

LENGTHS: Mapping[Varying, Mapping[bytes, int]] = {
    kind: {(b"%d\r\n" % length)[:3]: length for length in lengths}
    for kind, lengths in ((Varying.TIME, TIME_LENGTHS), (Varying.ANYTHING, range(100)))
}
"""What it may have, by the three bytes after the "$"."""

# An empty message, after the "$".
_NULL = b"0\r\n\r\n"
_LONGEST = b"%d" % LONGEST_TIME


@dataclass(frozen=True, slots=True, eq=False)
class Stretch:
    """What `n` replies hold: `cells`, an array `[n, numbers]` of each block, NaN where NaN or a
    null is stored, and `times_s` `[n, times]`."""

    cells: Sequence[NDArray[np.float64]]
    times_s: NDArray[np.float64]


class Record:
    """An array of these words, where what varies has these lengths, in the order of the words.

    `blocks` says which words, of one type each, make the cells of a stretch, `times` which are its
    times. `size` is in bytes, `body_size` that of what follows the head.
    """

    def __init__(
        self,
        words: Sequence[Word],
        blocks: Sequence[Sequence[int]],
        times: Sequence[int],
        lengths: Sequence[int],
    ) -> None:
        head = len(head_of(words))
        text, known = bytearray(b"*%d\r\n" % len(words)), bytearray()
        places: dict[int, int] = {}
        sizes: dict[int, int] = {}
        self._varying: list[tuple[int, int, Varying, Mapping[bytes, int]]] = []
        self._nan_at: dict[int, bytes] = {}
        length_of = iter(lengths)
        for index, word in enumerate(words):
            start = len(text) + 1 - head  # after the "$"
            text += before(word)
            if isinstance(word, Varying):
                sizes[index] = next(length_of)
                text += b"%d\r\n" % sizes[index]
                self._varying.append((start, sizes[index], word, LENGTHS[word]))
            known += b"\xff" * (len(text) - len(known))
            places[index] = len(text)
            content = content_of(word, sizes.get(index, 0))
            mask = (b"\xff" if isinstance(word, bytes) else b"\x00") * len(content)
            if word is Varying.TIME:
                mask, content = time_bits(sizes[index])
            elif isinstance(word, FixedWidth):
                nan = np.array(np.nan, word.layout).tobytes()
                self._nan_at[start] = before(word)[1:] + nan + b"\r\n"
            text += content + b"\r\n"
            known += mask
        known += b"\xff\xff"
        self.size = len(text)
        self.body_size = self.size - head
        self._text = bytes(text)
        self._known = np.frombuffer(bytes(known), np.uint8)
        self._numbers = [
            _Numbers(words[block[0]], [places[index] for index in block]) for block in blocks
        ]
        self._times = [slice(places[index], places[index] + sizes[index]) for index in times]

    def read(self, data: bytes, first: int, count: int) -> tuple[Stretch, list[bool] | None]:
        """So many, at least one, from the one that begins at `first` on, without a gap, and which
        of them are what they must be; None: all."""
        size = self.size
        records: NDArray[np.uint8] = np.ndarray((count, size), np.uint8, data, first)
        with np.errstate(invalid="ignore"):  # a stored NaN may be of the signalling kind
            cells = [numbers.of(records) for numbers in self._numbers]
        times_s = np.empty((count, len(self._times)))
        corrupt: NDArray[np.bool_] | bool = False
        for index, place in enumerate(self._times):
            times_s[:, index], wrong = times_from_bits(records[:, place])
            if wrong is not False:
                corrupt = corrupt | wrong
        stretch = Stretch(cells, times_s)
        found = records & self._known
        if corrupt is False and found.tobytes() == self._text * count:
            return stretch, None
        fits = (found == np.frombuffer(self._text, np.uint8)).all(axis=1) & ~np.asarray(corrupt)
        return stretch, fits.tolist()

    def made_alike(self, body: bytes) -> bytes:
        """What follows the head of a reply, with what varies made as long as here and NaN for its
        nulls, as far as that is possible.

        If the result is what follows the head of such a record, the body was that too, but for
        these changes: from left to right, each is made where such a word begins if all before it is
        right.
        """
        done = 0
        for start, length, kind, possible in self._varying:
            own = possible.get(body[start : start + 3])
            if own is None:  # nulls before it are shorter than numbers
                body = self._without_nulls(body, done, start)
                own = possible.get(body[start : start + 3])
                if own is None:
                    return body
            if own != length:
                content = start + (3 if own < 10 else 4)
                stop = content + own
                if kind is Varying.TIME:
                    end = TIME_ENDS[own].get(body[stop - 1 : stop], b"")
                    middle = body[content - 2 : stop - 1]
                    body = body[:start] + _LONGEST + middle + end + body[stop:]
                else:
                    text = b"%d%b%b" % (length, body[content - 2 : content], bytes(length))
                    body = body[:start] + text + body[stop:]
            done = start + length
        if len(body) == self.body_size:
            return body
        return self._without_nulls(body, done, self.body_size)

    def _without_nulls(self, body: bytes, start: int, stop: int) -> bytes:
        """With NaN for the nulls there."""
        null = body.find(_NULL, start, stop)
        while null >= 0:
            nan = self._nan_at.get(null)
            if nan is None:
                break
            body = body[:null] + nan + body[null + len(_NULL) :]
            null = body.find(_NULL, null + len(nan), stop)
        return body


class _Numbers:
    """Where the numbers of one type begin in a record."""

    def __init__(self, word: Word, starts: Sequence[int]) -> None:
        assert isinstance(word, FixedWidth)
        self._layout = word.layout
        self._starts = np.array(starts, dtype=np.intp)
        steps = set(np.diff(self._starts).tolist())
        self._step = steps.pop() if len(steps) == 1 else 0
        """From each to the next, where that is always the same."""

    def of(self, records: NDArray[np.uint8]) -> NDArray[np.float64]:
        """`[records, numbers]`."""
        count, size = records.shape
        found: NDArray[Any]
        if self._step:  # half the cost
            shape, first = (count, len(self._starts)), int(self._starts[0])
            found = np.ndarray(shape, self._layout, records, first, (size, self._step))
        else:
            shape = (count, size - self._layout.itemsize + 1)
            found = np.ndarray(shape, self._layout, records, 0, (size, 1))[:, self._starts]
        return found.astype(np.float64)


def head_of(words: Sequence[Word]) -> bytes:
    """What every reply of these words begins with: up to the first that is not always the same."""
    head = b"*%d\r\n" % len(words)
    for word in words:
        if not isinstance(word, bytes):
            break
        head += before(word) + word + b"\r\n"
    return head + b"$"


def before(word: Word) -> bytes:
    """What comes before the content of a word, as far as it is always the same."""
    if isinstance(word, Varying):
        return b"$"
    if isinstance(word, bytes):
        return b"$%d\r\n" % len(word)
    return b"$%d\r\n%c" % (word.width, word.tag)


def content_of(word: Word, size: int) -> bytes:
    """Zeros where it is not known; `size` is that of a word that varies."""
    if isinstance(word, bytes):
        return word
    return bytes(size if isinstance(word, Varying) else word.layout.itemsize)
