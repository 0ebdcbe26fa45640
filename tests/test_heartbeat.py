import asyncio
import os
import time
from contextlib import suppress

from app.heartbeat import Board, Vigil
from app.worker import beat

PATIENCE_S = 10.0


def test_a_beat_is_seen_through_another_descriptor_of_the_page() -> None:
    ours = Board.create()
    theirs = Board(os.dup(ours.descriptor))
    first, second = ours.heartbeat(0), ours.heartbeat(1)
    assert second.last_s is None
    before_s = time.monotonic()
    theirs.heartbeat(1).beat()
    assert second.last_s is not None
    assert before_s <= second.last_s <= time.monotonic()
    assert first.last_s is None
    second.forget()
    assert theirs.heartbeat(1).last_s is None


def test_that_a_loop_once_beat_is_remembered_beyond_it() -> None:
    ours = Board.create()
    theirs = Board(os.dup(ours.descriptor))
    assert not ours.heartbeat(0).has_beaten
    theirs.heartbeat(0).beat()
    ours.heartbeat(0).forget()
    assert theirs.heartbeat(0).has_beaten
    assert not theirs.heartbeat(1).has_beaten


async def test_a_loop_beats_while_it_runs_and_tells_for_how_long_it_did_not() -> None:
    lags: asyncio.Queue[float] = asyncio.Queue()
    heartbeat = Board.create().heartbeat(0)
    beating = asyncio.create_task(beat(heartbeat, lags.put_nowait))
    await lags.get()
    time.sleep(0.3)  # noqa: ASYNC251  (a blocked loop is the subject)
    blocked_until_s = time.monotonic()
    assert heartbeat.last_s is not None
    assert heartbeat.last_s < blocked_until_s - 0.2
    assert await lags.get() > 0.15
    await lags.get()
    assert heartbeat.last_s >= blocked_until_s
    beating.cancel()
    with suppress(asyncio.CancelledError):
        await beating


class TestVigil:
    def test_a_loop_that_has_not_beaten_for_longer_than_the_patience_is_stuck(self) -> None:
        vigil = Vigil(1.0, 100.0)
        seen = [vigil.is_stuck(101.0, PATIENCE_S, float(now_s)) for now_s in range(101, 115)]
        assert seen.index(True) == 11
        assert all(seen[11:])

    def test_one_that_beats_is_not(self) -> None:
        vigil = Vigil(1.0, 100.0)
        assert not any(vigil.is_stuck(now - 0.1, PATIENCE_S, now) for now in (101.0, 102.0, 103.0))

    def test_one_that_has_not_begun_has_all_the_time(self) -> None:
        vigil = Vigil(1.0, 100.0)
        assert not any(vigil.is_stuck(None, PATIENCE_S, float(now)) for now in range(101, 1000))

    def test_without_patience_nothing_is_stuck(self) -> None:
        vigil = Vigil(1.0, 100.0)
        assert not any(vigil.is_stuck(101.0, 0, float(now)) for now in range(101, 1000))

    def test_time_in_which_the_watcher_did_not_run_does_not_count(self) -> None:
        vigil = Vigil(1.0, 100.0)
        assert not vigil.is_stuck(101.0, PATIENCE_S, 101.0)
        # Both were suspended until now.
        seen = [vigil.is_stuck(101.0, PATIENCE_S, float(now_s)) for now_s in range(3600, 3612)]
        assert seen == [False] * 11 + [True]
