"""The proxy does what the fault says, no more: proofs rest on it."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from loadtests.fault_proxy import (
    Cut,
    Delay,
    FaultProxy,
    Pass,
    Refuse,
    Replace,
    Split,
    Stall,
    reply_end,
)

REPLIES = b"+OK\r\n*2\r\n$2\r\nab\r\n$-1\r\n:7\r\n-ERR no\r\n"


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Each line is answered with REPLIES."""
    try:
        while await reader.readline():
            writer.write(REPLIES)
    except ConnectionError:
        pass  # what the proxy is for
    finally:
        writer.close()


@pytest.fixture
async def proxy() -> AsyncIterator[FaultProxy]:
    upstream = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with upstream, FaultProxy(upstream.sockets[0].getsockname()[1]) as proxy:
        yield proxy


class Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def ask(self, size: int = len(REPLIES)) -> bytes:
        self.writer.write(b"?\n")
        return await self.hear(size)

    async def hear(self, size: int) -> bytes:
        async with asyncio.timeout(5):
            return await self.reader.readexactly(size)


@asynccontextmanager
async def connected(proxy: FaultProxy) -> AsyncIterator[Client]:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    try:
        yield Client(reader, writer)
    finally:
        writer.close()


async def test_bytes_go_through_and_connections_are_counted(proxy: FaultProxy) -> None:
    async with connected(proxy) as one, connected(proxy) as other:
        assert [await one.ask(), await other.ask(), await one.ask()] == [REPLIES] * 3
    assert (proxy.connections_opened, proxy.connections_cut) == (2, 0)


async def test_replies_come_later_by_the_delay_and_in_order(proxy: FaultProxy) -> None:
    async with connected(proxy) as client:
        await client.ask()
        await proxy.switch(Delay(0.05, jitter_s=0.01))
        started_s = time.monotonic()
        client.writer.write(b"?\n")
        assert await client.ask(2 * len(REPLIES)) == 2 * REPLIES
        assert time.monotonic() - started_s >= 0.05


async def test_what_a_stall_holds_back_comes_after_it(proxy: FaultProxy) -> None:
    async with connected(proxy) as client:
        await client.ask()
        await proxy.switch(Stall())
        async with connected(proxy) as late:
            asking = [asyncio.create_task(who.ask()) for who in (client, late)]
            _, silent = await asyncio.wait(asking, timeout=0.05)
            assert len(silent) == 2
            await proxy.switch(Pass())
            assert await asyncio.gather(*asking) == [REPLIES] * 2


async def test_refused_means_nobody_listens_until_it_is_over(proxy: FaultProxy) -> None:
    async with connected(proxy) as client:
        await client.ask()
        await proxy.switch(Refuse())
        with pytest.raises(ConnectionResetError):
            await client.hear(1)
    for _ in range(3):
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", proxy.port)
    await proxy.switch(Pass())
    async with connected(proxy) as client:
        assert await client.ask() == REPLIES


async def test_an_upstream_that_is_gone_resets_the_client() -> None:
    upstream = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with FaultProxy(upstream.sockets[0].getsockname()[1]) as proxy:
        upstream.close()
        await upstream.wait_closed()
        async with connected(proxy) as client:
            with pytest.raises(ConnectionResetError):
                await client.hear(1)


@pytest.mark.parametrize("after_bytes", [0, 1, len(REPLIES) - 1, len(REPLIES)])
async def test_a_connection_is_closed_within_a_reply_once(
    proxy: FaultProxy, after_bytes: int
) -> None:
    async with connected(proxy) as client:
        await proxy.switch(Cut(after_bytes))
        client.writer.write(b"?\n")
        assert await client.hear(after_bytes) == REPLIES[:after_bytes]
        client.writer.write(b"?\n")
        assert await client.reader.read() == b""
    async with connected(proxy) as client:
        assert await client.ask() == REPLIES
    assert proxy.connections_cut == 1


async def test_a_connection_is_reset_within_a_reply(proxy: FaultProxy) -> None:
    async with connected(proxy) as client:
        await proxy.switch(Cut(3, reset=True))
        with pytest.raises(ConnectionResetError):
            await client.ask()


async def test_every_connection_can_be_cut_at_once(proxy: FaultProxy) -> None:
    async with connected(proxy) as one, connected(proxy) as other:
        await asyncio.gather(one.ask(), other.ask())
        proxy.cut(reset=False)
        assert [await one.reader.read(), await other.reader.read()] == [b"", b""]
    assert proxy.connections_cut == 2


async def test_a_silenced_connection_stays_open_while_new_ones_are_served(
    proxy: FaultProxy,
) -> None:
    async with connected(proxy) as old:
        await old.ask()
        proxy.silence()
        asking = asyncio.create_task(old.ask())
        async with connected(proxy) as new:
            assert await new.ask() == REPLIES
            assert await new.ask() == REPLIES
        assert not asking.done()
        asking.cancel()


async def test_a_reply_comes_byte_by_byte(proxy: FaultProxy) -> None:
    await proxy.switch(Split())
    async with connected(proxy) as client:
        client.writer.write(b"?\n")
        first = await client.reader.read(1000)
        assert len(first) < len(REPLIES)
        assert first + await client.hear(len(REPLIES) - len(first)) == REPLIES


async def test_one_reply_of_a_pipeline_is_replaced(proxy: FaultProxy) -> None:
    async with connected(proxy) as client:
        await client.ask()
        await proxy.switch(Replace(b"-LOADING x\r\n", skip=1, times=1))
        expected = REPLIES.replace(b":7", b"-LOADING x") + REPLIES
        client.writer.write(b"?\n")
        assert await client.ask(len(expected)) == expected
        assert proxy.fault == Pass()


async def test_all_replies_but_a_plain_ok_are_replaced_until_it_is_switched_off(
    proxy: FaultProxy,
) -> None:
    async with connected(proxy) as client:
        await proxy.switch(Replace(b"-NO\r\n"))
        assert await client.ask(20) == b"+OK\r\n" + 3 * b"-NO\r\n"
        await proxy.switch(Pass())
        assert await client.ask() == REPLIES


async def test_leaving_ends_what_is_stalled() -> None:
    upstream = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with upstream:
        async with FaultProxy(upstream.sockets[0].getsockname()[1]) as proxy:
            await proxy.switch(Stall())
            reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        assert await reader.read() == b""
        writer.close()


@pytest.mark.parametrize("reply", [b"+OK\r\n", b":1\r\n", b"$0\r\n\r\n", b"$-1\r\n", b"*-1\r\n"])
def test_the_end_of_a_reply_is_found_when_it_is_whole(reply: bytes) -> None:
    nested = b"*2\r\n*1\r\n" + reply + b"$4\r\n\r\n\r\n\r\n"
    for whole in (reply, nested):
        assert reply_end(b"xy" + whole + b"+", 2) == 2 + len(whole)
        for size in range(len(whole)):
            assert reply_end(whole[:size], 0) is None
