"""The release state in Redis while Redis misbehaves."""

import asyncio
import os
import re
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import redis

from app.errors import ConfigurationError
from app.release.documents import encode_state
from app.release.redis_state import RedisState
from app.release.state import Chosen, ReleaseState, StateStore, StateUnavailable, WorkerReport
from app.release.store import open_state
from loadtests.fault_proxy import Cut, FaultProxy, Pass, Refuse, Replace, Stall
from loadtests.prove_release_state import misbehave
from tests.topologies import PASSWORD, Server, server

OPERATORS = (Path(__file__).parents[2] / "docs" / "operators.md").read_text()
KEY = "hikyaku:release:m"
ME = WorkerReport("w", {})


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A test leaves it as it was."""
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


@pytest.fixture
async def store(proxy: FaultProxy, tmp_path: Path) -> AsyncIterator[RedisState]:
    store = RedisState(f"redis://:{PASSWORD}@127.0.0.1:{proxy.port}", tmp_path)
    yield store
    await store.close()


async def generation(store: StateStore) -> int:
    return (await store.exchange(ME, ["m"]))["m"].generation


async def right_again(store: StateStore) -> int:
    """The generation, once the store answers."""
    give_up_s = time.monotonic() + 5
    while True:
        try:
            return await generation(store)
        except StateUnavailable:
            assert time.monotonic() < give_up_s
            await asyncio.sleep(0.05)


def look_bytes(client: "redis.Redis[Any]") -> int:
    """How long Redis's answer is to the look that comes before a change."""
    size = client.strlen(KEY)
    return len(f"+OK\r\n+OK\r\n${size}\r\n\r\n") + size


ASKED: dict[str, Callable[[RedisState], Any]] = {
    "exchange": lambda store: store.exchange(ME, ["m"]),
    "compare_and_set": lambda store: store.compare_and_set("m", 0, ReleaseState(1)),
    "workers": lambda store: store.workers(),
    "leave": lambda store: store.leave("w"),
}
FAULTS = {
    "silent": Stall(),
    "gone": Refuse(),
    "closes": Cut(times=10_000),
    "read only": Replace(b"-READONLY You can't write against a read only replica.\r\n"),
    "loading": Replace(b"-LOADING Redis is loading the dataset in memory\r\n"),
    "full": Replace(b"-OOM command not allowed when used memory > 'maxmemory'.\r\n"),
    "nonsense": Replace(b"?!\r\n"),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
async def test_no_call_hangs_and_all_are_right_again(
    store: RedisState, proxy: FaultProxy, fault: Any
) -> None:
    assert await generation(store) == 0
    await proxy.switch(fault)

    async def refused(call: Callable[[RedisState], Any]) -> None:
        with pytest.raises(StateUnavailable):
            async with asyncio.timeout(3):  # the machine may be busy
                await call(store)

    await asyncio.gather(*map(refused, ASKED.values()))
    await proxy.switch(Pass())
    before = await right_again(store)
    assert await store.compare_and_set("m", before, ReleaseState(before + 1))
    assert await generation(store) == before + 1


async def test_a_stopped_redis_holds_nobody_up(
    store: RedisState, running: Server, client: "redis.Redis[Any]"
) -> None:
    assert await store.compare_and_set("m", 0, ReleaseState(1))
    os.kill(running.process.pid, signal.SIGSTOP)
    try:
        calls = [store.compare_and_set("m", 1, ReleaseState(2, Chosen(n, ""))) for n in range(32)]
        async with asyncio.timeout(5):
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {StateUnavailable}
    finally:
        os.kill(running.process.pid, signal.SIGCONT)
    now = await right_again(store)
    assert now in (1, 2)  # one was on its way
    assert await store.compare_and_set("m", now, ReleaseState(now + 1))


async def test_a_change_whose_answer_is_lost_is_told_as_it_was_made(
    store: RedisState, proxy: FaultProxy, client: "redis.Redis[Any]"
) -> None:
    """Wherever the connection ends."""
    assert await store.compare_and_set("m", 0, ReleaseState(1))
    look = look_bytes(client)
    changed = len("+OK\r\n" + 3 * "+QUEUED\r\n" + "*3\r\n+OK\r\n:1\r\n+OK\r\n")
    at = 1
    for after_bytes in (0, 3, look - 2, *range(look, look + changed + 3, 2)):
        assert await store.compare_and_set("m", at, ReleaseState(at + 1))
        await proxy.switch(Cut(after_bytes, reset=after_bytes % 3 == 0))
        assert await store.compare_and_set("m", at + 1, ReleaseState(at + 2))
        await proxy.switch(Pass())
        at += 2
    assert proxy.connections_cut > 25
    assert await generation(store) == at
    assert client.llen("hikyaku:changes:m") == at  # each was made once


async def test_a_change_that_another_has_overtaken_is_told_as_it_was_made(
    store: RedisState,
    proxy: FaultProxy,
    client: "redis.Redis[Any]",
    running: Server,
    tmp_path: Path,
) -> None:
    """The answer is lost, and before we ask again another worker goes on from our state."""
    other = RedisState(f"redis://:{PASSWORD}@127.0.0.1:{running.port}", tmp_path / "other")
    assert await store.compare_and_set("m", 0, ReleaseState(1))
    await proxy.switch(Cut(look_bytes(client) + len("+OK\r\n")))
    change = asyncio.create_task(store.compare_and_set("m", 1, ReleaseState(2)))
    while not await other.compare_and_set("m", 2, ReleaseState(3)):
        pass
    assert await change
    await other.close()


async def test_what_changes_between_look_and_change_is_not_overwritten(
    store: RedisState,
    proxy: FaultProxy,
    client: "redis.Redis[Any]",
    running: Server,
    tmp_path: Path,
) -> None:
    """Two states, as fast as they can, each from its own connection."""
    other = RedisState(f"redis://:{PASSWORD}@127.0.0.1:{running.port}", tmp_path / "other")
    won: list[int] = []

    async def race(one: RedisState) -> None:
        while (at := await generation(one)) < 100:
            if await one.compare_and_set("m", at, ReleaseState(at + 1)):
                won.append(at + 1)

    await asyncio.gather(race(store), race(other))
    assert sorted(won) == list(range(1, 101))
    await other.close()


async def test_whatever_goes_wrong_changes_are_told_as_they_were_made(
    client: "redis.Redis[Any]", running: Server, tmp_path: Path
) -> None:
    """`make prove-release-state` goes on for a minute."""
    result = await misbehave(running.port, running.process.pid, tmp_path, seconds=3, seed=3)
    assert result.faults == []
    assert min(result.told["made"], result.told["not made"], result.told["unavailable"]) > 0


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "cannot be read"),
        (b"{}", "cannot be read"),
        (b'{"form":3,"state":{"generation":"x"}}', "cannot be read"),
        (b'{"form":3,"state":{"generation":3,"canary":5}}', "canary"),
        (b'{"form":4,"state":{}}', "form 4"),
        (b"\xff" * 100, "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
    ],
)
async def test_what_cannot_be_read_is_named_and_never_overwritten(
    store: RedisState, client: "redis.Redis[Any]", content: bytes, named: str
) -> None:
    client.set(KEY, content)
    for call in ("exchange", "compare_and_set"):
        with pytest.raises(StateUnavailable, match=f"{KEY}.*{named}"):
            await ASKED[call](store)
    assert client.get(KEY) == content
    client.delete(KEY)
    assert await store.compare_and_set("m", 0, ReleaseState(1))


