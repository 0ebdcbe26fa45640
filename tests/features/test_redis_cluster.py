"""What one node of a Redis Cluster that is slow or odd does to reads, gate by gate: the two nodes
here say what they are told. tests/features/test_redis_topologies.py has real clusters."""

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import hiredis
import pytest
from redis.crc import key_slot

from app.clock import ReplayClock
from app.deadline import Deadline
from app.errors import FeaturesUnavailable
from app.features.plan import FeaturePlan, PlannedFeature, PlannedView
from app.features.redis_address import ClusterAddress, parse_address
from app.features.redis_cluster import ClusterFeatures
from app.features.redis_connection import Reading, command
from app.features.redis_source import RedisSource
from app.features.source import ValueStatus
from loadtests.telltale import READ_AT, TELLTALE, driver_key, laid_out

NOT_FOUND, UNAVAILABLE = ValueStatus.NOT_FOUND, ValueStatus.UNAVAILABLE
NOTHING_STORED = b"*2\r\n$-1\r\n$-1\r\n"
LATE_S = 0.12
"""A deadline after which a node that has not answered counts as silent."""

PLAN = laid_out(
    FeaturePlan(
        project=TELLTALE.project,
        feature_service="rating",
        join_keys={"driver_id": "int"},
        views=(
            PlannedView("driver", ("driver_id",), None, (PlannedFeature("rating", "Float32"),)),
        ),
    )
)
DRIVERS_OF_NODE = [
    [driver for driver in range(100) if key_slot(driver_key(driver)) // 8192 == node]
    for node in range(2)
]
ON_FIRST, ON_SECOND = DRIVERS_OF_NODE


class Node:
    """Holds one half of the slots and no values."""

    def __init__(self) -> None:
        self.port = 0
        self.says = NOTHING_STORED
        """To each HMGET."""
        self.speaking = asyncio.Event()
        """Cleared: it takes commands and answers none, but who asks for the slots."""
        self.speaking.set()
        self.others: Sequence[Node] = ()

    async def serve(self, stream: asyncio.StreamReader, answers: asyncio.StreamWriter) -> None:
        commands = hiredis.Reader()
        while data := await stream.read(65_536):
            commands.feed(data)
            while (words := commands.gets()) is not False:
                answers.write(await self._answer(words[0]))
        answers.close()

    async def _answer(self, name: bytes) -> bytes:
        if name == b"CLUSTER":
            ranges = b"".join(
                b"*3\r\n:%d\r\n:%d\r\n*2\r\n$9\r\n127.0.0.1\r\n:%d\r\n"
                % (8192 * number, 8192 * number + 8191, node.port)
                for number, node in enumerate(self.others)
            )
            return b"*%d\r\n" % len(self.others) + ranges
        if name == b"CLIENT":
            return b"+OK\r\n"
        await self.speaking.wait()
        return self.says if name == b"HMGET" else b":0\r\n"


@pytest.fixture
async def nodes() -> AsyncIterator[Sequence[Node]]:
    nodes = [Node(), Node()]
    servers = []
    for node in nodes:
        node.others = nodes
        server = await asyncio.start_server(node.serve, "127.0.0.1", 0)
        node.port = server.sockets[0].getsockname()[1]
        servers.append(server)
    yield nodes
    for node, server in zip(nodes, servers, strict=True):
        node.speaking.set()
        server.close()


@asynccontextmanager
async def reads_of(nodes: Sequence[Node]) -> AsyncIterator[ClusterFeatures]:
    address = parse_address(f"redis+cluster://127.0.0.1:{nodes[0].port}")
    assert isinstance(address, ClusterAddress)
    async with ClusterFeatures(address) as features:
        yield features


class Drivers:
    """Reads drivers; each has the status of its rating."""

    def __init__(self, features: ClusterFeatures) -> None:
        self.source = RedisSource(features, PLAN, ReplayClock(READ_AT))

    async def read(self, *drivers: int, timeout_s: float = 5) -> list[int]:
        columns = {"driver_id": list(drivers)}
        rows = await self.source.fetch(columns, len(drivers), Deadline.after(timeout_s))
        return [status for [status] in rows.status.tolist()]


async def test_a_silent_node_is_left_and_no_other_pays_for_it(nodes: Sequence[Node]) -> None:
    first, second = nodes
    async with reads_of(nodes) as features:
        drivers = Drivers(features)
        assert await drivers.read(ON_FIRST[0], ON_SECOND[0]) == [NOT_FOUND, NOT_FOUND]
        second.speaking.clear()
        on_both = asyncio.create_task(drivers.read(ON_FIRST[0], ON_SECOND[0], timeout_s=LATE_S))
        await asyncio.sleep(0)  # its commands come before the next one's
        assert await drivers.read(ON_FIRST[1]) == [NOT_FOUND]
        # The first node has answered the read that will be late, and owes another's answer.
        first.speaking.clear()
        patient = asyncio.create_task(drivers.read(ON_FIRST[2]))
        with pytest.raises(FeaturesUnavailable, match="did not answer within"):
            await on_both
        await asyncio.sleep(0.02)  # both have been judged
        with pytest.raises(FeaturesUnavailable, match="says nothing"):
            await drivers.read(ON_SECOND[1])
        another = asyncio.create_task(drivers.read(ON_FIRST[3], ON_SECOND[2]))
        await asyncio.sleep(0)
        first.speaking.set()
        assert await patient == [NOT_FOUND]
        assert await another == [NOT_FOUND, UNAVAILABLE]


@pytest.mark.parametrize(
    "redirection",
    [
        "MOVED 1 127.0.0.1:port-that-is-no-number",
        "ASK 1 127.0.0.1:",
        "MOVED 1 nowhere",
        "MOVED 1 127.0.0.1:0",
        "ASK 1 127.0.0.1:65536",
        "MOVED 1",
    ],
)
async def test_a_redirection_that_leads_nowhere_is_an_error_of_its_entity(
    nodes: Sequence[Node], redirection: str
) -> None:
    async with reads_of(nodes) as features:
        drivers = Drivers(features)
        nodes[0].says = f"-{redirection}\r\n".encode()
        assert await drivers.read(ON_FIRST[0], ON_SECOND[0]) == [UNAVAILABLE, NOT_FOUND]
        with pytest.raises(FeaturesUnavailable, match=redirection):
            await drivers.read(ON_FIRST[0])
        nodes[0].says = NOTHING_STORED
        assert await drivers.read(ON_FIRST[0], ON_SECOND[0]) == [NOT_FOUND, NOT_FOUND]


class Told:
    """A reader that notes how its readings end."""

    def __init__(self) -> None:
        self.ended: asyncio.Queue[str] = asyncio.Queue()

    def arrived(self, readings: Sequence[Reading]) -> None:
        for reading in readings:
            self.ended.put_nowait(f"{len(reading.replies)} replies")

    def failed(self, reading: Reading, reason: str) -> None:
        self.ended.put_nowait(reason)


class TracedReading(Reading):
    """Without slots of its own: weak references find it."""


def reading_of(told: Told, *drivers: int) -> TracedReading:
    return TracedReading(told, [command(b"HMGET", driver_key(driver), b"x") for driver in drivers])


async def test_a_reading_that_cannot_be_completed_fails_once_and_harms_no_other(
    nodes: Sequence[Node], caplog: pytest.LogCaptureFixture
) -> None:
    second = nodes[1]
    async with reads_of(nodes) as features:
        told = Told()
        await Drivers(features).read(ON_FIRST[0], ON_SECOND[0])  # both are connected
        broken = reading_of(told, ON_FIRST[0], ON_SECOND[0])
        second.speaking.clear()
        features.read(broken)
        broken.replies = []  # a defect of whoever reads: no reply has a place any more
        features.read(reading_of(told, ON_FIRST[1]))
        async with asyncio.timeout(5):
            ends = [await told.ended.get() for _ in range(2)]
            assert sorted(ends) == ["1 replies", "a defect: IndexError"]
            assert "a part of a reading" in caplog.text
            # What the second node still owes of it comes to nobody.
            features.read(reading_of(told, ON_SECOND[1]))
            second.speaking.set()
            assert await told.ended.get() == "1 replies"
        assert told.ended.empty()


async def test_a_reading_that_has_ended_is_forgotten(nodes: Sequence[Node]) -> None:
    async with reads_of(nodes) as features:
        told = Told()
        reading = reading_of(told, ON_FIRST[0], ON_SECOND[0])
        trace = weakref.ref(reading)
        gc.disable()  # a cycle would wait for it, replies and all
        try:
            features.read(reading)
            del reading
            async with asyncio.timeout(5):
                assert await told.ended.get() == "2 replies"
            await asyncio.sleep(0)
            assert trace() is None
        finally:
            gc.enable()
