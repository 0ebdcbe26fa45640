"""When Redis misbehaves: the rows of the failure catalogue (2.1), against a real Redis.

| row | fault | here | elsewhere |
|---|---|---|---|
| F1 | Redis is down | `TestF1Down` | tests/api/test_redis_gone.py, prove_redis_outage.py |
| F2 | Redis hangs | `TestF2Hangs` | the same two |
| F3 | Redis or one shard is slow | `TestF3Slow` | tests/features/test_redis_cluster.py (1) |
| F4 | failover, LOADING, READONLY, … | `TestF4Failover` | tests/features/test_redis_topologies.py |
| F5 | Redis flaps | `TestF5Flaps` (2) | |
| F6 | a read that was left | `TestF6LeftReads` | loadtests/prove_no_foreign_values.py |
| F7 | no connection is to be had | `TestF7Connections` | |
| F8 | an entity is missing | | tests/contract/test_feature_sources.py |
| F9 | a value is too old or of the future | | tests/contract/test_feature_sources.py (3) |
| F10 | a value is of another type | `TestF10Corrupt` | tests/features/test_values.py |
| F11 | two fields have one hash | | tests/features/test_feast_plan.py: refused at publishing |
| F12 | one command of a read fails | `TestF12OneCommand` | |
| F13 | the registry is unreachable | | tests/api/test_redis_gone.py: serving has none |
| F14 | all ask for one entity | `TestF14Herd` | |
| F15 | a huge entity | `TestF15Huge` (4) | |
| F16 | features are exchanged | | tests/repository/test_publish.py: golden rows do not come out |

1. Reads are not hedged: no replica is asked. Of a cluster one silent node harms its own keys only:
   `test_a_silent_node_is_left_and_no_other_pays_for_it`.
2. Up and down every 30 ms, for a second: at most one connection for each time it comes up, right
   answers throughout, and fresh ones in the end. Neither latency nor what is logged is measured,
   and no budget of connections a second exists: the breaker's probes are what limits them.
3. A value of the future is NOT_FOUND, like one that is not stored, and not counted apart.
4. The size of a reply has no cap. A field of 10 MB harms no other entity's values and no later
   read, and a hash that is read whole and has 10 MB too many is read by its fields from then on.
   What is asked for is read whatever its size; those behind it on the connection wait for it, and
   how long is not tested.

Every value tells whose it is (loadtests/telltale.py), and every read below is held against it.
"""

import asyncio
import gc
import random
import struct
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import redis

from app.clock import ReplayClock
from app.deadline import Deadline
from app.errors import FeaturesUnavailable
from app.features.plan import FeaturePlan, PlannedFeature, PlannedView
from app.features.redis_address import parse_address
from app.features.redis_features import RedisFeatures
from app.features.redis_source import RedisSource
from app.features.source import FeatureRows, ValueStatus
from loadtests.fault_proxy import Cut, Delay, FaultProxy, Pass, Refuse, Replace, Split, Stall
from loadtests.prove_no_foreign_values import prove
from loadtests.redis_process import RedisProcess
from loadtests.telltale import (
    READ_AT,
    TELLTALE,
    asked,
    driver_hash,
    driver_key,
    event_time_of,
    faults_of,
    field,
    float32,
    int64,
    laid_out,
    store,
    timestamp,
    value_of,
)

PRESENT, UNAVAILABLE = ValueStatus.PRESENT, ValueStatus.UNAVAILABLE
STORED = (3_000, 20)
LONG_S = 30.0
"""A deadline that nothing here may wait for."""


