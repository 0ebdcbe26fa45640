"""A body that does not come ends its own request, and nobody else's."""

import asyncio
from collections.abc import MutableMapping
from typing import Any

import pytest

from app.api.body import BodyBudget, BodyReader
from app.errors import DeadlineExceeded, Overloaded, PayloadTooLarge

ROOM = BodyBudget(1000)


class Client:
    """Sends these chunks, then leaves, or with `stalls` nothing more."""

    def __init__(self, *chunks: bytes, complete: bool = True, stalls: bool = False) -> None:
        self._chunks = list(chunks)
        self._complete = complete
        self._stalls = stalls

    async def receive(self) -> MutableMapping[str, Any]:
        if self._chunks:
            chunk = self._chunks.pop(0)
            more = bool(self._chunks) or not self._complete
            return {"type": "http.request", "body": chunk, "more_body": more}
        if self._stalls:
            await asyncio.Event().wait()
        return {"type": "http.disconnect"}


@pytest.mark.parametrize("chunks", [(b"{}",), (b"",), (b"{", b"", b"}"), (b"{", b"}")])
async def test_a_body_is_whole_however_it_comes(chunks: tuple[bytes, ...]) -> None:
    assert await BodyReader(2, 30, ROOM).read(Client(*chunks).receive) == b"".join(chunks)


@pytest.mark.parametrize("chunks", [(b"{ }",), (b"{ ", b"}")])
async def test_a_body_over_the_limit_is_refused(chunks: tuple[bytes, ...]) -> None:
    refused = await BodyReader(2, 30, ROOM).read(Client(*chunks).receive)
    assert isinstance(refused, PayloadTooLarge)
    assert "2 bytes" in str(refused)


@pytest.mark.parametrize("chunks", [(), (b"{",)])
async def test_nobody_is_answered_who_left(chunks: tuple[bytes, ...]) -> None:
    assert await BodyReader(2, 30, ROOM).read(Client(*chunks, complete=False).receive) is None


@pytest.mark.parametrize("chunks", [(), (b"{",)])
async def test_a_body_that_does_not_come_is_refused_and_its_task_goes_on(
    chunks: tuple[bytes, ...],
) -> None:
    bodies = BodyReader(2, 0.02, ROOM, 0.01)
    refused = await bodies.read(Client(*chunks, complete=False, stalls=True).receive)
    assert isinstance(refused, DeadlineExceeded)
    assert "0.02 s" in str(refused)
    assert await bodies.read(Client(b"{}").receive) == b"{}"


async def test_a_caller_that_leaves_is_no_timeout() -> None:
    reading = asyncio.create_task(BodyReader(2, 30, ROOM).read(Client(stalls=True).receive))
    await asyncio.sleep(0)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading


async def test_bodies_under_way_share_a_budget_and_give_it_back() -> None:
    bodies = BodyReader(100, 30, BodyBudget(100))
    first = asyncio.create_task(bodies.read(Client(b"x" * 60, stalls=True, complete=False).receive))
    await asyncio.sleep(0)
    second = await bodies.read(Client(b"x" * 60, b"x").receive)
    assert isinstance(second, Overloaded)
    first.cancel()
    await asyncio.wait({first})
    assert await bodies.read(Client(b"x" * 60, b"x").receive) == b"x" * 61
