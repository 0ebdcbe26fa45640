"""What one worker has counted and how much of it is stored for certain, and what others' tables
count."""

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import reduce
from operator import add
from typing import NamedTuple

import msgspec

from app.release.state import StateUnavailable
from app.release.tables import MOST_BYTES, Additive, Kinds

log = logging.getLogger(__name__)

_FORM = 1


class UnreadableDocument(StateUnavailable):
    """What is stored is of another form than this release of the software reads."""


class TableDocument(msgspec.Struct, frozen=True, array_like=True):
    """A table of one worker: what it counted with its writes after number `since`, up to and with
    `number`. One whose `since` is not what the folded table holds of the worker counts for nothing.
    """

    form: int
    since: int
    number: int
    content: bytes


def encode_document(since: int, number: int, content: bytes) -> bytes:
    return msgspec.msgpack.encode(TableDocument(_FORM, since, number, content))


def decode_document(stored: bytes, where: str) -> TableDocument:
    """Raises `UnreadableDocument` that names `where`."""
    try:
        document = msgspec.msgpack.decode(stored, type=TableDocument)
    except msgspec.MsgspecError as exc:
        raise UnreadableDocument(f"{where}: cannot be read: {exc}") from exc
    if document.form != _FORM:
        raise UnreadableDocument(
            f"{where}: of form {document.form}; this release of the software reads form {_FORM}"
        )
    return document


def counted(
    documents: Iterable[tuple[str, TableDocument]], held: Mapping[str, int]
) -> Mapping[str, TableDocument]:
    """Of the documents found, each with its worker, the one that counts of each worker: of those
    that go on from what the folded table holds the latest. A command that was late may have left
    others."""
    latest: dict[str, TableDocument] = {}
    for worker, document in documents:
        if document.since == held.get(worker, 0):
            known = latest.get(worker)
            if known is None or known.number < document.number:
                latest[worker] = document
    return latest


def total(kinds: Kinds, name: str, contents: Sequence[bytes]) -> bytes:
    """The sum of one or more encoded tables. Raises `HikyakuError`."""
    decode = kinds[kind_of(name)]
    return reduce(add, map(decode, contents)).encode()


def kind_of(name: str) -> str:
    return name.partition(":")[0]


class Found(NamedTuple):
    """What a worker has been told about one of its tables."""

    is_there: bool
    held: int
    """The number of its last write that the folded table holds, 0 where it holds none."""
    removed: bool
    """Nobody is to write it any more."""


class OwnTables:
    """The tables of this worker, by name.

    A write may have been made though no answer came. So what was sent is not added to until it is
    answered for: the same is sent again, and if the table is folded meanwhile, one of two writes is
    the last that was.
    """

    def __init__(self, refused: Callable[[str], None]) -> None:
        """`refused` is told the kind of what was left out."""
        self.number = 0
        """Of the last call of `gather`."""
        self._tables: dict[str, _OwnTable] = {}
        self._refused = refused

    def gather(self, counted: Mapping[str, Additive]) -> None:
        self.number += 1
        for name, table in counted.items():
            self._tables.setdefault(name, _OwnTable()).gather(table, self.number)

    async def due(self) -> Mapping[str, bytes | None]:
        """Every table, with the document that is to be stored; None where nothing has changed."""
        tables = tuple(self._tables.items())
        documents = {name: await self._document(name, table) for name, table in tables}
        # The others were removed meanwhile.
        return {name: documents[name] for name, _ in tables if name in self._tables}

    def rewrite(self) -> None:
        """What is stored may be less than what had been."""
        for table in self._tables.values():
            table.is_due = True

    def told(self, name: str, stored: bool, found: Found) -> None:
        """`stored`: the document that was due is in place, unless the table was folded before."""
        if found.removed:
            self.forget(name)
        elif name in self._tables:
            self._tables[name].told(name, stored, found)

    def is_done(self) -> bool:
        """Whether nothing is left to be stored."""
        return not any(table.is_due for table in self._tables.values())

    def forget(self, name: str) -> None:
        self._tables.pop(name, None)

    async def _document(self, name: str, table: "_OwnTable") -> bytes | None:
        if not table.is_due:
            return None
        document = await table.document()
        if document is not None and len(document) > MOST_BYTES:
            log.error("a table has become too large", extra={"table": name, "most": MOST_BYTES})
            self._refused(kind_of(name))
            table.leave_out()
            return await table.document()
        return document


class _OwnTable:
    """One table, in the order in which it was counted: what is folded, written, sent, gathered."""

    def __init__(self) -> None:
        self.is_due = False
        self._folded: Additive | None = None
        self._since = 0
        self._written: Additive | None = None
        self._written_number = 0
        self._sent: Additive | None = None
        self._sent_number = 0
        self._both: Additive | None = None
        """What is written with what is sent."""
        self._gathered: Additive | None = None
        self._gathered_number = 0

    def gather(self, counted: Additive, number: int) -> None:
        self._gathered = _sum(self._gathered, counted)
        self._gathered_number = number
        self.is_due = True

    async def document(self) -> bytes | None:
        """From now on it may be stored. None where there is nothing to store."""
        if self._sent is None:
            self._sent, self._gathered = self._gathered, None
            self._sent_number = self._gathered_number
        if self._written is None and self._sent is None:
            self.is_due = False
            return None
        number = self._written_number if self._sent is None else self._sent_number
        # Of a large table that takes 100 ms.
        self._both, content = await asyncio.to_thread(_together, self._written, self._sent)
        return encode_document(self._since, number, content)

    def leave_out(self) -> None:
        """What is due last, with which it would be too large."""
        self._sent = None
        self.is_due = self._written is not None

    def told(self, name: str, stored: bool, found: Found) -> None:
        if found.held != self._since:
            self._was_folded(name, found.held)
        elif stored:
            self._written = self._both
            if self._sent is not None:
                self._written_number = self._sent_number
            self._sent = None
            self.is_due = self._gathered is not None
        elif not found.is_there and self._written is not None:
            self.is_due = True

    def _was_folded(self, name: str, held: int) -> None:
        """Go on with what was counted after it."""
        if held == self._sent_number and self._sent is not None:
            self._folded = _sum(self._folded, self._both)
            self._written = self._sent = None
            self._written_number = held
        elif held == self._written_number:
            self._folded = _sum(self._folded, self._written)
            self._written = None
        elif held == 0:  # and what had been folded is lost
            self._written = _sum(self._folded, self._written)
            self._folded = None
        else:
            # It was folded after the store had lost the last of what this worker had written.
            log.warning("counts are lost", extra={"table": name, "folded": held})
            self._folded = self._written = None
            self._written_number = held
        self._since = held
        self.is_due = True


class Absences:
    """Since when workers are missing."""

    def __init__(self, gone_s: float) -> None:
        self._gone_s = gone_s
        self._missing_s: dict[str, float] = {}

    def gone(self, workers: Iterable[str], living: Collection[str]) -> Collection[str]:
        """Of the workers those that have been missing for long enough."""
        now_s = time.monotonic()
        missing = set(workers).difference(living)
        self._missing_s = {worker: self._missing_s.get(worker, now_s) for worker in missing}
        return {w for w, since_s in self._missing_s.items() if now_s - since_s >= self._gone_s}


def _together(written: Additive | None, sent: Additive | None) -> tuple[Additive, bytes]:
    """Of both, one of which is there, the sum and how that is encoded."""
    both = _sum(written, sent)
    assert both is not None
    return both, both.encode()


def _sum(one: Additive | None, other: Additive | None) -> Additive | None:
    if one is None or other is None:
        return one if other is None else other
    return one + other
