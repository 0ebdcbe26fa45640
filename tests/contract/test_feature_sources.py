"""What every feature source promises, and what only one that lives in Redis has to."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    contextmanager,
)
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import pytest
import redis
from numpy.typing import NDArray

from app.clock import FeatureClock, ReplayClock
from app.config import Settings
from app.deadline import Deadline
from app.errors import FeaturesUnavailable
from app.features.source import EntityColumns, FeatureRows, FeatureSource, ValueStatus
from app.features.static_source import StaticSource
from app.local.redis_server import own_redis
from app.main import open_features
from tests.tiny_feast import FLEET, FLEET_VALUES, KNOWN_AT, TTL_S, Fleet, close_store

PRESENT = ValueStatus.PRESENT
NULL_VALUE = ValueStatus.NULL_VALUE
NOT_FOUND = ValueStatus.NOT_FOUND
OUTSIDE_MAX_AGE = ValueStatus.OUTSIDE_MAX_AGE


OpenStored: TypeAlias = Callable[[Fleet, FeatureClock], AbstractAsyncContextManager[FeatureSource]]


@asynccontextmanager
async def feast_source(fleet: Fleet, clock: FeatureClock) -> AsyncIterator[FeatureSource]:
    from app.features.feast_source import FeastSource

    store = fleet.open_store()
    try:
        yield FeastSource(store, FLEET, clock)
    finally:
        await close_store(store)


@asynccontextmanager
async def redis_source(fleet: Fleet, clock: FeatureClock) -> AsyncIterator[FeatureSource]:
    settings = Settings(feature_redis_url=fleet.redis_url)
    async with open_features(settings, clock) as open_source:
        yield open_source(fleet.plan)


@pytest.fixture(params=[feast_source, redis_source], ids=["feast", "redis"])
def open_stored(request: pytest.FixtureRequest) -> OpenStored:
    """How a source that lives in Redis is opened."""
    opener: OpenStored = request.param
    return opener


@pytest.fixture(
    params=[
        None,
        (feast_source, "fleet"),
        (redis_source, "fleet"),
        (redis_source, "fleet_in_cluster"),
        (redis_source, "fleet_behind_sentinels"),
    ],
    ids=["static", "feast", "redis", "cluster", "sentinels"],
)
async def source(request: pytest.FixtureRequest) -> AsyncIterator[FeatureSource]:
    """Holds FLEET_VALUES, read at the instant at which they became known."""
    if request.param is None:
        yield StaticSource(FLEET, FLEET_VALUES, KNOWN_AT.timestamp())
        return
    opener, fleet = request.param
    async with opener(request.getfixturevalue(fleet), ReplayClock(KNOWN_AT)) as opened:
        yield opened


def entities(*rows: tuple[int | None, str | None]) -> EntityColumns:
    return {"driver_id": [row[0] for row in rows], "city": [row[1] for row in rows]}


async def fetch(source: FeatureSource, *rows: tuple[int | None, str | None]) -> FeatureRows:
    return await source.fetch(entities(*rows), len(rows), Deadline.after(10))


def values(rows: FeatureRows, reference: str) -> list[Any]:
    """The column of a feature, NaN as None."""
    column = rows.columns[FLEET.references.index(reference)]
    return [None if value != value else value for value in column.tolist()]


def status(rows: FeatureRows, reference: str) -> list[ValueStatus]:
    return [ValueStatus(s) for s in rows.status[:, FLEET.references.index(reference)]]


async def test_stored_values_are_present(source: FeatureSource) -> None:
    rows = await fetch(source, (1, "kyoto"))
    assert [column.tolist() for column in rows.columns] == [
        [4.5],
        [7.0],
        ["品川 11"],
        [2.0],
        [10.0],
        [1.0],
    ]
    assert rows.status.tolist() == [[PRESENT] * 6]


async def test_the_answer_has_the_plans_columns_and_types(source: FeatureSource) -> None:
    rows = await fetch(source, (1, "kyoto"), (99, "nowhere"))
    assert rows.plan == source.plan
    assert rows.plan.references == FLEET.references
    assert [column.dtype for column in rows.columns] == [
        np.dtype(object if FLEET.value_types[name] == "text" else np.float64)
        for name in FLEET.references
    ]
    assert (rows.status.dtype, rows.status.shape) == (np.uint8, (2, 6))
    assert (rows.event_time_s.dtype, rows.event_time_s.shape) == (np.float64, (2, 3))


async def test_a_stored_null_is_a_null_value(source: FeatureSource) -> None:
    rows = await fetch(source, (2, "kyoto"))
    for reference in ("driver:rating", "driver:plate"):
        assert values(rows, reference) == [None]
        assert status(rows, reference) == [NULL_VALUE]
    assert values(rows, "driver:trips") == [3.0]
    assert status(rows, "driver:trips") == [PRESENT]


async def test_an_entity_whose_values_are_all_null_is_known(source: FeatureSource) -> None:
    rows = await fetch(source, (-3, "kyoto"))
    assert rows.status[0, :3].tolist() == [NULL_VALUE] * 3
    assert rows.event_time_s[0, 0] == KNOWN_AT.timestamp()


async def test_an_entity_that_is_not_stored_is_not_found_and_null(source: FeatureSource) -> None:
    rows = await fetch(source, (99, "nowhere"))
    assert rows.status.tolist() == [[NOT_FOUND] * 6]
    assert [values(rows, reference) for reference in FLEET.references] == [[None]] * 6


async def test_event_times_tell_when_each_view_became_known(source: FeatureSource) -> None:
    rows = await fetch(source, (1, "東京"))
    known_at_s = KNOWN_AT.timestamp()
    np.testing.assert_array_equal(rows.event_time_s, [[known_at_s, known_at_s, np.nan]])


async def test_a_row_without_an_entity_is_not_found_in_the_views_of_that_entity(
    source: FeatureSource,
) -> None:
    rows = await fetch(source, (None, "kyoto"), (1, None), (None, None))
    assert status(rows, "driver:rating") == [NOT_FOUND, PRESENT, NOT_FOUND]
    assert status(rows, "city:demand") == [PRESENT, NOT_FOUND, NOT_FOUND]
    assert status(rows, "driver_in_city:visits") == [NOT_FOUND, NOT_FOUND, NOT_FOUND]
    assert values(rows, "driver:rating") == [None, 4.5, None]
    assert values(rows, "city:demand") == [2.0, None, None]


async def test_zero_and_the_empty_string_are_entities_and_null_is_none(
    source: FeatureSource,
) -> None:
    rows = await fetch(source, (0, ""), (None, None))
    assert values(rows, "driver:rating") == [0.5, None]
    assert values(rows, "city:demand") == [0.25, None]
    assert values(rows, "driver_in_city:visits") == [30.0, None]


async def test_an_empty_text_and_a_zero_are_values(source: FeatureSource) -> None:
    rows = await fetch(source, (0, "kyoto"), (2, "東京"))
    assert values(rows, "driver:plate")[0] == ""
    assert status(rows, "driver:plate")[0] == PRESENT
    assert values(rows, "driver:trips")[0] == 0.0
    assert status(rows, "driver:trips")[0] == PRESENT
    assert values(rows, "driver_in_city:known")[1] == 0.0
    assert status(rows, "driver_in_city:known")[1] == PRESENT


async def test_a_composite_key_is_found_only_as_a_whole(source: FeatureSource) -> None:
    rows = await fetch(source, (1, "kyoto"), (2, "東京"), (1, "東京"), (2, "kyoto"))
    assert values(rows, "driver_in_city:visits") == [10.0, 20.0, None, None]
    assert status(rows, "driver_in_city:visits") == [PRESENT, PRESENT, NOT_FOUND, NOT_FOUND]


async def test_rows_come_in_the_order_that_they_were_asked_for(source: FeatureSource) -> None:
    forward = await fetch(source, (0, "東京"), (1, ""), (2, "kyoto"), (99, ""))
    backward = await fetch(source, (99, ""), (2, "kyoto"), (1, ""), (0, "東京"))
    for reference in FLEET.references:
        assert values(forward, reference) == values(backward, reference)[::-1]
    np.testing.assert_array_equal(forward.status, backward.status[::-1])


async def test_an_entity_that_is_asked_for_twice_is_answered_twice(source: FeatureSource) -> None:
    rows = await fetch(source, (1, "kyoto"), (2, "kyoto"), (1, "kyoto"), (1, "東京"))
    assert values(rows, "driver:trips") == [7.0, 3.0, 7.0, 7.0]
    assert values(rows, "city:demand") == [2.0, 2.0, 2.0, 8.0]


async def test_many_rows_are_answered_in_order(source: FeatureSource) -> None:
    asked: Sequence[tuple[int, str]] = [(number % 5, "kyoto") for number in range(1500)]
    rows = await fetch(source, *asked)
    trips = {0: 0.0, 1: 7.0, 2: 3.0}
    assert values(rows, "driver:trips") == [trips.get(driver) for driver, _ in asked]


async def test_integers_beyond_the_reach_of_a_float_are_keys(source: FeatureSource) -> None:
    rows = await fetch(source, (2**53 + 1, "kyoto"), (2**53, "kyoto"), (-3, "kyoto"))
    assert status(rows, "driver:trips") == [PRESENT, NOT_FOUND, NULL_VALUE]


async def test_the_answer_is_the_callers_to_change(source: FeatureSource) -> None:
    first = await fetch(source, (1, "kyoto"))
    for column in first.columns:
        column[0] = None
    first.status[:] = NOT_FOUND
    second = await fetch(source, (1, "kyoto"))
    assert values(second, "driver:rating") == [4.5]
    assert second.status.tolist() == [[PRESENT] * 6]


async def test_what_was_asked_is_not_changed(source: FeatureSource) -> None:
    asked = entities((1, "kyoto"), (None, None))
    await source.fetch(asked, 2, Deadline.after(10))
    assert asked == entities((1, "kyoto"), (None, None))


async def test_concurrent_reads_are_answered_with_their_own_rows(source: FeatureSource) -> None:
    drivers = (0, 1, 2, 99) * 5
    answers = await asyncio.gather(*(fetch(source, (driver, "kyoto")) for driver in drivers))
    trips = [values(rows, "driver:trips")[0] for rows in answers]
    assert trips == [0.0, 7.0, 3.0, None] * 5


async def test_a_source_that_can_be_read_passes_its_check(source: FeatureSource) -> None:
    await source.check()


# A source in memory has no age, no deadline and no connection; the rest is about Redis.


@pytest.mark.parametrize(
    ("age_s", "expected"),
    [(TTL_S - 1, PRESENT), (TTL_S, PRESENT), (TTL_S + 1, OUTSIDE_MAX_AGE)],
)
async def test_a_value_is_read_until_it_is_older_than_its_ttl(
    open_stored: OpenStored, fleet: Fleet, age_s: int, expected: ValueStatus
) -> None:
    clock = ReplayClock(KNOWN_AT + timedelta(seconds=age_s))
    async with open_stored(fleet, clock) as source:
        rows = await fetch(source, (1, "kyoto"))
    assert status(rows, "driver:rating") == [expected]
    assert values(rows, "driver:rating") == [4.5 if expected is PRESENT else None]
    assert rows.event_time_s[0, 0] == KNOWN_AT.timestamp()


@pytest.mark.parametrize(("ahead_s", "expected"), [(59, PRESENT), (61, NOT_FOUND)])
async def test_a_value_from_the_future_is_not_known_yet(
    open_stored: OpenStored, fleet: Fleet, ahead_s: int, expected: ValueStatus
) -> None:
    clock = ReplayClock(KNOWN_AT - timedelta(seconds=ahead_s))
    async with open_stored(fleet, clock) as source:
        rows = await fetch(source, (1, "kyoto"))
    assert rows.status.tolist() == [[expected] * 6]
    assert values(rows, "driver:rating") == [4.5 if expected is PRESENT else None]


async def test_values_without_a_ttl_never_grow_too_old(
    open_stored: OpenStored, fleet: Fleet
) -> None:
    async with open_stored(fleet, ReplayClock(KNOWN_AT + timedelta(days=3650))) as source:
        rows = await fetch(source, (1, "kyoto"))
    assert values(rows, "city:demand") == [2.0]
    assert rows.status.tolist() == [[OUTSIDE_MAX_AGE] * 3 + [PRESENT] + [OUTSIDE_MAX_AGE] * 2]


async def test_a_null_that_is_too_old_is_too_old(open_stored: OpenStored, fleet: Fleet) -> None:
    async with open_stored(fleet, ReplayClock(KNOWN_AT + timedelta(days=1))) as source:
        rows = await fetch(source, (2, "kyoto"), (99, "kyoto"))
    assert status(rows, "driver:rating") == [OUTSIDE_MAX_AGE, NOT_FOUND]


async def test_a_clock_that_advances_ages_the_values_of_an_open_source(
    open_stored: OpenStored, fleet: Fleet
) -> None:
    clock = ReplayClock(KNOWN_AT)
    async with open_stored(fleet, clock) as source:
        young = await fetch(source, (1, "kyoto"))
        clock.advance(KNOWN_AT + timedelta(seconds=TTL_S + 1))
        old = await fetch(source, (1, "kyoto"))
    assert (status(young, "driver:rating"), status(old, "driver:rating")) == (
        [PRESENT],
        [OUTSIDE_MAX_AGE],
    )


async def test_serving_and_training_read_the_same_on_both_sides_of_the_ttl(
    open_stored: OpenStored, fleet: Fleet
) -> None:
    ages_s = (TTL_S - 1, TTL_S, TTL_S + 1)
    asked = [(1, "kyoto"), (2, "東京"), (99, "nowhere")]
    trained_on = _point_in_time(fleet, asked, ages_s)
    clock = ReplayClock(KNOWN_AT)
    async with open_stored(fleet, clock) as source:
        for index, age_s in enumerate(ages_s):
            clock.advance(KNOWN_AT + timedelta(seconds=age_s))
            rows = await fetch(source, *asked)
            for reference, column in zip(FLEET.references, rows.columns, strict=True):
                offline = trained_on[reference][index * len(asked) : (index + 1) * len(asked)]
                np.testing.assert_array_equal(column, offline, err_msg=f"{reference} at {age_s} s")


def _point_in_time(
    fleet: Fleet, asked: Sequence[tuple[int, str]], ages_s: Sequence[int]
) -> dict[str, NDArray[Any]]:
    """The offline join of all entities at the first age, then at the second, …"""
    from app.features.feast_repo import point_in_time

    frame = pd.DataFrame(
        [
            {"driver_id": driver, "city": city, "asked_at": KNOWN_AT + timedelta(seconds=age_s)}
            for age_s in ages_s
            for driver, city in asked
        ]
    )
    return point_in_time(fleet.open_store(), "fleet", frame, "asked_at")


async def test_a_store_that_was_stopped_is_unavailable(
    open_stored: OpenStored, fleet: Fleet, tmp_path: Path
) -> None:
    async with AsyncExitStack() as stack:
        with own_redis(tmp_path / "redis") as redis_url:
            source = await stack.enter_async_context(
                open_stored(replace(fleet, redis_url=redis_url), ReplayClock(KNOWN_AT))
            )
            assert (await fetch(source, (1, "kyoto"))).status.tolist() == [[NOT_FOUND] * 6]
        with _within(2):
            with pytest.raises(FeaturesUnavailable):
                await source.fetch(entities((1, "kyoto")), 1, Deadline.after(0.5))
            with pytest.raises(FeaturesUnavailable):
                await source.check()


async def test_a_store_that_hangs_is_unavailable_at_the_deadline_and_back_when_it_answers(
    open_stored: OpenStored,
    fleet: Fleet,
) -> None:
    async with open_stored(fleet, ReplayClock(KNOWN_AT)) as source:
        await fetch(source, (2, "東京"))
        with (
            _hanging(fleet.redis_url),
            _within(1),
            pytest.raises(FeaturesUnavailable, match="did not answer within"),
        ):
            await source.fetch(entities((2, "東京")), 1, Deadline.after(0.2))
        rows = await fetch(source, (1, "kyoto"))
    assert values(rows, "driver:trips") == [7.0]


async def test_a_deadline_that_has_passed_is_not_waited_for(
    open_stored: OpenStored, fleet: Fleet
) -> None:
    async with open_stored(fleet, ReplayClock(KNOWN_AT)) as source:
        with _hanging(fleet.redis_url), _within(1), pytest.raises(FeaturesUnavailable):
            await source.fetch(entities((1, "kyoto")), 1, Deadline.after(-1))


@pytest.mark.parametrize("turns", range(8))
async def test_a_read_that_is_cancelled_at_any_moment_leaves_nothing_behind(
    open_stored: OpenStored, fleet: Fleet, turns: int
) -> None:
    """The connection is shared: an answer left in it would go to the next reader."""
    async with open_stored(fleet, ReplayClock(KNOWN_AT)) as source:
        await fetch(source, (0, ""))  # the connection is there
        left = asyncio.create_task(fetch(source, (2, "東京")))
        for _ in range(turns):
            await asyncio.sleep(0)
        left.cancel()
        await asyncio.gather(left, return_exceptions=True)
        rows = await fetch(source, (1, "kyoto"))
    assert values(rows, "driver:trips") == [7.0]
    assert values(rows, "driver_in_city:visits") == [10.0]


async def test_a_read_that_is_cancelled_while_the_store_hangs_leaves_nothing_behind(
    open_stored: OpenStored,
    fleet: Fleet,
) -> None:
    async with open_stored(fleet, ReplayClock(KNOWN_AT)) as source:
        await fetch(source, (0, ""))
        with _hanging(fleet.redis_url):
            left = asyncio.create_task(fetch(source, (2, "東京")))
            for _ in range(20):
                await asyncio.sleep(0)
            left.cancel()
            with pytest.raises(asyncio.CancelledError):
                await left
        rows = await fetch(source, (1, "kyoto"))
    assert values(rows, "driver:trips") == [7.0]


@contextmanager
def _hanging(redis_url: str) -> Iterator[None]:
    """Inside, the Redis accepts connections and says nothing."""
    with redis.Redis.from_url(redis_url) as client:
        process_id = int(client.info("server")["process_id"])
    os.kill(process_id, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process_id, signal.SIGCONT)


@contextmanager
def _within(limit_s: float) -> Iterator[None]:
    started_s = time.monotonic()
    yield
    assert time.monotonic() - started_s < limit_s
