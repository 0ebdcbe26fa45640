"""Stored values that tell whose they are: an answer alone shows whether it is another entity's."""

import hashlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime

import redis

from app.clock import as_rfc3339
from app.features.entity_key import EntityKeyEncoder
from app.features.plan import FeaturePlan, PlannedFeature, RedisLayout
from app.features.source import EntityColumns, FeatureRows, ValueStatus
from tests.tiny_models import DRIVERS

STORED_AT = datetime(2014, 1, 1, tzinfo=UTC)
READ_AT = datetime(2014, 1, 1, 0, 30, tzinfo=UTC)
"""By feature time, within the ttl of every value."""
CLOCK = as_rfc3339(READ_AT.timestamp())

_PRESENT, _NOT_FOUND, _UNAVAILABLE = (
    ValueStatus.PRESENT,
    ValueStatus.NOT_FOUND,
    ValueStatus.UNAVAILABLE,
)


def laid_out(plan: FeaturePlan) -> FeaturePlan:
    """The plan with a place in Redis for each value."""
    fields = {name: hashlib.sha256(name.encode()).hexdigest()[:8] for name in plan.references}
    types = {key: "String" if kind == "string" else "Int64" for key, kind in plan.join_keys.items()}
    return replace(plan, redis=RedisLayout(3, types, fields))  # type: ignore[arg-type]  # literals


def _wide() -> FeaturePlan:
    driver, city = DRIVERS.views
    more = tuple(PlannedFeature(f"more{number}", "Float32") for number in range(5))
    return replace(DRIVERS, views=(driver, replace(city, features=(*city.features, *more))))


TELLTALE = laid_out(DRIVERS)
"""The plan of all that follows. Drivers and cities are numbers; Redis knows city 3 as `city3`."""

WIDE = laid_out(_wide())
"""The same, with so many numbers of a city that its replies are read as columns."""


def value_of(position: int, entity: int) -> int:
    """The value of the feature at this position of the plan. Below 2**21 exact in a Float32."""
    return 8 * entity + position


def event_time_of(entity: int) -> float:
    return STORED_AT.timestamp() + entity // 1000 + (entity % 1000) * 1_000_000 / 1e9


def city(number: int) -> str:
    return f"city{number}"


def asked(drivers: Sequence[int], cities: Sequence[int]) -> EntityColumns:
    """What `FeatureSource.fetch` takes."""
    return {"driver_id": list(drivers), "city": [city(number) for number in cities]}


def driver_key(driver: int) -> bytes:
    return _KEYS[0].encode((driver,))


def city_key(number: int) -> bytes:
    return _KEYS[1].encode((city(number),))


def field(reference: str) -> bytes:
    """The hash field of a `view:feature`."""
    assert WIDE.redis is not None
    return bytes.fromhex(WIDE.redis.fields[reference])


def driver_hash(driver: int) -> dict[bytes, bytes]:
    """What Redis holds for a driver."""
    return {
        field("driver:rating"): float32(value_of(0, driver)),
        field("driver:trips"): int64(value_of(1, driver)),
        b"_ts:driver": timestamp(driver),
    }


def city_hash(number: int) -> dict[bytes, bytes]:
    return {
        **{
            field(reference): float32(value_of(position, number))
            for position, reference in enumerate(WIDE.references)
            if reference.startswith("city:")
        },
        b"_ts:city": timestamp(number),
    }


def store(redis_url: str, drivers: int, cities: int) -> None:
    """Write the first so many drivers and cities."""
    with redis.Redis.from_url(redis_url) as client, client.pipeline(transaction=False) as pipeline:
        for driver in range(drivers):
            pipeline.hset(driver_key(driver), mapping=driver_hash(driver))
        for number in range(cities):
            pipeline.hset(city_key(number), mapping=city_hash(number))
        pipeline.execute()


def faults_of(
    rows: FeatureRows, drivers: Sequence[int], cities: Sequence[int], stored: tuple[int, int]
) -> Iterator[str]:
    """What these rows hold that is not their own: the first `stored` drivers and cities are there,
    the others are not. UNAVAILABLE is never a fault, a value beside it is."""
    columns = [column.tolist() for column in rows.columns]
    times = rows.event_time_s.tolist()
    for row, statuses in enumerate(rows.status.tolist()):
        for position, status in enumerate(statuses):
            view = position >= 2
            entity = cities[row] if view else drivers[row]
            value = columns[position][row]
            if status == _PRESENT:
                own = value == value_of(position, entity) and entity < stored[view]
                right = own and times[row][view] == event_time_of(entity)
            else:
                is_null = value is None or value != value  # NaN is not itself
                known = status == _UNAVAILABLE or (status == _NOT_FOUND and entity >= stored[view])
                right = known and is_null
            if not right:
                yield (
                    f"{rows.plan.references[position]} of {entity}: {value!r}, "
                    f"{ValueStatus(status).name}, {times[row][view]}"
                )


def float32(value: float) -> bytes:
    """As `feast.types.Value` holds it."""
    return b"\x35" + struct.pack("<f", value)


def int64(value: int) -> bytes:
    return b"\x20" + _varint(value)


def timestamp(entity: int) -> bytes:
    """`event_time_of` as a `google.protobuf.Timestamp`."""
    seconds = int(STORED_AT.timestamp()) + entity // 1000
    nanos = (entity % 1000) * 1_000_000
    return b"\x08" + _varint(seconds) + (b"\x10" + _varint(nanos) if nanos else b"")


def _varint(number: int) -> bytes:
    low = bytearray()
    while number > 0x7F:
        low.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*low, number])


_KEYS = (
    EntityKeyEncoder({"driver_id": "Int64"}, TELLTALE.project, 3),
    EntityKeyEncoder({"city": "String"}, TELLTALE.project, 3),
)
