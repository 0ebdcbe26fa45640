"""What a Redis Cluster and a master behind sentinels do to reads when they change under them."""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import redis
from redis.crc import key_slot

from app.clock import ReplayClock
from app.config import Settings
from app.deadline import Deadline
from app.errors import FeaturesUnavailable
from app.features.redis_address import RedisAddress, parse_address
from app.features.redis_features import RedisFeatures
from app.features.redis_source import RedisSource
from app.features.source import FeatureRows, FeatureSource, ValueStatus
from app.main import open_features
from tests.tiny_feast import KNOWN_AT, Fleet, driver_key
from tests.topologies import (
    PASSWORD,
    Server,
    Watched,
    cluster,
    cluster_url,
    copy_keys,
    node_id,
    sentinel,
    sentinel_url,
    server,
    until,
)

PRESENT, NOT_FOUND = ValueStatus.PRESENT, ValueStatus.NOT_FOUND
UNAVAILABLE = ValueStatus.UNAVAILABLE

# Of the rows that are stored these have a value everywhere, and keys on each of three nodes.
ROWS = {"driver_id": [1, 0], "city": ["kyoto", ""]}
VALUES = [[4.5, 0.5], [7.0, 0.0], ["品川 11", ""], [2.0, 0.25], [10.0, 30.0], [1.0, 1.0]]


@asynccontextmanager
async def opened(fleet: Fleet) -> AsyncIterator[FeatureSource]:
    settings = Settings(feature_redis_url=fleet.redis_url)
    async with open_features(settings, ReplayClock(KNOWN_AT)) as open_source:
        yield open_source(fleet.plan)


async def read(source: FeatureSource, within_s: float = 5) -> FeatureRows:
    return await source.fetch(ROWS, 2, Deadline.after(within_s))


async def read_until_present(source: FeatureSource, limit_s: float = 15) -> None:
    """Read until every value is there; meanwhile what is missing is flagged, the rest is right."""
    async with asyncio.timeout(limit_s):
        while True:
            try:
                rows = await read(source, 0.3)
            except FeaturesUnavailable:
                await asyncio.sleep(0.02)
                continue
            assert_flagged_or_right(rows)
            if (rows.status == PRESENT).all():
                return
            await asyncio.sleep(0.02)


def assert_flagged_or_right(rows: FeatureRows) -> None:
    for feature, column in enumerate(rows.columns):
        for row, value in enumerate(column.tolist()):
            if rows.status[row, feature] == UNAVAILABLE:
                assert value is None or value != value
            else:
                assert (rows.status[row, feature], value) == (PRESENT, VALUES[feature][row])


