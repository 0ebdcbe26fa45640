"""Reads features through the Feast SDK, from any online store that it supports."""

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
from feast import FeatureStore
from feast.errors import FeastObjectNotFoundException
from numpy.typing import NDArray

from app.clock import FeatureClock
from app.deadline import Deadline
from app.errors import FeaturesUnavailable, InvalidModel
from app.features.plan import FeaturePlan, JoinKeyType, PlannedView
from app.features.source import (
    MAX_AHEAD_S,
    EntityColumns,
    FeatureRows,
    ValueStatus,
    all_with_status,
)

log = logging.getLogger(__name__)

_NO_ENTITY: Mapping[JoinKeyType, str | int] = {"string": "", "int": 0}


class FeastSource:
    """One plan, read with `FeatureStore.get_online_features`.

    Two of the SDK's answers are put right by their event time: an entity that is not stored is
    NOT_FOUND (the SDK says PRESENT), and a value older than its view's ttl is OUTSIDE_MAX_AGE and
    null (the SDK returns it; feast #6821).
    """

    def __init__(self, store: FeatureStore, plan: FeaturePlan, clock: FeatureClock) -> None:
        self._store = store
        self._plan = plan
        self._clock = clock
        try:
            self._service = store.get_feature_service(plan.feature_service)
        except FeastObjectNotFoundException as exc:
            raise InvalidModel(f"the registry has no {plan.feature_service!r}: {exc}") from exc
        self._reads_async = store.config.online_store.type == "redis"

    @property
    def plan(self) -> FeaturePlan:
        return self._plan

    async def fetch(self, entities: EntityColumns, rows: int, deadline: Deadline) -> FeatureRows:
        asked = {key: self._without_null(key, entities) for key in self._plan.join_keys}
        remaining_s = deadline.remaining_s()
        try:
            async with asyncio.timeout(remaining_s):
                response = await self._read(asked)
        except TimeoutError:
            raise FeaturesUnavailable(
                f"the feature store did not answer within {max(0, remaining_s) * 1000:.0f} ms"
            ) from None
        except Exception as exc:  # every store that Feast supports raises errors of its own
            log.warning("the feature store failed", exc_info=exc)
            raise FeaturesUnavailable(f"the feature store failed: {type(exc).__name__}") from exc
        try:
            return self._table(response, entities, rows)
        except KeyError as exc:
            raise FeaturesUnavailable(f"the registry no longer has {exc}; publish again") from exc

    async def check(self) -> None:
        """Read one entity that does not exist."""
        nobody = {key: [_NO_ENTITY[kind]] for key, kind in self._plan.join_keys.items()}
        await self.fetch(nobody, 1, Deadline.after(1.0))

    def _without_null(self, key: str, entities: EntityColumns) -> list[str | int]:
        """The SDK cannot ask for a null entity; its rows are NOT_FOUND whatever is read here."""
        nobody = _NO_ENTITY[self._plan.join_keys[key]]
        return [nobody if value is None else value for value in entities[key]]

    async def _read(self, entities: dict[str, list[str | int]]) -> Any:
        if self._reads_async:
            return await self._store.get_online_features_async(
                self._service, entities, full_feature_names=True
            )
        return await asyncio.to_thread(
            self._store.get_online_features, self._service, entities, full_feature_names=True
        )

    def _table(self, response: Any, entities: EntityColumns, rows: int) -> FeatureRows:
        proto = response.proto
        names = {name: index for index, name in enumerate(proto.metadata.feature_names.val)}
        table = all_with_status(self._plan, rows, ValueStatus.NOT_FOUND)
        now_s = self._clock.now_s()
        for index, (view, columns) in enumerate(
            zip(self._plan.views, self._plan.view_columns, strict=True)
        ):
            vectors = [proto.results[names[f"{view.name}__{f.name}"]] for f in view.features]
            event_time_s = _event_times(vectors[0], _has_entity(view, entities, rows))
            table.event_time_s[:, index] = event_time_s
            found = now_s - event_time_s >= -MAX_AHEAD_S  # NaN is not
            too_old = found & (now_s - event_time_s > (view.ttl_s or np.inf))
            for position, vector in enumerate(vectors, start=columns.start):
                present = _fill(table.columns[position], vector, found & ~too_old)
                status = table.status[:, position]
                status[found] = ValueStatus.NULL_VALUE
                status[present] = ValueStatus.PRESENT
                status[too_old] = ValueStatus.OUTSIDE_MAX_AGE
        return table


def _has_entity(view: PlannedView, entities: EntityColumns, rows: int) -> NDArray[np.bool_]:
    """Which rows name every join key of the view."""
    named = np.ones(rows, dtype=bool)
    for key in view.join_keys:
        named &= np.array([value is not None for value in entities[key]])
    return named


def _event_times(vector: Any, named: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Seconds since 1970, NaN where nothing is stored: the SDK gives such a value the epoch."""
    seconds = np.array([stamp.seconds + stamp.nanos / 1e9 for stamp in vector.event_timestamps])
    return np.where(named & (seconds > 0), seconds, np.nan)


def _fill(column: NDArray[Any], vector: Any, wanted: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Write the wanted values that are not null into `column`; says which those are."""
    present = np.zeros(len(column), dtype=bool)
    for row in np.flatnonzero(wanted):
        value = vector.values[row]
        kind = value.WhichOneof("val")
        if kind is None or kind == "null_val":
            continue
        content = getattr(value, kind)
        if content != content:  # NaN: how a null number of the offline store is materialized
            continue
        column[row] = content
        present[row] = True
    return present
