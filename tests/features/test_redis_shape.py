"""Replies that are read as columns, many at once, are what hiredis alone makes of them."""

import asyncio
import struct
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.clock import ReplayClock
from app.deadline import Deadline
from app.features.plan import FeaturePlan, JoinKeyType, PlannedFeature, PlannedView, RedisLayout
from app.features.redis_connection import Reading, RedisConnection
from app.features.redis_record import Varying
from app.features.redis_shape import FEW, Shape
from app.features.redis_source import RedisSource
from app.features.source import FeatureRows, ValueStatus
from app.features.values import FIXED_WIDTH
from tests.tiny_feast import KNOWN_AT

NOW_S = int(KNOWN_AT.timestamp())
MANY = 32
"""Entities of a read: enough for replies that are not all alike to be read as columns too."""

FEW_FEATURES, MANY_FEATURES = 6, 20
"""Read by their fields, and as a whole hash."""


def plan_of(features: int) -> FeaturePlan:
    planned = [PlannedFeature(f"f{number}", "Float32") for number in range(features)]
    planned[-1] = PlannedFeature(planned[-1].name, "Float64")
    view = PlannedView("v", ("id",), 3600.0, tuple(planned))
    fields = {
        name: number.to_bytes(4, "little").hex() for number, name in enumerate(view.references())
    }
    return FeaturePlan("p", "s", {"id": "int"}, (view,), RedisLayout(3, {"id": "Int64"}, fields))


class Wire(asyncio.Transport):
    """What is written on it is answered by the test."""

    def write(self, data: Any) -> None:
        pass

    def abort(self) -> None:
        pass


class OneConnection:
    """A `HashReader` without a Redis: the test says what arrives."""

    def __init__(self) -> None:
        self.lost: list[str] = []
        self.connection = RedisConnection(lambda _, reason: self.lost.append(reason))
        self.connection.connection_made(Wire())

    def read(self, reading: Reading) -> None:
        self.connection.send(reading)

    def check_up(self) -> None:
        pass

    def watch(self, answer: "asyncio.Future[Any]", deadline: Deadline) -> None:
        pass

    def answered(self) -> None:
        pass

    def late(self, waited_s: float, readings: Collection[Reading]) -> None:
        pass

    def refused(self, reason: str) -> None:
        pass


@pytest.mark.parametrize(
    ("entities", "present"),
    [
        ({"a": [None], "b": [7]}, [False, True]),
        ({"a": [7], "b": [None]}, [True, False]),
        ({"a": [None], "b": [None]}, [False, False]),
    ],
)
async def test_an_instance_without_one_of_its_entities_gets_nothing_of_the_other(
    entities: dict[str, list[int | None]], present: list[bool]
) -> None:
    views = tuple(
        PlannedView(key, (key,), 3600.0, (PlannedFeature("f", "Float32"),)) for key in "ab"
    )
    fields = {"a:f": "00000001", "b:f": "00000002"}
    layout = RedisLayout(3, {"a": "Int64", "b": "Int64"}, fields)
    plan = FeaturePlan("p", "s", {"a": "int", "b": "int"}, views, layout)
    redis = OneConnection()
    source = RedisSource(redis, plan, ReplayClock(KNOWN_AT))
    fetch = asyncio.create_task(source.fetch(entities, 1, Deadline.after(60)))
    await asyncio.sleep(0)
    if any(present):
        redis.connection.data_received(bulk(b"\x35" + struct.pack("<f", 1.5), timestamp(0, 0)))
    found = await fetch
    expected = [ValueStatus.PRESENT if there else ValueStatus.NOT_FOUND for there in present]
    assert found.status.tolist() == [expected]


class Reads:
    """Reads of one plan, whose usual replies it has seen."""

    def __init__(self, features: int) -> None:
        self.features = features
        self._redis = OneConnection()
        self._source = RedisSource(self._redis, plan_of(features), ReplayClock(KNOWN_AT))

    async def learn(self) -> None:
        await self.read([usual(self.features, 0)], [])

    async def read(self, replies: Sequence[bytes], cuts: Collection[int]) -> FeatureRows:
        """The rows of so many entities, whose replies come in parts that are cut there."""
        rows = len(replies)
        fetch = asyncio.create_task(
            self._source.fetch({"id": list(range(rows))}, rows, Deadline.after(60))
        )
        await asyncio.sleep(0)
        stream = b"".join(replies)
        for part in parts_of(stream, cuts):
            self._redis.connection.data_received(part)
        assert not self._redis.lost
        return await fetch


