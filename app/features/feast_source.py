"""Reads features through the Feast SDK, from any online store that it supports."""

import asyncio
import logging
from collections.abc import Sequence
from datetime import datetime
from typing import Any, TypeAlias

import numpy as np
from feast import FeatureStore
from feast.errors import FeastObjectNotFoundException
from feast.feature_view import DUMMY_ENTITY_ID, DUMMY_ENTITY_VAL
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from feast.type_map import python_values_to_proto_values
from feast.utils import make_tzaware

from app.clock import FeatureClock
from app.deadline import Deadline
from app.errors import FeaturesUnavailable, InvalidModel
from app.features.feast_plan import find_view
from app.features.feast_values import column_of, nulls
from app.features.plan import NO_ENTITY, FeaturePlan, PlannedView
from app.features.source import (
    MAX_AHEAD_S,
    EntityColumns,
    FeatureRows,
    ValueStatus,
    all_with_status,
)

log = logging.getLogger(__name__)

_Row: TypeAlias = tuple[datetime | None, dict[str, Value] | None]
"""What Feast's stores answer for one entity of a view."""


class FeastSource:
    """The stored features of one plan, read with `OnlineStore.online_read`, view by view.

    That is what `FeatureStore.get_online_features` does with an online store, and what Feast asks
    of each; but it says which rows are there, it knows the views by the plan, and values that only
    on-demand views read can be shown too. Raises `InvalidModel` when the registry does not have
    what the plan reads.
    """

    def __init__(self, store: FeatureStore, plan: FeaturePlan, clock: FeatureClock) -> None:
        self._config = store.config
        self._provider = store._get_provider()  # the only way to the store's own connection
        self._plan = plan
        self._clock = clock
        try:
            self._views = [_ViewRead(store, plan, view) for view in plan.views]
        except FeastObjectNotFoundException as exc:
            raise InvalidModel(f"the registry has no {plan.feature_service!r}: {exc}") from exc
        self._reads_async = store.config.online_store.type == "redis"

    @property
    def plan(self) -> FeaturePlan:
        return self._plan

    async def fetch(self, entities: EntityColumns, rows: int, deadline: Deadline) -> FeatureRows:
        asked = [view.ask(entities, rows) for view in self._views]
        remaining_s = deadline.remaining_s()
        try:
            async with asyncio.timeout(remaining_s):
                answers = await self._read([keys for keys, _ in asked])
        except TimeoutError:
            raise FeaturesUnavailable(
                f"the feature store did not answer within {max(0, remaining_s) * 1000:.0f} ms"
            ) from None
        except Exception as exc:  # every store that Feast supports raises errors of its own
            log.warning("the feature store failed", exc_info=exc)
            raise FeaturesUnavailable(f"the feature store failed: {type(exc).__name__}") from exc
        return self._table(answers, [entity_of_row for _, entity_of_row in asked], rows)

    async def check(self) -> None:
        """Read one entity, which need not exist."""
        nobody = {key: [NO_ENTITY[kind]] for key, kind in self._plan.join_keys.items()}
        await self.fetch(nobody, 1, Deadline.after(1.0))

    async def _read(self, asked: Sequence[list[EntityKey]]) -> list[list[_Row]]:
        if not self._reads_async:
            return await asyncio.to_thread(self._read_all, asked)
        answers: list[list[_Row]] = await asyncio.gather(
            *(
                self._provider.online_read_async(self._config, view.table, keys, view.features())
                if keys
                else _nothing()
                for view, keys in zip(self._views, asked, strict=True)
            )
        )
        return answers

    def _read_all(self, asked: Sequence[list[EntityKey]]) -> list[list[_Row]]:
        return [
            self._provider.online_read(self._config, view.table, keys, view.features())
            if keys
            else []
            for view, keys in zip(self._views, asked, strict=True)
        ]

    def _table(
        self,
        answers: Sequence[list[_Row]],
        asked: Sequence[list[int]],
        rows: int,
    ) -> FeatureRows:
        table = all_with_status(self._plan, rows, ValueStatus.NOT_FOUND)
        columns = list(table.columns)
        now_s = self._clock.now_s()
        for index, (view, place) in enumerate(
            zip(self._plan.views, self._plan.view_columns, strict=True)
        ):
            answer = [*answers[index], (None, None)]  # -1: a row without that entity
            rows_of_view = [answer[entity] for entity in asked[index]]
            event_time_s = np.array([_seconds(at) for at, _ in rows_of_view], dtype=np.float64)
            table.event_time_s[:, index] = event_time_s
            found = now_s - event_time_s >= -MAX_AHEAD_S  # NaN is not
            too_old = found & (now_s - event_time_s > (view.ttl_s or np.inf))
            for position, feature in enumerate(view.features, start=place.start):
                values = [(row or {}).get(feature.name, _NULL) for _, row in rows_of_view]
                column, corrupt = column_of(feature.dtype, values)
                status = table.status[:, position]
                status[found] = np.where(nulls(column), *_NULL_OR_PRESENT)[found]
                status[[row for row in corrupt if found[row]]] = ValueStatus.UNAVAILABLE
                status[too_old] = ValueStatus.OUTSIDE_MAX_AGE
                column[~found | too_old] = None
                columns[position] = column
        return FeatureRows(self._plan, tuple(columns), table.status, table.event_time_s)


