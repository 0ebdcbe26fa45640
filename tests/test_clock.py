from array import array
from datetime import UTC, datetime, timedelta

import pytest

from app.clock import ReplayClock, as_rfc3339
from app.errors import Conflict

NEW_YEAR = datetime(2014, 1, 1, tzinfo=UTC)


def test_a_replay_clock_stands_still_until_it_is_advanced() -> None:
    clock = ReplayClock(NEW_YEAR)
    assert clock.now_s() == clock.now_s() == NEW_YEAR.timestamp()
    clock.advance(NEW_YEAR + timedelta(minutes=5))
    assert clock.now_s() == NEW_YEAR.timestamp() + 300


def test_a_replay_clock_never_goes_back() -> None:
    clock = ReplayClock(NEW_YEAR)
    with pytest.raises(Conflict, match="2014-01-01T00:00:00Z"):
        clock.advance(NEW_YEAR - timedelta(microseconds=1))
    clock.advance(NEW_YEAR)  # standing still is not going back


def test_clocks_that_share_their_instant_stand_together() -> None:
    instant = [0.0]
    one, other = (ReplayClock(NEW_YEAR, instant) for _ in range(2))
    one.advance(NEW_YEAR + timedelta(minutes=5))
    assert other.now_s() == NEW_YEAR.timestamp() + 300
    assert ReplayClock(NEW_YEAR, instant).now_s() == other.now_s()  # of a worker started later


def test_a_clock_that_starts_later_leaves_the_shared_instant_alone() -> None:
    instant = array("d", [0.0])
    first = ReplayClock(NEW_YEAR, instant)
    first.advance(NEW_YEAR + timedelta(minutes=5))
    later = ReplayClock(NEW_YEAR, memoryview(instant).toreadonly())
    assert later.now_s() == first.now_s()


def test_instants_are_written_in_utc() -> None:
    assert as_rfc3339(NEW_YEAR.timestamp()) == "2014-01-01T00:00:00Z"
