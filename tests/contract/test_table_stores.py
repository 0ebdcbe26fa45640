"""What every store of workers' tables promises, on a real Redis and in files."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from app.local.redis_server import own_redis
from app.release.store import open_tables
from app.release.tables import MOST_BYTES, TableStore
from loadtests.prove_tables import KINDS, Numbers, total

Opening = Callable[[str], "asyncio.Future[TableStore]"]
NAME = "numbers:m:1-2-ab"


async def numbers(store: TableStore, name: str = NAME) -> dict[int, int]:
    return {n: c for each in (await store.read(name)).values() for n, c in total(each).items()}


def once(*numbers: int) -> dict[int, int]:
    return dict.fromkeys(numbers, 1)


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with own_redis(tmp_path_factory.mktemp("redis")) as url:
        yield url


databases = iter(range(1, 16))
REFUSED: list[str] = []


@pytest.fixture(params=["redis", "files"])
async def opening(
    request: pytest.FixtureRequest, redis_url: str, tmp_path: Path
) -> AsyncIterator[Opening]:
    """Opens the store of one more worker, whose tables are folded as soon as it is missing."""
    url = None
    if request.param == "redis":
        url = f"{redis_url.rpartition('/')[0]}/{next(databases)}"
    REFUSED.clear()
    async with AsyncExitStack() as stack:
        yield lambda worker: stack.enter_async_context(
            open_tables(url, tmp_path, worker, KINDS, REFUSED.append, gone_s=0)
        )


async def test_what_workers_write_is_read_by_all_of_them(opening: Opening) -> None:
    one, other = await opening("a/1"), await opening("b 2")
    assert await one.read("") == {}
    assert one.next_write == 1
    await one.write({NAME: Numbers(1, 2), "numbers:n:0": Numbers(9)})
    await other.write({NAME: Numbers(3)})
    await one.write({NAME: Numbers(4)})
    assert one.next_write == 3
    assert await numbers(other) == once(1, 2, 3, 4)
    read = await one.read("numbers:")
    assert sorted(read) == [NAME, "numbers:n:0"]
    assert read[NAME].writes == {"a/1": 2, "b 2": 1}
    assert await one.read("numbers:x") == {}


async def test_who_is_gone_is_folded_once(opening: Opening) -> None:
    stores = [await opening(f"w{n}") for n in range(4)]
    for number, store in enumerate(stores):
        await store.write({NAME: Numbers(number)})
    assert await stores[0].fold(["w0", "w1", "w2", "w3"]) == 0
    assert await stores[0].fold(["w0", "w1"]) == 2
    assert await stores[1].fold(["w0", "w1"]) == 0
    table = (await stores[1].read(NAME))[NAME]
    assert total(table) == once(0, 1, 2, 3)
    assert len(table.contents) == 3
    assert table.writes == {"w0": 1, "w1": 1, "w2": 1, "w3": 1}
    assert await stores[0].fold(["w0"]) == 1
    assert await numbers(stores[1]) == once(0, 1, 2, 3)


async def test_who_was_folded_and_comes_back_counts_on(opening: Opening) -> None:
    paused, other = await opening("paused"), await opening("other")
    await paused.write({NAME: Numbers(1)})
    for round_number in range(3):
        assert await other.fold(["other"]) == 1
        assert await numbers(other) == once(*range(1, 2 + round_number))
        await paused.write({NAME: Numbers(2 + round_number)})
        assert await numbers(other) == once(*range(1, 3 + round_number))
    await paused.write({})
    assert await numbers(other) == once(1, 2, 3, 4)


async def test_workers_that_fold_at_the_same_time_fold_once(opening: Opening) -> None:
    gone = [await opening(f"gone{n}") for n in range(6)]
    stores = [await opening(f"w{n}") for n in range(4)]
    living = {f"w{n}" for n in range(4)}
    for number, store in enumerate([*gone, *stores]):
        await store.write({NAME: Numbers(number)})
    await asyncio.gather(
        *(store.fold(living) for store in stores),
        *(store.write({NAME: Numbers(10 + number)}) for number, store in enumerate(stores)),
        *(store.write({NAME: Numbers(20 + number)}) for number, store in enumerate(gone)),
    )
    await stores[0].fold(living)
    await asyncio.gather(*(store.write({}) for store in gone))
    assert await numbers(stores[0]) == once(*range(14), *range(20, 26))


async def test_a_removed_table_stays_away(opening: Opening) -> None:
    one, other, gone = [await opening(worker) for worker in ("one", "other", "gone")]
    for store in (one, other, gone):
        await store.write({NAME: Numbers(1), "numbers:kept": Numbers(1)})
    await one.fold(["one", "other"])
    await one.remove(NAME)
    assert sorted(await one.read("")) == ["numbers:kept"]
    await other.write({NAME: Numbers(2)})
    await other.write({})
    await gone.write({NAME: Numbers(2), "numbers:kept": Numbers(2)})
    await one.fold(["one", "other"])
    assert sorted(await other.read("")) == ["numbers:kept"]


async def test_a_table_that_would_be_too_large_keeps_what_it_had(opening: Opening) -> None:
    store = await opening("w")
    await store.write({NAME: Numbers(1), "numbers:n": Numbers(1)})
    await store.write({NAME: Numbers(2, size=MOST_BYTES), "numbers:n": Numbers(2)})
    assert REFUSED == ["numbers"]
    await store.write({NAME: Numbers(3)})
    assert await numbers(store) == once(1, 3)
    assert await numbers(store, "numbers:n") == once(1, 2)