class Reader:
    """Reads drivers, each in a city, and holds every answer against what is stored."""

    def __init__(self, features: RedisFeatures) -> None:
        self.source = RedisSource(features, TELLTALE, ReplayClock(READ_AT))

    async def read(
        self, *drivers: int, timeout_s: float = LONG_S, city: int | None = None
    ) -> FeatureRows:
        cities = [driver % STORED[1] if city is None else city for driver in drivers]
        deadline = Deadline.after(timeout_s)
        rows = await self.source.fetch(asked(drivers, cities), len(drivers), deadline)
        assert list(faults_of(rows, drivers, cities, STORED)) == []
        return rows

    async def fresh(self, *drivers: int) -> bool:
        """Whether a read brings every value; False when it is refused."""
        try:
            rows = await self.read(*drivers)
        except FeaturesUnavailable:
            return False
        return bool((rows.status == PRESENT).all())

    async def fresh_again(self) -> None:
        """Return when reads bring every value again."""
        async with asyncio.timeout(2):  # promised within 1 s; the machine may be busy
            while not await self.fresh(1):  # noqa: ASYNC110  nobody tells that it is back
                await asyncio.sleep(0.01)

    async def times_out(self) -> None:
        """Reads run out of time, one after the other, until a silent Redis is known to be gone."""
        for driver in range(5):
            with pytest.raises(FeaturesUnavailable):
                await self.read(driver, timeout_s=0.05)

    async def fails_at_once(self) -> None:
        """Nothing waits for a store that is known to be gone."""
        async with asyncio.timeout(2):
            for driver in range(200):
                with pytest.raises(FeaturesUnavailable):
                    await self.read(driver)


@asynccontextmanager
async def reader_of(url: str) -> AsyncIterator[Reader]:
    async with RedisFeatures(parse_address(url)) as features:
        yield Reader(features)


@pytest.fixture(scope="module")
def shared_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisProcess]:
    """For faults that the proxy makes; its data is not to be changed."""
    with RedisProcess(tmp_path_factory.mktemp("redis")) as process:
        store(process.url, *STORED)
        yield process


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisProcess]:
    """To be killed, stopped and changed."""
    with RedisProcess(tmp_path / "redis") as process:
        store(process.url, *STORED)
        yield process


@pytest.fixture
async def proxy(shared_redis: RedisProcess) -> AsyncIterator[FaultProxy]:
    async with FaultProxy(shared_redis.port) as proxy:
        yield proxy


@pytest.fixture
async def reader(shared_redis: RedisProcess, proxy: FaultProxy) -> AsyncIterator[Reader]:
    """Connected through the proxy."""
    async with reader_of(shared_redis.url_through(proxy.port)) as reader:
        await reader.fresh_again()
        yield reader


@pytest.fixture
def client(own_redis: RedisProcess) -> Iterator["redis.Redis[Any]"]:
    with redis.Redis.from_url(own_redis.url) as client:
        yield client


def commands_read(process: RedisProcess) -> int:
    """How many reads Redis has executed."""
    with redis.Redis.from_url(process.url) as client:
        return int(client.info("commandstats").get("cmdstat_hmget", {}).get("calls", 0))


async def commands_above(process: RedisProcess, count: int) -> None:
    """Return when Redis has executed more reads than that."""
    async with asyncio.timeout(5):
        while commands_read(process) <= count:  # noqa: ASYNC110  Redis tells nobody
            await asyncio.sleep(0.005)


def connections_to(client: "redis.Redis[Any]") -> int:
    """How many connections Redis has ever accepted."""
    return int(client.info("stats")["total_connections_received"])


def bytes_sent(client: "redis.Redis[Any]") -> int:
    return int(client.info("stats")["total_net_output_bytes"])


async def refusals(reads: Sequence["asyncio.Task[FeatureRows]"]) -> int:
    """How many of these reads were refused; the others have brought rows."""
    answers = await asyncio.gather(*reads, return_exceptions=True)
    assert {type(a) for a in answers} <= {FeatureRows, FeaturesUnavailable}
    return sum(isinstance(answer, FeaturesUnavailable) for answer in answers)


