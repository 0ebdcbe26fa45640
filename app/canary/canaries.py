"""The canaries of all models in this worker, settled once a second; an async context manager."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from functools import partial
from types import TracebackType
from typing import Self

from app.canary.canary import Canary
from app.canary.first_seen import FirstSeen
from app.canary.table import KIND, ExposureTable, began_of
from app.release.state import StateUnavailable
from app.release.tables import TableStore
from app.tasks import ended
from app.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

_CLAIM_EVERY_S = 0.01
"""Each time costs some 0.1 ms."""
_SETTLE_EVERY_S = 1.0
_TIDY_EVERY_S = 30.0
_KEPT_STAGES = 16
"""Of those of a model that are over."""


class Canaries:
    """`canaries` is where requests look their model's up, by its name."""

    def __init__(
        self,
        canaries: MutableMapping[str, Canary],
        first_seen: FirstSeen,
        tables: TableStore,
        metrics: Metrics,
    ) -> None:
        self._canaries = canaries
        self._first_seen = first_seen
        self._tables = tables
        self._metrics = metrics
        self._begun = asyncio.Event()
        """There is something to claim."""
        self._tasks: list[asyncio.Task[None]] = []

    def canary(self, model: str) -> Canary:
        """Of this model, the same one every time."""
        if model not in self._canaries:
            self._canaries[model] = Canary(model, self._first_seen, self._metrics, self._begun.set)
        return self._canaries[model]

    def take(self) -> Mapping[str, ExposureTable]:
        """What was counted since it was taken the last time, by the name of the table."""
        return {
            name: table
            for canary in self._canaries.values()
            for name, table in canary.take().items()
        }

    async def __aenter__(self) -> Self:
        for work in (self._claim_often(), self._settle_often()):
            self._tasks.append(asyncio.create_task(work, name="canaries"))
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for task in self._tasks:
            await ended(task)
        await self._each(partial(Canary.settle, is_last=True))

    async def tidy(self) -> None:
        """Remove what was counted of stages that ended long ago. Raises `StateUnavailable`."""
        for model, canary in tuple(self._canaries.items()):
            names = await self._tables.read(f"{KIND}:{model}:")
            over = [name for name in names if began_of(name) not in canary.stages]
            for name in sorted(over, key=began_of)[:-_KEPT_STAGES]:
                await self._tables.remove(name)

    async def _claim_often(self) -> None:
        while True:
            await self._begun.wait()
            self._begun.clear()
            await self._each(Canary.claim)
            await asyncio.sleep(_CLAIM_EVERY_S)

    async def _settle_often(self) -> None:
        tidied_s = time.monotonic()
        while True:
            await asyncio.sleep(_SETTLE_EVERY_S)
            await self._each(Canary.settle)
            if time.monotonic() - tidied_s >= _TIDY_EVERY_S:
                tidied_s = time.monotonic()
                await self._tidy()

    async def _tidy(self) -> None:
        try:
            await self.tidy()
        except StateUnavailable as exc:
            log.info("exposures are not tidied now", extra={"reason": str(exc)})
        except Exception:  # a defect: it must not end what follows
            log.exception("exposures could not be tidied")

    async def _each(self, do: Callable[[Canary], Awaitable[None]]) -> None:
        for name, canary in tuple(self._canaries.items()):
            try:
                await do(canary)
            except Exception:  # a defect: it must not end what follows
                log.exception("exposures could not be counted", extra={"model": name})
