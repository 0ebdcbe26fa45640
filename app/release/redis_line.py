"""A connection to the Redis of the release state: made when it is needed, bounded in time."""

import asyncio
import random
import time
from collections.abc import Callable, Sequence

import hiredis

from app.errors import ConfigurationError
from app.features.redis_address import RedisAddress, parse_address
from app.features.redis_connection import (
    ConnectionLost,
    Reading,
    RedisConnection,
    Reply,
    ask,
    command,
    connect,
    give_up,
)
from app.release.state import StateUnavailable

_SETTING = "STATE_REDIS_URL"
_FIRST_PAUSE_S = 0.05


class NoAnswer(StateUnavailable):
    """Redis was asked, perhaps, and has not answered."""


class RedisLine:
    """One connection at a time. `lost` is told when one ends that was there; after attempts that
    fail there are pauses."""

    def __init__(
        self,
        address: RedisAddress,
        lost: Callable[[], None] = lambda: None,
        longest_pause_s: float = 0.0,
    ) -> None:
        self._address = address
        self._told_lost = lost
        self._longest_pause_s = longest_pause_s
        self._connection: RedisConnection | None = None
        self._connecting = asyncio.Lock()
        self._pause_s = 0.0
        self._not_before_s = 0.0
        self._reason = ""
        """Why the last attempt failed."""

    async def ask(self, *commands: bytes, within_s: float) -> list[Reply]:
        """Their replies, errors among them, after connecting where that is due. Whoever asks in the
        pause after an attempt that failed is told its reason: all is `NoAnswer`."""
        try:
            async with asyncio.timeout(within_s):
                return await ask(await self._connected(), *commands)
        except TimeoutError:
            # What is on its way would be executed late, and in front of what comes next.
            self.close("no answer in time")
            raise self._no_answer(f"no answer within {within_s:g} s") from None
        except ConnectionLost as exc:
            raise self._no_answer(str(exc)) from exc

    def close(self, reason: str) -> None:
        """The next question makes another connection."""
        if self._connection is not None:
            self._connection.close(reason)

    async def _connected(self) -> RedisConnection:
        async with self._connecting:
            if self._connection is not None and self._connection.is_open:
                return self._connection
            if time.monotonic() < self._not_before_s:
                raise ConnectionLost(self._reason)
            try:
                self._connection = await self._connect()
            except BaseException as exc:
                self._reason = str(exc) or "no answer in time"
                doubled_s = max(2 * self._pause_s, _FIRST_PAUSE_S)
                self._pause_s = min(doubled_s, self._longest_pause_s)
                pause_s = random.uniform(0.5, 1) * self._pause_s
                self._not_before_s = time.monotonic() + pause_s
                raise
            self._pause_s = 0.0
            return self._connection

    async def _connect(self) -> RedisConnection:
        connection = await connect(self._address, self._lost)
        try:
            fault = forgets(await ask(connection, *ASK_WHETHER_IT_FORGETS))
        except BaseException:
            connection.close("it was not checked")
            raise
        if fault is not None:
            connection.close(fault)
            raise ConnectionLost(fault)
        return connection

    def _lost(self, readings: list[Reading], reason: str) -> None:
        give_up(readings, reason)
        self._told_lost()

    def _no_answer(self, reason: str) -> NoAnswer:
        return NoAnswer(f"{_SETTING}: {self._address}: {reason}")


class RedisAbsent(ConfigurationError):
    """The Redis does not answer, or lets us not in."""


async def check_state_store(url: str) -> None:
    """Raises `ConfigurationError` unless the Redis answers, never evicts and persists; of these
    `RedisAbsent` when nothing can be asked."""
    address = state_address(url)
    try:
        connection = await connect(address, give_up)
        try:
            fault = forgets(await ask(connection, *ASK_WHETHER_IT_FORGETS))
        finally:
            connection.close("it has been checked")
    except ConnectionLost as exc:
        raise RedisAbsent(f"{_SETTING}: cannot be used: {exc}") from exc
    if fault is not None:
        raise ConfigurationError(f"{_SETTING}: {fault}")


def state_address(url: str) -> RedisAddress:
    """Raises `ConfigurationError`."""
    address = parse_address(url, _SETTING)
    if not isinstance(address, RedisAddress):
        raise ConfigurationError(f"{_SETTING}: one Redis, without Sentinels and no cluster")
    return address


def refused(replies: Sequence[Reply]) -> hiredis.ReplyError | None:
    """The first that is an error."""
    return next((reply for reply in replies if isinstance(reply, hiredis.ReplyError)), None)


ASK_WHETHER_IT_FORGETS = tuple(
    command(b"CONFIG", b"GET", name) for name in (b"maxmemory-policy", b"appendonly", b"save")
)


def forgets(replies: Sequence[Reply]) -> str | None:
    """How this Redis may drop what it has accepted; None when it does not.

    A state that may be dropped is worse than none: a replica would believe that nothing was ever
    released. A Redis that forbids CONFIG (managed ones do) is taken at its word.
    """
    policy, append_only, save = map(_setting, replies)
    if policy not in {"noeviction", None}:
        return f"maxmemory-policy is {policy}, not noeviction"
    if append_only == "no" and save == "":
        return "neither appendonly nor save is set"
    return None


def _setting(reply: Reply) -> str | None:
    """Of `CONFIG GET name`; None where that is not allowed."""
    return reply[1].decode() if isinstance(reply, list) and len(reply) == 2 else None
