"""The tables of workers in the Redis that replicas share."""

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from app.errors import HikyakuError
from app.features.redis_connection import Reply, command
from app.release.own_tables import (
    Absences,
    Found,
    OwnTables,
    TableDocument,
    counted,
    decode_document,
    encode_document,
    total,
)
from app.release.redis_line import NoAnswer, RedisLine, refused, state_address
from app.release.state import StateUnavailable
from app.release.tables import (
    GONE_S,
    KEPT_REMOVED_S,
    MOST_BYTES,
    Additive,
    Kinds,
    StoredTable,
)

log = logging.getLogger(__name__)

_ANSWER_S = 2.0
_LONGEST_PAUSE_S = 0.5
_INDEX = b"hikyaku:tables"
_FOLDED = ""
"""Stands for a worker in the index: the table of those that are gone."""
_REMOVED = b""
"""Stands for a worker among those that the folded table holds: there is to be none any more."""
_MOST_HELD = 10_000
# Whoever reads what it has written finds that all is well; after a fold it writes once more.
_ROUNDS = 4
# Whoever has read the index before a table was somewhere else is done with reading.
_LATE_S = 10.0


class _Place(NamedTuple):
    """Where a worker keeps a table. It has another `part` with every connection: a command that is
    late, of a connection that was given up, does not undo what has been written since."""

    name: str
    worker: str
    part: int

    def member(self) -> bytes:
        """Of the index."""
        return f"{self.name}\0{self.worker}\0{self.part}".encode()

    def key(self) -> bytes:
        return f"hikyaku:table:{self.name}:{self.worker}:{self.part}".encode()


