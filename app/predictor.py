"""The path of a prediction: fetch, fill, encode, submit, read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from app.batching.priority import Priority
from app.clock import FeatureClock
from app.deadline import Deadline
from app.errors import ModelNotReady, NotFound
from app.features.missing import FilledRows
from app.features.source import FeatureRows, ValueStatus
from app.instances import Instances
from app.outputs import NotFinite, Prediction, Readout
from app.served_model import ServedModel
from app.telemetry.recorder import PredictionRecorder

# A plain number: numpy takes 20 µs to compare one of its own with a member of an enumeration.
_NOT_FOUND = int(ValueStatus.NOT_FOUND)


@dataclass(frozen=True, slots=True)
class DegradedReason:
    """Some instances rest on values of this view that are missing or too old."""

    feature_view: str
    status: ValueStatus
    instances: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class NotFiniteOutput:
    """The model returned no finite number as this output of some instances; they have null."""

    output: str
    instances: tuple[int, ...]


@dataclass(slots=True)  # made for every request; a frozen one takes 1 µs longer to make
class ReadFeatures:
    """The stored features that an answer rests on, and what the model got in their place, at the
    feature time `now_s`."""

    rows: FeatureRows
    filled: FilledRows
    now_s: float


@dataclass(slots=True)
class Answer:
    """The predictions of one request, in the order of its instances, and how they came about.

    The instants are monotonic seconds; together with the request's arrival and its answer they
    bound the stages.
    """

    model: ServedModel
    predictions: list[Prediction]
    degraded: Sequence[DegradedReason | NotFiniteOutput]
    features: ReadFeatures | None
    """None of a model that reads no stored feature."""
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

    async def predict(
        self,
        model: ServedModel,
        instances: Instances,
        deadline: Deadline,
        priority: Priority = Priority.LIVE,
        caller: str = "",
    ) -> Answer:
        """`caller` is who asks, as far as is known: one whose rows keep failing is kept apart.

        Raises whatever refuses the request (app/errors.py); nothing is kept then.
        """
        features: ReadFeatures | None = None
        if model.source.plan.views:
            rows = await model.fetch(instances, deadline)
            now_s = self._clock.now_s()
            filled, inputs = model.encode(instances, rows, now_s)
            features = ReadFeatures(rows, filled, now_s)
        else:
            inputs = model.encode_fields(instances)
        encoded_s = deadline.check()
        execution = await model.batcher.submit(inputs, deadline, priority=priority, caller=caller)
        try:
            read = model.outputs.read(execution.outputs)
        except NotFinite as exc:
            model.recorder.not_finite(exc.rows)
            raise
        return Answer(
            model=model,
            predictions=read.predictions,
            degraded=_record(model.recorder, features, read),
            features=features,
            encoded_s=encoded_s,
            started_s=execution.started_s,
            finished_s=execution.finished_s,
        )


def _record(
    recorder: PredictionRecorder, features: ReadFeatures | None, read: Readout
) -> Sequence[DegradedReason | NotFiniteOutput]:
    """Tell the recorder what was predicted and read; why the answer is degraded."""
    recorder.predicted(read.distributions)
    degraded: Sequence[DegradedReason | NotFiniteOutput] = ()
    if features is not None:
        degraded = _record_features(recorder, features)
    if read.not_finite:
        recorder.not_finite(read.not_finite)
        outputs = [NotFiniteOutput(name, tuple(rows)) for name, rows in read.not_finite.items()]
        degraded = (*degraded, *outputs)
    return degraded


def _record_features(
    recorder: PredictionRecorder, features: ReadFeatures
) -> Sequence[DegradedReason]:
    rows = features.rows
    recorder.read(rows.status, rows.event_time_s, features.now_s)
    reasons = _degraded(rows)
    for reason in reasons:
        recorder.degraded(reason.feature_view, reason.status.name)
    for substitute in features.filled.substitutes:
        recorder.substituted(substitute.by, substitute.positions, substitute.mask)
    return reasons


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
