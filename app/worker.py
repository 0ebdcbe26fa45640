"""What a worker owes its parent: terms, a heartbeat, its stack when asked, and to end with it."""

import asyncio
import ctypes
import faulthandler
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Never

from app.config import Settings
from app.heartbeat import BEAT_EVERY_S, Heartbeat
from app.supervisor import Assignment, Terms

_PR_SET_PDEATHSIG = 1


class Parent:
    """The parent of this process, from `Assignment` on.

    When it is killed this process is, too: whoever takes its place finds the port free. A crash,
    and SIGUSR1, write the stack of every thread to it.
    """

    def __init__(self, assignment: Assignment) -> None:
        _end_with(assignment.parent)
        self.replaced = assignment.replaced
        self.listener = (
            None if assignment.listener is None else socket.socket(fileno=assignment.listener)
        )
        self._line = socket.socket(fileno=assignment.line)
        self._heartbeat = Heartbeat(assignment.heartbeat)
        for inherited in (self._line, self.listener):
            if inherited is not None:
                inherited.set_inheritable(False)  # what we start is none of their business
        os.close(assignment.heartbeat)
        # The signal is handled in C, whatever Python or native code the loop is stuck in.
        faulthandler.enable(self._line.fileno())
        faulthandler.register(signal.SIGUSR1, self._line.fileno())

    def tell(self, settings: Settings, listener: socket.socket) -> None:
        """What it needs to watch us and to replace us."""
        terms = Terms(settings.stuck_s, settings.drain_s, settings.log_level)
        given = [listener.fileno()] if self.listener is None else []
        socket.send_fds(self._line, [terms.as_line()], given)

    @asynccontextmanager
    async def beating(self, tell_lag: Callable[[float], None]) -> AsyncIterator[None]:
        """We are ready and our loop runs. `tell_lag` is told how late each beat was, in s."""
        task = asyncio.create_task(beat(self._heartbeat, tell_lag), name="heartbeat")
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