def parts_of(stream: bytes, cuts: Collection[int]) -> Iterator[bytes]:
    start = 0
    for cut in sorted({cut % len(stream) for cut in cuts} | {len(stream)}):
        if start < cut:
            yield stream[start:cut]
        start = cut


def bulk(*words: bytes | None) -> bytes:
    parts = [b"$-1\r\n" if word is None else b"$%d\r\n%b\r\n" % (len(word), word) for word in words]
    return b"*%d\r\n" % len(words) + b"".join(parts)


def stored(features: int, entity: int) -> dict[bytes, bytes]:
    """What tells whose it is."""
    values = {
        number.to_bytes(4, "little"): b"\x35" + struct.pack("<f", 100 * entity + number)
        for number in range(features)
    }
    values[(features - 1).to_bytes(4, "little")] = b"\x29" + struct.pack("<d", entity + 0.1)
    return values | {b"_ts:v": timestamp(entity, 0)}


def timestamp(entity: int, nanos: int) -> bytes:
    return b"\x08" + varint(NOW_S - entity) + (b"\x10" + varint(nanos) if nanos else b"")


def varint(number: int) -> bytes:
    low = bytearray()
    while number > 0x7F:
        low.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*low, number])


def reply(content: dict[bytes, bytes], features: int) -> bytes:
    if features == FEW_FEATURES:
        return bulk(*content.values())
    return bulk(*[part for pair in content.items() for part in pair])


def usual(features: int, entity: int) -> bytes:
    return reply(stored(features, entity), features)


def odd(kind: str, features: int, entity: int) -> bytes:
    """The reply for an entity, which is unusual in one way."""
    content = stored(features, entity)
    match kind:
        case "null":
            content[b"\x01\x00\x00\x00"] = b""
        case "first and last null":
            content[b"\x00\x00\x00\x00"] = content[(features - 1).to_bytes(4, "little")] = b""
        case "nulls":
            content = dict.fromkeys(content, b"") | {b"_ts:v": timestamp(entity, 5_000_000)}
        case "explicit null":
            content[b"\x01\x00\x00\x00"] = b"\x98\x01\x00"
        case "null and nanos":
            content[b"\x01\x00\x00\x00"] = b""
            content[b"_ts:v"] = timestamp(entity, 999_999_999)
        case "what looks like nulls":
            content[b"\x01\x00\x00\x00"] = b"\x35$0\r\n"
            content[(features - 1).to_bytes(4, "little")] = b"\x290\r\n\r\n$0\r"
        case "nan":
            content[b"\x01\x00\x00\x00"] = b"\x35" + struct.pack("<I", 0x7FA00000)
        case "text":
            content[b"\x01\x00\x00\x00"] = b"\x12\x03abc"
        case "head":
            head = (
                b"*7\r\n$5\r\n\x35"
                if features == FEW_FEATURES
                else b"*42\r\n$4\r\n\0\0\0\0\r\n$5\r\n\x35"
            )
            content[b"\x01\x00\x00\x00"] = head * 3
        case "reply":
            content[b"\x01\x00\x00\x00"] = usual(features, entity + 1000)
        case "nanos" | "more nanos" | "most nanos" | "impossible nanos":
            nanos = {"nanos": 1, "more nanos": 1 << 20, "most nanos": 999_999_999}
            content[b"_ts:v"] = timestamp(entity, nanos.get(kind, 1_000_000_000))
        case "endless nanos":
            content[b"_ts:v"] = timestamp(entity, 1)[:-1] + b"\x81"
        case "old":
            content[b"_ts:v"] = timestamp(7200, 0)
        case "no time":
            content[b"_ts:v"] = b""
        case "broken time":
            content[b"_ts:v"] = b"\x08\xff\xff\xff\xff\xff"
        case "another field" if features == MANY_FEATURES:
            content[b"other"] = usual(FEW_FEATURES, 1)
        case "another order" if features == MANY_FEATURES:
            content = dict(reversed(content.items()))
        case "unknown":
            return bulk(*[None] * len(content)) if features == FEW_FEATURES else b"*0\r\n"
        case "error":
            return b"-ERR no\r\n"
        case "number":
            return b":7\r\n"
        case "nested":
            return b"*2\r\n*1\r\n$1\r\na\r\n$1\r\nb\r\n"
        case "fewer":
            return bulk(*list(content.values())[:-1])
    return reply(content, features)


