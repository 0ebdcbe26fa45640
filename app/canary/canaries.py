"""The canaries of all models in this worker, settled once a second; an async context manager."""

import asyncio
import logging
import time
from collections.abc import Mapping, MutableMapping
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
        self._settling: asyncio.Task[None] | None = None

    def canary(self, model: str) -> Canary:
        """Of this model, the same one every time."""
        if model not in self._canaries:
            self._canaries[model] = Canary(model, self._first_seen, self._metrics)
        return self._canaries[model]

    def take(self) -> Mapping[str, ExposureTable]:
        """What was counted since it was taken the last time, by the name of the table."""
        return {
            name: table
            for canary in self._canaries.values()
            for name, table in canary.take().items()
        }

    async def __aenter__(self) -> Self:
        self._settling = asyncio.create_task(self._settle_often(), name="canaries")
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._settling is not None:
            await ended(self._settling)
        await self._settle()

    async def tidy(self) -> None:
        """Remove what was counted of stages that ended long ago. Raises `StateUnavailable`."""
        for model, canary in self._canaries.items():
            names = await self._tables.read(f"{KIND}:{model}:")
            over = [name for name in names if began_of(name) not in canary.stages]
            for name in sorted(over, key=began_of)[:-_KEPT_STAGES]:
                await self._tables.remove(name)

    async def _settle_often(self) -> None:
        tidied_s = time.monotonic()
        while True:
            await asyncio.sleep(_SETTLE_EVERY_S)
            await self._settle()
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

    async def _settle(self) -> None:
        for name, canary in self._canaries.items():
            try:
                await canary.settle()
            except Exception:  # a defect: it must not end what follows
                log.exception("exposures could not be counted", extra={"model": name})
