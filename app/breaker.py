"""A circuit breaker: while what we depend on is down nobody waits for it, and one probe at a time
finds out when it is back."""

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable

log = logging.getLogger(__name__)

_FIRST_WAIT_S = 0.05
_WAITS_S = (0.1, 0.25)
_TELL_AT_MOST, _TELL_WITHIN_S = 10, 60.0


class StillDown(Exception):
    """A probe found that it is not back; the text says why."""


class CircuitBreaker:
    """Closed until `open` is called; closes when `probe` succeeds, which raises `StillDown` else.

    Probes run one after the other, 100 to 250 ms apart: spread out, so that the workers of a fleet
    do not come back in step. `name` says in the log what it is that is down.
    """

    def __init__(self, name: str, probe: Callable[[], Awaitable[None]]) -> None:
        self._name = name
        self._probe = probe
        self._opened_s = 0.0
        self._told_s: list[float] = []
        self._untold = 0
        self._reason = ""
        self._recovery: asyncio.Task[None] | None = None

    @property
    def is_open(self) -> bool:
        return self._recovery is not None

    @property
    def reason(self) -> str:
        """Why it is open: what the last probe met, or what opened it."""
        return self._reason

    def open(self, reason: str) -> None:
        """Ask nothing of it until a probe succeeds; while it is open this changes nothing."""
        if self._recovery is None:
            self._reason = reason
            self._opened_s = time.monotonic()
            self._tell("it is down: it is not asked until a probe succeeds", reason=reason)
            self._recovery = asyncio.create_task(self._recover(), name="circuit breaker probes")

    async def _recover(self) -> None:
        await asyncio.sleep(_FIRST_WAIT_S * random.random())
        while True:
            try:
                await self._probe()
            except StillDown as exc:
                self._reason = str(exc)
            except Exception as exc:  # a defect; without probes it would stay open for ever
                log.error("the probe failed", exc_info=exc)
                self._reason = f"the probe failed: {type(exc).__name__}"
            else:
                self._recovery = None
                down_s = round(time.monotonic() - self._opened_s, 3)
                self._tell("it is back", down_s=down_s, untold=self._untold)
                return
            await asyncio.sleep(random.uniform(*_WAITS_S))

    def _tell(self, event: str, **details: object) -> None:
        """Log what happened, at most a few times a minute: what flaps must not fill a disk."""
        now_s = time.monotonic()
        self._told_s = [told_s for told_s in self._told_s if now_s - told_s < _TELL_WITHIN_S]
        if len(self._told_s) >= _TELL_AT_MOST:
            self._untold += 1
            return
        self._told_s.append(now_s)
        self._untold = 0
        log.warning(event, extra={"what": self._name, **details})

    async def close(self) -> None:
        """End the probes."""
        if self._recovery is not None:
            self._recovery.cancel()
            await asyncio.wait({self._recovery})
