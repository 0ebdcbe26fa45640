"""What every store of the release state promises, on a real Redis and in files."""

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis

from app.evidence.plan import Plan
from app.local.redis_server import own_redis
from app.release.state import (
    PRESENCE_S,
    Chosen,
    ModelReport,
    Preparation,
    Quarantined,
    ReleaseState,
    Rollout,
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
CHAMPION, CANDIDATE = Chosen(3, "aa" * 32), Chosen(4, "cc" * 32)
RELEASING = msgspec.structs.replace(
    FULL, rollout=Rollout(CANDIDATE, CHAMPION, Plan(), 0.0, 0.05, 3_600.0, 1.2, 10.0, 1, "a", ())
)
Opening = Callable[[], Awaitable[StateStore]]


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with own_redis(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture(params=["redis", "files"])
def url(request: pytest.FixtureRequest, redis_url: str) -> str | None:
    """None for the store in files."""
    if request.param == "files":
        return None
    with redis.Redis.from_url(redis_url) as client:
        client.flushdb()
    return redis_url


@pytest.fixture
async def opening(url: str | None, tmp_path: Path) -> AsyncIterator[Opening]:
    """Opens one more store, of which all share the state."""
    async with AsyncExitStack() as stack:
        yield lambda: stack.enter_async_context(open_state(url, tmp_path))


@pytest.fixture
async def store(opening: Opening) -> StateStore:
    return await opening()


async def read(store: StateStore, model: str = "m", worker: str = "w") -> ReleaseState:
    return (await store.exchange(WorkerReport(worker, {}), [model]))[model]


class Raw:
    """The documents as they are stored, which other releases of the software write and read."""

    def __init__(self, url: str | None, folder: Path) -> None:
        self._url = url
        self._folder = folder / "release"

    def document(self) -> dict[str, Any]:
        """Of the state of "m"."""
        found: dict[str, Any] = json.loads(self._get("release:m", "m.json"))
        return found

    def put(self, document: dict[str, Any]) -> None:
        self._set("release:m", "m.json", json.dumps(document))

    def told(self, worker: str) -> dict[str, Any]:
        """What an older release reads of the worker."""
        found: dict[str, Any] = json.loads(self._get(f"worker:{worker}", f"workers/{worker}.json"))
        return found if self._url is not None else found["report"]

    def tell(self, worker: str, document: dict[str, Any]) -> None:
        """In place of all that the worker has told, as an older release does."""
        if self._url is not None:
            self._delete(f"hikyaku:report:{worker}")
            self._set(f"worker:{worker}", "", json.dumps(document))
            return
        path = f"workers/{worker}.json"
        word = json.loads(self._get("", path))
        told = {name: word[name] for name in ("boot", "told_s")}
        self._set("", path, json.dumps(told | {"report": document}))

    def _get(self, key: str, path: str) -> str:
        if self._url is None:
            return (self._folder / path).read_text()
        with redis.Redis.from_url(self._url, decode_responses=True) as client:
            return str(client.get(f"hikyaku:{key}"))

    def _set(self, key: str, path: str, content: str) -> None:
        if self._url is None:
            (self._folder / path).write_text(content)
            return
        with redis.Redis.from_url(self._url) as client:
            client.set(f"hikyaku:{key}", content)

    def _delete(self, key: str) -> None:
        assert self._url is not None
        with redis.Redis.from_url(self._url) as client:
            client.delete(key)


@pytest.fixture
def raw(url: str | None, tmp_path: Path) -> Raw:
    return Raw(url, tmp_path)


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


async def test_a_state_of_an_older_release_of_the_software_is_one_without_releases(
    store: StateStore, raw: Raw
) -> None:
    assert await store.compare_and_set("m", 0, FULL)
    older = raw.document()["state"]
    for name in ("rollout", "quarantined"):
        older.pop(name, None)
    raw.put({"form": 2, "state": older})
    assert await read(store) == FULL
    assert await store.compare_and_set("m", 1, ReleaseState(2))


@pytest.mark.parametrize("quarantined", [(), (Quarantined(CANDIDATE, "errors", 1.0),)])
async def test_an_older_release_of_the_software_reads_what_it_could_have_written(
    store: StateStore, raw: Raw, quarantined: tuple[Quarantined, ...]
) -> None:
    """It refuses another form, and fields that it does not know."""
    assert await store.compare_and_set("m", 0, FULL)
    assert raw.document()["form"] == 2
    assert not {"rollout", "quarantined"} & raw.document()["state"].keys()
    releasing = msgspec.structs.replace(RELEASING, generation=2)
    assert await store.compare_and_set("m", 1, releasing)
    assert (raw.document()["form"], await read(store)) == (3, releasing)
    over = msgspec.structs.replace(FULL, generation=3, quarantined=quarantined)
    assert await store.compare_and_set("m", 2, over)
    assert (raw.document()["form"], await read(store)) == (3 if quarantined else 2, over)


async def test_what_a_worker_tells_is_read_by_an_older_release_and_whole_by_this_one(
    opening: Opening, raw: Raw
) -> None:
    one, other = await opening(), await opening()
    new: dict[str, Any] = {"tripped": {"bb": "3 deaths"}, "per_s": 5.0, "routes": 7}
    new |= {"died": {"bb": 1}, "ended": {"bb": 2}}
    model = ModelReport(2, CHAMPION, [CHAMPION], **new)
    report = WorkerReport("w", {"m": model})
    await one.exchange(report, [])
    assert await other.workers() == [report]
    told = raw.told("w")
    assert (told["form"], told["report"].keys()) == (2, {"worker", "models"})
    assert not new.keys() & told["report"]["models"]["m"].keys()


async def test_a_worker_of_an_older_release_counts_and_confirms_no_release(
    store: StateStore, raw: Raw
) -> None:
    await store.exchange(WorkerReport("w", {"m": ModelReport(2, CHAMPION, [])}), [])
    raw.tell("w", raw.told("w"))
    assert await store.workers() == [
        WorkerReport("w", {"m": ModelReport(2, CHAMPION, [])}, knows_releases=False)
    ]


async def test_fields_of_a_newer_release_are_left_out_of_what_a_worker_tells(
    store: StateStore, raw: Raw
) -> None:
    await store.exchange(WorkerReport("w", {}), [])
    model = {"generation": 2, "serves": None, "mood": "good"}
    raw.tell("w", {"form": 3, "report": {"worker": "w", "models": {"m": model}, "hat": "on"}})
    assert await store.workers() == [WorkerReport("w", {"m": ModelReport(2, None)})]


@pytest.mark.parametrize("unread", [{"form": 9, "report": {}}, {"form": 3, "report": [1]}, {}])
async def test_a_worker_whose_word_cannot_be_read_lives_and_stops_nobody(
    store: StateStore, raw: Raw, caplog: pytest.LogCaptureFixture, unread: dict[str, Any]
) -> None:
    mine = WorkerReport("a", {"m": ModelReport(2, CHAMPION, [])})
    await store.exchange(WorkerReport("b", mine.models), [])
    await store.exchange(mine, [])
    raw.tell("b", unread)
    for _ in range(2):
        assert await store.workers() == [mine, WorkerReport("b", {})]
    [record] = [each for each in caplog.records if "cannot be read" in each.getMessage()]
    assert vars(record)["worker"] == "b"
