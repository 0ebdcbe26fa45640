"""Changes of several keys of a Redis at once, made only if nobody changed them since we looked."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from app.features.redis_connection import Reply, command
from app.release.redis_line import RedisLine, refused
from app.release.state import StateUnavailable

STEP_S = 0.8

_MULTI, _EXEC, _UNWATCH = command(b"MULTI"), command(b"EXEC"), command(b"UNWATCH")


class Transactions:
    """One at a time, on a connection of their own: what is watched, and what is queued, holds for a
    connection. Every call raises `StateUnavailable`."""

    def __init__(self, line: RedisLine) -> None:
        self._line = line
        self._turn = asyncio.Lock()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """What looks and then makes is to be within this."""
        async with self._turn:
            try:
                yield
            except BaseException:
                # With the connection ends what it watches, and what it may have queued.
                self._line.close("a transaction was given up")
                raise

    async def read(self, *reads: bytes) -> list[Reply]:
        """Of commands that watch nothing."""
        return required(await self._line.ask(*reads, within_s=STEP_S))

    async def look(self, watched: Sequence[bytes], *reads: bytes) -> list[Reply]:
        """The replies to `reads`, from when on the watched keys are watched, and no others."""
        watch = command(b"WATCH", *watched)
        replies = await self._line.ask(_UNWATCH, watch, *reads, within_s=STEP_S)
        return required(replies)[2:]

    async def make(self, *commands: bytes) -> list[Reply] | None:
        """All of them at once, and the replies; None, and nothing done, when a watched key was
        changed. Where it raises they may have been executed, or may be yet, unless what is watched
        changes before."""
        # By itself: if it were refused, what comes behind it would be done at once, whoever has
        # changed a key meanwhile.
        required(await self._line.ask(_MULTI, within_s=STEP_S))
        replies = required(await self._line.ask(*commands, _EXEC, within_s=STEP_S))
        return None if replies[-1] is None else required(replies[-1])


def required(replies: list[Reply]) -> list[Reply]:
    """Raises `StateUnavailable` when one of them is an error."""
    error = refused(replies)
    if error is not None:
        raise StateUnavailable(f"STATE_REDIS_URL: {error}")
    return replies