class TestF1Down:
    async def test_killed_reads_fail_at_once_and_are_fresh_once_it_is_back(
        self, own_redis: RedisProcess
    ) -> None:
        async with reader_of(own_redis.url) as reader:
            await reader.fresh_again()
            own_redis.kill()
            await reader.fails_at_once()
            own_redis.launch()
            await own_redis.good_reply()
            await reader.fresh_again()

    async def test_reads_under_way_end_with_the_connection(
        self, reader: Reader, proxy: FaultProxy
    ) -> None:
        await proxy.switch(Stall())
        reads = [asyncio.create_task(reader.read(driver)) for driver in range(50)]
        await asyncio.sleep(0)
        await proxy.switch(Refuse())
        async with asyncio.timeout(2):
            assert await refusals(reads) == 50

    async def test_a_read_that_is_asked_again_alone_ends_once(
        self, reader: Reader, proxy: FaultProxy, shared_redis: RedisProcess
    ) -> None:
        """The breaker opens meanwhile and gives up what is queued: this one is not, any more."""
        await proxy.switch(Delay(0.3))
        before = commands_read(shared_redis)
        patient = asyncio.create_task(reader.read(1))
        await commands_above(shared_redis, before)
        proxy.cut()
        before = commands_read(shared_redis)
        await commands_above(shared_redis, before + 1)  # the new connection's own, then this read's
        with pytest.raises(FeaturesUnavailable):
            await reader.read(2, timeout_s=0.15)
        assert ((await patient).status == PRESENT).all()

    async def test_a_redis_that_was_never_there_is_read_once_it_comes(
        self, shared_redis: RedisProcess, proxy: FaultProxy
    ) -> None:
        await proxy.switch(Refuse())
        async with reader_of(shared_redis.url_through(proxy.port)) as reader:
            await reader.fails_at_once()
            await proxy.switch(Pass())
            await reader.fresh_again()


class TestF2Hangs:
    async def test_stopped_every_read_ends_by_its_deadline_and_few_are_under_way(
        self, own_redis: RedisProcess
    ) -> None:
        async with reader_of(own_redis.url) as reader:
            await reader.fresh_again()
            before = commands_read(own_redis)
            own_redis.pause()
            reads = [
                asyncio.create_task(reader.read(driver % STORED[0], timeout_s=0.2))
                for driver in range(5_000)
            ]
            async with asyncio.timeout(3):
                assert await refusals(reads) == len(reads)
            await reader.times_out()
            await reader.fails_at_once()
            own_redis.resume()
            await reader.fresh_again()
            assert commands_read(own_redis) - before < len(reads)

    async def test_what_a_stopped_redis_says_late_goes_to_nobody(
        self, own_redis: RedisProcess
    ) -> None:
        async with reader_of(own_redis.url) as reader:
            await reader.fresh_again()
            own_redis.pause()
            late = [asyncio.create_task(reader.read(n, timeout_s=0.05)) for n in range(100)]
            assert await refusals(late) == 100
            own_redis.resume()
            await reader.fresh_again()
            for driver in range(200, 300):
                assert await reader.fresh(driver)

    async def test_a_peer_that_vanished_is_replaced(
        self, reader: Reader, proxy: FaultProxy
    ) -> None:
        proxy.silence()
        await reader.times_out()
        await reader.fresh_again()
        assert proxy.connections_opened == 2

    async def test_reads_that_fail_leave_nothing_to_the_garbage_collector(
        self, reader: Reader, proxy: FaultProxy
    ) -> None:
        await proxy.switch(Stall())
        gc.collect()
        gc.disable()  # an outage of seconds would otherwise be followed by a pause
        try:
            late = [asyncio.create_task(reader.read(n, timeout_s=0.05)) for n in range(200)]
            assert await refusals(late) == 200
            late.clear()
            assert gc.collect() < 200
        finally:
            gc.enable()

    async def test_cut_off_and_back_it_is_read_again(
        self, reader: Reader, proxy: FaultProxy
    ) -> None:
        await proxy.switch(Stall())
        await reader.times_out()
        await reader.fails_at_once()
        await proxy.switch(Pass())
        await reader.fresh_again()


