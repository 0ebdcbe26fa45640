"""Reads the bodies of requests, bounded in size and time."""

import asyncio
import time
from collections.abc import Mapping
from typing import Any, cast

from starlette.types import Receive

from app.errors import DeadlineExceeded, Overloaded, PayloadTooLarge, RequestError

MAX_BODY_S = 30
"""A client that drips its body must not keep a connection for ever."""


def body_too_large(max_bytes: int) -> PayloadTooLarge:
    """A body is over the limit, as far as it was read."""
    return PayloadTooLarge(f"body: over the limit of {max_bytes} bytes")


def body_too_slow(max_s: float) -> DeadlineExceeded:
    """A body did not come in time."""
    return DeadlineExceeded(f"body: not complete within {max_s} s")


class BodyBudget:
    """What the bodies that are not complete yet may hold together: many clients that send large
    ones slowly must not fill the memory. A body that came at once holds nothing."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._held = 0

    def hold(self, more: int) -> Overloaded | None:
        """`more` bytes are kept, until they are released; the refusal where there is no room, upon
        which all of that body is to be released."""
        self._held += more
        if self._held <= self._max_bytes:
            return None
        return Overloaded("bodies: too many are under way", retry_after_s=1)

    def release(self, held: int) -> None:
        self._held -= held


class BodyReader:
    """Reads bodies of at most `max_bytes`, for at most `max_s` each and `look_every_s` longer.

    One timer looks at all of them: that of `asyncio.timeout`, one a request, costs as much as it
    takes to decode the request and to encode its tensor.
    """

    def __init__(
        self, max_bytes: int, max_s: float, budget: BodyBudget, look_every_s: float = 1.0
    ) -> None:
        self._max_bytes = max_bytes
        self._max_s = max_s
        self._budget = budget
        self._look_every_s = look_every_s
        self._begun_s: dict[asyncio.Task[Any], float] = {}
        """When each reading began, the oldest first."""
        self._given_up: set[asyncio.Task[Any]] = set()
        self._timer: asyncio.TimerHandle | None = None

    async def read(self, receive: Receive) -> bytes | RequestError | None:
        """The whole body; a refusal as soon as it is over the limit, however it is framed, or when
        it takes too long; None when the client left before it was complete. A task reads one body
        at a time."""
        task = cast("asyncio.Task[Any]", asyncio.current_task())
        self._begun_s[task] = time.monotonic()
        if self._timer is None:
            self._look_later()
        try:
            message = await receive()
            if message["type"] == "http.request" and not message.get("more_body", False):
                body: bytes = message.get("body", b"")
                return body if len(body) <= self._max_bytes else body_too_large(self._max_bytes)
            return await self._read_rest(message, receive)
        except asyncio.CancelledError:
            if task not in self._given_up or task.uncancel():  # somebody else cancelled it too
                raise
            return body_too_slow(self._max_s)
        finally:
            del self._begun_s[task]
            self._given_up.discard(task)

    async def _read_rest(
        self, message: Mapping[str, Any], receive: Receive
    ) -> bytes | RequestError | None:
        chunks: list[bytes] = []
        size = 0
        try:
            while message["type"] == "http.request":
                chunks.append(message.get("body", b""))
                size += len(chunks[-1])
                no_room = self._budget.hold(len(chunks[-1]))
                if size > self._max_bytes:
                    return body_too_large(self._max_bytes)
                if not message.get("more_body", False):
                    return b"".join(chunks)
                if no_room is not None:
                    return no_room
                message = await receive()
            return None
        finally:
            self._budget.release(size)

    def _look_later(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._look_every_s, self._look)

    def _look(self) -> None:
        self._timer = None
        now_s = time.monotonic()
        for task, begun_s in self._begun_s.items():
            if begun_s + self._max_s > now_s:
                break
            if task not in self._given_up:
                self._given_up.add(task)
                task.cancel()
        if self._begun_s:
            self._look_later()
