"""Whether a list of the workers that live can be believed."""

import math
import time

from app.release.state import StateUnavailable

# Workers tell of themselves four times a second, and after an interruption every half second.
_INTERRUPTED_S = 1.0
_SETTLED_S = 1.5


class Presence:
    """After an interruption, in which nobody could tell of itself, the others seem to be gone until
    they have had time for a word."""

    def __init__(self) -> None:
        self._told_s: float | None = None
        self._settled_s = 0.0

    def told(self) -> None:
        """We have told of ourselves."""
        now_s = time.monotonic()
        if self._told_s is not None and now_s - self._told_s > _INTERRUPTED_S:
            self._settled_s = now_s + _SETTLED_S
        self._told_s = now_s

    def interrupted(self) -> None:
        """What we and the others told may be lost."""
        if self._told_s is not None:
            self._told_s = -math.inf

    def require_settled(self) -> None:
        """Raises `StateUnavailable` while others may be missing."""
        now_s = time.monotonic()
        silent = self._told_s is not None and now_s - self._told_s > _INTERRUPTED_S
        if silent or now_s < self._settled_s:
            raise StateUnavailable("after an interruption it is not known yet which workers live")