class TestF3Slow:
    async def test_reads_share_the_wait_for_a_slow_redis(
        self, reader: Reader, proxy: FaultProxy
    ) -> None:
        await proxy.switch(Delay(0.05, jitter_s=0.01))
        async with asyncio.timeout(64 * 0.05 / 2):  # one after the other would take twice as long
            rows = await asyncio.gather(*(reader.read(driver) for driver in range(64)))
        assert all((row.status == PRESENT).all() for row in rows)

    async def test_reads_that_cannot_wait_are_refused_and_harm_no_later_one(
        self, reader: Reader, proxy: FaultProxy
    ) -> None:
        await proxy.switch(Delay(0.1))
        hasty = [asyncio.create_task(reader.read(n, timeout_s=0.02)) for n in range(100)]
        async with asyncio.timeout(2):
            assert await refusals(hasty) == 100
        await proxy.switch(Pass())
        await reader.fresh_again()
        for driver in range(200, 300):
            assert await reader.fresh(driver)


STORE_ERRORS = [
    "LOADING Redis is loading the dataset in memory",
    "READONLY You can't write against a read only replica.",
    "MASTERDOWN Link with MASTER is down",
    "NOAUTH Authentication required.",
    "CLUSTERDOWN The cluster is down",
]


class TestF4Failover:
    @pytest.mark.parametrize("error", STORE_ERRORS, ids=lambda error: error.split()[0])
    async def test_an_error_of_the_store_refuses_reads_until_it_is_over(
        self, reader: Reader, proxy: FaultProxy, error: str
    ) -> None:
        await proxy.switch(Replace(f"-{error}\r\n".encode()))
        with pytest.raises(FeaturesUnavailable, match=error.split()[0]):
            await reader.read(1)
        await reader.fails_at_once()
        await proxy.switch(Pass())
        await reader.fresh_again()

    async def test_a_redis_that_loads_its_data_is_never_taken_for_an_empty_one(
        self, own_redis: RedisProcess
    ) -> None:
        async with reader_of(own_redis.url) as reader:
            await reader.fresh_again()
            own_redis.kill()
            own_redis.launch("key-load-delay 300")  # µs a key: it loads for a second
            said = set()
            async with asyncio.timeout(10):
                while True:
                    try:
                        rows = await reader.read(1, STORED[0] - 1)
                        break
                    except FeaturesUnavailable as exc:
                        said.add(str(exc))
                    await asyncio.sleep(0.01)
        assert (rows.status == PRESENT).all()
        assert any("LOADING" in reason for reason in said), said

    async def test_a_replica_without_its_master_is_refused_until_it_is_the_master(
        self, own_redis: RedisProcess, client: "redis.Redis[Any]"
    ) -> None:
        async with reader_of(own_redis.url) as reader:
            await reader.fresh_again()
            client.config_set("replica-serve-stale-data", "no")
            client.replicaof("127.0.0.1", "1")
            with pytest.raises(FeaturesUnavailable, match="MASTERDOWN"):
                await reader.read(1)
            before = connections_to(client)
            until_s = time.monotonic() + 0.5
            while time.monotonic() < until_s:
                await reader.fails_at_once()
            assert connections_to(client) - before <= 0.5 / 0.1 + 1
            client.replicaof("NO", "ONE")
            await reader.fresh_again()

    async def test_a_failover_costs_one_connection(
        self, own_redis: RedisProcess, shared_redis: RedisProcess, tmp_path: Path
    ) -> None:
        with redis.Redis.from_url(own_redis.url) as client:
            client.config_set("requirepass", shared_redis.password)  # one address, one password
        ports = [own_redis.port, shared_redis.port]
        async with AsyncExitStack() as stack:
            proxy = await stack.enter_async_context(FaultProxy(shared_redis.port))
            url = shared_redis.url_through(proxy.port)
            reader = await stack.enter_async_context(reader_of(url))
            await reader.fresh_again()
            for failover in range(20):
                proxy.upstream_port = ports[failover % 2]
                proxy.cut()
                await reader.fresh_again()
        assert proxy.connections_opened == 21


