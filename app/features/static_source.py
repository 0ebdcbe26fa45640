"""A feature source that holds its rows in memory: for tests, demonstrations and models without
stored features."""

from collections.abc import Mapping
from typing import Any

from app.deadline import Deadline
from app.features.plan import NO_FEATURES, FeaturePlan
from app.features.source import EntityColumns, FeatureRows, ValueStatus, all_with_status


class StaticSource:
    """Answers from `values`: view name → entity (its join key values, in the plan's order) →
    feature name → value. An entity that is not there is NOT_FOUND, a None is NULL_VALUE."""

    def __init__(
        self,
        plan: FeaturePlan = NO_FEATURES,
        values: Mapping[str, Mapping[tuple[str | int | None, ...], Mapping[str, Any]]]
        | None = None,
        event_time_s: float = 0.0,
    ) -> None:
        self._plan = plan
        self._values = values or {}
        self._event_time_s = event_time_s

    @property
    def plan(self) -> FeaturePlan:
        return self._plan

    async def fetch(self, entities: EntityColumns, rows: int, deadline: Deadline) -> FeatureRows:
        table = all_with_status(self._plan, rows, ValueStatus.NOT_FOUND)
        for index, (view, columns) in enumerate(
            zip(self._plan.views, self._plan.view_columns, strict=True)
        ):
            known = self._values.get(view.name, {})
            for row in range(rows):
                entity = tuple(entities[key][row] for key in view.join_keys)
                features = known.get(entity)
                if features is None:
                    continue
                table.event_time_s[row, index] = self._event_time_s
                for offset, feature in enumerate(view.features):
                    value = features.get(feature.name)
                    position = columns.start + offset
                    table.status[row, position] = (
                        ValueStatus.NULL_VALUE if value is None else ValueStatus.PRESENT
                    )
                    if value is not None:
                        table.columns[position][row] = value
        return table

    async def check(self) -> None:
        return None
