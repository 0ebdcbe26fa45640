"""An event loop whose time is moved by hand, so that what happens when is the test's choice."""

import asyncio
import contextlib
import selectors
from collections.abc import Iterator, Mapping
from typing import Any


class VirtualLoop(asyncio.SelectorEventLoop):
    """Runs what is ready, in asyncio's own order; timers fire when `now_s` has been moved to them.

    `turn` and `settle` leave the time alone. `run_until_complete` moves it to the next timer
    whenever nothing else can happen, and raises `EverybodyWaits` where there is no timer either.
    `reports` keeps what the loop's exception handler was told. There are no sockets and no threads.
    """

    def __init__(self) -> None:
        self.now_s = 0.0
        self.reports: list[str] = []
        self._clockwork = _Clockwork(self)
        super().__init__(self._clockwork)
        self.set_exception_handler(self._keep)

    def time(self) -> float:
        return self.now_s

    def turn(self) -> None:
        """One turn: what is ready now runs, what that makes ready does not."""
        self.stop()
        self.run_forever()

    def settle(self) -> None:
        """Turns until nothing is ready at this time."""
        self._clockwork.stops_when_quiet = True
        try:
            self.run_forever()
        finally:
            self._clockwork.stops_when_quiet = False

    def _keep(self, _: asyncio.AbstractEventLoop, context: Mapping[str, Any]) -> None:
        self.reports.append(f"{context['message']}: {context.get('exception')!r}")


class EverybodyWaits(Exception):
    """Nothing is ready and no timer is set: what is awaited never comes."""


class _Clockwork(selectors.SelectSelector):
    """Where a loop would sleep until a socket or a timer, this moves its time."""

    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop
        self.stops_when_quiet = False

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is not None and timeout <= 0:
            return []
        if self.stops_when_quiet:
            self._loop.stop()
        elif timeout is None:
            raise EverybodyWaits
        else:
            self._loop.now_s += timeout
        return []


@contextlib.contextmanager
def virtual_loop() -> Iterator[VirtualLoop]:
    """A loop of its own, closed at the end."""
    loop = VirtualLoop()
    try:
        yield loop
    finally:
        loop.close()