class TestF5Flaps:
    async def test_connections_stay_few_and_answers_right(
        self, reader: Reader, proxy: FaultProxy
    ) -> None:
        over = asyncio.Event()

        async def keep_reading() -> None:
            while not over.is_set():
                await reader.fresh(*(random.randrange(STORED[0]) for _ in range(3)))
                await asyncio.sleep(0.001)

        readers = [asyncio.create_task(keep_reading()) for _ in range(20)]
        for _ in range(15):
            await proxy.switch(Refuse())
            await asyncio.sleep(0.03)
            await proxy.switch(Pass())
            await asyncio.sleep(0.03)
        over.set()
        await asyncio.gather(*readers)
        assert proxy.connections_opened <= 1 + 15
        await reader.fresh_again()


class TestF6LeftReads:
    @pytest.mark.parametrize("turns", range(12))
    async def test_a_read_cancelled_at_any_turn_leaves_nothing_behind(
        self, reader: Reader, proxy: FaultProxy, turns: int
    ) -> None:
        await proxy.switch(Split(max_bytes=16))
        for driver in range(20):
            left = asyncio.create_task(reader.read(driver))
            for _ in range(turns):
                await asyncio.sleep(0)
            left.cancel()
            await asyncio.gather(left, return_exceptions=True)
            assert await reader.fresh(1000 + driver)
        assert proxy.connections_opened == 1

    async def test_a_connection_that_ends_within_a_reply_is_replaced_within_the_read(
        self, reader: Reader, proxy: FaultProxy
    ) -> None:
        for reset in (False, True):
            for after_bytes in (0, 1, 7, 30):
                await proxy.switch(Cut(after_bytes, reset=reset))
                assert await reader.fresh(1, 2, 3)
        assert proxy.connections_opened == 9

    async def test_cancels_timeouts_and_faults_at_random(self) -> None:
        summary = await prove(reads=5_000, concurrency=64, seed=2013)
        assert summary.violations == []
        assert summary.fresh > 500
        assert summary.cancelled > 100
        assert summary.refused > 10


class TestF7Connections:
    async def test_a_thousand_reads_at_once_need_one_connection(
        self, shared_redis: RedisProcess, proxy: FaultProxy
    ) -> None:
        async with reader_of(shared_redis.url_through(proxy.port)) as reader:
            answers = await asyncio.gather(*(reader.fresh(n) for n in range(1_000)))
        assert answers == [True] * 1_000
        assert proxy.connections_opened == 1

    async def test_a_user_who_may_do_nothing_but_hmget_is_served(
        self, own_redis: RedisProcess, client: "redis.Redis[Any]"
    ) -> None:
        client.acl_setuser(
            "reader", enabled=True, passwords=["+secret"], keys=["*tiny"], commands=["+hmget"]
        )
        async with reader_of(f"redis://reader:secret@127.0.0.1:{own_redis.port}") as reader:
            assert await reader.fresh(1, 2, 3)

    async def test_a_redis_without_a_place_for_us_is_read_once_it_has_one(
        self, own_redis: RedisProcess, client: "redis.Redis[Any]"
    ) -> None:
        async with reader_of(own_redis.url) as reader:
            await reader.fresh_again()
            client.config_set("maxclients", 1)
            client.client_kill_filter(_type="normal", skipme=True)
            await reader.fails_at_once()
            client.config_set("maxclients", 1_000)
            await reader.fresh_again()