@contextmanager
def stopped(node: Server) -> Iterator[None]:
    """Inside, it accepts connections and says nothing."""
    os.kill(node.process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(node.process.pid, signal.SIGCONT)


async def test_a_slot_is_read_while_it_moves_and_when_it_has_moved(
    fleet_in_cluster: Fleet, cluster_nodes: list[Server]
) -> None:
    key = driver_key(1)
    slot = key_slot(key)
    with ExitStack() as stack:
        clients = [stack.enter_context(node.client()) for node in cluster_nodes]
        owner = next(
            number for number, client in enumerate(clients) if key in list(client.scan_iter())
        )
        source, target = clients[owner], clients[owner - 1]
        async with opened(fleet_in_cluster) as features:
            await read(features)
            target.execute_command("CLUSTER SETSLOT", slot, "IMPORTING", node_id(source))
            source.execute_command("CLUSTER SETSLOT", slot, "MIGRATING", node_id(target))
            source.migrate("127.0.0.1", cluster_nodes[owner - 1].port, key, 0, 5000, auth=PASSWORD)
            moving = await read(features)  # the owner answers ASK
            for client in (target, source):
                client.execute_command("CLUSTER SETSLOT", slot, "NODE", node_id(target))
            moved = await read(features)  # it answers MOVED
    for rows in (moving, moved):
        assert (rows.status == PRESENT).all()
        assert_flagged_or_right(rows)


async def test_a_node_that_dies_harms_its_own_keys_until_its_replica_takes_over(
    fleet: Fleet, tmp_path: Path
) -> None:
    with cluster(tmp_path, masters=3, replicas=1) as nodes:
        with redis.RedisCluster("127.0.0.1", nodes[0].port, password=PASSWORD) as client:
            copy_keys(fleet.redis_url, client)
        async with opened(replace(fleet, redis_url=cluster_url(nodes))) as source:
            await read_until_present(source)
            nodes[0].process.kill()
            rows = await read(source)
            assert_flagged_or_right(rows)
            assert (rows.status == UNAVAILABLE).any()
            assert (rows.status == PRESENT).any()
            await read_until_present(source)


async def test_a_node_that_hangs_is_not_waited_for_twice(
    fleet_in_cluster: Fleet, cluster_nodes: list[Server]
) -> None:
    async with opened(fleet_in_cluster) as source:
        await read(source)
        with stopped(cluster_nodes[0]):
            with pytest.raises(FeaturesUnavailable):
                await read(source, 0.15)
            # Later it is known, and what the others hold is answered.
            other = {"driver_id": [99, 98, 97, 96], "city": ["a", "b", "c", "d"]}
            await asyncio.sleep(0.05)
            rows = await source.fetch(other, 4, Deadline.after(0.15))
            assert (rows.status == UNAVAILABLE).any()
            assert (rows.status == NOT_FOUND).any()
        await read_until_present(source)


async def test_a_cluster_that_is_not_there_is_read_once_it_is(fleet: Fleet, tmp_path: Path) -> None:
    with server(tmp_path / "node", "cluster-enabled yes") as node, node.client() as client:
        async with opened(replace(fleet, redis_url=cluster_url([node]))) as source:
            with pytest.raises(FeaturesUnavailable, match="knows of no slots"):
                await read(source)
            client.execute_command("CLUSTER ADDSLOTS", *range(16384))
            until(lambda: client.execute_command("CLUSTER INFO")["cluster_state"] == "ok")
            copy_keys(fleet.redis_url, client)
            await read_until_present(source)


@pytest.mark.parametrize("turns", range(8))
async def test_a_read_of_a_cluster_that_is_cancelled_leaves_nothing_behind(
    fleet_in_cluster: Fleet, turns: int
) -> None:
    async with opened(fleet_in_cluster) as source:
        await read(source)
        left = asyncio.create_task(
            source.fetch({"driver_id": [2], "city": ["東京"]}, 1, Deadline.after(5))
        )
        for _ in range(turns):
            await asyncio.sleep(0)
        left.cancel()
        await asyncio.gather(left, return_exceptions=True)
        rows = await read(source)
    assert [column.tolist() for column in rows.columns] == VALUES


async def test_all_readers_of_a_worker_share_one_connection_to_a_node(
    fleet_in_cluster: Fleet, cluster_nodes: list[Server]
) -> None:
    def connections() -> int:
        with cluster_nodes[0].client() as client:
            return len(client.client_list())

    async with opened(fleet_in_cluster) as source:
        before = connections()
        await asyncio.gather(
            *(
                source.fetch({"driver_id": [driver], "city": [str(driver)]}, 1, Deadline.after(5))
                for driver in range(300)
            )
        )
        assert connections() <= before + 1


async def test_a_failover_is_followed(fleet_behind_sentinels: Fleet, sentinels: Watched) -> None:
    async with opened(fleet_behind_sentinels) as source:
        await read(source)
        with sentinels.sentinels[0].client() as client:
            before = master_port(client)
            until(lambda: started_failover(client))
            until(lambda: master_port(client) != before)
        after = next(r for r in (sentinels.master, sentinels.replica) if r.port != before)
        with after.client() as client:
            until(lambda: client.role()[0] == b"master")
            key = driver_key(1)
            client.rename(key, b"kept")
            try:
                await read_until_not_found(source)
            finally:
                client.rename(b"kept", key)
        await read_until_present(source)


def master_port(client: "redis.Redis[Any]") -> int:
    return int(client.sentinel_get_master_addr_by_name("fleet")[1])


def started_failover(client: "redis.Redis[Any]") -> bool:
    try:
        return bool(client.execute_command("SENTINEL FAILOVER", "fleet"))
    except redis.ResponseError:  # it has not heard enough of the replica yet
        return False


async def read_until_not_found(source: FeatureSource) -> None:
    """Read driver 1 until it is not there any more."""
    async with asyncio.timeout(15):
        while True:
            with contextlib.suppress(FeaturesUnavailable):
                if (await read(source, 0.3)).status[0, 0] == NOT_FOUND:
                    return
            await asyncio.sleep(0.02)


async def test_an_old_master_that_stays_up_is_left_within_seconds(
    fleet: Fleet, tmp_path: Path
) -> None:
    """It was cut off from its sentinels, say: nothing in its answers tells."""
    with (
        server(tmp_path / "old") as old,
        server(tmp_path / "new") as new,
        sentinel(tmp_path / "sentinel", old) as watching,
        old.client() as client,
        watching.client() as asked,
    ):
        copy_keys(fleet.redis_url, client)
        async with opened(replace(fleet, redis_url=sentinel_url([watching]))) as source:
            await read_until_present(source)
            asked.sentinel_remove("fleet")
            asked.sentinel_monitor("fleet", "127.0.0.1", new.port, 1)
            asked.sentinel_set("fleet", "auth-pass", PASSWORD)
            await read_until_not_found(source)


async def test_the_next_sentinel_is_asked_when_one_is_down(
    fleet_behind_sentinels: Fleet, sentinels: Watched
) -> None:
    url = sentinel_url(sentinels.sentinels[:1]).replace("@", "@127.0.0.1:1,")
    async with opened(replace(fleet_behind_sentinels, redis_url=url)) as source:
        assert ((await read(source)).status == PRESENT).all()


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("/fleet", "/another", "another is not known"),
        ("sentinel_password=a-secret", "sentinel_password=wrong", "password"),
        ("?sentinel_password=a-secret", "", "uthentication required"),
    ],
)
async def test_sentinels_that_name_no_master_are_told(
    fleet_behind_sentinels: Fleet, old: str, new: str, reason: str
) -> None:
    url = fleet_behind_sentinels.redis_url.replace(old, new)
    async with opened(replace(fleet_behind_sentinels, redis_url=url)) as source:
        with pytest.raises(FeaturesUnavailable, match=reason):
            await read(source)


async def test_a_replica_is_not_taken_for_the_master(fleet: Fleet, tmp_path: Path) -> None:
    with server(tmp_path / "demoted", "replicaof 127.0.0.1 1") as demoted:
        address = parse_address(f"redis://:{PASSWORD}@127.0.0.1:{demoted.port}")
        assert isinstance(address, RedisAddress)
        async with RedisFeatures(replace(address, is_master=True)) as features:
            source = RedisSource(features, fleet.plan, ReplayClock(KNOWN_AT))
            with pytest.raises(FeaturesUnavailable, match="is no master"):
                await read(source)
