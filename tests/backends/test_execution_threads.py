"""Calls in threads: how many at once, and what giving one up leaves behind."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import pytest

from app.backends.execution_threads import ExecutionThreads


class Gate:
    """Work that says when it has begun and returns when it is let."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.let = threading.Event()
        self.told_to_stop = False

    def work(self) -> str:
        self.begun.set()
        assert self.let.wait(60)
        return "done"

    def stop(self) -> None:
        """A stuck call does not listen."""
        self.told_to_stop = True

    async def has_begun(self) -> None:
        assert await asyncio.to_thread(self.begun.wait, 60)


@pytest.fixture
async def threads() -> AsyncIterator[ExecutionThreads]:
    threads = ExecutionThreads("test", 1)
    yield threads
    await threads.close()


@pytest.fixture
def gate(threads: ExecutionThreads) -> Iterator[Gate]:
    """Opens before `threads` close."""
    gate = Gate()
    yield gate
    gate.let.set()


def nothing() -> None:
    """No call of this test is given up."""


def left(task: "asyncio.Task[str]") -> "asyncio.Future[list[object]]":
    task.cancel()
    return asyncio.gather(task, return_exceptions=True)


async def until_none_is_left_behind(threads: ExecutionThreads) -> None:
    async with asyncio.timeout(60):
        while threads.left_behind:  # noqa: ASYNC110 - threads count it, nothing tells the loop
            await asyncio.sleep(0.001)


async def test_what_the_work_raises_is_the_callers(threads: ExecutionThreads) -> None:
    with pytest.raises(KeyError):
        await threads.call(lambda: {}["absent"], nothing)
    assert await threads.call(lambda: 7, nothing) == 7


async def test_as_many_calls_run_at_once_as_there_are_threads() -> None:
    threads = ExecutionThreads("test", 3)
    together = threading.Barrier(3)
    calls = [threads.call(lambda: together.wait(60), nothing) for _ in range(3)]
    assert sorted(await asyncio.gather(*calls)) == [0, 1, 2]
    await threads.close()


async def test_a_call_that_has_not_begun_is_never_run(
    threads: ExecutionThreads, gate: Gate
) -> None:
    first = asyncio.create_task(threads.call(gate.work, gate.stop))
    await gate.has_begun()
    second = Gate()
    waiting = asyncio.create_task(threads.call(second.work, second.stop))
    await asyncio.sleep(0)  # it is in line
    await left(waiting)
    gate.let.set()
    assert await first == "done"
    assert await threads.call(lambda: 7, nothing) == 7
    assert not second.begun.is_set()
    assert not second.told_to_stop


async def test_another_thread_takes_the_place_of_one_whose_call_is_given_up(
    threads: ExecutionThreads, gate: Gate
) -> None:
    stuck = asyncio.create_task(threads.call(gate.work, gate.stop))
    await gate.has_begun()
    await left(stuck)
    assert gate.told_to_stop
    assert await threads.call(lambda: 7, nothing) == 7
    assert threads.left_behind == 1


async def test_a_call_that_is_given_up_is_stuck_when_it_had_time_to_return(
    threads: ExecutionThreads, gate: Gate
) -> None:
    hung = asyncio.create_task(threads.call(gate.work, gate.stop))
    await gate.has_begun()
    await left(hung)
    assert threads.stuck == 0
    async with asyncio.timeout(60):
        while not threads.stuck:  # noqa: ASYNC110 - nothing happens but that time passes
            await asyncio.sleep(0.01)


async def test_a_thread_that_was_left_behind_ends_with_its_call(
    threads: ExecutionThreads, gate: Gate
) -> None:
    stuck = asyncio.create_task(threads.call(gate.work, gate.stop))
    await gate.has_begun()
    await left(stuck)
    gate.let.set()
    await until_none_is_left_behind(threads)
    together = threading.Barrier(2)
    calls = [threads.call(lambda: together.wait(0.2), nothing) for _ in range(2)]
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(result) for result in results] == [threading.BrokenBarrierError] * 2


async def test_where_no_thread_can_be_started_one_that_returns_goes_on(
    threads: ExecutionThreads, gate: Gate
) -> None:
    given_up = asyncio.create_task(threads.call(gate.work, gate.stop))
    await gate.has_begun()
    with no_room_for_threads():
        assert [type(error) for error in await left(given_up)] == [asyncio.CancelledError]
        assert gate.told_to_stop
        next_one = asyncio.create_task(threads.call(lambda: 7, nothing))
        await asyncio.sleep(0)  # it is in line
        gate.let.set()
        assert await next_one == 7
    assert threads.left_behind == 0


async def test_a_thread_that_could_not_be_started_is_started_with_the_next_call(
    threads: ExecutionThreads, gate: Gate
) -> None:
    hung = asyncio.create_task(threads.call(gate.work, gate.stop))
    await gate.has_begun()
    with no_room_for_threads():
        await left(hung)
    assert await threads.call(lambda: 7, nothing) == 7
    assert threads.left_behind == 1


@contextmanager
def no_room_for_threads() -> Iterator[None]:
    """Each new one would want a stack larger than the address space."""
    before = threading.stack_size(1 << 48)
    try:
        with pytest.raises(RuntimeError, match="can't start new thread"):
            threading.Thread().start()
        yield
    finally:
        threading.stack_size(before)


async def test_closing_waits_for_a_thread_that_is_about_to_return(
    threads: ExecutionThreads, gate: Gate
) -> None:
    stuck = asyncio.create_task(threads.call(gate.work, gate.stop))
    await gate.has_begun()
    await left(stuck)
    closing = asyncio.create_task(threads.close())
    done, _ = await asyncio.wait({closing}, timeout=0.05)
    assert not done
    gate.let.set()
    await closing
    assert threads.left_behind == 0


async def test_closing_ends_the_threads() -> None:
    threads = ExecutionThreads("closed", 3)
    await threads.close()
    for thread in threading.enumerate():
        if thread.name == "closed":
            await asyncio.to_thread(thread.join, 60)
    assert "closed" not in {thread.name for thread in threading.enumerate()}