class RedisTables:
    """A `TableStore` in one Redis. Each worker overwrites its own tables. Those of workers that are
    gone are put into the folded one, by a transaction that takes place only if nobody has written
    any of them since they were read."""

    def __init__(
        self,
        url: str,
        worker: str,
        kinds: Kinds,
        refused: Callable[[str], None],
        gone_s: float = GONE_S,
    ) -> None:
        """`refused` is told the kind of what was left out. Raises `ConfigurationError` for an
        address that is none; asks nothing yet."""
        address = state_address(url)
        self._worker = worker
        self._kinds = kinds
        self._own = OwnTables(refused)
        self._part = 0
        self._places: dict[str, set[_Place]] = {}
        """Where each of its tables may be; one place, where nothing is due."""
        self._former: dict[_Place, float] = {}
        """Where it is to be no more, from that monotonic instant on."""
        self._writing = asyncio.Lock()
        self._writes = RedisLine(address, self._lost, _LONGEST_PAUSE_S)
        self._reads = RedisLine(address, longest_pause_s=_LONGEST_PAUSE_S)
        # WATCH and MULTI hold for a connection.
        self._folds = RedisLine(address, longest_pause_s=_LONGEST_PAUSE_S)
        self._folding = asyncio.Lock()
        self._absences = Absences(gone_s)

    @property
    def next_write(self) -> int:
        return self._own.number + 1

    async def write(self, counted: Mapping[str, Additive]) -> None:
        self._own.gather(counted)
        async with self._writing:
            for _ in range(_ROUNDS):
                await self._store()
                if self._own.is_done():
                    return
        raise StateUnavailable("STATE_REDIS_URL: what is written is folded again and again")

    async def read(self, prefix: str) -> Mapping[str, StoredTable]:
        places = _by_name(await self._index(), prefix)
        if not places:
            return {}
        commands = [
            command(b"GET", place.key()) for of_name in places.values() for place in of_name
        ]
        folded = [word for name in places for word in _ask_folded(name)]
        *queued, found = await self._reads.ask(
            command(b"MULTI"), *commands, *folded, command(b"EXEC"), within_s=_ANSWER_S
        )
        _require(_INDEX, [*queued, found])
        _require(_INDEX, found)
        replies = iter(found)
        documents = {name: list(_documents(of, replies)) for name, of in places.items()}
        tables = {name: _table(name, documents[name], *_take(replies, 2)) for name in places}
        return {name: table for name, table in tables.items() if table.contents}

    async def remove(self, name: str) -> None:
        self._own.forget(name)
        places = [place for place in await self._index() if place.name == name]
        replies = await self._reads.ask(
            command(b"MULTI"),
            command(b"DEL", _folded_key(name), _held_key(name), *(p.key() for p in places)),
            *(command(b"SREM", _INDEX, place.member()) for place in places),
            command(b"HSET", _held_key(name), _REMOVED, b"1"),
            command(b"PEXPIRE", _held_key(name), b"%d" % int(KEPT_REMOVED_S * 1000)),
            command(b"EXEC"),
            within_s=_ANSWER_S,
        )
        _require(_held_key(name), replies)

    async def fold(self, living: Collection[str]) -> int:
        async with self._folding:
            places = await self._index()
            workers = {place.worker for place in places} - {_FOLDED, self._worker}
            gone = self._absences.gone(workers, living)
            folded = 0
            for name in sorted({place.name for place in places if place.worker in gone}):
                folded += await self._folded(name, gone)
            return folded

    async def close(self) -> None:
        for line in (self._writes, self._reads, self._folds):
            line.close("the worker ends")

    def _lost(self) -> None:
        """What was sent may be done late, and the Redis may come back with less."""
        self._part += 1
        self._own.rewrite()

    async def _store(self) -> None:
        """One round trip: write what is due and look how all tables stand."""
        due = await self._own.due()
        part, now_s = self._part, time.monotonic()
        former = [place for place, from_s in self._former.items() if from_s <= now_s]
        clearing = [word for place in former for word in _clear(place)]
        asking = {name: self._ask(name, document) for name, document in due.items()}
        commands = [word for words in asking.values() for word in words] + clearing
        if not commands:
            return
        replies = await self._writes.ask(*commands, within_s=_ANSWER_S)
        _require(_INDEX, replies)
        for place in former:
            self._former.pop(place, None)
        answers = iter(replies)
        for name, document in due.items():
            *_, there, [held, removed] = _take(answers, len(asking[name]))
            found = Found(there != 0, int(held or 0), removed is not None)
            self._own.told(name, document is not None, found)
            if found.removed:
                self._leave(name, set())
            elif document is not None:
                self._leave(name, {_Place(name, self._worker, part)})
        if self._part != part:  # the answers were the last that the connection brought
            self._own.rewrite()

    def _ask(self, name: str, document: bytes | None) -> Sequence[bytes]:
        """Commands, the last of which tell whether its table is there and what is held of it."""
        places = self._places.setdefault(name, set())
        held = command(b"HMGET", _held_key(name), self._worker.encode(), _REMOVED)
        if document is None:
            keys = [place.key() for place in places] or [_folded_key(name)]
            return command(b"EXISTS", *keys), held
        place = _Place(name, self._worker, self._part)
        places.add(place)
        stored = command(b"SET", place.key(), document)
        return command(b"SADD", _INDEX, place.member()), stored, held

    def _leave(self, name: str, but: set[_Place]) -> None:
        """Its table is to be nowhere else, now that it is certain where it is."""
        from_s = time.monotonic() + _LATE_S
        self._former |= dict.fromkeys(self._places.pop(name, set()) - but, from_s)
        if but:
            self._places[name] = but

    async def _index(self) -> Collection[_Place]:
        [members] = await self._reads.ask(command(b"SMEMBERS", _INDEX), within_s=_ANSWER_S)
        _require(_INDEX, [members])
        return {_place(member) for member in members}

    async def _folded(self, name: str, gone: Collection[str]) -> int:
        """How many workers' tables have been folded: none when somebody wrote them meanwhile."""
        try:
            return await self._fold(name, gone)
        except BaseException as exc:
            self._folds.close("folding was given up")  # and with it what it watches
            if isinstance(exc, NoAnswer) or not isinstance(exc, HikyakuError):
                raise
            # The others are to be folded all the same.
            log.error("a table is not folded", extra={"table": name}, exc_info=exc)
            return 0

    async def _fold(self, name: str, gone: Collection[str]) -> int:
        # The index as well: a worker that is not gone may go on elsewhere.
        *done, members = await self._folds.ask(
            command(b"UNWATCH"),
            command(b"WATCH", _INDEX, _folded_key(name), _held_key(name)),
            command(b"SMEMBERS", _INDEX),
            within_s=_ANSWER_S,
        )
        _require(_INDEX, [*done, members])
        places = [p for p in map(_place, members) if p.name == name and p.worker in gone]
        if not places:
            return 0
        keys = [place.key() for place in places]
        watched, *found, of_folded, of_held = await self._folds.ask(
            command(b"WATCH", *keys),
            *(command(b"GET", key) for key in keys),
            *_ask_folded(name),
            within_s=_ANSWER_S,
        )
        _require(_folded_key(name), [watched, *found, of_folded, of_held])
        documents = _documents(places, iter(found))
        held, removed = _held(of_held)
        taken = {} if removed else counted(documents, held)
        words = [command(b"DEL", *keys), command(b"SREM", _INDEX, *(p.member() for p in places))]
        if taken:
            content = await asyncio.to_thread(self._sum, name, of_folded, taken)
            if content is None or len(held.keys() | taken.keys()) > _MOST_HELD:
                log.error("a table cannot be folded any more", extra={"table": name})
                return 0
            numbers = [(worker, document.number) for worker, document in taken.items()]
            words += [
                command(b"SET", _folded_key(name), encode_document(0, 0, content)),
                command(b"SADD", _INDEX, _Place(name, _FOLDED, 0).member()),
                *(
                    command(b"HSET", _held_key(name), worker.encode(), b"%d" % number)
                    for worker, number in numbers
                ),
            ]
        # By itself: if it were refused, what comes behind it would be done at once, whoever has
        # written the keys meanwhile.
        _require(_folded_key(name), await self._folds.ask(command(b"MULTI"), within_s=_ANSWER_S))
        *queued, made = await self._folds.ask(*words, command(b"EXEC"), within_s=_ANSWER_S)
        _require(_folded_key(name), [*queued, made, *(made or [])])
        return 0 if made is None else len(taken)

    def _sum(
        self, name: str, folded: bytes | None, taken: Mapping[str, TableDocument]
    ) -> bytes | None:
        """None where it would be too large."""
        contents = [document.content for document in taken.values()]
        if folded is not None:
            contents.append(decode_document(folded, _where(_folded_key(name))).content)
        content = total(self._kinds, name, contents)
        return content if len(content) <= MOST_BYTES else None


