"""Pushing a Redis stream: nothing is lost, nothing harms by coming twice, what cannot be used is
kept."""

import itertools
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import redis
from prometheus_client import CollectorRegistry

from app.errors import ConfigurationError, HikyakuError
from app.local.redis_server import own_redis
from tests.features.pushed_repository import Pushed

if TYPE_CHECKING:
    from app.features.row_stream import StreamPush

_keys = itertools.count()


@dataclass
class Stream:
    """One stream in the Redis of the features, and consumers of it."""

    pushed: Pushed
    client: redis.Redis
    key: str
    said: list[str] = field(default_factory=list)
    registry: CollectorRegistry | None = None

    def add(self, driver: int, **changes: str | None) -> bytes:
        entry: dict[str, str | None] = {
            "driver_id": str(driver),
            "known_at": "2013-06-01T12:00:00Z",
            "stars": "4.5",
            "trips": "7",
            "plate": "品川 11",
            "active": "true",
        } | changes
        return self.put({name: value for name, value in entry.items() if value is not None})

    def put(self, fields: Mapping[Any, Any]) -> bytes:
        return self.client.xadd(self.key, dict(fields))

    def consumer(
        self,
        name: str = "one",
        *,
        url: str | None = None,
        key: str | None = None,
        batch_rows: int = 100,
        claim_after_s: float = 60.0,
    ) -> "StreamPush":
        from app.features.push_progress import Progress
        from app.features.row_stream import StreamPosition, StreamPush, stream_client
        from app.telemetry.metrics import PushMetrics

        metrics = PushMetrics()
        self.registry = metrics.registry
        return StreamPush(
            stream_client(url or self.pushed.redis_url, "--stream-url"),
            StreamPosition(key or self.key, "hikyaku", name, claim_after_s),
            self.pushed.target("tracked"),
            metrics,
            batch_rows=batch_rows,
            progress=Progress(self.said.append),
            say=self.said.append,
        )

    def drain(self, name: str = "one", **options: Any) -> None:
        self.consumer(name, **options).run(threading.Event(), once=True)

    def trips(self, driver_id: int) -> Any:
        return self.pushed.online("ratings:trips", driver_id=driver_id)[0]

    def unacknowledged(self) -> int:
        return self.client.xpending(self.key, "hikyaku")["pending"]

    def refused(self) -> list[tuple[dict[bytes, bytes], str]]:
        """The entries that were refused, and why."""
        kept = []
        for _, fields in self.client.xrange(f"{self.key}:refused"):
            reason = fields.pop(b"hikyaku_reason").decode()
            kept.append((fields, reason))
        return kept


@pytest.fixture
def stream(pushed: Pushed) -> Iterator[Stream]:
    with redis.Redis.from_url(pushed.redis_url) as client:
        yield Stream(pushed, client, f"rows-{next(_keys)}")


def test_entries_are_written_and_acknowledged(stream: Stream, driver_id: int) -> None:
    stream.add(driver_id)
    stream.drain()
    assert stream.pushed.online(
        "ratings:rating", "ratings:plate", "states:active", driver_id=driver_id
    ) == [4.5, "品川 11", True]
    assert stream.unacknowledged() == 0


def test_empty_text_is_null(stream: Stream, driver_id: int) -> None:
    stream.add(driver_id, plate="", trips="")
    stream.drain()
    assert stream.pushed.online("ratings:plate", "ratings:trips", driver_id=driver_id) == [
        None,
        None,
    ]


def test_once_ends_when_nothing_is_left_and_a_second_time_changes_nothing(
    stream: Stream, driver_id: int
) -> None:
    for trips in range(5):
        stream.add(driver_id, trips=str(trips), known_at=f"2013-06-01T12:00:0{trips}Z")
    stream.drain(batch_rows=2)
    assert stream.trips(driver_id) == 4
    before = stream.pushed.dump()
    stream.drain()
    assert stream.pushed.dump() == before


