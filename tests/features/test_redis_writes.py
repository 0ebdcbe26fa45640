"""The store that jobs write through: what Feast would store, but never over something newer."""

import threading
from datetime import timedelta
from typing import TYPE_CHECKING

import pandas as pd
import pyarrow as pa
import redis

from tests.features.pushed_repository import Pushed
from tests.tiny_feast import KNOWN_AT

if TYPE_CHECKING:
    from feast import FeatureStore

    from app.features.push import CheckedRows, PushTarget


def rows(driver_ids: list[int], second: int) -> pd.DataFrame:
    """What both views of the source hold, under Feast's names: it takes no others here."""
    return pd.DataFrame(
        {
            "driver_id": driver_ids,
            "known_at": pd.Timestamp(KNOWN_AT) + timedelta(seconds=second),
            "rating": 0.5,
            "trips": second,
            "plate": None,
        }
    )


def checked(target: "PushTarget", driver_ids: list[int], second: int) -> "CheckedRows":
    frame = rows(driver_ids, second).rename(columns={"rating": "stars"}).assign(active=True)
    columns = {name: pa.array(column) for name, column in frame.items()}
    ready, faults = target.check(columns, from_text=False)
    assert faults == {}
    return ready


def writer(pushed: Pushed) -> "FeatureStore":
    from app.features.feast_repo import open_writer

    return open_writer(pushed.repo, pushed.redis_url)


def trips(pushed: Pushed, driver_id: int) -> object:
    return pushed.online("ratings:trips", driver_id=driver_id)[0]


def hashes(pushed: Pushed, driver_id: int) -> list[dict[bytes, bytes]]:
    entity = driver_id.to_bytes(8, "little", signed=True)
    with redis.Redis.from_url(pushed.redis_url) as client:
        return [client.hgetall(key) for key in client.scan_iter() if entity in key]


def test_what_is_stored_is_byte_for_byte_what_feast_stores(pushed: Pushed, driver_id: int) -> None:
    from app.features.feast_repo import open_store

    frame = rows([driver_id], 1)
    open_store(pushed.repo, pushed.redis_url).write_to_online_store("ratings", frame)
    [by_feast] = hashes(pushed, driver_id)
    with redis.Redis.from_url(pushed.redis_url) as client:
        client.flushall()
    writer(pushed).write_to_online_store("ratings", frame)
    assert hashes(pushed, driver_id) == [by_feast]


def test_of_writers_at_the_same_entities_the_newest_row_wins(
    pushed: Pushed, driver_id: int
) -> None:
    """Feast alone loses this race: it writes what was newer when it looked."""
    ids = [driver_id * 1000 + i for i in range(300)]
    rounds = 10
    targets = [pushed.target("tracked") for _ in range(4)]
    together = threading.Barrier(len(targets))

    def write(target: "PushTarget", first: int) -> None:
        seconds = [1 + first + turn * len(targets) for turn in range(rounds)]
        batches = [checked(target, ids, second) for second in seconds]
        for batch in batches:
            together.wait()
            target.write(batch)

    threads = [
        threading.Thread(target=write, args=(target, first)) for first, target in enumerate(targets)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {trips(pushed, i) for i in ids[::50]} == {rounds * len(targets)}


def test_a_row_without_a_readable_event_time_is_replaced(pushed: Pushed, driver_id: int) -> None:
    store = writer(pushed)
    store.write_to_online_store("ratings", rows([driver_id], 5))
    entity = driver_id.to_bytes(8, "little", signed=True)
    with redis.Redis.from_url(pushed.redis_url) as client:
        [key] = [key for key in client.scan_iter() if entity in key]
        client.hset(key, "_ts:ratings", b"\xff\xff")
    store.write_to_online_store("ratings", rows([driver_id], 4))
    assert trips(pushed, driver_id) == 4


def test_keys_expire_when_the_repository_says_so(pushed: Pushed, driver_id: int) -> None:
    store = writer(pushed)
    store.config.online_store.key_ttl_seconds = 1000
    store.write_to_online_store("ratings", rows([driver_id], 1))
    entity = driver_id.to_bytes(8, "little", signed=True)
    with redis.Redis.from_url(pushed.redis_url) as client:
        [key] = [key for key in client.scan_iter() if entity in key]
        assert 0 < client.ttl(key) <= 1000
