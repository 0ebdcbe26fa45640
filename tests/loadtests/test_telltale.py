"""The check that the proofs rest on finds what is not an entity's own."""

import numpy as np
import pytest

from app.features.source import FeatureRows, ValueStatus
from loadtests.telltale import (
    TELLTALE,
    event_time_of,
    faults_of,
    value_of,
)

STORED = (100, 10)


def rows_of(drivers: list[int], cities: list[int]) -> FeatureRows:
    """What a right reader answers when all of them are stored."""
    entities = (drivers, drivers, cities)
    return FeatureRows(
        TELLTALE,
        tuple(
            np.array([float(value_of(position, entity)) for entity in of])
            for position, of in enumerate(entities)
        ),
        np.full((len(drivers), 3), ValueStatus.PRESENT, dtype=np.uint8),
        np.array(
            [[event_time_of(d), event_time_of(c)] for d, c in zip(drivers, cities, strict=True)]
        ),
    )


def test_own_values_are_no_fault() -> None:
    assert list(faults_of(rows_of([1, 2], [3, 3]), [1, 2], [3, 3], STORED)) == []


@pytest.mark.parametrize(("drivers", "cities"), [([2], [3]), ([1], [4])])
def test_values_of_another_entity_are_found(drivers: list[int], cities: list[int]) -> None:
    assert list(faults_of(rows_of([1], [3]), drivers, cities, STORED))


def test_values_of_two_rows_exchanged_are_found() -> None:
    assert list(faults_of(rows_of([1, 2], [3, 3]), [2, 1], [3, 3], STORED))


def test_a_value_with_the_time_of_another_is_found() -> None:
    rows = rows_of([1], [3])
    rows.event_time_s[0, 0] += 0.001
    assert len(list(faults_of(rows, [1], [3], STORED))) == 2


def test_a_value_of_an_entity_that_is_not_stored_is_found() -> None:
    assert list(faults_of(rows_of([100], [3]), [100], [3], STORED))


@pytest.mark.parametrize(
    ("status", "driver", "value", "faults"),
    [
        (ValueStatus.UNAVAILABLE, 1, np.nan, 0),
        (ValueStatus.UNAVAILABLE, 1, 8.0, 1),
        (ValueStatus.NOT_FOUND, 100, np.nan, 0),
        (ValueStatus.NOT_FOUND, 1, np.nan, 1),
        (ValueStatus.NULL_VALUE, 1, np.nan, 1),
        (ValueStatus.OUTSIDE_MAX_AGE, 1, np.nan, 1),
    ],
)
def test_a_status_is_held_against_what_is_stored(
    status: ValueStatus, driver: int, value: float, faults: int
) -> None:
    rows = rows_of([1], [3])
    rows.status[0, 0] = status
    rows.columns[0][0] = value
    rows.status[0, 1] = ValueStatus.UNAVAILABLE
    rows.columns[1][0] = np.nan
    found = list(faults_of(rows, [driver], [3], STORED))
    assert len(found) == faults
    assert all("driver:rating" in fault for fault in found)
