"""Deadlines: instants on the monotonic clock, and the one sweep that enforces them."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from app.errors import DeadlineExceeded

log = logging.getLogger(__name__)


@dataclass(slots=True)  # made for every request; a frozen one takes 1 µs longer to make
class Deadline:
    """An instant on the monotonic clock, in seconds."""

    at_s: float

    @classmethod
    def after(cls, timeout_s: float) -> "Deadline":
        return cls(time.monotonic() + timeout_s)

    def remaining_s(self) -> float:
        """Seconds left; negative once it has passed."""
        return self.at_s - time.monotonic()

    def check(self) -> float:
        """What time it is, monotonic seconds. Raises `DeadlineExceeded` once it has passed."""
        now_s = time.monotonic()
        if now_s >= self.at_s:
            raise DeadlineExceeded("the deadline passed before the answer")
        return now_s

    def share(self, fraction: float) -> "Deadline":
        """The earlier instant that leaves `1 - fraction` of the remaining time for what follows."""
        now_s = time.monotonic()
        return Deadline(now_s + (self.at_s - now_s) * fraction)


class Watched(Protocol):
    """What has a deadline: a future, or what behaves like one."""

    def done(self) -> bool: ...

    def set_exception(self, error: Exception, /) -> None: ...

    def cancel(self) -> object: ...


class DeadlineSweep:
    """Fails the futures whose deadline has passed: one timer per worker, not one per request.

    A watched future gets `DeadlineExceeded` at most `interval_s` after its deadline; a future that
    is done is forgotten. The timer runs only while something is watched. `now_s` is the clock of
    the deadlines.
    """

    def __init__(
        self, interval_s: float = 0.005, now_s: Callable[[], float] = time.monotonic
    ) -> None:
        self._interval_s = interval_s
        self._now_s = now_s
        self._watched: list[tuple[Deadline, Watched]] = []
        self._timer: asyncio.TimerHandle | None = None

    def watch(self, future: Watched, deadline: Deadline) -> None:
        self._watched.append((deadline, future))
        if self._timer is None:
            self._arm()

    def _arm(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._interval_s, self._sweep)

    def _sweep(self) -> None:
        self._timer = None
        watched, self._watched = self._watched, []
        still = list(self._still_waiting(watched))
        self._watched = still + self._watched
        if self._watched and self._timer is None:
            self._arm()

    def _still_waiting(
        self, watched: Iterable[tuple[Deadline, Watched]]
    ) -> Iterator[tuple[Deadline, Watched]]:
        now_s = self._now_s()
        for deadline, future in watched:
            if future.done():
                continue
            if deadline.at_s > now_s:
                yield deadline, future
                continue
            try:
                future.set_exception(DeadlineExceeded("the deadline passed before the answer"))
            except Exception:  # a defect of whoever waits must not take the others' deadlines away
                log.exception("could not be told that its deadline passed")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop; what is still watched is cancelled."""
        if self._timer is not None:
            self._timer.cancel()
        for _, future in self._watched:
            future.cancel()
        self._watched.clear()
