"""Segments: which one a row is in, whatever its fields hold."""

from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from app.comparison.segments import SegmentReader
from app.contract import Contract
from app.errors import InvalidModel
from tests.tiny_models import contract

NEW_YORK = timezone(timedelta(hours=-5))


def reader(**segments: Any) -> SegmentReader:
    fields = ("origin", "distance", "departure", "seats", "cargo")
    document = contract("binary", segments=segments)
    return SegmentReader(Contract.model_validate(document), fields)


def names(of: SegmentReader, field: str, *values: Any) -> list[str]:
    read = of.read({field: values}, len(values))
    assert read.shape == (len(values), 1)
    return [of.names[0][number] for number in read[:, 0]]


def test_values_are_told_apart_by_their_text() -> None:
    origins = reader(origin={"values": ["EWR", "JFK"]})
    assert names(origins, "origin", "JFK", "EWR", "LGA", "ewr", "", None, 3) == [
        *("origin=JFK", "origin=EWR"),
        *["origin=other"] * 5,
    ]
    assert names(reader(seats={"values": ["1", "2"]}), "seats", 1, 2, 3, True) == [
        *("seats=1", "seats=2"),
        *["seats=other"] * 2,
    ]
    assert names(reader(cargo={"values": ["true"]}), "cargo", True, False, None) == [
        "cargo=true",
        *["cargo=other"] * 2,
    ]


def test_an_edge_belongs_to_what_is_above_it() -> None:
    distances = reader(distance={"edges": [500.0, 1000.0]})
    assert names(distances, "distance", 499.9, 500, 999.9, 1000.0, -1e9) == [
        *("distance=..500", "distance=500..1000", "distance=500..1000", "distance=1000.."),
        "distance=..500",
    ]


@pytest.mark.parametrize("value", [None, float("nan"), "far", 10**400, datetime(2013, 1, 1)])
def test_what_is_no_number_is_in_no_range(value: object) -> None:
    assert names(reader(distance={"edges": [0.0]}), "distance", value) == ["distance=other"]


def test_an_instant_is_told_by_its_own_clock() -> None:
    hours = reader(hour={"from": "departure", "as": "minute_of_day", "edges": [360, 1080]})
    assert names(
        hours,
        "departure",
        datetime(2013, 1, 1, 5, 59, tzinfo=NEW_YORK),
        datetime(2013, 1, 1, 6, 0, tzinfo=NEW_YORK),
        datetime(2013, 1, 1, 18, 0, tzinfo=NEW_YORK),
        None,
        7,
    ) == ["hour=..360", "hour=360..1080", "hour=1080..", "hour=other", "hour=other"]


def test_each_segment_of_the_contract_is_a_dimension() -> None:
    both = reader(origin={"values": ["EWR"]}, distance={"edges": [0.0]})
    read = both.read({"origin": ["EWR", "LGA"], "distance": [-1.0, 1.0]}, 2)
    assert read.tolist() == [[0, 0], [1, 1]]
    assert reader().read({}, 3).shape == (3, 0)


@pytest.mark.parametrize(
    ("segments", "reason"),
    [
        ({"gate": {"values": ["A"]}}, r"segments\.gate: 'gate' is no field"),
        ({"by": {"from": "gate", "values": ["A"]}}, r"segments\.by: 'gate' is no field"),
        (
            {"origin": {"as": "text", "edges": [1.0]}},
            r"segments\.origin: `as: text` needs `values`",
        ),
    ],
)
def test_segments_that_no_row_could_be_in_are_refused(segments: Any, reason: str) -> None:
    with pytest.raises(InvalidModel, match=reason):
        reader(**segments)
