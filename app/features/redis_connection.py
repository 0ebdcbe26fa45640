"""One connection to Redis that all requests of a worker share: their commands leave together, the
replies come back in order."""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import hiredis

from app.features.redis_address import RedisAddress
from app.features.redis_shape import Shape

Reply: TypeAlias = Any
"""bytes, int, None, a list of replies, or a `hiredis.ReplyError`: a value, which is not raised."""

_CONNECT_TIMEOUT_S = 2.0


class ConnectionLost(Exception):
    """The connection ended before the reply came."""


def command(*words: bytes) -> bytes:
    """A command in Redis's wire format."""
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(w), w) for w in words)


# Not PING, which a replica that lost its master answers while it refuses to read.
_ANY_READ = command(b"HMGET", b"hikyaku", b"hikyaku")
# Whoever may not read this key, or finds it on another node, has an answer all the same.
_ANSWERS_OTHERS = ("NOPERM", "MOVED", "ASK")


class Reader(Protocol):
    """Whoever sends commands and takes their replies."""

    def arrived(self, readings: "Sequence[Reading]") -> None:
        """All replies of these are there; they came with one read from the socket."""
        ...

    def failed(self, reading: "Reading", reason: str) -> None:
        """No reply will come any more."""
        ...


class Reading:
    """Commands that only read, under way; each brings one reply. `sent` counts the attempts."""

    __slots__ = ("commands", "reader", "replies", "sent")

    def __init__(self, reader: Reader, commands: list[bytes]) -> None:
        self.reader = reader
        self.commands = commands
        self.replies: list[Reply] = []
        self.sent = 0

    def expected(self) -> tuple[Shape, int] | None:
        """What the next replies probably look like, and how many of them. Those that do are `Row`s
        among its replies."""
        return None


class RedisConnection(asyncio.Protocol):
    """Pipelines the commands of concurrent readers.

    No reader owns the socket: a reply is taken off it in its turn whether anybody still waits for
    it, so a cancelled or late read cannot leave its answer to the next one. When it ends, `lost` is
    told once, with the readings that are not answered and the reason.
    """

    def __init__(self, lost: Callable[[list[Reading], str], None]) -> None:
        self._lost = lost
        self._replies = hiredis.Reader()
        self._within = False
        """hiredis has a part of a reply."""
        self._waiting: deque[Reading] = deque()
        self._outgoing: list[bytes] = []
        self._transport: asyncio.Transport | None = None
        self._heard_s = 0.0

    @property
    def is_open(self) -> bool:
        return self._transport is not None

    @property
    def unanswered(self) -> int:
        """Readings whose replies have not come, whoever still waits for them."""
        return len(self._waiting)

    def silent_s(self) -> float:
        """Seconds for which Redis has owed an answer and sent none; 0 when it owes none."""
        return time.monotonic() - self._heard_s if self._waiting else 0.0

    def send(self, reading: Reading) -> None:
        """Send its commands; whatever is sent in one turn of the event loop leaves in one write."""
        reading.sent += 1
        if not self._waiting:
            self._heard_s = time.monotonic()
        self._waiting.append(reading)
        if not self._outgoing:
            asyncio.get_running_loop().call_soon(self._flush)
        self._outgoing += reading.commands

    def close(self, reason: str) -> None:
        """Give the connection up, and what is still unanswered."""
        if self._transport is not None:
            self._transport.abort()
            self._end(reason)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # a stream's is an asyncio.Transport

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(str(exc or "the connection was closed"))

    def _end(self, reason: str) -> None:
        if self._transport is None:
            return
        self._transport = None
        self._outgoing.clear()
        unanswered = list(self._waiting)
        self._waiting.clear()
        for reading in unanswered:
            reading.replies.clear()
        self._lost(unanswered, reason)

    def data_received(self, data: bytes) -> None:
        self._heard_s = time.monotonic()
        finished: list[Reading] = []
        try:
            fault = self._read(data, finished)
        except hiredis.ProtocolError as exc:
            fault = str(exc)
        hand_over(finished)
        if fault:
            self.close(fault)  # what follows cannot be told apart any more

    def _read(self, data: bytes, finished: list[Reading]) -> str:
        """Give each reading its replies: as rows those that look as expected, and through hiredis
        all else. Why it cannot go on, if so. Raises `hiredis.ProtocolError`."""
        position = 0
        while position < len(data):
            expected = self._waiting[0].expected() if self._waiting else None
            if expected is None:
                return self._parse(data, position, len(data), finished)
            shape, most = expected
            if self._within:  # a reply that began earlier ends where a usual one begins
                end = data.find(shape.head, position + 1)
                end = end if end >= 0 else len(data)
                if fault := self._parse(data, position, end, finished):
                    return fault
                position = end
                continue
            runs = shape.scan(data, position, most)
            if not runs:
                return self._parse(data, position, len(data), finished)
            for members, end in runs:
                if members is None:
                    if fault := self._parse(data, position, end, finished):
                        return fault
                elif len(members) <= self._expected_of(shape):
                    self._give(members, finished)
                else:
                    break  # there were more replies than we saw
                position = end
                if self._within:
                    break
        return ""

    def _expected_of(self, shape: Shape) -> int:
        """How many replies of this shape may come next."""
        expected = self._waiting[0].expected() if self._waiting else None
        return expected[1] if expected is not None and expected[0] is shape else 0

    def _parse(self, data: bytes, start: int, stop: int, finished: list[Reading]) -> str:
        """Let hiredis read this part."""
        self._replies.feed(data, start, stop - start)
        return self._take_whole(finished)

    def _take_whole(self, finished: list[Reading]) -> str:
        """The replies that hiredis has now; what is wrong with them."""
        gets, has_data, waiting = self._replies.gets, self._replies.has_data, self._waiting
        while (reply := gets()) is not False:  # False: no whole reply is there
            if not waiting:
                return "a reply came that nobody asked for"
            first = waiting[0]
            first.replies.append(reply)
            if len(first.replies) == len(first.commands):
                finished.append(waiting.popleft())
            if not has_data():
                self._within = False
                return ""
        self._within = True
        return ""

    def _give(self, members: Sequence[Reply], finished: list[Reading]) -> None:
        """To the first that waits, which needs at least so many."""
        first = self._waiting[0]
        first.replies += members
        if len(first.replies) == len(first.commands):
            finished.append(self._waiting.popleft())

    def _flush(self) -> None:
        if self._transport is not None and self._outgoing:
            self._transport.write(b"".join(self._outgoing))
            self._outgoing.clear()