FREQUENT = ["usual"] * 20 + ["nanos", "more nanos", "most nanos", "null", "null and nanos"] * 3
KINDS = [
    *("first and last null", "nulls", "explicit null", "what looks like nulls", "nan", "text"),
    *("head", "reply", "impossible nanos", "endless nanos", "old", "no time", "broken time"),
    *("another field", "another order", "unknown", "error", "number", "nested", "fewer"),
]


def assert_same(rows: FeatureRows, expected: FeatureRows) -> None:
    np.testing.assert_array_equal(rows.status, expected.status)
    np.testing.assert_array_equal(rows.event_time_s, expected.event_time_s)
    for column, other in zip(rows.columns, expected.columns, strict=True):
        assert column.tobytes() == other.tobytes()


@pytest.mark.parametrize("features", [FEW_FEATURES, MANY_FEATURES])
@given(
    st.lists(st.sampled_from(FREQUENT + KINDS), min_size=1, max_size=2 * MANY),
    st.lists(st.integers(0, 1 << 20), max_size=3),
    st.booleans(),
)
def test_any_mix_of_replies_is_what_hiredis_alone_makes_of_it(
    features: int, kinds: list[str], cuts: list[int], fractions: bool
) -> None:
    replies = [
        odd(kind, features, entity) if kind != "usual" else usual(features, entity)
        for entity, kind in enumerate(kinds)
    ]

    async def both() -> tuple[FeatureRows, FeatureRows]:
        reads, by_byte = Reads(features), Reads(features)
        await reads.learn()
        before = ["most nanos", "usual"] if fractions else ["usual"]
        await reads.read([odd(before[n % len(before)], features, n) for n in range(MANY)], [])
        every_byte = range(sum(map(len, replies)))
        return await reads.read(replies, cuts), await by_byte.read(replies, every_byte)

    rows, expected = asyncio.run(both())
    assert_same(rows, expected)
    own = [entity for entity, kind in enumerate(kinds) if kind == "usual"]
    assert (rows.status[own] == ValueStatus.PRESENT).all()
    assert rows.columns[0][own].tolist() == [100 * entity for entity in own]
    assert rows.columns[features - 1][own].tolist() == [entity + 0.1 for entity in own]
    assert rows.event_time_s[own, 0].tolist() == [NOW_S - entity for entity in own]


@pytest.mark.parametrize("features", [FEW_FEATURES, MANY_FEATURES])
async def test_a_stream_may_be_cut_at_every_byte(features: int) -> None:
    replies = [usual(features, entity) for entity in range(2 * FEW + 1)]
    reads = Reads(features)
    await reads.learn()
    for cut in range(0, sum(map(len, replies)), 1 if features == FEW_FEATURES else 7):
        rows = await reads.read(replies, [cut])
        assert rows.columns[0].tolist() == [100 * entity for entity in range(len(replies))]


async def test_those_who_share_a_stretch_do_not_share_its_arrays() -> None:
    """Beside a hash of texts, whose columns are arrays of their own."""
    plan = plan_of(FEW_FEATURES)
    assert plan.redis is not None
    texts = PlannedView("t", ("key",), None, (PlannedFeature("text", "String"),))
    layout = RedisLayout(
        3, {"id": "Int64", "key": "Int64"}, {**plan.redis.fields, "t:text": "00000000"}
    )
    keys: dict[str, JoinKeyType] = {"id": "int", "key": "int"}
    both = replace(plan, join_keys=keys, views=(*plan.views, texts), redis=layout)
    redis = OneConnection()
    source = RedisSource(redis, both, ReplayClock(KNOWN_AT))
    ids = list(range(MANY))
    fetches = [
        asyncio.create_task(
            source.fetch({"id": ids, "key": [key] * MANY}, MANY, Deadline.after(60))
        )
        for key in (1, 2)
    ]
    await asyncio.sleep(0)
    text = bulk(b"\x12\x01a", timestamp(0, 0))
    numbers = b"".join(usual(FEW_FEATURES, entity) for entity in ids)
    redis.connection.data_received(numbers + text)
    first = await fetches[0]
    for column in first.columns:
        column[:] = None
    redis.connection.data_received(text)
    second = await fetches[1]
    assert second.columns[0].tolist() == [100 * entity for entity in ids]