@pytest.mark.parametrize("key", [KEY, "hikyaku:workers", "hikyaku:worker:w", "hikyaku:report:w"])
async def test_a_key_of_another_kind_is_named_and_not_taken_for_empty(
    store: RedisState, client: "redis.Redis[Any]", key: str
) -> None:
    client.hset(key, "a", "b")
    await store.exchange(ME, []) if key == KEY else None
    call = "workers" if key != KEY else "exchange"
    if key in {"hikyaku:worker:w", "hikyaku:report:w"}:
        client.sadd("hikyaku:workers", "w")
    with pytest.raises(StateUnavailable, match=f"{key}: WRONGTYPE"):
        await ASKED[call](store)
    if key == KEY:
        with pytest.raises(StateUnavailable, match=f"{key}: WRONGTYPE"):
            await ASKED["compare_and_set"](store)


async def test_a_redis_that_may_forget_is_not_written_to(
    store: RedisState, client: "redis.Redis[Any]"
) -> None:
    client.config_set("maxmemory-policy", "allkeys-lru")
    try:
        with pytest.raises(StateUnavailable, match="allkeys-lru, not noeviction"):
            await store.compare_and_set("m", 0, ReleaseState(1))
    finally:
        client.config_set("maxmemory-policy", "noeviction")
    assert await right_again(store) == 0


@pytest.mark.parametrize("left", [None, ReleaseState(1), ReleaseState(2, Chosen(9, "x"))])
async def test_what_redis_has_lost_is_put_back_by_who_has_read_it(
    store: RedisState,
    client: "redis.Redis[Any]",
    running: Server,
    tmp_path: Path,
    left: ReleaseState | None,
) -> None:
    other = RedisState(f"redis://:{PASSWORD}@127.0.0.1:{running.port}", tmp_path / "other")
    for at in range(3):
        assert await store.compare_and_set("m", at, ReleaseState(at + 1, Chosen(at, "x")))
        assert await generation(store) == at + 1
        if at == 1:
            assert await generation(other) == 2
    client.flushall()
    if left is not None:
        client.set(KEY, encode_state(left))
    states = await asyncio.gather(right_again(store), right_again(other))
    assert max(states) == 3
    assert await generation(other) == 3
    assert await other.compare_and_set("m", 3, ReleaseState(4))
    assert await generation(store) == 4
    await other.close()


