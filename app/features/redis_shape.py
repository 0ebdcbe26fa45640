"""Takes replies of one known shape off the stream, many at once, without making objects of their
parts."""

from collections.abc import Sequence
from itertools import repeat
from typing import TypeAlias

from app.features.redis_record import (
    LENGTHS,
    Record,
    Stretch,
    Varying,
    Word,
    before,
    content_of,
    head_of,
)
from app.features.values import LONGEST_TIME, SHORTEST_TIME

FEW = 8
"""For fewer replies hiredis is faster."""

_MOST_KNOWN_RECORDS = 256
# After a scan of which little was of use, so many are not made.
_PAUSE = 32

Member: TypeAlias = tuple[Stretch, int]
"""A reply as a row of a stretch."""

Run: TypeAlias = tuple[list[Member] | None, int]
"""Replies that follow each other, and where the last one ends; None for what is something else."""


class Shape:
    """Replies that are an array of these words and nothing else, but that a number may be a null.

    Where they are equally long they are read where they lie. Where what varies has several lengths,
    or there are nulls, all are made equally long before. A reply that is different in any other
    byte (an error, another order, another type, a part of a reply) is left to a parser that knows
    all of the protocol.

    `blocks` and `times` are those of a `Record`.
    """

    def __init__(
        self, words: Sequence[Word], blocks: Sequence[Sequence[int]], times: Sequence[int]
    ) -> None:
        self._words = list(words)
        self._blocks = [list(block) for block in blocks]
        self._times = list(times)
        self._varying = [word for word in words if isinstance(word, Varying)]
        # Of what varies, in a record that has room for the first replies of all scans.
        self._roomy = tuple([_room(kind, 0) for kind in self._varying])
        self._records: dict[tuple[int, ...], Record] = {}
        self._paused = 0
        text, self._pieces = bytearray(b"*%d\r\n" % len(words)), []
        for word in words:
            text += before(word)
            if isinstance(word, Varying):
                self._pieces.append((len(text), LENGTHS[word]))
                text.clear()
            text += content_of(word, 0) + b"\r\n"
        self.head = head_of(words)
        """What every such reply begins with."""

    def scan(self, data: bytes, position: int, most: int) -> list[Run]:
        """The replies that seem to begin at this position, at most so many. Nothing where there are
        too few.

        A member is right if its reply does begin where it seems to: where the one before it ends.
        """
        if self._paused:
            self._paused -= 1
            return []
        if most < FEW:
            return []
        if not data.startswith(self.head, position):
            end = data.find(self.head, position + 1)
            return [(None, end)] if end >= 0 else []
        lengths = self._lengths_at(data, position)
        if lengths is not None:
            record = self._record(lengths)
            count = min(most, (len(data) - position) // record.size)
            last = position + (count - 1) * record.size
            if count >= FEW and data.startswith(self.head, last):
                stretch, fits = record.read(data, position, count)
                if fits is None:
                    return [(_members(stretch), last + record.size)]
            if lengths != self._roomy:
                self._roomy = tuple(map(max, self._roomy, map(_room, self._varying, lengths)))
        return self._scan_unequal(data, position, most)

    def _scan_unequal(self, data: bytes, position: int, most: int) -> list[Run]:
        """As `scan`, where not all are equally long."""
        record, head = self._record(self._roomy), self.head
        size = record.body_size
        _, *bodies, rest = data[position:].split(head, most)
        alike = [body if len(body) == size else record.made_alike(body) for body in bodies]
        rest = rest[: record.size]
        last = record.made_alike(rest)
        surplus = len(last) - size
        if surplus >= 0:  # a whole one, and the surplus is behind it
            bodies.append(rest[: len(rest) - surplus])
            alike.append(last[:size])
        if set(map(len, alike)) == {size} and len(alike) >= FEW:
            stretch, fits = record.read(head + head.join(alike), 0, len(alike))
            if fits is None:
                end = position + len(bodies) * len(head) + sum(map(len, bodies))
                return [(_members(stretch), end)]
        return self._runs(record, position, bodies, alike)

    def _runs(
        self, record: Record, position: int, bodies: Sequence[bytes], alike: Sequence[bytes]
    ) -> list[Run]:
        """Of replies with these bodies, from this position on, some of which are something else."""
        head = self.head
        whole = [index for index, body in enumerate(alike) if len(body) == record.body_size]
        if 2 * len(whole) < len(bodies):
            self._paused = _PAUSE
        if len(whole) < FEW:
            return []
        joined = head + head.join([alike[index] for index in whole])
        stretch, fits = record.read(joined, 0, len(whole))
        row_of = {index: row for row, index in enumerate(whole) if fits is None or fits[row]}
        runs: list[Run] = []
        members: list[Member] = []
        for index, body in enumerate(bodies):
            end = position + len(head) + len(body)
            if index in row_of:
                members.append((stretch, row_of[index]))
            else:
                if members:
                    runs.append((members, position))
                    members = []
                runs.append((None, end))
            position = end
        if members:
            runs.append((members, position))
        return runs

    def _lengths_at(self, data: bytes, position: int) -> tuple[int, ...] | None:
        """Those of what varies in the reply that begins here, if it is of this shape."""
        lengths = []
        for piece, possible in self._pieces:
            position += piece
            length = possible.get(data[position : position + 3])
            if length is None:
                return None
            lengths.append(length)
            position += (3 if length < 10 else 4) + length
        return tuple(lengths)

    def _record(self, lengths: tuple[int, ...]) -> Record:
        record = self._records.get(lengths)
        if record is None:
            if len(self._records) >= _MOST_KNOWN_RECORDS:
                self._records.clear()
            record = Record(self._words, self._blocks, self._times, lengths)
            self._records[lengths] = record
        return record


def _members(stretch: Stretch) -> list[Member]:
    count = len(stretch.times_s)
    return list(zip(repeat(stretch, count), range(count), strict=True))


def _room(kind: Varying, length: int) -> int:
    """For what is so long here and has another length elsewhere."""
    if kind is Varying.ANYTHING:
        return length
    return LONGEST_TIME if length > SHORTEST_TIME else SHORTEST_TIME
