"""Makes the values of on-demand views from stored values and fields of the instance, with Feast's
own objects."""

import asyncio
import base64
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import pyarrow
from feast import OnDemandFeatureView
from feast.protos.feast.core.OnDemandFeatureView_pb2 import (
    OnDemandFeatureView as OnDemandFeatureViewProto,
)
from feast.protos.feast.core.OnDemandFeatureView_pb2 import OnDemandFeatureViewSpec
from feast.type_map import python_values_to_proto_values
from numpy.typing import NDArray

from app.deadline import Deadline
from app.errors import InvalidModel
from app.features.feast_values import column_of, nulls, python_values
from app.features.plan import FeaturePlan, PlannedView, Transformation, value_type
from app.features.source import (
    EntityColumns,
    FeatureRows,
    FeatureSource,
    ValueStatus,
    empty_column,
)

log = logging.getLogger(__name__)

_INLINE_S = 0.001
_THREADS = 4
_LOG_EVERY_S = 60.0

_Made: TypeAlias = list[tuple[NDArray[Any], list[int]]]
"""For each feature of a view, its column and the rows whose value is none of its type."""

_KEY_DTYPES = {"timestamp": "UnixTimestamp"}  # other join keys are what they are


class OnDemandSource:
    """Adds what is made on demand to the stored values of `inner`, which reads `plan.stored()`.

    A function sees what the model would see, so a value that is missing or too old is null to it,
    as in training. Its values get the worst status of what it read and the oldest event time. Where
    it raises, or is not done by the deadline, they are UNAVAILABLE.

    Functions run in the event loop only while they are expected to take at most a millisecond, else
    in a thread; one that never returns keeps its thread, and at most four of them are taken.

    Raises `InvalidModel` for a view that Feast cannot load.
    """

    def __init__(self, inner: FeatureSource, plan: FeaturePlan) -> None:
        self._inner = inner
        self._plan = plan
        self._functions = [
            _Function(view, view.transformation, plan)
            for view in plan.views
            if view.transformation is not None
        ]
        self._cost = _Cost()
        self._threads = asyncio.Semaphore(_THREADS)

    @property
    def plan(self) -> FeaturePlan:
        return self._plan

    async def fetch(self, entities: EntityColumns, rows: int, deadline: Deadline) -> FeatureRows:
        stored = await self._inner.fetch(entities, rows, deadline)
        return self._table(stored, await self._make(stored, entities, rows, deadline), rows)

    async def check(self) -> None:
        await self._inner.check()

    async def _make(
        self, stored: FeatureRows, entities: EntityColumns, rows: int, deadline: Deadline
    ) -> Sequence[_Made | None]:
        """What each function makes; None where it did not."""
        if self._cost.expected_s(rows) <= _INLINE_S:
            return self._run(stored, entities, rows)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(deadline.remaining_s()):
                await self._threads.acquire()
                running = loop.run_in_executor(None, self._run, stored, entities, rows)
                # The thread goes on where nobody waits any more: it is free when it has ended.
                running.add_done_callback(lambda _: self._threads.release())
                return await asyncio.shield(running)
        except TimeoutError:
            return [None] * len(self._functions)

    def _run(
        self, stored: FeatureRows, entities: EntityColumns, rows: int
    ) -> Sequence[_Made | None]:
        started_s = time.perf_counter()
        inputs = self._inputs(stored, entities)
        made = [function.make(inputs, rows) for function in self._functions]
        self._cost.observe(rows, time.perf_counter() - started_s)
        return made

    def _inputs(self, stored: FeatureRows, entities: EntityColumns) -> Mapping[str, list[Any]]:
        """Join keys, fields of the instance and stored values by name, as Feast shows them."""
        inputs = {
            key: python_values(_KEY_DTYPES.get(kind, ""), entities[key])
            for key, kind in self._plan.join_keys.items()
        }
        for name, dtype in self._plan.request_fields.items():
            inputs[name] = python_values(dtype, entities[name])
        columns = iter(stored.columns)
        for view in stored.plan.views:
            for feature, reference in zip(view.features, view.references(), strict=True):
                column = next(columns)
                if reference in self._plan.inputs:
                    inputs[reference] = python_values(feature.dtype, column)
        return inputs

    def _table(self, stored: FeatureRows, made: Sequence[_Made | None], rows: int) -> FeatureRows:
        columns: list[NDArray[Any]] = []
        status = np.empty((rows, len(self._plan.references)), dtype=np.uint8)
        times = np.full((rows, len(self._plan.views)), np.nan)
        of_stored = iter(zip(range(len(stored.plan.views)), stored.plan.view_columns, strict=True))
        results = iter(zip(self._functions, made, strict=True))
        for index, (view, place) in enumerate(
            zip(self._plan.views, self._plan.view_columns, strict=True)
        ):
            if view.transformation is None:
                source, source_place = next(of_stored)
                columns.extend(stored.columns[source_place])  # += would add the arrays up
                status[:, place] = stored.status[:, source_place]
                times[:, index] = stored.event_time_s[:, source]
            else:
                function, result = next(results)
                columns.extend(_columns(view, result, rows))
                status[:, place] = function.status(stored, result, rows)
                times[:, index] = function.event_time_s(stored, rows)
        return FeatureRows(self._plan, tuple(columns), status, times)


