"""What only the reader that speaks to Redis itself has to withstand."""

import asyncio
import gc
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import redis

from app.clock import ReplayClock
from app.deadline import Deadline
from app.errors import FeaturesUnavailable, InvalidInput, InvalidModel
from app.features.entity_key import EntityKeyEncoder
from app.features.redis_address import parse_address
from app.features.redis_features import RedisFeatures
from app.features.redis_source import RedisSource
from app.features.source import FeatureRows, ValueStatus
from app.local.redis_server import own_redis
from tests.tiny_feast import FLEET, KNOWN_AT, Fleet

PRESENT, UNAVAILABLE = ValueStatus.PRESENT, ValueStatus.UNAVAILABLE


@pytest.fixture
async def source(fleet: Fleet) -> AsyncIterator[RedisSource]:
    async with RedisFeatures(parse_address(fleet.redis_url)) as features:
        yield RedisSource(features, fleet.plan, ReplayClock(KNOWN_AT))


@pytest.fixture
def client(fleet: Fleet) -> Iterator["redis.Redis[Any]"]:
    with redis.Redis.from_url(fleet.redis_url) as client:
        yield client


def driver_key(fleet: Fleet, driver: int) -> bytes:
    return EntityKeyEncoder({"driver_id": "Int64"}, fleet.plan.project, 3).encode((driver,))


async def fetch(source: RedisSource, *drivers: int) -> FeatureRows:
    entities = {"driver_id": list(drivers), "city": ["kyoto"] * len(drivers)}
    return await source.fetch(entities, len(drivers), Deadline.after(5))


async def test_a_key_of_another_type_harms_its_own_entity(
    source: RedisSource, fleet: Fleet, client: "redis.Redis[Any]"
) -> None:
    key = driver_key(fleet, 555)
    client.set(key, "not a hash")
    try:
        rows = await fetch(source, 1, 555)
    finally:
        client.delete(key)
    assert rows.status[0].tolist() == [PRESENT] * 6
    assert rows.status[1, :3].tolist() == [UNAVAILABLE] * 3
    assert rows.status[1, 3] == PRESENT


async def test_a_corrupt_value_harms_no_other(
    source: RedisSource, fleet: Fleet, client: "redis.Redis[Any]"
) -> None:
    assert fleet.plan.redis is not None
    key, copy = driver_key(fleet, 1), driver_key(fleet, 556)
    client.hset(copy, mapping=client.hgetall(key))
    client.hset(copy, bytes.fromhex(fleet.plan.redis.fields["driver:trips"]), b"\x12\x03abc")
    try:
        rows = await fetch(source, 556, 1)
    finally:
        client.delete(copy)
    trips = FLEET.references.index("driver:trips")
    assert rows.status[0, trips] == UNAVAILABLE
    assert rows.columns[trips].tolist()[1] == 7.0
    assert (rows.status == UNAVAILABLE).sum() == 1


async def test_a_connection_that_was_cut_is_replaced_within_the_read(
    source: RedisSource, client: "redis.Redis[Any]"
) -> None:
    await fetch(source, 1)
    client.client_kill_filter(_type="normal", skipme=True)
    assert (await fetch(source, 1)).status.tolist() == [[PRESENT] * 6]


async def test_an_entity_that_ends_every_connection_harms_itself_only(
    source: RedisSource, fleet: Fleet, client: "redis.Redis[Any]"
) -> None:
    assert fleet.plan.redis is not None
    poison = driver_key(fleet, 559)
    client.hset(poison, mapping=client.hgetall(driver_key(fleet, 1)))
    huge = b"\x12\x80\xad\xe2\x04" + b"x" * 10_000_000
    client.hset(poison, bytes.fromhex(fleet.plan.redis.fields["driver:plate"]), huge)
    # Redis closes a connection to which it owes more than this.
    client.config_set("client-output-buffer-limit", "normal 1mb 0 0")
    connections = client.info("stats")["total_connections_received"]
    try:
        poisoned, *others = await asyncio.gather(
            fetch(source, 559), *(fetch(source, driver) for driver in (0, 1, 2))
        )
        for _ in range(50):  # it is known now
            with pytest.raises(FeaturesUnavailable, match="ends the connection"):
                await fetch(source, 559)
            assert (await fetch(source, 1)).status.tolist() == [[PRESENT] * 6]
    finally:
        client.config_set("client-output-buffer-limit", "normal 0 0 0")
        client.delete(poison)
    assert poisoned.status[0].tolist()[:4] == [UNAVAILABLE] * 3 + [PRESENT]
    assert [rows.columns[1].tolist() for rows in others] == [[0.0], [7.0], [3.0]]
    assert client.info("stats")["total_connections_received"] - connections <= 4


