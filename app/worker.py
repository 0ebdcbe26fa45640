"""What a worker owes its parent: terms, a heartbeat, its stack when asked, and to end with it."""

import asyncio
import ctypes
import faulthandler
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Never

from app.config import Settings
from app.heartbeat import BEAT_EVERY_S, Board, Heartbeat
from app.supervisor import Assignment, Terms
from app.telemetry.tally import Tallies

BACKLOG = 2048
_PR_SET_PDEATHSIG = 1


class Parent:
    """The parent of this process, from `Assignment` on.

    When it is killed this process is, too: whoever takes its place finds the port free. A crash,
    and SIGUSR1, write the stack of every thread to it.
    """

    def __init__(self, assignment: Assignment) -> None:
        _end_with(assignment.parent)
        self.place = assignment.place
        """Which of the workers we are, counted from 0."""
        self.replaced = assignment.replaced
        self.listener = (
            None if assignment.listener is None else socket.socket(fileno=assignment.listener)
        )
        self.board = Board(assignment.board)
        self._line = socket.socket(fileno=assignment.line)
        self._tallies = assignment.tallies
        for inherited in (self._line.fileno(), assignment.tallies, assignment.listener):
            if inherited is not None:
                os.set_inheritable(inherited, False)  # what we start is none of their business
        os.close(assignment.board)
        # The signal is handled in C, whatever Python or native code the loop is stuck in.
        faulthandler.enable(self._line.fileno())
        faulthandler.register(signal.SIGUSR1, self._line.fileno())

    def tell(self, settings: Settings, listeners: Sequence[socket.socket]) -> None:
        """What it needs to watch us and to replace us; `listeners`, one for each worker, are those
        that we have bound, and none but the first stays open here.

        That one listens from now on, so that whoever asks waits until we serve. One that we were
        given is to listen once we do: meanwhile connections go to others."""
        if self.listener is None:
            listeners[0].listen(BACKLOG)
        terms = Terms(settings.workers, settings.stuck_s, settings.drain_s, settings.log_level)
        given = [] if self.listener else [listener.fileno() for listener in listeners]
        socket.send_fds(self._line, [terms.as_line()], given)
        for listener in listeners[1:]:
            listener.close()

    def tallies(self, workers: int) -> Tallies:
        """Where so many workers count, we among them."""
        return Tallies.shared(self._tallies, self.place, workers)

    def missing(self, workers: int) -> list[str]:
        """Which of so many workers have not been ready yet, beside us. One that was and is replaced
        does not make the others unready, nor those that replace them."""
        others = [place for place in range(workers) if place != self.place]
        missing = [place for place in others if not self.board.heartbeat(place).has_beaten]
        return [f"worker {place + 1}: not ready yet" for place in missing]

    @asynccontextmanager
    async def beating(self, tell_lag: Callable[[float], None]) -> AsyncIterator[None]:
        """We are ready and our loop runs. `tell_lag` is told how late each beat was, in s."""
        heartbeat = self.board.heartbeat(self.place)
        task = asyncio.create_task(beat(heartbeat, tell_lag), name="heartbeat")
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


async def beat(heartbeat: Heartbeat, tell_lag: Callable[[float], None]) -> Never:
    """At once, and ten times a second from then on, as long as the loop runs."""
    while True:
        heartbeat.beat()
        due_s = time.monotonic() + BEAT_EVERY_S
        await asyncio.sleep(BEAT_EVERY_S)
        tell_lag(max(0.0, time.monotonic() - due_s))


def _end_with(parent: int) -> None:
    """The kernel kills us when the parent is gone."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it went before the call
        os.kill(os.getpid(), signal.SIGKILL)