class _Function:
    """The function of one on-demand view."""

    def __init__(
        self, view: PlannedView, transformation: Transformation, plan: FeaturePlan
    ) -> None:
        self._name = view.name
        self._singly = transformation.mode == "python_singleton"
        self._in_pandas = transformation.mode == "pandas"
        self._view = _load(view.name, transformation)
        types = {feature.name: feature.dtype for feature in self._view.features}
        self._features = [
            (feature.name, feature.dtype, types[feature.name].to_value_type())
            for feature in view.features
        ]
        self._names = {
            **{key: key for key in (*plan.join_keys, *plan.request_fields)},
            **{reference: reference.replace(":", "__", 1) for reference in transformation.inputs},
        }
        stored = plan.stored()
        self._positions = [stored.references.index(name) for name in transformation.inputs]
        self._views = [
            index
            for index, view in enumerate(stored.views)
            if not set(view.references()).isdisjoint(transformation.inputs)
        ]
        self._log_at_s = 0.0

    def make(self, inputs: Mapping[str, list[Any]], rows: int) -> _Made | None:
        """Its features for these rows; None, which is logged, when the function fails."""
        given = {theirs: list(inputs[name]) for name, theirs in self._names.items()}
        try:
            values = self._values(given, rows)
            return [
                column_of(dtype, python_values_to_proto_values(_rows(values[name], rows), kind))
                for name, dtype, kind in self._features
            ]
        except Exception as exc:  # whatever the function of a user raises
            self._log(exc)
            return None

    def status(self, stored: FeatureRows, made: _Made | None, rows: int) -> NDArray[np.uint8]:
        """`[rows, features]`: the worst of what was read, else whether the value is null."""
        shape = (rows, len(self._features))
        if made is None:
            return np.full(shape, ValueStatus.UNAVAILABLE, dtype=np.uint8)
        status = np.zeros(shape, dtype=np.uint8)
        for feature, (column, wrong) in enumerate(made):
            status[nulls(column), feature] = ValueStatus.NULL_VALUE
            status[wrong, feature] = ValueStatus.UNAVAILABLE
        if self._positions:
            worst = stored.status[:, self._positions].max(axis=1, keepdims=True)
            worst[worst < ValueStatus.NOT_FOUND] = ValueStatus.PRESENT
            status = np.maximum(status, worst)
        return status

    def event_time_s(self, stored: FeatureRows, rows: int) -> NDArray[np.float64]:
        """The oldest of what was read; NaN where nothing was."""
        oldest = np.full(rows, np.nan)
        for view in self._views:
            oldest = np.fmin(oldest, stored.event_time_s[:, view])
        return oldest

    def _values(self, given: dict[str, list[Any]], rows: int) -> Mapping[str, Any]:
        if self._in_pandas:
            table = self._view.transform_arrow(pyarrow.Table.from_pydict(given))
            return {name: table[name].to_numpy() for name, _, _ in self._features}
        if not self._singly:
            made: Mapping[str, Any] = self._view.transform_dict(given)
            return made
        each = [
            self._view.transform_dict({name: [values[row]] for name, values in given.items()})
            for row in range(rows)
        ]
        return {
            name: [value for one in each for value in _rows(one[name], 1)]
            for name, _, _ in self._features
        }

    def _log(self, exc: Exception) -> None:
        """Once a minute at most: a function fails for every request, or for many."""
        now_s = time.monotonic()
        if now_s >= self._log_at_s:
            self._log_at_s = now_s + _LOG_EVERY_S
            log.warning("an on-demand view failed", extra={"view": self._name}, exc_info=exc)


class _Cost:
    """How long the functions take, learnt for each order of magnitude of rows: what a call costs
    and what a row costs are not told apart."""

    def __init__(self) -> None:
        self._mean_s: dict[int, float] = {}

    def expected_s(self, rows: int) -> float:
        return self._mean_s.get(rows.bit_length(), np.inf)

    def observe(self, rows: int, elapsed_s: float) -> None:
        magnitude = rows.bit_length()
        mean_s = self._mean_s.get(magnitude, elapsed_s)
        self._mean_s[magnitude] = mean_s + 0.2 * (elapsed_s - mean_s)


def _load(name: str, transformation: Transformation) -> OnDemandFeatureView:
    try:
        definition = OnDemandFeatureViewSpec.FromString(
            base64.b64decode(transformation.definition, validate=True)
        )
        view = OnDemandFeatureView.from_proto(OnDemandFeatureViewProto(spec=definition))
    except Exception as exc:  # it may be pickled, and then raises whatever its modules raise
        raise InvalidModel(f"{name}: the function cannot be loaded: {exc!r}") from exc
    loaded: OnDemandFeatureView = view
    return loaded


def _rows(values: Any, rows: int) -> Any:
    """One value a row, from what a function may return: a list, an array, or a single value."""
    vector = values if isinstance(values, list | np.ndarray) else [values]
    if len(vector) != rows:
        raise ValueError(f"{len(vector)} values for {rows} rows")
    return vector


def _columns(view: PlannedView, made: _Made | None, rows: int) -> list[NDArray[Any]]:
    if made is not None:
        return [column for column, _ in made]
    return [empty_column(value_type(feature.dtype), rows) for feature in view.features]
