"""A circuit breaker: while what we depend on is down nobody waits for it, and one probe at a time
finds out when it is back."""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable

log = logging.getLogger(__name__)

_FIRST_WAIT_S = 0.05
_WAITS_S = (0.1, 0.25)


class StillDown(Exception):
    """A probe found that it is not back; the text says why."""


class CircuitBreaker:
    """Closed until `open` is called; closes when `probe` succeeds, which raises `StillDown` else.

    Probes run one after the other, 100 to 250 ms apart: spread out, so that the workers of a fleet
    do not come back in step.
    """

    def __init__(self, probe: Callable[[], Awaitable[None]]) -> None:
        self._probe = probe
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
                return
            await asyncio.sleep(random.uniform(*_WAITS_S))

    async def close(self) -> None:
        """End the probes."""
        if self._recovery is not None:
            self._recovery.cancel()
            await asyncio.wait({self._recovery})
