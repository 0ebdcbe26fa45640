"""The path of a prediction: fetch, fill, encode, submit, read."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from app.clock import FeatureClock
from app.deadline import Deadline
from app.errors import ModelNotReady, NotFound
from app.features.missing import FilledRows
from app.features.source import FeatureRows, ValueStatus
from app.instances import Instances
from app.outputs import Prediction
from app.served_model import ServedModel

# A plain number: numpy takes 20 µs to compare one of its own with a member of an enumeration.
_NOT_FOUND = int(ValueStatus.NOT_FOUND)


@dataclass(frozen=True, slots=True)
class DegradedReason:
    """Some instances rest on values of this view that are missing or too old."""

    feature_view: str
    status: ValueStatus
    instances: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """The predictions of one request, in the order of its instances, and how they came about.

    The instants are monotonic seconds; together with the request's arrival and its answer they
    bound the stages.
    """

    model: ServedModel
    predictions: list[Prediction]
    degraded: tuple[DegradedReason, ...]
    rows: FeatureRows
    filled: FilledRows
    ages_s: NDArray[np.float64]
    """`[instances, views]`, NaN where the view has no row."""
    encoded_s: float
    started_s: float
    finished_s: float


class Predictor:
    """Answers with the champion of each model. `models` may be replaced entry by entry while
    requests run: a request keeps the version that it started with."""

    def __init__(self, models: Mapping[str, ServedModel | None], clock: FeatureClock) -> None:
        self._models = models
        self._clock = clock

    def champion(self, name: str) -> ServedModel:
        """Raises `NotFound` for a name that is not served, `ModelNotReady` before it is warm."""
        model = self._models.get(name)
        if model is not None:
            return model
        if name in self._models:
            raise ModelNotReady(f"model {name!r} is not ready yet")
        raise NotFound(f"no model is named {name[:64]!r}")

    def label(self, name: str) -> str:
        """The name as a metric's label: names that callers invent make no series."""
        return name if name in self._models else "unknown"

    async def predict(self, model: ServedModel, instances: Instances, deadline: Deadline) -> Answer:
        """Raises whatever refuses the request (app/errors.py); nothing is kept then."""
        rows = await model.fetch(instances, deadline)
        now_s = self._clock.now_s()
        filled, inputs = model.encode(instances, rows, now_s)
        deadline.check()
        encoded_s = time.monotonic()
        execution = await model.submit(inputs, deadline)
        predictions, distributions = model.outputs.read(execution.outputs)
        ages_s = now_s - rows.event_time_s
        degraded = _degraded(rows)
        model.recorder.record(rows.status, ages_s, distributions)
        for reason in degraded:
            model.recorder.degraded(reason.feature_view, reason.status.name)
        for substitute in filled.substitutes:
            model.recorder.substituted(substitute.by, substitute.positions, substitute.mask)
        return Answer(
            model=model,
            predictions=predictions,
            degraded=degraded,
            rows=rows,
            filled=filled,
            ages_s=ages_s,
            encoded_s=encoded_s,
            started_s=execution.started_s,
            finished_s=execution.finished_s,
        )


def _degraded(rows: FeatureRows) -> tuple[DegradedReason, ...]:
    if not rows.status.size or rows.status.max() < _NOT_FOUND:
        return ()
    reasons = []
    for view, columns in zip(rows.plan.views, rows.plan.view_columns, strict=True):
        worst = rows.status[:, columns].max(axis=1)
        for status in (s for s in ValueStatus if s >= ValueStatus.NOT_FOUND):
            instances = tuple(np.flatnonzero(worst == status).tolist())
            if instances:
                reasons.append(DegradedReason(view.name, status, instances))
    return tuple(reasons)
