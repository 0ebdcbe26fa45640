import asyncio

import pytest

from app.deadline import Deadline, DeadlineSweep
from app.errors import DeadlineExceeded


async def test_a_future_past_its_deadline_fails() -> None:
    async with DeadlineSweep(interval_s=0.001) as sweep:
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        sweep.watch(future, Deadline.after(0))
        with pytest.raises(DeadlineExceeded):
            await future


async def test_a_future_answered_in_time_is_left_alone() -> None:
    async with DeadlineSweep(interval_s=0.001) as sweep:
        loop = asyncio.get_running_loop()
        answered, late = loop.create_future(), loop.create_future()
        sweep.watch(answered, Deadline.after(0))
        answered.set_result(1)
        sweep.watch(late, Deadline.after(0))
        with pytest.raises(DeadlineExceeded):
            await late  # the sweep has passed both by now
        assert await answered == 1


async def test_later_deadlines_are_swept_after_earlier_ones() -> None:
    async with DeadlineSweep(interval_s=0.001) as sweep:
        loop = asyncio.get_running_loop()
        soon, later = loop.create_future(), loop.create_future()
        sweep.watch(later, Deadline.after(0.02))
        sweep.watch(soon, Deadline.after(0.001))
        with pytest.raises(DeadlineExceeded):
            await soon
        assert not later.done()
        with pytest.raises(DeadlineExceeded):
            await later


async def test_one_that_cannot_be_told_does_not_keep_the_others_from_it() -> None:
    class Deaf:
        def done(self) -> bool:
            return False

        def set_exception(self, error: Exception, /) -> None:
            raise ZeroDivisionError("a defect")

        def cancel(self) -> None: ...

    async with DeadlineSweep(interval_s=0.001) as sweep:
        sweep.watch(Deaf(), Deadline.after(0))
        for _ in range(2):  # in the same sweep, and in a later one
            future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
            sweep.watch(future, Deadline.after(0))
            with pytest.raises(DeadlineExceeded):
                await future


async def test_leaving_cancels_what_still_waits() -> None:
    async with DeadlineSweep() as sweep:
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        sweep.watch(future, Deadline.after(60))
    assert future.cancelled()


def test_a_share_leaves_the_rest_of_the_time() -> None:
    deadline = Deadline.after(10)
    assert 3.9 < deadline.share(0.4).remaining_s() < 4.1


async def test_the_sweep_goes_by_the_clock_it_is_given() -> None:
    now_s = 0.0
    async with DeadlineSweep(interval_s=0.001, now_s=lambda: now_s) as sweep:
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        sweep.watch(future, Deadline(1.0))
        passed: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        sweep.watch(passed, Deadline(0.0))
        with pytest.raises(DeadlineExceeded):
            await passed
        assert not future.done()
        now_s = 1.0
        with pytest.raises(DeadlineExceeded):
            await future
