"""The keys that all workers have counted, as bits in the Redis that replicas share."""

import time
from collections.abc import Sequence
from itertools import chain

from app.canary.first_seen import KEPT_S
from app.features.redis_connection import Reply, command
from app.release.redis_line import RedisLine, refused, state_address
from app.release.state import StateUnavailable

_ANSWER_S = 2.0
_LONGEST_PAUSE_S = 0.5
_AT_ONCE = 500
_PUT_BACK_WITHIN_S = 3.0
"""So long it takes the workers that live to put back what a Redis has lost."""


class RedisFirstSeen:
    """A `FirstSeen` in one Redis: a string of bits a name, beside it the set of the workers whose
    bits are in there. A worker that is not found in it, or has lost its connection, puts back what
    it has claimed, and claims nothing while others may still have to."""

    def __init__(self, url: str, worker: str) -> None:
        """Raises `ConfigurationError` for an address that is none; asks nothing yet."""
        self._line = RedisLine(state_address(url), self._lost, _LONGEST_PAUSE_S)
        self._worker = worker.encode()
        self._known: set[str] = set()
        """Names under which all that this worker has claimed is there."""
        self._claimed: set[str] = set()
        self._trusted_from_s = 0.0

    async def claim(self, name: str, marks: Sequence[int], ours: bytearray) -> Sequence[bool]:
        if name in self._claimed and name not in self._known:
            await self._put_back(name, ours)
        if time.monotonic() < self._trusted_from_s:
            raise StateUnavailable(f"STATE_REDIS_URL: {name}: other workers may put back more")
        self._claimed.add(name)
        is_new: list[bool] = []
        # One after the other: all of a second together would keep the loop for milliseconds.
        for at in range(0, len(marks), _AT_ONCE):
            is_new += await self._claim(name, marks[at : at + _AT_ONCE])
        return is_new

    async def _claim(self, name: str, marks: Sequence[int]) -> Sequence[bool]:
        added, before, *_ = await self._ask(
            name,
            command(b"SADD", _workers_key(name), self._worker),
            command(b"BITFIELD", _key(name), *chain.from_iterable(map(_set, marks))),
            *(() if name in self._known else _expire(name)),
        )
        if added and name in self._known:
            self._lost()
            raise StateUnavailable(f"STATE_REDIS_URL: {name}: what was claimed is gone")
        self._known.add(name)
        return [not bit for bit in before]

    async def forget(self, name: str) -> None:
        self._known.discard(name)
        self._claimed.discard(name)
        await self._ask(name, command(b"DEL", _key(name), _workers_key(name)))

    async def close(self) -> None:
        self._line.close("the worker ends")

    def _lost(self) -> None:
        """It may come back with less than it had."""
        self._known.clear()

    async def _put_back(self, name: str, ours: bytearray) -> None:
        draft = b"%b:%b" % (_key(name), self._worker)
        await self._ask(
            name,
            command(b"SET", draft, bytes(ours), b"EX", b"60"),
            command(b"BITOP", b"OR", _key(name), _key(name), draft),
            command(b"DEL", draft),
            command(b"SADD", _workers_key(name), self._worker),
            *_expire(name),
        )
        self._known.add(name)
        self._trusted_from_s = time.monotonic() + _PUT_BACK_WITHIN_S

    async def _ask(self, name: str, *commands: bytes) -> Sequence[Reply]:
        replies = await self._line.ask(*commands, within_s=_ANSWER_S)
        error = refused(replies)
        if error is not None:
            raise StateUnavailable(f"STATE_REDIS_URL: {name}: {error}")
        return replies


def _key(name: str) -> bytes:
    return f"hikyaku:seen:{name}".encode()


def _workers_key(name: str) -> bytes:
    return f"hikyaku:seen-by:{name}".encode()


def _set(mark: int) -> Sequence[bytes]:
    return b"SET", b"u1", b"%d" % mark, b"1"


def _expire(name: str) -> Sequence[bytes]:
    kept = b"%d" % int(KEPT_S)
    return command(b"EXPIRE", _key(name), kept), command(b"EXPIRE", _workers_key(name), kept)