async def test_it_needs_no_more_rights_than_the_documentation_says(
    client: "redis.Redis[Any]", running: Server, tmp_path: Path
) -> None:
    rights = re.findall(r"`(~hikyaku:\* [^`]+)`", OPERATORS)[0].split()
    client.execute_command("ACL", "SETUSER", "release", "on", f">{PASSWORD}", *rights)
    url = f"redis://release:{PASSWORD}@127.0.0.1:{running.port}/1"
    async with open_state(url, tmp_path) as store:
        await store.exchange(WorkerReport("other", {}), [])
        await store.leave("other")
        client.execute_command("SELECT", 1)
        client.sadd("hikyaku:workers", "gone")
        await store.exchange(ME, ["m"])
        assert await store.compare_and_set("m", 0, ReleaseState(1))
        assert await store.workers() == [ME]
        assert client.smembers("hikyaku:workers") == {b"w"}


async def test_names_of_workers_that_are_gone_do_not_pile_up(
    store: RedisState, client: "redis.Redis[Any]"
) -> None:
    client.sadd("hikyaku:workers", *(f"gone-{number}" for number in range(20)))
    await store.exchange(ME, [])
    assert [report.worker for report in await store.workers()] == ["w"]
    assert client.smembers("hikyaku:workers") == {b"w"}


async def test_a_start_without_redis_goes_on_with_what_is_known(
    proxy: FaultProxy, client: "redis.Redis[Any]", tmp_path: Path
) -> None:
    url = f"redis://:{PASSWORD}@127.0.0.1:{proxy.port}"
    state = ReleaseState(1, Chosen(3, "aa"))
    async with open_state(url, tmp_path) as store:
        await store.compare_and_set("m", 0, state)
        await store.exchange(ME, ["m"])
    await proxy.switch(Refuse())
    async with AsyncExitStack() as stack:
        store = await stack.enter_async_context(open_state(url, tmp_path))
        assert await store.last_known(["m"]) == {"m": state}
        with pytest.raises(StateUnavailable):
            await store.exchange(ME, ["m"])
    with pytest.raises(ConfigurationError, match="STATE_REDIS_URL"):
        async with open_state(url, tmp_path / "of a new machine"):
            pass


async def test_a_change_that_redis_loses_before_anybody_has_read_it_is_put_back(
    store: RedisState, client: "redis.Redis[Any]"
) -> None:
    await store.exchange(ME, ["m"])
    assert await store.compare_and_set("m", 0, ReleaseState(1))
    client.flushall()
    assert await right_again(store) == 1


async def test_what_a_worker_has_started_by_is_put_back_into_a_redis_that_comes_back_empty(
    proxy: FaultProxy, client: "redis.Redis[Any]", tmp_path: Path
) -> None:
    url = f"redis://:{PASSWORD}@127.0.0.1:{proxy.port}"
    async with open_state(url, tmp_path) as store:
        await store.compare_and_set("m", 0, ReleaseState(1))
        await store.compare_and_set("m", 1, ReleaseState(2))
        await store.exchange(ME, ["m"])
    await proxy.switch(Refuse())
    async with open_state(url, tmp_path) as store:
        assert (await store.last_known(["m"]))["m"].generation == 2
        client.flushall()
        await proxy.switch(Pass())
        assert await right_again(store) == 2
        assert await store.compare_and_set("m", 2, ReleaseState(3))


async def test_a_reading_that_a_change_overtakes_is_no_loss(store: RedisState) -> None:
    """It was answered before the change, and is taken in after it."""
    made = asyncio.Event()

    async def read() -> None:
        known = 0
        while not made.is_set():
            now = await generation(store)
            assert now >= known
            known = now

    readers = [asyncio.create_task(read()) for _ in range(4)]
    for number in range(300):
        state = ReleaseState(number + 1, champion=Chosen(number + 1, "a"))
        assert await store.compare_and_set("m", number, state)
    made.set()
    await asyncio.gather(*readers)
    assert await generation(store) == 300


async def test_a_redis_that_refuses_transactions_is_not_written_to_without_one(
    store: RedisState, client: "redis.Redis[Any]"
) -> None:
    assert await store.compare_and_set("m", 0, ReleaseState(1))
    client.execute_command("ACL", "SETUSER", "default", "-multi")
    try:
        with pytest.raises(StateUnavailable, match="multi"):
            await store.compare_and_set("m", 1, ReleaseState(2))
    finally:
        client.execute_command("ACL", "SETUSER", "default", "+multi")
    assert await right_again(store) == 1