class _ViewRead:
    """How one view of the plan is asked for."""

    def __init__(self, store: FeatureStore, plan: FeaturePlan, view: PlannedView) -> None:
        self.table = find_view(store, plan.feature_service, view.name)
        types = {column.name: column.dtype for column in self.table.entity_columns}
        stored_keys = view.stored_keys or view.join_keys
        known = {*types, *(feature.name for feature in self.table.features)}
        missing = {*stored_keys, *(feature.name for feature in view.features)} - known
        if missing:
            raise InvalidModel(
                f"the registry's {view.name} no longer has {min(missing)}; publish again"
            )
        self._features = [feature.name for feature in view.features]
        self._join_keys = view.join_keys
        self._stored_keys = stored_keys
        self._types = [types[key].to_value_type() for key in stored_keys]

    def features(self) -> list[str]:
        """A list of their own for each read: Feast's Redis store adds to it."""
        return list(self._features)

    def ask(self, entities: EntityColumns, rows: int) -> tuple[list[EntityKey], list[int]]:
        """Each entity once, and its index for every row; -1 for a row without that entity."""
        if not self._join_keys:
            return [_NO_ENTITY_KEY], [0] * rows
        index_of: dict[tuple[Any, ...], int] = {}
        entity_of_row = [
            -1 if None in values else index_of.setdefault(values, len(index_of))
            for values in zip(*(entities[key] for key in self._join_keys), strict=True)
        ]
        if not index_of:
            return [], entity_of_row
        columns = [
            python_values_to_proto_values(list(values), kind)
            for values, kind in zip(zip(*index_of, strict=True), self._types, strict=True)
        ]
        keys = [
            EntityKey(join_keys=self._stored_keys, entity_values=values)
            for values in zip(*columns, strict=True)
        ]
        return keys, entity_of_row


_NULL = Value()
_NULL_OR_PRESENT = (np.uint8(ValueStatus.NULL_VALUE), np.uint8(ValueStatus.PRESENT))
_NO_ENTITY_KEY = EntityKey(
    join_keys=[DUMMY_ENTITY_ID], entity_values=[Value(string_val=DUMMY_ENTITY_VAL)]
)


async def _nothing() -> list[_Row]:
    return []


def _seconds(at: datetime | None) -> float:
    """Seconds since 1970, NaN where nothing is stored: Redis' reader gives that the epoch."""
    seconds = 0.0 if at is None else make_tzaware(at).timestamp()
    return seconds if seconds > 0 else np.nan
