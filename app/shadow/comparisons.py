"""What all workers have counted of the candidates: written every second, read when it is asked."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import reduce
from operator import add
from types import TracebackType
from typing import Any, Self, TypeAlias

from app.comparison.document import comparison_document
from app.comparison.table import ComparisonTable
from app.release.state import ReleaseState, ShadowState, StateUnavailable, WorkerReport
from app.release.tables import Additive, Kinds, StoredTable, TableStore
from app.served_model import ServedModel
from app.shadow.block import decision_numbers
from app.shadow.shadow import Shadow
from app.shadow.trial import Records, TrialId
from app.tasks import ended

log = logging.getLogger(__name__)

KIND = "comparison"
_WRITE_EVERY_S = 1.0
_TIDY_EVERY_S = 30.0
_KEPT_TRIALS = 8
"""Of those of a model that have ended."""

States: TypeAlias = Callable[[], Mapping[str, ReleaseState]]
Quality: TypeAlias = Callable[[str], Awaitable[dict[str, Any] | None]]
TABLE_KINDS: Kinds = {KIND: ComparisonTable.decode}


class Comparisons:
    """The shadow of every model in this worker, and its tables in the store; an async context
    manager, which writes what is left when it is left itself.

    `models` are those that serve, `states` the release states by model, as far as they are known
    here; `quality` says how good a model's predictions were, as JSON; `feature_now_s` says feature
    time, seconds since 1970.
    """

    def __init__(
        self,
        tables: TableStore,
        models: Mapping[str, ServedModel | None],
        states: States,
        records: Records,
        quality: Quality,
        feature_now_s: Callable[[], float],
        others: Callable[[], Mapping[str, Additive]] = dict,
    ) -> None:
        """`others` gives what else was counted since it was asked the last time, by the names of
        its tables: a store is written once a second, with everything."""
        self._others = others
        self._tables = tables
        self._models = models
        self._states = states
        self._records = records
        self._quality = quality
        self._metrics = records.metrics
        self._feature_now_s = feature_now_s
        self._shadows: dict[str, Shadow] = {}
        self._writing: asyncio.Task[None] | None = None
        self._fault = ""

    def shadow(self, model: str) -> Shadow:
        """Of this model, the same one every time."""
        if model not in self._shadows:
            shadow = self._shadows[model] = Shadow(self._records, self._feature_now_s)
            pending = self._metrics.shadow_pending_rows.labels(model)
            pending.set_function(lambda: float(shadow.pending_rows))
        return self._shadows[model]

    async def document(self, model: str) -> dict[str, Any]:
        """What all workers of all replicas have counted of the candidates that are shown what its
        champion answers, as JSON. Raises `StateUnavailable`."""
        stored = await self._tables.read(f"{KIND}:{model}:")
        state = self._states()[model]
        champion = state.champion
        assert champion is not None  # a model that is followed serves
        served = self._models[model]
        names = () if served is None else tuple(decision_numbers(served.contract))[1:]
        candidates = [
            await asyncio.to_thread(_described, stored, model, state, shown, names)
            for shown in state.shadows
        ]
        return {
            "model": model,
            "output": None if served is None else served.contract.score,
            "threshold": None if served is None else served.contract.threshold,
            "champion": {"version": str(champion.version), "sha256": champion.sha256},
            "candidates": candidates,
            "quality": await self._quality(model),
        }

    @asynccontextmanager
    async def tidied(
        self, workers: Callable[[], Awaitable[Sequence[WorkerReport]]]
    ) -> AsyncIterator[None]:
        """Until the block ends the tables of workers that are gone are put together, and those of
        trials that ended long ago removed. `workers` are those that live."""
        tidying = asyncio.create_task(self._tidy_often(workers), name="tidy comparisons")
        try:
            yield
        finally:
            await ended(tidying)

    async def __aenter__(self) -> Self:
        self._writing = asyncio.create_task(self._write_often(), name="comparisons")
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._writing is not None:
            await ended(self._writing)
        await self._write()
        await self._records.pair_log.close()

    async def _write_often(self) -> None:
        while True:
            await asyncio.sleep(_WRITE_EVERY_S)
            try:
                await self._write()
            except Exception:  # a defect: it must not end what follows
                log.exception("what was counted of candidates could not be written")

    async def _tidy_often(self, workers: Callable[[], Awaitable[Sequence[WorkerReport]]]) -> None:
        while True:
            await asyncio.sleep(_TIDY_EVERY_S)
            try:
                await self._tables.fold([report.worker for report in await workers()])
                for model, state in self._states().items():
                    await self._remove_old(model, state)
            except StateUnavailable as exc:
                log.info("tables are not tidied now", extra={"reason": str(exc)})
            except Exception:  # a defect: it must not end what follows
                log.exception("tables could not be tidied")

    async def _remove_old(self, model: str, state: ReleaseState) -> None:
        """All but the trials that began last, and those that go on."""
        begun = {shown.began for shown in state.shadows}
        names = await self._tables.read(f"{KIND}:{model}:")
        over = [name for name in names if TrialId.began_of(name) not in begun]
        for name in sorted(over, key=TrialId.began_of)[:-_KEPT_TRIALS]:
            await self._tables.remove(name)

    async def _write(self) -> None:
        counted: dict[str, Additive] = {
            _name(model, trial): table
            for model, shadow in self._shadows.items()
            for trial, table in shadow.take().items()
        }
        counted |= self._others()
        try:
            try:
                await self._records.pair_log.append(self._tables.next_write)
            finally:  # also when it is cancelled: what was taken is nowhere else
                await self._tables.write(counted)
        except StateUnavailable as exc:
            self._metrics.unwritten_comparisons.inc()
            if str(exc) != self._fault:  # it is tried again every second
                log.warning("what was counted of candidates waits", extra={"reason": str(exc)})
            self._fault = str(exc)
        else:
            self._fault = ""


def _name(model: str, trial: TrialId) -> str:
    return f"{KIND}:{model}:{trial}"


def _described(
    stored: Mapping[str, StoredTable],
    model: str,
    state: ReleaseState,
    shown: ShadowState,
    decisions: Sequence[bool | str],
) -> dict[str, Any]:
    """The trial of the present champion with this candidate; of several, by different contracts,
    the one that was counted last. `decisions` are the names of the numbered ones."""
    champion = state.champion
    assert champion is not None
    prefix = f"{KIND}:{model}:{TrialId.prefix(champion, shown.chosen, shown.began)}"
    tables = {
        name: reduce(add, map(ComparisonTable.decode, table.contents))
        for name, table in stored.items()
        if name.startswith(prefix) and table.contents
    }
    latest = max(tables, key=lambda name: tables[name].last_s, default=None)
    return {
        "version": str(shown.chosen.version),
        "sha256": shown.chosen.sha256,
        "share": shown.share,
        "trial": None if latest is None else latest.removeprefix(f"{KIND}:{model}:"),
        "writes": {} if latest is None else stored[latest].writes,
        "comparison": None if latest is None else comparison_document(tables[latest], decisions),
    }
