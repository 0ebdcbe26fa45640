"""The signs of life of event loops, on a page of memory that all workers and their parent share."""

import mmap
import os
import time
from typing import Self

BEAT_EVERY_S = 0.1


class Board:
    """A page of instants: the last beat of each worker's loop, and where the replay clock stands.

    One process writes an instant, the others read it without its help: a loop that does not run, or
    a process that is stopped, cannot answer. `descriptor` names the page in this process and stays
    the caller's.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        # One aligned store of eight bytes: a reader sees the old instant or the new one.
        self._instants = memoryview(mmap.mmap(descriptor, mmap.PAGESIZE)).cast("d")

    @classmethod
    def create(cls) -> Self:
        """A page of its own, on which nothing has been written yet."""
        descriptor = os.memfd_create("board")
        try:
            os.ftruncate(descriptor, mmap.PAGESIZE)
            return cls(descriptor)
        except OSError:
            os.close(descriptor)
            raise

    def heartbeat(self, place: int) -> "Heartbeat":
        """Of the worker at this place, counted from 0."""
        return Heartbeat(self._instants[2 * place : 2 * place + 2])

    @property
    def replay_instant(self) -> "memoryview[float]":
        """One cell; 0 until it is written."""
        return self._instants[-1:]


class Heartbeat:
    """The instant of the last beat of one loop, and whether it or one before it ever did."""

    def __init__(self, cells: "memoryview[float]") -> None:
        self._cells = cells

    def beat(self) -> None:
        self._cells[0] = self._cells[1] = time.monotonic()

    def forget(self) -> None:
        """Another loop will beat here."""
        self._cells[0] = 0

    @property
    def last_s(self) -> float | None:
        """On the monotonic clock, which all processes of a machine share; None before the first."""
        return self._cells[0] or None

    @property
    def has_beaten(self) -> bool:
        """Those that were forgotten count, too."""
        return self._cells[1] != 0


class Vigil:
    """Decides when a loop counts as stuck.

    Time in which the watcher itself did not run counts for nobody: after the whole container was
    suspended, or the machine too busy, the loop gets its full patience again.
    """

    def __init__(self, look_every_s: float, now_s: float) -> None:
        self._late_s = 2 * look_every_s
        self._looked_s = now_s
        self._awake_since_s = now_s

    def is_stuck(self, last_beat_s: float | None, patience_s: float, now_s: float) -> bool:
        """To be asked every `look_every_s`. A loop that has never beaten is still starting; with a
        patience of 0 nothing is ever stuck."""
        if now_s - self._looked_s > self._late_s:
            self._awake_since_s = now_s
        self._looked_s = now_s
        if last_beat_s is None or patience_s == 0:
            return False
        return now_s - max(last_beat_s, self._awake_since_s) > patience_s