def hand_over(finished: Sequence[Reading]) -> None:
    """Tell each reader once of all its readings that are complete."""
    if len(finished) == 1:
        finished[0].reader.arrived(finished)
        return
    by_reader: dict[Reader, list[Reading]] = {}
    for reading in finished:
        by_reader.setdefault(reading.reader, []).append(reading)
    for reader, readings in by_reader.items():
        reader.arrived(readings)


async def connect(
    address: RedisAddress, lost: Callable[[list[Reading], str], None]
) -> RedisConnection:
    """A connection that is authenticated, on its database, and to a Redis that answers (and is a
    master, where the address asks for one).

    Raises `ConnectionLost` with the reason when that does not succeed within two seconds.
    """
    loop = asyncio.get_running_loop()
    connected = False

    def lost_once_connected(readings: list[Reading], reason: str) -> None:
        if connected:
            lost(readings, reason)
        else:
            give_up(readings, reason)

    connection = RedisConnection(lost_once_connected)
    try:
        async with asyncio.timeout(_CONNECT_TIMEOUT_S):
            if address.unix_path is not None:
                await loop.create_unix_connection(lambda: connection, address.unix_path)
            else:
                await loop.create_connection(
                    lambda: connection,
                    address.host,
                    address.port,
                    ssl=address.tls,
                )
            await _introduce(connection, address)
        if not connection.is_open:  # what came after the last answer made no sense
            raise ConnectionLost("Redis answered what it was not asked")
    except (OSError, TimeoutError) as exc:
        connection.close("it was not made in time")
        reason = getattr(exc, "strerror", None) or "no answer"
        raise ConnectionLost(f"cannot connect: {reason}") from exc
    except BaseException:
        connection.close("the attempt was given up")
        raise
    connected = True
    return connection


async def ask(connection: RedisConnection, *commands: bytes) -> list[Reply]:
    """The replies to a few commands. Raises `ConnectionLost`."""
    question = _Question()
    connection.send(Reading(question, list(commands)))
    return await question.answer


async def ping(connection: RedisConnection) -> None:
    """Raises `ConnectionLost` when Redis does not answer, or says that it serves nobody now."""
    _accepted(await ask(connection, _ANY_READ))


def give_up(readings: Sequence[Reading], reason: str) -> None:
    """Tell the readers that these will have no answer."""
    for reading in readings:
        reading.reader.failed(reading, reason)


class _Question:
    """A reader that waits for one reading."""

    def __init__(self) -> None:
        self.answer: asyncio.Future[list[Reply]] = asyncio.get_running_loop().create_future()

    def arrived(self, readings: Sequence[Reading]) -> None:
        if not self.answer.done():
            self.answer.set_result(readings[0].replies)

    def failed(self, reading: Reading, reason: str) -> None:
        if not self.answer.done():
            self.answer.set_exception(ConnectionLost(reason))


async def _introduce(connection: RedisConnection, address: RedisAddress) -> None:
    words: list[Sequence[bytes]] = []
    if address.password is not None:
        user = [address.username.encode()] if address.username is not None else []
        words.append((b"AUTH", *user, address.password.encode()))
    if address.db:
        words.append((b"SELECT", b"%d" % address.db))
    _accepted(await ask(connection, *(command(*line) for line in words), _ANY_READ))
    if address.is_master:
        [role] = await ask(connection, command(b"ROLE"))
        if isinstance(role, list) and role[0] != b"master":
            raise ConnectionLost(f"{address} is no master")


def _accepted(replies: Sequence[Reply]) -> None:
    for reply in replies:
        if isinstance(reply, hiredis.ReplyError) and not str(reply).startswith(_ANSWERS_OTHERS):
            raise ConnectionLost(str(reply))