def mutants() -> Iterator[tuple[str, bytes]]:
    """What is no Float32 in the place of one."""
    whole = float32(1.5)
    for size in range(1, len(whole)):
        yield f"cut to {size} bytes", whole[:size]
    for size in (1, 4, 100):
        yield f"{size} bytes too long", whole + b"\x00" * size
    yield "an Int64", int64(7)
    yield "a String", b"\x12\x03abc"
    yield "a Float64", b"\x29" + struct.pack("<d", 1.5)
    yield "a Bool", b"\x38\x01"
    yield "a list", b"\x5a\x06\x0a\x04" + struct.pack("<f", 1.5)
    yield "text", b"4.5"
    yield "a number beyond all", b"1e400"
    noise = random.Random(2013)
    for number in range(30):
        content = noise.randbytes(noise.randrange(1, 12))
        # What it is depends on the tag: none of these is a Float32 or an explicit null.
        yield f"noise {number}", (b"\x07" if content[0] in b"\x35\x98" else b"") + content


SHAPES = {
    "a number": b":5\r\n",
    "a text": b"$5\r\nhello\r\n",
    "nothing": b"$-1\r\n",
    "no list": b"*-1\r\n",
    "an empty list": b"*0\r\n",
    "too few": b"*1\r\n$1\r\nx\r\n",
    "too many": b"*5\r\n" + 5 * b"$-1\r\n",
}

# Never the answer of a Redis.
NEVER = (b"*2\r\n:1\r\n:2\r\n", b"*2\r\n*0\r\n*0\r\n")

WIDE = laid_out(
    FeaturePlan(
        project=TELLTALE.project,
        feature_service="wide",
        join_keys={"driver_id": "int"},
        views=(
            PlannedView(
                "wide",
                ("driver_id",),
                None,
                tuple(PlannedFeature(f"feature{number}", "Float32") for number in range(40)),
            ),
        ),
    )
)
"""So many features that their hash is read whole."""


def wide_row(driver: int) -> list[float | None]:
    return [float(100 * driver + number) for number in range(len(WIDE.references))]


def store_wide(client: "redis.Redis[Any]", *drivers: int) -> None:
    assert WIDE.redis is not None
    names = [bytes.fromhex(WIDE.redis.fields[name]) for name in WIDE.references]
    for driver in drivers:
        values = [float32(value or 0) for value in wide_row(driver)]
        content = dict(zip(names, values, strict=True)) | {b"_ts:wide": timestamp(driver)}
        client.hset(driver_key(driver), mapping=content)


async def wide_values(source: RedisSource, driver: int) -> list[float | None]:
    rows = await source.fetch({"driver_id": [driver]}, 1, Deadline.after(1))
    values: list[float] = [column.tolist()[0] for column in rows.columns]
    return [None if value != value else value for value in values]


