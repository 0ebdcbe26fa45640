"""Keeps the connection to the features' Redis: made anew when it ends, given up for a while when
Redis is down or says nothing."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Collection, Sequence
from types import TracebackType
from typing import Any, Protocol, Self

import hiredis

from app.breaker import CircuitBreaker, StillDown
from app.deadline import Deadline, DeadlineSweep
from app.errors import FeaturesUnavailable
from app.features.redis_address import RedisAddress
from app.features.redis_connection import (
    ConnectionLost,
    Reading,
    RedisConnection,
    ask,
    connect,
    give_up,
    hand_over,
    ping,
)

log = logging.getLogger(__name__)

PATIENCE_S = 0.1
"""What a Redis may take before it counts as slow."""

_MAX_UNANSWERED = 1024
_LATE_TO_OPEN = 3
_MOST_LOSSES = 20
_BAN_S, _MOST_BANNED = 5.0, 1000
# Longer would not leave a peer that vanished within the second that recovery may take.
_STALLED_AFTER_S = 0.5
_LET_THE_SOCKET_BE_READ_S = 0.001


class Whereabouts(Protocol):
    """Where a Redis is: a `RedisAddress`, or who knows where it has moved."""

    async def find(self) -> RedisAddress:
        """Where to connect now. Raises `ConnectionLost` when nobody knows."""
        ...


class RedisFeatures:
    """The one connection that all plans of a worker read through.

    A reading whose connection ends is asked again on the next one, alone and command by command.
    A command that ends two more is an error from then on, and not sent for five seconds: it must
    not take the others' connection with it.

    A circuit breaker opens when no connection can be made, when twenty have ended within a second,
    when Redis refuses to serve, when it has said nothing for 100 ms past a deadline, or when three
    reads in a row were too late: then a read fails at once, and the breaker's probes find out when
    Redis is back. As an async context manager it connects at once, else at the first read; then
    `aclose` ends it.
    """

    def __init__(self, whereabouts: Whereabouts) -> None:
        self._whereabouts = whereabouts
        self._connected_to: RedisAddress | None = None
        self._breaker = CircuitBreaker("Redis of the features", self._probe)
        self._sweep = DeadlineSweep()
        self._connection: RedisConnection | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._connecting_since_s = 0.0
        self._queued: list[Reading] = []
        self._losses_s: deque[float] = deque(maxlen=_MOST_LOSSES)
        self._suspect = b""
        """The command during which, alone, the last connection ended."""
        self._banned: dict[bytes, float] = {}
        """Commands that have ended a connection, and the instants until which none is sent."""
        self._late = 0
        self._closed = False

    @property
    def unanswered(self) -> int:
        """Readings whose replies have not come, whoever still waits for them."""
        sent = self._connection.unanswered if self._connection is not None else 0
        return len(self._queued) + sent

    @property
    def is_down(self) -> bool:
        """Whether nobody may ask it until a probe succeeds."""
        return self._breaker.is_open

    def read(self, reading: Reading) -> None:
        """Send its commands; its reader is told how it ends. Raises `FeaturesUnavailable` when it
        is not worth trying."""
        self.check_up()
        if self._banned:
            self._check_allowed(reading)
        unanswered = self.unanswered
        if unanswered >= _MAX_UNANSWERED:
            raise FeaturesUnavailable(f"Redis owes {unanswered} answers")
        if self._connection is not None:
            self._connection.send(reading)
        else:
            self._queued.append(reading)
            self._reconnect()

    def check_up(self) -> None:
        """Raises `FeaturesUnavailable` while nobody may ask it."""
        if self._breaker.is_open:
            raise FeaturesUnavailable(f"Redis: {self._breaker.reason}")

    def watch(self, answer: "asyncio.Future[Any]", deadline: Deadline) -> None:
        """Fail it with `DeadlineExceeded` at its deadline."""
        self._sweep.watch(answer, deadline)

    def answered(self) -> None:
        """A read was answered in time."""
        self._late = 0

    def late(self, waited_s: float, readings: Collection[Reading]) -> None:
        """A read ran out of time after so long. Whichever readings are missing, this is the one
        Redis that owes them."""
        # A caller in a hurry is no fault of Redis'.
        self._late += waited_s >= PATIENCE_S
        # Our own loop may have been too busy to read what is already here: it gets a turn first.
        asyncio.get_running_loop().call_later(_LET_THE_SOCKET_BE_READ_S, self._judge)

    def refused(self, reason: str) -> None:
        """Redis answered that it serves nobody now: it is loading, or no longer who it was."""
        if reason.startswith("NOPERM"):
            return  # it serves others, and us with other keys
        if self._connection is not None:
            self._connection.close(reason)
        self._open(reason)

    def follow(self, address: RedisAddress) -> None:
        """This is where it is now: connect anew unless that is where we are connected."""
        if self._connection is not None and self._connected_to != address:
            self._connection.close(f"{address} has taken over")
            self._reconnect()

    def _check_allowed(self, reading: Reading) -> None:
        now_s = time.monotonic()
        for command in reading.commands:
            if self._banned.get(command, 0) > now_s:
                raise FeaturesUnavailable("Redis: to read this entity ends the connection")

    def _judge(self) -> None:
        if self._silent_s() >= PATIENCE_S:
            self._open("it says nothing")
        elif self._late >= _LATE_TO_OPEN:
            self._open("it answers too late")

    def _silent_s(self) -> float:
        if self._connection is not None:
            return self._connection.silent_s()
        return time.monotonic() - self._connecting_since_s if self._connecting is not None else 0.0

    def _open(self, reason: str) -> None:
        if self._closed:
            return
        self._late = 0
        self._breaker.open(reason)
        queued, self._queued = self._queued, []
        give_up(queued, reason)

    def _lost(self, unanswered: Sequence[Reading], reason: str) -> None:
        in_use, self._connection = self._connection is not None, None
        now_s = time.monotonic()
        self._losses_s.append(now_s)
        if self._closed or self._breaker.is_open or not in_use:
            give_up(unanswered, reason)
            return
        self._queued = [*unanswered, *self._queued]
        if len(self._losses_s) == _MOST_LOSSES and now_s - self._losses_s[0] < 1:
            self._open(f"connections keep ending: {reason}")
        elif self._queued:
            self._reconnect()

    def _reconnect(self) -> None:
        if self._connecting is None:
            self._connecting_since_s = time.monotonic()
            self._connecting = asyncio.create_task(self._connect_or_open(), name="connect to Redis")

    async def _connect_or_open(self) -> None:
        try:
            while self._queued and not self._breaker.is_open:
                await self._connect()
        except ConnectionLost as exc:
            self._open(str(exc))
        except Exception as exc:  # a defect: nobody may be left in the queue
            log.error("connecting failed", exc_info=exc)
            self._open(f"connecting failed: {type(exc).__name__}")
        finally:
            self._connecting = None

    async def _connect(self) -> None:
        """Connect, and send what is queued. Raises `ConnectionLost`."""
        try:
            address = await self._whereabouts.find()
            connection = await connect(address, self._lost)
        except ConnectionLost:
            raise
        except Exception as exc:  # an address, or a sentinel's answer, that nobody foresaw
            raise ConnectionLost(f"cannot connect: {type(exc).__name__}: {exc}") from exc
        self._connected_to = address
        while self._queued and self._queued[0].sent:
            if not await self._answered_alone(connection, self._queued.pop(0)):
                return  # what is left, on the next connection
        self._connection = connection
        queued, self._queued = self._queued, []
        for reading in queued:
            connection.send(reading)

    async def _answered_alone(self, connection: RedisConnection, reading: Reading) -> bool:
        """Ask a reading whose connection has ended, command by command: one that ends two more is
        what ended it, and is not sent again for a while."""
        try:
            while len(reading.replies) < len(reading.commands):
                suspect = reading.commands[len(reading.replies)]
                self._connecting_since_s = time.monotonic()
                async with asyncio.timeout(_STALLED_AFTER_S):
                    reading.replies += await ask(connection, suspect)
        except ConnectionLost as exc:
            if suspect == self._suspect:
                self._ban(suspect)
                reading.replies.append(hiredis.ReplyError(f"ERR it ends the connection: {exc}"))
            self._suspect = suspect
            if self._closed or self._breaker.is_open:
                give_up([reading], str(exc))
            else:
                self._queued.insert(0, reading)
            return False
        except TimeoutError:
            connection.close("it says nothing")
            give_up([reading], "it says nothing")
            raise ConnectionLost("it says nothing") from None
        except asyncio.CancelledError:
            give_up([reading], "we are closing")
            raise
        hand_over([reading])
        return True

    def _ban(self, command: bytes) -> None:
        if len(self._banned) >= _MOST_BANNED:
            self._banned.clear()
        self._banned[command] = time.monotonic() + _BAN_S

    async def _probe(self) -> None:
        """What the breaker asks: does Redis answer?"""
        try:
            if self._connecting is not None:
                await asyncio.wait({self._connecting})
            if self._connection is None:
                await self._connect()
            else:
                await self._still_answers(self._connection)
        except ConnectionLost as exc:
            raise StillDown(str(exc)) from exc

    async def _still_answers(self, connection: RedisConnection) -> None:
        try:
            async with asyncio.timeout(_STALLED_AFTER_S):
                await ping(connection)
        except TimeoutError:
            connection.close("it said nothing")  # a peer that vanished would keep it for ever
            raise ConnectionLost("it says nothing") from None

    async def __aenter__(self) -> Self:
        try:
            await self._connect()
        except ConnectionLost as exc:
            self._open(str(exc))
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connection; whoever still waits for an answer is told so."""
        self._closed = True
        await self._breaker.close()
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.wait({self._connecting})
        if self._connection is not None:
            self._connection.close("we are closing")
        queued, self._queued = self._queued, []
        give_up(queued, "we are closing")
        self._sweep.close()