def test_an_older_entry_does_not_replace_a_newer_one(stream: Stream, driver_id: int) -> None:
    stream.add(driver_id, trips="2", known_at="2013-06-01T12:00:02Z")
    stream.drain()
    stream.add(driver_id, trips="1", known_at="2013-06-01T12:00:01Z")
    stream.drain()
    assert stream.trips(driver_id) == 2


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"trips": "many"}, "column 'trips': 'many' is no Int64"),
        ({"driver_id": ""}, "column 'driver_id': is null"),
        ({"known_at": "2013-06-01T12:00:00"}, "has no offset from UTC"),
        ({"known_at": ""}, "column 'known_at': is null"),
        ({"stars": None}, "column 'stars' is missing"),
        ({"luck": "7"}, "unknown column 'luck'"),
    ],
)
def test_what_cannot_be_used_is_kept_with_its_reason_and_harms_no_other(
    stream: Stream, driver_id: int, changes: dict[str, str | None], reason: str
) -> None:
    stream.add(driver_id)
    identity = stream.add(-driver_id, **changes)
    stream.add(driver_id, trips="8", known_at="2013-06-01T13:00:00Z")
    original = stream.client.xrange(stream.key, identity, identity)[0][1]
    stream.drain()
    [(fields, why)] = stream.refused()
    assert reason in why
    assert fields == original | {b"hikyaku_id": identity}
    assert stream.trips(driver_id) == 8
    assert stream.unacknowledged() == 0


def test_bytes_that_are_no_text_are_refused(stream: Stream, driver_id: int) -> None:
    stream.put({b"driver_id": b"\xff\xfe"})
    stream.drain()
    assert [why for _, why in stream.refused()] == ["is not UTF-8"]


def test_an_entity_whose_key_holds_something_else_is_refused(
    stream: Stream, driver_id: int
) -> None:
    ids = [driver_id * 1000 + i for i in range(5)]
    stream.add(ids[2])
    stream.drain()
    [key] = [k for k in stream.client.scan_iter(match=b"*fleet") if _int64(ids[2]) in k]
    stream.client.delete(key)
    stream.client.set(key, "not a hash")
    for identity in ids:
        stream.add(identity, known_at="2013-06-01T13:00:00Z")
    stream.drain()
    [(fields, why)] = stream.refused()
    assert fields[b"driver_id"] == str(ids[2]).encode()
    assert "WRONGTYPE" in why
    stream.client.delete(key)
    assert [stream.trips(i) for i in ids] == [7, 7, None, 7, 7]


def test_what_was_written_and_not_acknowledged_is_delivered_again_and_harmless(
    stream: Stream, driver_id: int
) -> None:
    stream.add(driver_id)
    # A consumer that dies between the two, as far as the stream can tell.
    stream.client.acl_setuser(
        "writer", enabled=True, passwords=["+w"], keys=["*"], commands=["+@all", "-xack"]
    )
    password = stream.pushed.redis_url.split("@")[1]
    with pytest.raises(ConfigurationError, match="xack"):
        stream.drain("dead", url=f"redis://writer:w@{password}")
    assert stream.trips(driver_id) == 7
    assert stream.unacknowledged() == 1

    stream.drain("patient")
    assert stream.unacknowledged() == 1
    stream.drain("quick", claim_after_s=0)
    assert stream.unacknowledged() == 0
    assert stream.trips(driver_id) == 7


