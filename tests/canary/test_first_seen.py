"""Which keys were seen is agreed on by all workers, in files and in a Redis that misbehaves."""

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import redis

from app.canary.file_first_seen import FileFirstSeen
from app.canary.first_seen import MARKS, FirstSeen, SeenHere, open_first_seen
from app.release.state import StateUnavailable
from loadtests.fault_proxy import FaultProxy, Pass, Refuse
from tests.topologies import PASSWORD, Server, server

NAME = "canary:m:4"
OPERATORS_PAGE = Path(__file__).parent.parent.parent / "docs" / "operators.md"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with server(tmp_path_factory.mktemp("redis") / "r", "appendonly yes") as started:
        yield started


@pytest.fixture
def client(running: Server) -> "Iterator[redis.Redis[Any]]":
    with running.client() as client:
        client.flushall()
        yield client


class Worker:
    """Claims what it sees first."""

    def __init__(self, store: FirstSeen) -> None:
        self._store = store
        self._here = SeenHere()

    async def first(self, *marks: int) -> list[int]:
        """Of these those that nobody has seen before."""
        new = [mark for mark in marks if self._here.is_new(mark)]
        firsts = await self._store.claim(NAME, new, self._here.bits)
        return [mark for mark, is_first in zip(new, firsts, strict=True) if is_first]


Open: TypeAlias = Callable[..., Any]


@pytest.fixture
async def redis_worker(client: "redis.Redis[Any]", running: Server) -> AsyncIterator[Open]:
    async with AsyncExitStack() as stack:

        async def opened(worker: str, port: int = running.port) -> Worker:
            url = f"redis://:{PASSWORD}@127.0.0.1:{port}"
            store = open_first_seen(url, Path("unused"), worker)
            return Worker(await stack.enter_async_context(store))

        yield opened


@pytest.fixture(params=["files", "redis"])
async def two(
    request: pytest.FixtureRequest, tmp_path: Path, redis_worker: Open
) -> AsyncIterator[list[Worker]]:
    if request.param == "redis":
        yield [await redis_worker("one"), await redis_worker("other")]
        return
    async with AsyncExitStack() as stack:
        yield [
            Worker(await stack.enter_async_context(open_first_seen(None, tmp_path, name)))
            for name in ("one", "other")
        ]


async def test_each_key_is_new_to_one_worker(two: list[Worker]) -> None:
    one, other = two
    marks = [n * 7_919 % MARKS for n in range(1_500)]
    assert await one.first(*marks[:1_000]) == marks[:1_000]
    assert await other.first(*marks) == marks[1_000:]
    assert await one.first(*marks[1_000:], 5) == [5]


async def test_of_two_that_claim_at_once_each_key_goes_to_one(two: list[Worker]) -> None:
    marks = list(range(0, 3_000, 3))
    found = await asyncio.gather(*(worker.first(*marks) for worker in two))
    assert sorted(found[0] + found[1]) == marks


async def test_the_first_and_the_last_mark_are_marks(two: list[Worker]) -> None:
    one, other = two
    assert await one.first(0, MARKS - 1) == [0, MARKS - 1]
    assert await other.first(0, 1, MARKS - 2, MARKS - 1) == [1, MARKS - 2]


async def test_what_a_full_disk_leaves_of_a_file_is_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "seen" / "canary%3Am%3A4.bits"
    store = FileFirstSeen(tmp_path)
    assert await Worker(store).first(3, 4) == [3, 4]
    path.write_bytes(path.read_bytes()[:1])
    assert await Worker(store).first(3, 99_999) == [99_999]
    await store.close()


async def test_a_redis_that_is_gone_says_so_and_is_used_again(
    redis_worker: Open, client: "redis.Redis[Any]", running: Server
) -> None:
    async with FaultProxy(running.port) as proxy:
        worker = await redis_worker("one", proxy.port)
        assert await worker.first(1, 2) == [1, 2]
        await proxy.switch(Refuse())
        with pytest.raises(StateUnavailable):
            await worker.first(3)
        await proxy.switch(Pass())
        with pytest.raises(StateUnavailable, match="put back"):
            await until_answered(worker)


async def test_what_a_redis_has_lost_is_put_back_before_anything_is_new(
    redis_worker: Open, client: "redis.Redis[Any]"
) -> None:
    one, other = await redis_worker("one"), await redis_worker("other")
    assert await one.first(1, 2) == [1, 2]
    assert await other.first(3) == [3]
    client.flushall()
    for worker in (one, other):
        for expected in ("is gone", "put back"):
            with pytest.raises(StateUnavailable, match=expected):
                await worker.first(0)
    assert await (await redis_worker("new")).first(1, 2, 3, 4) == [4]


async def test_it_needs_no_more_rights_than_the_page_for_operators_says(
    client: "redis.Redis[Any]", running: Server
) -> None:
    rights = re.search(r"`(~hikyaku:\* [^`]+)`", OPERATORS_PAGE.read_text())
    assert rights is not None
    client.execute_command("ACL", "SETUSER", "h", "on", f">{PASSWORD}", *rights[1].split())
    url = f"redis://h:{PASSWORD}@127.0.0.1:{running.port}"
    async with open_first_seen(url, Path("unused"), "one") as store:
        worker = Worker(store)
        assert await worker.first(1) == [1]
        client.flushall()
        for expected in ("is gone", "put back"):
            with pytest.raises(StateUnavailable, match=expected):
                await worker.first(2)
        assert client.keys("hikyaku:seen*")
        await store.forget(NAME)
        assert not client.keys("hikyaku:seen*")


async def test_what_nobody_asks_for_any_more_is_forgotten(
    redis_worker: Open, client: "redis.Redis[Any]"
) -> None:
    await (await redis_worker("one")).first(1)
    keys = client.keys("hikyaku:seen*")
    assert len(keys) == 2
    assert all(0 < client.ttl(key) <= 30 * 86_400 for key in keys)


async def until_answered(worker: Worker) -> None:
    """The connection is made anew after a pause."""
    for _ in range(100):
        try:
            await worker.first(9)
        except StateUnavailable as exc:
            if "put back" in str(exc):
                raise
        await asyncio.sleep(0.05)


async def test_a_stage_that_is_over_takes_no_room(
    redis_worker: Open, client: "redis.Redis[Any]", running: Server, tmp_path: Path
) -> None:
    url = f"redis://:{PASSWORD}@127.0.0.1:{running.port}"
    for address in (None, url):
        async with open_first_seen(address, tmp_path, "one") as store:
            await store.forget(NAME)  # of which nothing is known
            assert await Worker(store).first(1) == [1]
            assert await Worker(store).first(1) == []
            await store.forget(NAME)
            assert client.keys("hikyaku:seen*") == []
            assert not (tmp_path / "seen" / "canary%3Am%3A4.bits").exists()
            assert await Worker(store).first(1) == [1]
            await store.forget(NAME)