def test_usual_replies_are_one_stretch_with_its_numbers_and_times() -> None:
    number = FIXED_WIDTH["Float32"]
    shape = Shape([b"a", number, b"t", Varying.TIME, Varying.ANYTHING], [[1]], [3])
    replies = [
        bulk(b"a", b"\x35" + struct.pack("<f", n), b"t", timestamp(n, 0), b"x" * 12)
        for n in range(FEW)
    ]
    [(members, end)] = shape.scan(b"--" + b"".join(replies) + b"-ERR\r\n", 2, 100)
    assert members is not None
    assert [row for _, row in members] == list(range(FEW))
    assert end == 2 + sum(map(len, replies))
    (stretch,) = {stretch for stretch, _ in members}
    assert stretch.cells[0].tolist() == [[n] for n in range(FEW)]
    assert stretch.times_s.tolist() == [[NOW_S - n] for n in range(FEW)]


WORDS = [
    *(b"a", FIXED_WIDTH["Float32"], Varying.ANYTHING, b"b", FIXED_WIDTH["Float32"]),
    *(Varying.TIME, FIXED_WIDTH["Float64"], b"c", FIXED_WIDTH["Float32"]),
]


def reply_of(numbers: Sequence[int | None], nanos: int, anything: bytes) -> bytes:
    """Of the shape of WORDS."""
    first, second, double, third = (
        b"" if number is None else tag + struct.pack(layout, number)
        for number, (tag, layout) in zip(
            numbers,
            [(b"\x35", "<f"), (b"\x35", "<f"), (b"\x29", "<d"), (b"\x35", "<f")],
            strict=True,
        )
    )
    return bulk(b"a", first, anything, b"b", second, timestamp(0, nanos), double, b"c", third)


@given(
    st.lists(
        st.tuples(
            st.tuples(*[st.none() | st.integers(0, 9)] * 4),
            st.sampled_from([0, 1, 1 << 9, 1 << 15, 1 << 22, 1 << 29]),
            st.sampled_from([b"", b"x", b"0\r\n\r\n", b"y" * 20]),
        ),
        min_size=FEW,
        max_size=MANY,
    )
)
def test_replies_of_any_lengths_are_one_stretch_too(
    contents: list[tuple[tuple[int | None, ...], int, bytes]],
) -> None:
    shape = Shape(WORDS, [[1, 4, 8], [6]], [5])
    # The first of a scan is what there must be room for.
    shape.scan(
        b"".join([reply_of([1] * 4, 1, b"z" * 20)] + [reply_of([1] * 4, 0, b"")] * MANY), 0, MANY
    )
    replies = [reply_of(*content) for content in contents]
    [(members, end)] = shape.scan(b"".join(replies) + b"-ERR\r\n", 0, len(replies))
    assert members is not None
    assert end == sum(map(len, replies))
    (stretch,) = {stretch for stretch, _ in members}
    assert [row for _, row in members] == list(range(len(replies)))
    expected = np.array([numbers for numbers, _, _ in contents], dtype=float)  # NaN for None
    np.testing.assert_array_equal(stretch.cells[0], expected[:, [0, 1, 3]])
    np.testing.assert_array_equal(stretch.cells[1], expected[:, [2]])
    assert stretch.times_s[:, 0].tolist() == [NOW_S + nanos / 1e9 for _, nanos, _ in contents]


def test_what_is_something_else_stands_between_the_runs() -> None:
    shape = Shape([Varying.TIME, FIXED_WIDTH["Float64"]], [[1]], [0])
    nanos = [5 if n % 3 else 0 for n in range(MANY)]
    nanos[0] = 5
    replies = [bulk(timestamp(n, nanos[n]), b"\x29" + struct.pack("<d", n)) for n in range(MANY)]
    replies[5] = b"-ERR\r\n"
    before, odd_one, after = shape.scan(b"".join(replies), 0, MANY)
    assert before[0] is not None
    assert after[0] is not None
    # The one before the error seems to be longer than it is.
    assert [len(before[0]), odd_one[0], len(after[0])] == [4, None, MANY - 6]
    ends = np.cumsum(list(map(len, replies))).tolist()
    assert [before[1], odd_one[1], after[1]] == [ends[3], ends[5], ends[-1]]
    stretch, row = after[0][-1]
    assert stretch.cells[0][row, 0] == MANY - 1
    assert stretch.times_s[row, 0] == NOW_S - (MANY - 1) + nanos[-1] / 1e9
