"""Runs calls in threads of their own; a call that is given up leaves its thread behind."""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from enum import Enum
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")

# One that was told to stop and did not within this time is stuck.
_STUCK_AFTER_S = 0.5
_CLOSE_WITHIN_S = 2.0


class _State(Enum):
    QUEUED = "no thread has taken it"
    RUNNING = "a thread is in it"
    GIVEN_UP = "nobody waits for it"
    DONE = "its thread is free again"


class _Call(Generic[T]):
    def __init__(self, work: Callable[[], T]) -> None:
        self.work = work
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[T] = self.loop.create_future()
        self.state = _State.QUEUED
        self.thread: threading.Thread | None = None


class ExecutionThreads:
    """`count` calls at once; more of them wait in line.

    Not concurrent.futures: its threads are joined when the process ends, so that one stuck in
    native code would keep the process alive. These are daemons.
    """

    def __init__(self, name: str, count: int) -> None:
        self._name = name
        self._calls: SimpleQueue[_Call[Any] | None] = SimpleQueue()
        self._lock = threading.Lock()  # around every change of a call's state
        self._working = 0
        self._missing = 0  # places without a thread, as none could be started
        self._left_behind: dict[threading.Thread, float] = {}  # since when
        for _ in range(count):
            self._start_thread()

    @property
    def left_behind(self) -> int:
        """Threads whose call was given up and has not returned yet."""
        return len(self._left_behind)

    @property
    def stuck(self) -> int:
        """Those of them that had time to return."""
        if not self._left_behind:
            return 0
        with self._lock:
            until_s = time.monotonic() - _STUCK_AFTER_S
            return sum(since_s < until_s for since_s in self._left_behind.values())

    async def call(self, work: Callable[[], T], give_up: Callable[[], None]) -> T:
        """What `work` returns or raises, from one of the threads.

        Cancelling gives the call up. One that no thread has taken is never run. For one under way
        `give_up` is called, which should ask `work` to return soon, and another thread takes the
        place of the one it is in. Where the system lets none be started, the place is empty until
        it does or one of those left behind returns.
        """
        if self._missing:
            self._make_up()
        call = _Call(work)
        self._calls.put(call)
        try:
            return await call.future
        except asyncio.CancelledError:
            if self._leave_behind(call):
                give_up()
            raise

    async def close(self) -> None:
        """Let the threads end. No call may be waited for.

        Those left behind get `_CLOSE_WITHIN_S`: native code that returns into an interpreter which
        is going down aborts the process.
        """
        for _ in range(self._working):
            self._calls.put(None)
        self._working = self._missing = 0
        if self._left_behind:
            await asyncio.to_thread(_join, tuple(self._left_behind), _CLOSE_WITHIN_S)

    def _start_thread(self) -> None:
        threading.Thread(target=self._work, name=self._name, daemon=True).start()
        self._working += 1

    def _make_up(self) -> None:
        """Start the threads that could not be started before."""
        with self._lock:
            while self._missing:
                try:
                    self._start_thread()
                except RuntimeError:  # still none; it was logged
                    return
                self._missing -= 1

    def _leave_behind(self, call: _Call[T]) -> bool:
        """Whether a thread is still in the call, which is nobody's any more."""
        with self._lock:
            under_way = call.state is _State.RUNNING
            call.state = _State.GIVEN_UP
            if under_way and call.thread:
                self._left_behind[call.thread] = time.monotonic()
                self._working -= 1
                try:
                    self._start_thread()
                except RuntimeError as exc:  # "can't start new thread"
                    self._missing += 1
                    log.error("no thread for the next execution", exc_info=exc)
        return under_way

    def _work(self) -> None:
        while True:
            call = self._calls.get()
            if call is None:
                return
            if self._begins(call):
                _answer(call)
                if not self._may_go_on(call):
                    return
            del call  # or its tensors would stay until the next one comes

    def _begins(self, call: _Call[Any]) -> bool:
        with self._lock:
            if call.state is _State.GIVEN_UP:
                return False
            call.state = _State.RUNNING
            call.thread = threading.current_thread()
            return True

    def _may_go_on(self, call: _Call[Any]) -> bool:
        """Whether this thread has not been replaced meanwhile, or its place is empty."""
        with self._lock:
            if call.state is _State.GIVEN_UP:
                del self._left_behind[threading.current_thread()]
                if not self._missing:
                    return False
                self._missing -= 1
                self._working += 1
                return True
            call.state = _State.DONE
            return True


def _join(threads: Sequence[threading.Thread], at_most_s: float) -> None:
    until_s = time.monotonic() + at_most_s
    for thread in threads:
        thread.join(max(until_s - time.monotonic(), 0))


def _answer(call: _Call[T]) -> None:
    result: T | None = None
    error: BaseException | None = None
    try:
        result = call.work()
    except BaseException as exc:  # whatever it is, it belongs to the caller
        error = exc
    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
        call.loop.call_soon_threadsafe(_settle, call.future, result, error)


def _settle(
    future: "asyncio.Future[Any]", result: object | None, error: BaseException | None
) -> None:
    if future.done():  # given up meanwhile
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
