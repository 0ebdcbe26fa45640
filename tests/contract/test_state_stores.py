"""What every store of the release state promises, on a real Redis and in files."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import pytest

from app.local.redis_server import own_redis
from app.release.state import (
    PRESENCE_S,
    Chosen,
    ModelReport,
    Preparation,
    ReleaseState,
    StateStore,
    StateUnavailable,
    WorkerReport,
)
from app.release.store import open_state

FULL = ReleaseState(
    1,
    Chosen(3, "aa" * 32),
    Chosen(2, "bb" * 32),
    Preparation(Chosen(4, "cc" * 32), "w-1"),
    current=Chosen(3, "aa" * 32),
)
Opening = Callable[[], Awaitable[StateStore]]


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with own_redis(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture(params=["redis", "files"])
async def opening(
    request: pytest.FixtureRequest, redis_url: str, tmp_path: Path
) -> AsyncIterator[Opening]:
    """Opens one more store, of which all share the state."""
    url = None
    if request.param == "redis":
        url = f"{redis_url.rpartition('/')[0]}/{next(databases)}"
    async with AsyncExitStack() as stack:
        yield lambda: stack.enter_async_context(open_state(url, tmp_path))


databases = iter(range(1, 16))


@pytest.fixture
async def store(opening: Opening) -> StateStore:
    return await opening()


async def read(store: StateStore, model: str = "m", worker: str = "w") -> ReleaseState:
    return (await store.exchange(WorkerReport(worker, {}), [model]))[model]


async def test_a_model_of_which_nothing_was_decided_has_generation_0(store: StateStore) -> None:
    assert await store.exchange(WorkerReport("w", {}), ["a", "b"]) == {
        "a": ReleaseState(),
        "b": ReleaseState(),
    }


async def test_all_of_a_state_comes_back_elsewhere(opening: Opening) -> None:
    one, other = await opening(), await opening()
    assert await one.compare_and_set("m", 0, FULL)
    assert await read(other) == FULL
    assert await read(other, "another") == ReleaseState()


async def test_only_the_next_generation_of_what_is_there_is_taken(opening: Opening) -> None:
    one, other = await opening(), await opening()
    assert await one.compare_and_set("m", 0, FULL)
    assert not await other.compare_and_set("m", 0, ReleaseState(1))
    assert not await other.compare_and_set("m", 7, ReleaseState(8))
    with pytest.raises(ValueError, match="does not follow"):
        await other.compare_and_set("m", 1, ReleaseState(3))
    assert await read(other) == FULL
    assert await other.compare_and_set("m", 1, ReleaseState(2))
    assert await read(one) == ReleaseState(2)


async def test_of_changes_at_the_same_time_one_succeeds_and_none_is_lost(
    opening: Opening,
) -> None:
    stores = [await opening() for _ in range(4)]
    history: list[ReleaseState] = []
    rng = random.Random(6)

    async def client(number: int) -> None:
        store = stores[number % len(stores)]
        for _ in range(8):
            state = await read(store, worker=f"w{number}")
            await asyncio.sleep(rng.uniform(0, 0.01))
            following = ReleaseState(state.generation + 1, Chosen(number + 1, f"{number}"))
            if await store.compare_and_set("m", state.generation, following):
                history.append(following)

    await asyncio.gather(*(client(number) for number in range(32)))
    history.sort(key=lambda state: state.generation)
    assert [state.generation for state in history] == list(range(1, len(history) + 1))
    assert await read(stores[0]) == history[-1]


async def test_workers_know_of_each_other(opening: Opening) -> None:
    one, other = await opening(), await opening()
    report = ModelReport(2, Chosen(1, "aa"), [Chosen(1, "aa")], {"bb": "its rows differ"}, "")
    second = WorkerReport("host/2", {"m": report})
    await other.exchange(second, [])
    await one.exchange(WorkerReport("a", {}), [])
    assert await one.workers() == await other.workers() == [WorkerReport("a", {}), second]
    await other.exchange(WorkerReport("host/2", {}), [])
    assert await one.workers() == [WorkerReport("a", {}), WorkerReport("host/2", {})]


async def test_who_leaves_is_gone_at_once_and_may_return(opening: Opening) -> None:
    one, other = await opening(), await opening()
    await read(one, worker="a")
    await read(other, worker="b")
    await other.leave("b")
    assert [report.worker for report in await one.workers()] == ["a"]
    await other.leave("b")
    await read(other, worker="b")
    assert [report.worker for report in await one.workers()] == ["a", "b"]


async def test_who_is_silent_is_gone_after_a_while_and_may_return(opening: Opening) -> None:
    one, other = await opening(), await opening()
    await read(other, worker="b")
    since_s = time.monotonic()
    alive = ["a", "b"]
    while alive == ["a", "b"]:
        await read(one, worker="a")
        alive = [report.worker for report in await one.workers()]
        await asyncio.sleep(0.05)
    assert alive == ["a"]
    assert time.monotonic() - since_s >= PRESENCE_S - 0.1
    await read(other, worker="b")
    assert [report.worker for report in await one.workers()] == ["a", "b"]


async def test_after_an_interruption_workers_are_not_taken_for_gone(opening: Opening) -> None:
    one, other = await opening(), await opening()
    await read(one, worker="a")
    await read(other, worker="b")
    await asyncio.sleep(1.1)  # as if the store had been away so long
    with pytest.raises(StateUnavailable, match="interruption"):
        await one.workers()
    said: list[str] = []
    while not said:
        with suppress(StateUnavailable):
            said = [report.worker for report in await one.workers()]
        await read(one, worker="a")
        await read(other, worker="b")
        await asyncio.sleep(0.05)
    assert said == ["a", "b"]


async def test_a_state_that_was_read_is_known_to_the_next_worker(opening: Opening) -> None:
    store = await opening()
    assert await store.last_known(["m"]) == {}
    await store.compare_and_set("m", 0, FULL)
    await read(store)
    await store.close()
    assert await (await opening()).last_known(["m", "other"]) == {"m": FULL}


async def test_a_cancelled_change_is_made_or_not_and_the_next_one_works(store: StateStore) -> None:
    generation = 0
    for pause in range(30):
        change = asyncio.create_task(
            store.compare_and_set("m", generation, ReleaseState(generation + 1))
        )
        for _ in range(pause):
            await asyncio.sleep(0)
        change.cancel()
        await asyncio.wait({change})
        state = await read(store)
        if not change.cancelled():
            assert state.generation == generation + 1
        assert state.generation in (generation, generation + 1)
        generation = state.generation
    assert await store.compare_and_set("m", generation, ReleaseState(generation + 1))