def test_two_consumers_share_the_entries_and_the_newest_one_stays(
    stream: Stream, driver_id: int
) -> None:
    entries = 400
    for trips in range(entries):
        at = f"2013-06-01T12:{trips // 60:02}:{trips % 60:02}Z"
        stream.add(driver_id + (trips % 2) * 500_000, trips=str(trips), known_at=at)
    consumers = [stream.consumer(name, batch_rows=7) for name in ("one", "two")]
    threads = [
        threading.Thread(target=consumer.run, args=(threading.Event(),), kwargs={"once": True})
        for consumer in consumers
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stream.trips(driver_id) == entries - 2
    assert stream.trips(driver_id + 500_000) == entries - 1
    assert stream.unacknowledged() == 0


def test_a_running_consumer_takes_what_comes_and_stops_when_told(
    stream: Stream, driver_id: int
) -> None:
    stop = threading.Event()
    consumer = stream.consumer()
    thread = threading.Thread(target=consumer.run, args=(stop,))
    thread.start()
    stream.add(driver_id)
    until(lambda: stream.trips(driver_id) == 7)
    stop.set()
    thread.join()
    # Nothing waits for it: its name is taken out of the group.
    assert stream.client.xinfo_consumers(stream.key, "hikyaku") == []


def test_a_stream_that_is_deleted_and_made_anew_is_read_on(stream: Stream, driver_id: int) -> None:
    stop = threading.Event()
    thread = threading.Thread(target=stream.consumer().run, args=(stop,))
    thread.start()
    until(lambda: stream.client.exists(stream.key))
    stream.client.delete(stream.key)  # its group is gone with it
    stream.add(driver_id)
    until(lambda: stream.trips(driver_id) == 7)
    stop.set()
    thread.join()
    assert "waiting for it" in stream.said[0]
    assert "answers again" in stream.said[1]


def test_a_redis_that_is_gone_is_waited_for_until_told_to_stop(
    pushed: Pushed, tmp_path: Path
) -> None:
    stop = threading.Event()
    with own_redis(tmp_path / "redis") as url, redis.Redis.from_url(url) as client:
        stream = Stream(pushed, client, "rows")
        thread = threading.Thread(target=stream.consumer(url=url).run, args=(stop,))
        thread.start()
        until(lambda: client.exists(stream.key))
    until(lambda: stream.said)
    stop.set()
    thread.join()
    assert "waiting for it" in stream.said[0]


def test_once_does_not_wait_for_a_redis_that_is_gone(pushed: Pushed, tmp_path: Path) -> None:
    with own_redis(tmp_path / "gone") as url:
        pass
    with redis.Redis.from_url(pushed.redis_url) as client:
        stream = Stream(pushed, client, "rows-gone")
        with pytest.raises(HikyakuError, match="Redis failed"):
            stream.drain(url=url)


def test_a_key_that_holds_no_stream_is_refused(stream: Stream) -> None:
    stream.client.set("no-stream", "x")
    with pytest.raises(ConfigurationError, match="no-stream: its key holds no stream"):
        stream.drain(key="no-stream")


def test_a_wrong_password_is_refused(stream: Stream) -> None:
    address = stream.pushed.redis_url.split("@")[1]
    with pytest.raises(ConfigurationError, match="Redis refuses us"):
        stream.drain(url=f"redis://:wrong@{address}")


def test_the_job_reports_what_it_does(stream: Stream, driver_id: int) -> None:
    stream.add(driver_id)
    stream.add(driver_id, trips="many")
    stream.add(driver_id, trips="8", known_at="2013-06-01T11:00:00Z")
    stream.drain()
    assert stream.registry is not None

    def value(name: str, **labels: str) -> float | None:
        assert stream.registry is not None
        return stream.registry.get_sample_value(name, labels)

    assert value("hikyaku_push_rows_total", feature_view="ratings", result="stored") == 1
    assert value("hikyaku_push_rows_total", feature_view="ratings", result="not_newer") == 1
    assert value("hikyaku_push_refused_entries_total") == 1
    assert value("hikyaku_push_batch_duration_seconds_count") == 1
    newest = value("hikyaku_push_newest_event_timestamp_seconds", feature_view="states")
    assert newest == 1370088000


def _int64(number: int) -> bytes:
    return number.to_bytes(8, "little", signed=True)


def until(holds: Callable[[], object]) -> None:
    """Wait for something that another thread brings about."""
    waited = threading.Event()
    for _ in range(2000):
        if holds():
            return
        waited.wait(0.01)
    pytest.fail("it did not come about")