async def test_all_readers_of_a_worker_share_one_connection(
    source: RedisSource, client: "redis.Redis[Any]"
) -> None:
    before = len(client.client_list())
    await asyncio.gather(*(fetch(source, driver % 3) for driver in range(300)))
    assert len(client.client_list()) <= before + 1


@contextmanager
def paused(client: "redis.Redis[Any]") -> Iterator[None]:
    """Inside, Redis takes commands and answers none."""
    process_id = int(client.info("server")["process_id"])
    os.kill(process_id, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process_id, signal.SIGCONT)


def hashes_read(client: "redis.Redis[Any]") -> int:
    """HMGETs that Redis has executed since it started."""
    statistics: Any = client.info("commandstats")
    return int(statistics.get("cmdstat_hmget", {"calls": 0})["calls"])


async def started(*fetches: "asyncio.Task[FeatureRows]") -> None:
    """Let them run until they wait for Redis."""
    for _ in range(3):
        await asyncio.sleep(0)
    assert not any(fetch.done() for fetch in fetches)


async def test_reads_of_one_entity_at_the_same_time_are_one_read(
    source: RedisSource, client: "redis.Redis[Any]"
) -> None:
    before = hashes_read(client)
    with paused(client):
        fetches = [asyncio.create_task(fetch(source, 1)) for _ in range(100)]
        await started(*fetches)
    answers = await asyncio.gather(*fetches)
    assert hashes_read(client) - before == 3  # of the driver, of the city, of both
    assert all(rows.status.tolist() == [[PRESENT] * 6] for rows in answers)


async def test_those_who_share_a_read_do_not_share_its_arrays(
    source: RedisSource, client: "redis.Redis[Any]"
) -> None:
    with paused(client):
        fetches = [asyncio.create_task(fetch(source, 1)) for _ in range(2)]
        await started(*fetches)
    first, second = await asyncio.gather(*fetches)
    for column in first.columns:
        column[0] = None
    first.status[:] = UNAVAILABLE
    assert second.status.tolist() == [[PRESENT] * 6]
    assert second.columns[0].tolist() == [4.5]


async def test_whoever_began_a_shared_read_may_leave(
    source: RedisSource, client: "redis.Redis[Any]"
) -> None:
    with paused(client):
        first = asyncio.create_task(fetch(source, 1, 2))
        await started(first)
        others = [asyncio.create_task(fetch(source, driver, 0)) for driver in (1, 2)]
        await started(*others)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
    answers = await asyncio.gather(*others)
    assert [rows.columns[1].tolist() for rows in answers] == [[7.0, 0.0], [3.0, 0.0]]


async def test_nothing_is_kept_beyond_the_read(
    source: RedisSource, fleet: Fleet, client: "redis.Redis[Any]"
) -> None:
    key, copy = driver_key(fleet, 1), driver_key(fleet, 557)
    client.hset(copy, mapping=client.hgetall(key))
    try:
        assert (await fetch(source, 557)).status[0, 0] == PRESENT
        client.delete(copy)
        assert (await fetch(source, 557)).status[0, 0] == ValueStatus.NOT_FOUND
    finally:
        client.delete(copy)


async def test_a_redis_that_says_nothing_is_not_waited_for_again(
    source: RedisSource, client: "redis.Redis[Any]"
) -> None:
    with paused(client):
        entities = {"driver_id": [1], "city": ["kyoto"]}
        with pytest.raises(FeaturesUnavailable, match="did not answer within"):
            await source.fetch(entities, 1, Deadline.after(0.15))
        async with asyncio.timeout(5):
            while True:  # the breaker opens a moment later
                with pytest.raises(FeaturesUnavailable) as refused:
                    await source.fetch(entities, 1, Deadline.after(0.15))
                if "it says nothing" in str(refused.value):
                    break
    async with asyncio.timeout(5):
        while True:
            try:
                assert (await fetch(source, 1)).status.tolist() == [[PRESENT] * 6]
                break
            except FeaturesUnavailable:
                await asyncio.sleep(0.01)


