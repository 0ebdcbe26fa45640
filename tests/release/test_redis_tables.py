"""The tables of workers in Redis while Redis misbehaves, and loses what it had."""

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import redis

from app.release.redis_tables import RedisTables
from app.release.state import StateUnavailable
from app.release.tables import TableStore
from loadtests.fault_proxy import Cut, FaultProxy, Pass, Refuse, Replace
from loadtests.prove_tables import KINDS, Numbers, misbehave_in_redis, total
from tests.topologies import PASSWORD, Server, server

OPERATORS = (Path(__file__).parents[2] / "docs" / "operators.md").read_text()
NAME = "numbers:m:1-2-ab"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with server(tmp_path_factory.mktemp("redis") / "r", "appendonly yes") as started:
        yield started


@pytest.fixture
def client(running: Server) -> "Iterator[redis.Redis[Any]]":
    with running.client() as client:
        client.flushall()
        yield client


@pytest.fixture
async def proxy(client: "redis.Redis[Any]", running: Server) -> AsyncIterator[FaultProxy]:
    async with FaultProxy(running.port) as proxy:
        yield proxy


class Stores:
    """Of workers, each with connections of its own."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self._stack = stack

    def open(self, worker: str, port: int, user: str = "") -> RedisTables:
        url = f"redis://{user}:{PASSWORD}@127.0.0.1:{port}"
        store = RedisTables(url, worker, KINDS, lambda kind: None, gone_s=0)
        self._stack.push_async_callback(store.close)
        return store


@pytest.fixture
async def stores() -> AsyncIterator[Stores]:
    async with AsyncExitStack() as stack:
        yield Stores(stack)


async def counted(store: TableStore) -> dict[int, int]:
    return {n: c for each in (await store.read("")).values() for n, c in total(each).items()}


def once(*numbers: int) -> dict[int, int]:
    return dict.fromkeys(numbers, 1)


async def stored(store: TableStore) -> None:
    while True:
        try:
            return await store.write({})
        except StateUnavailable:
            await asyncio.sleep(0.02)


async def test_a_write_whose_answer_is_lost_counts_once(
    stores: Stores, proxy: FaultProxy, running: Server
) -> None:
    """Wherever the connection ends, also when the table is folded before the worker asks again."""
    store, other = stores.open("w", proxy.port), stores.open("other", running.port)
    await store.write({NAME: Numbers(0)})
    for number in range(1, 40):
        await proxy.switch(Cut(number % 20, reset=number % 3 == 0))
        with pytest.raises(StateUnavailable):
            await store.write({NAME: Numbers(number)})
        await proxy.switch(Pass())
        if number % 2:
            await other.fold(["other"])
        seen = await counted(other)
        assert seen in (once(*range(number)), once(*range(number + 1)))
        await stored(store)
        assert await counted(other) == once(*range(number + 1))


async def test_what_redis_has_lost_its_living_workers_write_again(
    stores: Stores, running: Server, client: "redis.Redis[Any]"
) -> None:
    one, other = (stores.open(worker, running.port) for worker in ("one", "other"))
    await one.write({NAME: Numbers(1), "numbers:idle": Numbers(2)})
    await other.write({NAME: Numbers(3)})
    await one.fold(["one"])  # while it lives
    await other.write({NAME: Numbers(4)})
    client.flushall()
    await asyncio.gather(one.write({}), other.write({}))
    assert await counted(one) == once(1, 2, 3, 4)


async def test_a_redis_that_comes_back_with_less_gets_the_rest(
    stores: Stores, proxy: FaultProxy, running: Server, client: "redis.Redis[Any]"
) -> None:
    store, other = stores.open("w", proxy.port), stores.open("other", running.port)
    await store.write({NAME: Numbers(1)})
    [key] = client.keys("hikyaku:table:*")
    before = client.dump(key)
    await store.write({NAME: Numbers(2)})
    await proxy.switch(Refuse())
    client.restore(key, 0, before, replace=True)
    assert await counted(other) == once(1)
    await proxy.switch(Pass())
    await stored(store)
    assert await counted(other) == once(1, 2)


async def test_a_command_that_comes_late_undoes_nothing(
    stores: Stores, proxy: FaultProxy, running: Server, client: "redis.Redis[Any]"
) -> None:
    """It was sent on a connection that was given up, and carried out after what followed it."""
    store, other = stores.open("w", proxy.port), stores.open("other", running.port)
    await store.write({NAME: Numbers(1)})
    [key] = client.keys("hikyaku:table:*")
    late = client.dump(key)
    proxy.cut()
    await stored(store)
    await store.write({NAME: Numbers(2)})
    client.restore(key, 0, late, replace=True)
    assert await counted(other) == once(1, 2)
    await store.close()
    assert await other.fold(["other"]) == 1
    client.restore(key, 0, late, replace=True)
    client.sadd("hikyaku:tables", f"{NAME}\0w\x000")
    assert await counted(other) == once(1, 2)
    assert await other.fold(["other"]) == 0
    assert client.keys("hikyaku:table:*") == [f"hikyaku:table:{NAME}".encode()]


async def test_a_full_redis_keeps_what_it_has_until_there_is_room(
    stores: Stores, proxy: FaultProxy, running: Server
) -> None:
    store, other = stores.open("w", proxy.port), stores.open("other", running.port)
    await store.write({NAME: Numbers(1)})
    await proxy.switch(Replace(b"-OOM command not allowed when used memory > 'maxmemory'.\r\n"))
    for number in (2, 3):
        with pytest.raises(StateUnavailable, match="OOM"):
            await store.write({NAME: Numbers(number)})
    await proxy.switch(Pass())
    await store.write({})
    assert await counted(other) == once(1, 2, 3)


async def test_what_is_stored_in_another_form_is_named_and_others_are_folded(
    stores: Stores, running: Server, client: "redis.Redis[Any]"
) -> None:
    gone, other = stores.open("gone", running.port), stores.open("other", running.port)
    await gone.write({"numbers:a": Numbers(1), "numbers:b": Numbers(2)})
    client.set("hikyaku:table:numbers:a:gone:0", b"\x94\x02\x00\x01\xc4\x00")
    with pytest.raises(StateUnavailable, match="numbers:a:gone:0: of form 2"):
        await other.read("numbers:")
    assert await other.fold(["other"]) == 1
    assert sorted(await other.read("numbers:b")) == ["numbers:b"]


async def test_it_needs_no_more_rights_than_the_documentation_says(
    stores: Stores, running: Server, client: "redis.Redis[Any]"
) -> None:
    rights = re.findall(r"`(~hikyaku:\* [^`]+)`", OPERATORS)[0].split()
    client.execute_command("ACL", "SETUSER", "tables", "on", f">{PASSWORD}", *rights)
    gone, store = (stores.open(worker, running.port, "tables") for worker in ("gone", "w"))
    await gone.write({NAME: Numbers(1)})
    assert await store.fold(["w"]) == 1
    await store.write({NAME: Numbers(2)})
    assert await counted(store) == once(1, 2)
    await store.remove(NAME)
    await store.write({NAME: Numbers(3)})
    assert await counted(store) == {}


async def test_whatever_goes_wrong_numbers_count_once(
    client: "redis.Redis[Any]", running: Server, tmp_path: Path
) -> None:
    """`make prove-tables` goes on for a minute."""
    result = await misbehave_in_redis(running.port, running.process.pid, tmp_path, 2, seed=3)
    assert result.faults == []
    assert min(result.done[what] for what in ("folded", "writes", "writes refused")) > 0


async def test_a_store_that_adds_to_what_is_stored_is_caught(
    client: "redis.Redis[Any]", running: Server, tmp_path: Path
) -> None:
    process, port = running.process.pid, running.port
    result = await misbehave_in_redis(port, process, tmp_path, 3, seed=3, increment=True)
    assert any("twice" in fault for fault in result.faults)
