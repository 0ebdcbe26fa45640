"""Which version a worker was executing when it died, as the one in its place finds it."""

import os
import time
from collections.abc import Iterator

import pytest

from app.telemetry.black_box import BlackBox
from app.telemetry.metrics import Metrics
from app.telemetry.tally import Tallies

VERSION = ("m", 2, "b" * 64)


@pytest.fixture
def file() -> Iterator[int]:
    file = os.memfd_create("tallies")
    yield file
    os.close(file)


def worker(file: int, place: int = 0) -> BlackBox:
    """The one that begins in this place; the one before it has died."""
    return BlackBox(Tallies.shared(file, place, workers=2))


def test_who_was_executed_is_found_and_counted(file: int) -> None:
    worker(file).executing(*VERSION).begin()
    second = worker(file)
    assert second.found == [VERSION]
    assert second.deaths(*VERSION, since_s=0) == 1
    second.executing(*VERSION).begin()
    assert worker(file).deaths(*VERSION, since_s=0) == 2


def test_who_had_been_executed_is_not(file: int) -> None:
    executing = worker(file).executing(*VERSION)
    for _ in range(2):
        executing.begin()
    for _ in range(2):
        executing.end()
    second = worker(file)
    assert second.found == []
    assert second.deaths(*VERSION, since_s=0) == 0


def test_a_death_is_found_once_by_who_takes_the_place(file: int) -> None:
    worker(file, 1).executing(*VERSION).begin()
    assert worker(file, 0).found == []
    assert worker(file, 1).found == [VERSION]
    assert worker(file, 1).found == []


def test_those_of_all_places_add_up(file: int) -> None:
    for place in (0, 1):
        worker(file, place).executing(*VERSION).begin()
    first = worker(file, 0)
    assert first.deaths(*VERSION, since_s=0) == 1
    worker(file, 1)
    assert first.deaths(*VERSION, since_s=0) == 2


def test_what_was_before_is_not_counted(file: int) -> None:
    worker(file).executing(*VERSION).begin()
    before_s, second, after_s = time.time() - 1, worker(file), time.time() + 1
    assert second.deaths(*VERSION, before_s) == 1
    assert second.deaths(*VERSION, after_s) == 0


def test_many_deaths_leave_the_last_ones(file: int) -> None:
    for _ in range(20):
        worker(file).executing(*VERSION).begin()
    assert worker(file).deaths(*VERSION, since_s=0) == 8


def test_operators_are_told_of_the_version(file: int) -> None:
    Metrics(Tallies.shared(file, 0, workers=1)).black_box.executing(*VERSION).begin()
    told = Metrics(Tallies.shared(file, 0, workers=1)).registry.get_sample_value(
        "hikyaku_deaths_executing_total", {"model": "m", "version": "2"}
    )
    assert told == 1