async def test_nobody_joins_a_read_of_a_redis_that_is_down(
    source: RedisSource, client: "redis.Redis[Any]"
) -> None:
    with paused(client):
        patient = asyncio.create_task(fetch(source, 1))
        await started(patient)
        async with asyncio.timeout(5):
            while True:  # until the breaker has opened
                with pytest.raises(FeaturesUnavailable) as refused:
                    await source.fetch(
                        {"driver_id": [2], "city": ["kyoto"]}, 1, Deadline.after(0.15)
                    )
                if "it says nothing" in str(refused.value):
                    break
        with pytest.raises(FeaturesUnavailable, match="it says nothing"):
            await fetch(source, 1)
    patient.cancel()


async def test_a_caller_in_a_hurry_closes_redis_to_nobody(source: RedisSource) -> None:
    entities = {"driver_id": [1], "city": ["kyoto"]}
    for _ in range(20):
        with suppress(FeaturesUnavailable):
            await source.fetch(entities, 1, Deadline.after(0))
        assert (await fetch(source, 1)).status.tolist() == [[PRESENT] * 6]


async def test_what_was_read_is_freed_without_the_garbage_collector(source: RedisSource) -> None:
    """A cycle would hold the replies until the collector comes, and make it come often."""
    await fetch(source, 1)
    gc.collect()
    gc.disable()
    try:
        for _ in range(20):
            await fetch(source, 1, 2)
        assert gc.collect() < 20
    finally:
        gc.enable()


async def test_a_redis_that_comes_back_is_read_again(fleet: Fleet, tmp_path: Path) -> None:
    with own_redis(tmp_path) as url:
        address = parse_address(url)
        async with RedisFeatures(address) as features:
            source = RedisSource(features, fleet.plan, ReplayClock(KNOWN_AT))
            await fetch(source, 1)
            with redis.Redis.from_url(url) as client:
                client.config_set("requirepass", "another")  # what connects now is refused
                client.client_kill_filter(_type="normal", skipme=True)
                with pytest.raises(FeaturesUnavailable, match="WRONGPASS"):
                    await fetch(source, 1)
                assert address.password is not None
                client.config_set("requirepass", address.password)
            async with asyncio.timeout(2):
                while True:
                    try:
                        await fetch(source, 1)
                        break
                    except FeaturesUnavailable:
                        await asyncio.sleep(0.02)


async def test_integers_beyond_a_float_are_exact_among_many_rows(
    source: RedisSource, fleet: Fleet, client: "redis.Redis[Any]"
) -> None:
    assert fleet.plan.redis is not None
    copy = driver_key(fleet, 558)
    client.hset(copy, mapping=client.hgetall(driver_key(fleet, 1)))
    huge = b"\x20\xff\xff\xff\xff\xff\xff\xff\xff\x7f"
    client.hset(copy, bytes.fromhex(fleet.plan.redis.fields["driver:trips"]), huge)
    drivers = [1] * 600 + [558, 99]
    try:
        rows = await fetch(source, *drivers)
    finally:
        client.delete(copy)
    trips = rows.columns[FLEET.references.index("driver:trips")].tolist()
    assert trips == [7] * 600 + [2**63 - 1, None]


async def test_a_small_read_does_not_wait_for_all_of_a_large_one(source: RedisSource) -> None:
    large = asyncio.create_task(fetch(source, *range(20_000)))
    await started(large)
    assert (await fetch(source, 1)).status.tolist() == [[PRESENT] * 6]
    assert not large.done()
    assert (await large).status.shape == (20_000, 6)


async def test_an_entity_that_its_type_does_not_hold_is_the_callers_fault(
    source: RedisSource,
) -> None:
    with pytest.raises(InvalidInput, match="driver_id"):
        await fetch(source, 2**63)


def test_a_plan_of_another_store_is_refused() -> None:
    features = RedisFeatures(parse_address("redis://nowhere"))
    with pytest.raises(InvalidModel, match="not for Redis"):
        RedisSource(features, FLEET, ReplayClock(KNOWN_AT))