class TestF10Corrupt:
    async def test_a_corrupt_value_harms_its_own_feature_only(
        self, own_redis: RedisProcess, client: "redis.Redis[Any]"
    ) -> None:
        cases = list(mutants())
        corrupt = [5_000 + number for number in range(len(cases))]  # not among those stored
        for driver, (_, value) in zip(corrupt, cases, strict=True):
            content = driver_hash(driver) | {field("driver:rating"): value}
            client.hset(driver_key(driver), mapping=content)
        async with reader_of(own_redis.url) as reader:
            drivers = [
                driver for pair in zip(corrupt, range(len(cases)), strict=True) for driver in pair
            ]
            deadline = Deadline.after(LONG_S)
            rows = await reader.source.fetch(
                asked(drivers, [1] * len(drivers)), len(drivers), deadline
            )
            assert rows.status[1::2].tolist() == [[PRESENT] * 3] * len(cases)
            for (name, _), status in zip(cases, rows.status[::2].tolist(), strict=True):
                assert status == [UNAVAILABLE, PRESENT, PRESENT], name
            assert rows.columns[1].tolist() == [value_of(1, driver) for driver in drivers]
            assert rows.columns[2].tolist() == [value_of(2, 1)] * len(drivers)
            assert rows.columns[0].tolist()[1::2] == [value_of(0, n) for n in range(len(cases))]

    async def test_a_corrupt_time_harms_its_own_view_only(
        self, own_redis: RedisProcess, client: "redis.Redis[Any]"
    ) -> None:
        client.hset(driver_key(1), b"_ts:driver", b"\xff\xff")
        async with reader_of(own_redis.url) as reader:
            rows = await reader.read(1, 2)
        assert rows.status.tolist() == [[UNAVAILABLE, UNAVAILABLE, PRESENT], [PRESENT] * 3]
        assert rows.event_time_s[1, 0] == event_time_of(2)

    @pytest.mark.parametrize("kind", ["text", "list", "set"])
    async def test_a_key_that_is_no_hash_harms_its_own_entity_only(
        self, own_redis: RedisProcess, client: "redis.Redis[Any]", kind: str
    ) -> None:
        client.delete(driver_key(1))
        match kind:
            case "text":
                client.set(driver_key(1), b"no hash")
            case "list":
                client.rpush(driver_key(1), b"no hash")
            case "set":
                client.sadd(driver_key(1), b"no hash")
        async with reader_of(own_redis.url) as reader:
            rows = await reader.read(1, 2)
        assert rows.status.tolist() == [[UNAVAILABLE, UNAVAILABLE, PRESENT], [PRESENT] * 3]

    @pytest.mark.parametrize("reply", SHAPES.values(), ids=SHAPES)
    async def test_a_reply_of_another_shape_is_no_value(
        self, reader: Reader, proxy: FaultProxy, reply: bytes
    ) -> None:
        await proxy.switch(Replace(reply, times=2))
        try:
            rows = await reader.read(1)
        except FeaturesUnavailable:
            pass
        else:
            assert (rows.status == UNAVAILABLE).all()
        await proxy.switch(Pass())
        await reader.fresh_again()

    @pytest.mark.parametrize("reply", [*SHAPES.values(), *NEVER], ids=[*SHAPES, "numbers", "lists"])
    async def test_a_hash_read_whole_in_another_shape_is_no_value_either(
        self, own_redis: RedisProcess, client: "redis.Redis[Any]", reply: bytes
    ) -> None:
        store_wide(client, 1, 2)
        async with (
            FaultProxy(own_redis.port) as proxy,
            RedisFeatures(parse_address(own_redis.url_through(proxy.port))) as features,
        ):
            source = RedisSource(features, WIDE, ReplayClock(READ_AT))
            assert await wide_values(source, 1) == wide_row(1)
            await proxy.switch(Replace(reply, times=1))
            assert await wide_values(source, 1) == [None] * len(WIDE.references)
            await proxy.switch(Pass())
            for driver in (1, 2):
                assert await wide_values(source, driver) == wide_row(driver)

    async def test_what_is_no_redis_at_all_is_left(self, reader: Reader, proxy: FaultProxy) -> None:
        await proxy.switch(Replace(b"HTTP/1.1 400 Bad Request\r\n\r\n"))
        with pytest.raises(FeaturesUnavailable):
            await reader.read(1)
        await proxy.switch(Pass())
        await reader.fresh_again()


class TestF12OneCommand:
    @pytest.mark.parametrize("slot", range(4))
    async def test_an_error_for_one_entity_harms_that_one_only(
        self, reader: Reader, proxy: FaultProxy, slot: int
    ) -> None:
        await proxy.switch(Replace(b"-ERR injected\r\n", skip=slot, times=1))
        rows = await reader.read(1, 2, 3, city=1)  # three drivers and a city: four commands
        drivers, cities = (rows.status[:, :2] == UNAVAILABLE), (rows.status[:, 2] == UNAVAILABLE)
        harmed = [int(drivers[row].all()) for row in range(3)] + [int(cities.all())]
        assert sum(harmed) == 1
        assert drivers.any() != cities.any()
        assert await reader.fresh(1)


