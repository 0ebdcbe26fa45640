"""Tells events to receivers: each has a queue of its own, and nobody waits for it."""

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, NamedTuple, Protocol, Self, TypeAlias
from urllib.parse import quote

from app.events.addresses import ForbiddenAddress, Reach
from app.events.delivery import (
    Answer,
    Delivery,
    Unreachable,
    system_addresses,
    trusted_authorities,
)
from app.events.event import CONTENT_TYPE, Event
from app.events.receivers import receivers_of
from app.events.signing import Signer
from app.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

Outcome: TypeAlias = Literal[
    "delivered", "retried", "refused", "forbidden", "given_up", "dropped", "lost", "unsent"
]
OUTCOMES: tuple[Outcome, ...] = (
    *("delivered", "retried", "refused", "forbidden", "given_up", "dropped", "lost", "unsent"),
)
_AGAIN = {408, 425, 429}
_MOST_RETRY_AFTER_S = 300.0


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a receiver is borne with."""

    attempt_s: float = 15.0
    delays_s: Sequence[float] = (1, 5, 25, 125, 625)
    """Before each further attempt; one is up to half as long again, or shorter by as much."""
    most_waiting: int = 256
    """Events: of more, those that have waited longest are dropped."""
    drain_s: float = 2.0
    """At the end, with one attempt for each event."""


class Webhooks:
    """Tells every event to all receivers, as an async context manager. Leaving waits until all are
    told, for as long as the patience says."""

    def __init__(
        self,
        deliveries: Sequence[Delivery],
        signer: Signer,
        source: str,
        metrics: Metrics,
        patience: Patience | None = None,
    ) -> None:
        self._source = source
        self._metrics = metrics
        self._patience = patience or Patience()
        self._lines = [
            _Line(delivery, signer, self._patience, self._count) for delivery in deliveries
        ]
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        for outcome in OUTCOMES:  # a rule sees the first one only where there was a 0 before
            self._metrics.webhook_deliveries.labels(outcome).inc(0)
        waiting = self._metrics.webhook_waiting_events.labels()
        waiting.set_function(lambda: sum(line.waiting for line in self._lines))
        self._tasks = [
            asyncio.create_task(line.run(), name=f"webhook {line.host}") for line in self._lines
        ]
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for line in self._lines:
            line.close()
        await asyncio.wait(self._tasks, timeout=self._patience.drain_s)
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)
        for line in self._lines:
            await line.closed()

    def tell(self, event: Event) -> None:
        try:
            message = _Message(event.id, event.type, event.encode(self._source))
        except Exception as exc:  # who decides on a release must not fail for what is told of it
            self._count("unsent")
            log.exception("an event cannot be told", exc_info=exc, extra={"type": event.type})
            return
        for line in self._lines:
            line.offer(message)

    def _count(self, outcome: Outcome) -> None:
        self._metrics.webhook_deliveries.labels(outcome).inc()


class _Message(NamedTuple):
    id: str
    type: str
    body: bytes


class _Count(Protocol):
    def __call__(self, outcome: Outcome) -> None: ...


class _Line:
    """What one receiver is still to be told, in order."""

    def __init__(
        self, delivery: Delivery, signer: Signer, patience: Patience, count: _Count
    ) -> None:
        self._delivery = delivery
        self._signer = signer
        self._patience = patience
        self._count = count
        self._queue: deque[_Message] = deque()
        self._under_way: _Message | None = None
        self._queued = asyncio.Event()
        self._closing = asyncio.Event()

    @property
    def host(self) -> str:
        return self._delivery.receiver.host

    @property
    def waiting(self) -> int:
        """Events, the one that is under way among them."""
        return len(self._queue) + (self._under_way is not None)

    def offer(self, message: _Message) -> None:
        if len(self._queue) >= self._patience.most_waiting:
            self._ended(self._queue.popleft(), "dropped", "too many events wait")
        self._queue.append(message)
        self._queued.set()

    async def run(self) -> None:
        """Until it is closed and the queue is empty."""
        while self._queue or not self._closing.is_set():
            if self._queue:
                self._under_way = self._queue.popleft()
                self._ended(self._under_way, *await self._deliver(self._under_way))
                self._under_way = None
            else:
                self._queued.clear()
                await self._queued.wait()

    def close(self) -> None:
        """No delays any more, and one attempt for each event."""
        self._closing.set()
        self._queued.set()

    async def closed(self) -> None:
        """Once `run` has ended: give up what it has left."""
        under_way = [] if self._under_way is None else [self._under_way]
        for message in (*under_way, *self._queue):
            self._ended(message, "lost", "the process ended")
        self._queue.clear()
        self._under_way = None
        await self._delivery.close()

    async def _deliver(self, message: _Message) -> tuple[Outcome, str]:
        """What became of it, and why."""
        for delay_s in self._patience.delays_s:
            outcome, reason, asked_s = await self._attempt(message)
            if outcome != "retried" or self._closing.is_set():
                break
            self._count("retried")
            await self._pause(max(delay_s * random.uniform(0.5, 1.5), asked_s))
        else:
            outcome, reason, _ = await self._attempt(message)
        return ("given_up" if outcome == "retried" else outcome), reason

    async def _attempt(self, message: _Message) -> tuple[Outcome, str, float]:
        """`retried` where another attempt is worth while; the third is how long the receiver asks
        to be left alone."""
        headers = {"content-type": CONTENT_TYPE, "user-agent": "hikyaku"}
        headers |= self._signer.headers(message.id, message.body, time.time())
        within_s = self._patience.attempt_s
        try:
            answer = await self._delivery.attempt(headers, message.body, within_s)
        except ForbiddenAddress as exc:
            return "forbidden", str(exc), 0.0
        except Unreachable as exc:
            return "retried", str(exc), 0.0
        except Exception as exc:  # the next event may fare better; its text may quote a header
            return "given_up", type(exc).__name__, 0.0
        return _outcome(answer)

    async def _pause(self, delay_s: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(delay_s):
                await self._closing.wait()

    def _ended(self, message: _Message, outcome: Outcome, reason: str) -> None:
        self._count(outcome)
        if outcome != "delivered":
            extra: Mapping[str, str] = {
                "host": self.host,
                "event_id": message.id,
                "type": message.type,
                "outcome": outcome,
                "reason": reason,
            }
            log.warning("an event was not delivered", extra=extra)


def _outcome(answer: Answer) -> tuple[Outcome, str, float]:
    reason = f"answered {answer.status}"
    if 200 <= answer.status < 300:
        return "delivered", reason, 0.0
    if answer.status >= 500 or answer.status in _AGAIN:
        return "retried", reason, min(answer.retry_after_s or 0.0, _MOST_RETRY_AFTER_S)
    return "refused", reason, 0.0


def open_webhooks(
    urls: str, hosts: str, networks: str, secret: str, worker: str, metrics: Metrics
) -> Webhooks:
    """Of the settings of these names. Raises `ConfigurationError`."""
    receivers = receivers_of(urls, hosts)
    reach = Reach.of(networks)
    signer = Signer.of(secret)
    authorities = trusted_authorities()
    deliveries = [Delivery(each, reach, system_addresses, authorities) for each in receivers]
    return Webhooks(deliveries, signer, f"urn:hikyaku:{quote(worker)}", metrics)