def _folded_key(name: str) -> bytes:
    return f"hikyaku:table:{name}".encode()


def _held_key(name: str) -> bytes:
    return f"hikyaku:held:{name}".encode()


def _ask_folded(name: str) -> Sequence[bytes]:
    return command(b"GET", _folded_key(name)), command(b"HGETALL", _held_key(name))


def _place(member: bytes) -> _Place:
    name, worker, part = member.decode().split("\0")
    return _Place(name, worker, int(part))


def _clear(place: _Place) -> Sequence[bytes]:
    return command(b"DEL", place.key()), command(b"SREM", _INDEX, place.member())


def _by_name(places: Iterable[_Place], prefix: str) -> Mapping[str, Sequence[_Place]]:
    """Of the workers, not the folded ones; of each name that begins so."""
    names: dict[str, list[_Place]] = {}
    for place in sorted(places):
        if place.name.startswith(prefix):
            of_name = names.setdefault(place.name, [])
            if place.worker != _FOLDED:
                of_name.append(place)
    return names


def _documents(
    places: Sequence[_Place], replies: Iterator[Reply]
) -> Iterator[tuple[str, TableDocument]]:
    for place, reply in zip(places, replies, strict=False):
        if reply is not None:
            yield place.worker, decode_document(reply, _where(place.key()))


def _held(reply: Sequence[bytes]) -> tuple[Mapping[str, int], bool]:
    """Of the reply to HGETALL: what the folded table holds, and whether the name was removed."""
    held = {reply[n].decode(): int(reply[n + 1]) for n in range(0, len(reply), 2)}
    return held, held.pop(_REMOVED.decode(), None) is not None


def _table(
    name: str, documents: Iterable[tuple[str, TableDocument]], folded: Reply, of_held: Reply
) -> StoredTable:
    held, removed = _held(of_held)
    if removed:
        return StoredTable([], {})
    latest = counted(documents, held)
    contents = [document.content for document in latest.values()]
    if folded is not None:
        contents.append(decode_document(folded, _where(_folded_key(name))).content)
    numbers = {worker: document.number for worker, document in latest.items()}
    return StoredTable(contents, {**held, **numbers})


def _take(replies: Iterator[Reply], count: int) -> Sequence[Reply]:
    return [next(replies) for _ in range(count)]


def _where(key: bytes) -> str:
    return f"STATE_REDIS_URL: {key.decode()}"


def _require(key: bytes, replies: Sequence[Reply]) -> None:
    """Raises `StateUnavailable` when one of them is an error."""
    error = refused(replies)
    if error is not None:
        raise StateUnavailable(f"{_where(key)}: {error}")