class TestF14Herd:
    async def test_reads_of_one_entity_at_the_same_time_share_one(
        self, shared_redis: RedisProcess, reader: Reader, proxy: FaultProxy
    ) -> None:
        before = commands_read(shared_redis)
        await proxy.switch(Stall())
        reads = [asyncio.create_task(reader.fresh(7)) for _ in range(1_000)]
        for _ in range(5):
            await asyncio.sleep(0)
        await proxy.switch(Pass())
        assert await asyncio.gather(*reads) == [True] * 1_000
        assert commands_read(shared_redis) - before <= 20

    async def test_nothing_is_kept_after_the_read(
        self, own_redis: RedisProcess, client: "redis.Redis[Any]"
    ) -> None:
        async with reader_of(own_redis.url) as reader:
            await reader.fresh_again()
            client.delete(driver_key(1))
            rows = await reader.source.fetch(asked([1], [1]), 1, Deadline.after(LONG_S))
        assert rows.status.tolist() == [[ValueStatus.NOT_FOUND, ValueStatus.NOT_FOUND, PRESENT]]

    @pytest.mark.parametrize("leaves", ["cancelled", "late"])
    async def test_who_leaves_a_shared_read_takes_it_from_nobody(
        self, reader: Reader, proxy: FaultProxy, leaves: str
    ) -> None:
        await proxy.switch(Stall())
        timeout_s = 0.03 if leaves == "late" else LONG_S
        first = asyncio.create_task(reader.read(7, timeout_s=timeout_s))
        others = [asyncio.create_task(reader.fresh(7)) for _ in range(2)]
        await asyncio.sleep(0)
        if leaves == "cancelled":
            first.cancel()
        expected = FeaturesUnavailable if leaves == "late" else asyncio.CancelledError
        with pytest.raises(expected):
            await first
        await proxy.switch(Pass())
        assert await asyncio.gather(*others) == [True, True]

    async def test_who_shares_a_read_may_change_the_answer(
        self, reader: Reader, proxy: FaultProxy
    ) -> None:
        await proxy.switch(Stall())
        reads = [asyncio.create_task(reader.read(7)) for _ in range(2)]
        await asyncio.sleep(0)
        await proxy.switch(Pass())
        one, other = await asyncio.gather(*reads)
        for column in one.columns:
            column[0] = -1.0
        one.status[:] = UNAVAILABLE
        assert list(faults_of(other, [7], [7], STORED)) == []
        assert (other.status == PRESENT).all()


class TestF15Huge:
    @pytest.mark.parametrize("asked_for", [False, True])
    async def test_a_huge_value_of_one_entity_harms_no_other(
        self, own_redis: RedisProcess, client: "redis.Redis[Any]", asked_for: bool
    ) -> None:
        name = field("driver:rating") if asked_for else b"another field"
        client.hset(driver_key(1), name, b"\x35" * 10_000_000)
        async with reader_of(own_redis.url) as reader:
            await reader.read(2)
            huge = asyncio.create_task(reader.read(1))
            others = [asyncio.create_task(reader.fresh(n)) for n in range(2, 300)]
            async with asyncio.timeout(5):
                assert await asyncio.gather(*others) == [True] * len(others)
                rows = await huge
            assert rows.status.tolist() == [
                [UNAVAILABLE if asked_for else PRESENT, PRESENT, PRESENT]
            ]
            assert await reader.fresh(3)

    async def test_a_huge_value_that_nobody_wants_is_not_read_again(
        self, own_redis: RedisProcess, client: "redis.Redis[Any]"
    ) -> None:
        store_wide(client, 1, 2)
        client.hset(driver_key(1), b"another field", b"x" * 10_000_000)
        async with RedisFeatures(parse_address(own_redis.url)) as features:
            source = RedisSource(features, WIDE, ReplayClock(READ_AT))
            first = [asyncio.create_task(wide_values(source, driver)) for driver in (1, 2)]
            assert await asyncio.gather(*first) == [wide_row(1), wide_row(2)]
            sent = bytes_sent(client)
            for _ in range(5):
                assert await wide_values(source, 1) == wide_row(1)
            assert bytes_sent(client) - sent < 1_000_000
