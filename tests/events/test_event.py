"""What is told has one form, and bounds."""

import json
import uuid

import pytest

from app.events.event import EVENT_TYPES, Event

ROLLED_BACK = Event(
    "release.rolled_back",
    "flight_delay",
    3,
    "ab" * 32,
    17,
    "worker-1",
    ["errors: more than the margin", "stage 1"],
    {"errors": [[64, 3, 2]], "share": 0.1},
    "3b241101-e2bb-4255-8caf-4136c566a962",
    1388534340.5,
)


def test_an_event_is_a_cloud_event() -> None:
    assert json.loads(ROLLED_BACK.encode("urn:hikyaku:worker-1")) == {
        "specversion": "1.0",
        "id": "3b241101-e2bb-4255-8caf-4136c566a962",
        "source": "urn:hikyaku:worker-1",
        "type": "release.rolled_back",
        "subject": "flight_delay",
        "time": "2013-12-31T23:59:00.500000Z",
        "datacontenttype": "application/json",
        "data": {
            "text": "flight_delay version 3 is rolled back: errors: more than the margin; stage 1",
            "model": "flight_delay",
            "version": 3,
            "sha256": "ab" * 32,
            "generation": 17,
            "by": "worker-1",
            "reasons": ["errors: more than the margin", "stage 1"],
            "details": {"errors": [[64, 3, 2]], "share": 0.1},
        },
    }


@pytest.mark.parametrize("type_", EVENT_TYPES)
def test_an_event_needs_no_more_than_its_type_and_its_model(type_: str) -> None:
    events = [json.loads(Event(type_, "m").encode("urn:test")) for _ in range(2)]  # type: ignore[arg-type]  # of a parameter
    assert [event["type"] for event in events] == [type_, type_]
    assert len({uuid.UUID(event["id"]) for event in events}) == 2
    assert events[0]["data"]["text"].startswith("m ")


def test_however_much_is_said_an_event_has_a_bound() -> None:
    event = Event(
        "release.held",
        "m",
        by="😀" * 10_000,
        reasons=["😀" * 10_000] * 1_000,
        details={"x": "😀" * 2_900},
    )
    content = event.encode("urn:test")
    assert len(content) < 40_000
    data = json.loads(content)["data"]
    assert data["reasons"][0] == "😀" * 300 + "…"
    assert data["details"] == event.details
    larger = Event("release.held", "m", details={"x": "😀" * 3_100})
    assert json.loads(larger.encode("urn:test"))["data"]["details"] == {"left_out_bytes": 12_408}


def test_what_a_reason_quotes_does_nothing_where_it_is_shown() -> None:
    event = Event("release.held", "m", reasons=["\x1b[2J\nother: line"])
    [reason] = json.loads(event.encode("urn:test"))["data"]["reasons"]
    assert reason == r"\x1b[2J\nother: line"
