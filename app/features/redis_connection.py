"""One connection to Redis that all requests of a worker share: their commands leave together, the
replies come back in order."""

import asyncio
import ssl
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias
from urllib.parse import unquote, urlsplit

import hiredis

from app.errors import ConfigurationError

Reply: TypeAlias = Any
"""bytes, int, None, a list of replies, or a `hiredis.ReplyError`: a value, which is not raised."""

_CONNECT_TIMEOUT_S = 2.0


class ConnectionLost(Exception):
    """The connection ended before the reply came."""


@dataclass(frozen=True)
class RedisAddress:
    """Where a Redis is and who asks it. `unix_path` set: a unix socket, else host and port."""

    host: str
    port: int
    unix_path: str | None
    tls: bool
    username: str | None
    password: str | None = field(repr=False)
    db: int


def parse_address(url: str) -> RedisAddress:
    """`redis[s]://[user:password@]host[:port][/db]` or `unix://[user:password@]/path[?db=N]`.

    Raises `ConfigurationError`, without the password, for anything else.
    """
    parts = urlsplit(url)
    try:
        if parts.scheme == "unix":
            db = int(parts.query.removeprefix("db=") or 0)
            path, host, port = parts.path, "", 0
        elif parts.scheme in {"redis", "rediss"} and parts.hostname and not parts.query:
            db = int(parts.path.strip("/") or 0)
            path, host, port = "", parts.hostname, parts.port or 6379
        else:
            raise ValueError
    except ValueError:
        raise ConfigurationError(
            "FEATURE_REDIS_URL: must be redis[s]://[user:password@]host[:port][/db] or "
            "unix://[user:password@]/path[?db=N]"
        ) from None
    return RedisAddress(
        host,
        port,
        path or None,
        parts.scheme == "rediss",
        unquote(parts.username) if parts.username else None,
        unquote(parts.password) if parts.password else None,
        db,
    )


def command(*words: bytes) -> bytes:
    """A command in Redis's wire format."""
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(w), w) for w in words)


@dataclass(slots=True)
class _Waiting:
    """Some commands of one caller: how many replies are still to come, and those that have."""

    missing: int
    replies: list[Reply]
    answer: "asyncio.Future[list[Reply]]"


class RedisConnection(asyncio.Protocol):
    """Pipelines the commands of concurrent callers.

    No caller owns the socket: a reply is taken off it in its turn whether anybody still waits for
    it, so a cancelled or late read cannot leave its answer to the next one.
    """

    def __init__(self) -> None:
        self._reader = hiredis.Reader()
        self._waiting: deque[_Waiting] = deque()
        self._outgoing: list[bytes] = []
        self._transport: asyncio.Transport | None = None
        self._heard_s = 0.0

    @property
    def is_open(self) -> bool:
        return self._transport is not None

    @property
    def unanswered(self) -> int:
        """Callers whose replies have not come, those that have left included."""
        return len(self._waiting)

    def silent_s(self) -> float:
        """Seconds for which Redis has owed an answer and sent none; 0 when it owes none."""
        return time.monotonic() - self._heard_s if self._waiting else 0.0

    def send(self, commands: bytes, replies: int) -> "asyncio.Future[list[Reply]]":
        """Send commands that bring `replies` replies; everything that is sent in one turn of the
        event loop leaves in one write. The future fails with `ConnectionLost`."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[list[Reply]] = loop.create_future()
        if self._transport is None:
            answer.set_exception(ConnectionLost("the connection to Redis is closed"))
            return answer
        if not self._waiting:
            self._heard_s = time.monotonic()
        self._waiting.append(_Waiting(replies, [], answer))
        if not self._outgoing:
            loop.call_soon(self._flush)
        self._outgoing.append(commands)
        return answer

    def close(self) -> None:
        """Give the connection up, and whoever waits for it."""
        if self._transport is not None:
            self._transport.abort()
            self.connection_lost(None)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # a stream's is an asyncio.Transport

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._outgoing.clear()
        while self._waiting:
            answer = self._waiting.popleft().answer
            if not answer.done():
                answer.set_exception(ConnectionLost(str(exc or "Redis closed the connection")))

    def data_received(self, data: bytes) -> None:
        self._heard_s = time.monotonic()
        self._reader.feed(data)
        while True:
            try:
                reply = self._reader.gets()
            except hiredis.ProtocolError:
                self.close()  # what follows cannot be told apart any more
                return
            if reply is False:  # no whole reply is there
                return
            self._take(reply)

    def _take(self, reply: Reply) -> None:
        if not self._waiting:
            self.close()  # a reply that nobody asked for: we are out of step
            return
        first = self._waiting[0]
        first.replies.append(reply)
        first.missing -= 1
        if first.missing == 0:
            self._waiting.popleft()
            if not first.answer.done():
                first.answer.set_result(first.replies)

    def _flush(self) -> None:
        if self._transport is not None and self._outgoing:
            self._transport.write(b"".join(self._outgoing))
            self._outgoing.clear()


async def connect(address: RedisAddress) -> RedisConnection:
    """A connection that is authenticated and on its database.

    Raises `ConnectionLost` with the reason when that does not succeed within two seconds.
    """
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(_CONNECT_TIMEOUT_S):
            if address.unix_path is not None:
                _, connection = await loop.create_unix_connection(
                    RedisConnection, address.unix_path
                )
            else:
                _, connection = await loop.create_connection(
                    RedisConnection,
                    address.host,
                    address.port,
                    ssl=ssl.create_default_context() if address.tls else None,
                )
            await _introduce(connection, address)
    except (OSError, TimeoutError) as exc:
        reason = getattr(exc, "strerror", None) or "no answer"
        raise ConnectionLost(f"cannot connect: {reason}") from exc
    return connection


async def _introduce(connection: RedisConnection, address: RedisAddress) -> None:
    words: list[Sequence[bytes]] = []
    if address.password is not None:
        user = [address.username.encode()] if address.username is not None else []
        words.append((b"AUTH", *user, address.password.encode()))
    if address.db:
        words.append((b"SELECT", b"%d" % address.db))
    if not words:
        return
    try:
        replies = await connection.send(b"".join(command(*line) for line in words), len(words))
    except BaseException:
        connection.close()
        raise
    for reply in replies:
        if isinstance(reply, hiredis.ReplyError):
            connection.close()
            raise ConnectionLost(str(reply))
