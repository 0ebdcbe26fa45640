"""Feature time: the clock by which feature values age.

Deadlines and queues never use it: they run on the monotonic clock (app/deadline.py).
"""

import time
from collections.abc import MutableSequence
from datetime import UTC, datetime
from typing import Protocol

from app.errors import Conflict, InvalidInput

_LAST_YEAR = 9000


class FeatureClock(Protocol):
    """Says what time it is for the age of a feature value."""

    def now_s(self) -> float:
        """Seconds since 1970-01-01 UTC."""
        ...


class WallClock:
    """The real time: what production uses."""

    def now_s(self) -> float:
        return time.time()


class ReplayClock:
    """Stands still at an instant of the past until the replay driver advances it."""

    def __init__(
        self, start: datetime, instant: "MutableSequence[float] | memoryview[float] | None" = None
    ) -> None:
        """`start` must carry a time zone. `instant` is one cell that several clocks may share, 0
        until the first of them starts: only that one writes its start there."""
        self._instant = [0.0] if instant is None else instant
        if not self._instant[0]:
            self._instant[0] = start.timestamp()

    def now_s(self) -> float:
        return self._instant[0]

    def advance(self, to: datetime) -> None:
        """Raises `Conflict` when `to` lies before the current instant: time only advances; and
        `InvalidInput` for an instant beyond year 9999.

        Of two processes that advance a shared instant at once, either may be the last: it stands
        at one of their instants then, and never before where it stood when they began. With one
        caller, who waits for the answer, it never goes back."""
        if to.year > _LAST_YEAR:
            raise InvalidInput(f"now: not after {_LAST_YEAR}", field="now")
        to_s = to.timestamp()
        if to_s < self.now_s():
            raise Conflict(f"the replay clock is at {as_rfc3339(self.now_s())} and only advances")
        self._instant[0] = to_s


_FIRST_S = datetime(1, 1, 2, tzinfo=UTC).timestamp()
_LAST_S = datetime(9999, 12, 31, tzinfo=UTC).timestamp()


def as_rfc3339(at_s: float) -> str:
    """`1388534340.0` → `2013-12-31T23:59:00Z`; beyond the years 1 to 9999 it is their end."""
    at_s = min(max(at_s, _FIRST_S), _LAST_S)
    return datetime.fromtimestamp(at_s, UTC).isoformat().replace("+00:00", "Z")
