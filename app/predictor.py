"""The path of a prediction: fetch, fill, encode, enqueue, read."""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from math import log2
from typing import Any, Protocol, TypeAlias

import numpy as np

from app.batching.batcher import DynamicBatcher
from app.batching.priority import Priority
from app.batching.waiting import Entry, Executed
from app.clock import FeatureClock
from app.deadline import Deadline
from app.errors import (
    DeadlineExceeded,
    FeaturesUnavailable,
    ModelNotReady,
    NotFound,
    ShuttingDown,
)
from app.features.missing import FilledRows
from app.features.source import FeatureRows, ValueStatus
from app.instances import Instances, together
from app.outputs import Prediction, Readout
from app.served_model import ServedModel
from app.telemetry.recorder import PredictionRecorder, Role
from app.tensors import Tensors, take_rows

log = logging.getLogger(__name__)

# A plain number: numpy takes 20 µs to compare one of its own with a member of an enumeration.
_NOT_FOUND = int(ValueStatus.NOT_FOUND)
# A request of more rows goes by itself: its turn's others need not wait for it.
_MOST_SHARING = 8
_MOST_TOGETHER = 128
# The most urgent of a group bounds its read: nobody may lose more than a tenth of its time by that.
_KINDS_OF_HASTE = 8  # in each doubling of the time that is left


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


@dataclass(frozen=True, slots=True)
class ReadFeatures:
    """The stored features that the requests of one turn rest on, and what the model got in their
    place, at the feature time `now_s`."""

    rows: FeatureRows
    filled: FilledRows
    now_s: float


Degraded: TypeAlias = Sequence[DegradedReason | NotFiniteOutput]


@dataclass(slots=True)  # made for every request; a frozen one takes 1 µs longer to make
class Answer:
    """The predictions of one request, in the order of its instances, and how they came about.

    The instants are monotonic seconds; together with the request's arrival and its answer they
    bound the stages.
    """

    model: ServedModel
    predictions: list[Prediction]
    degraded: Degraded
    features: ReadFeatures | None
    """None of a model that reads no stored feature."""
    first_row: int
    """Of `features`: those of this request begin there."""
    encoded_s: float
    started_s: float
    finished_s: float
    instances: Instances
    inputs: Tensors
    first_input: int
    """Of `inputs`: the rows of this request begin there."""
    executed: Executed


@dataclass(slots=True)  # made for every request; a frozen one takes 1 µs longer to make
class Asker:
    """Who asks, and how the request is called.

    `caller` is who it is as far as is known: one whose rows keep failing is kept apart.
    `routing_key` is what the request itself says, None where that is left to the contract. `route`
    is how it was led to the version that answers it.
    """

    request_id: str
    caller: str = ""
    routing_key: str | None = None
    route: Role = "champion"


class Observer(Protocol):
    """Sees what was answered."""

    def offer(self, asker: Asker, answer: Answer) -> None:
        """Called after the caller was answered. Must neither raise nor block, and may keep the
        answer, but not change it."""
        ...


Tell: TypeAlias = Callable[[Answer | Exception], None]
"""Is told how a request ended; must neither raise nor block."""


class Asked:
    """One request under way: it waits for its rows' execution and tells how it ended, once."""

    __slots__ = (
        *("_group", "_tell", "asker", "deadline", "degraded", "encoded_s", "entry", "features"),
        *("first_input", "first_row", "inputs", "instances", "is_over", "priority", "task"),
    )

    def __init__(
        self,
        group: "_Group",
        instances: Instances,
        deadline: Deadline,
        priority: Priority,
        asker: Asker,
        tell: Tell,
    ) -> None:
        self._group = group
        self._tell = tell
        self.instances = instances
        self.deadline = deadline
        self.priority = priority
        self.asker = asker
        self.features: ReadFeatures | None = None
        self.first_row = 0
        self.degraded: Degraded = ()
        self.encoded_s = 0.0
        self.inputs: Tensors = {}
        self.first_input = 0
        self.entry: Entry | None = None
        """In front of the batcher."""
        self.task: asyncio.Task[None] | None = None
        """Of a request that is larger than a batch."""
        self.is_over = False

    def leave(self) -> None:
        """Nobody waits for the answer any more: what is not executed yet is not."""
        if self.is_over:
            return
        self._end()
        self._leave_queue()
        self._group.left()

    def done(self) -> bool:
        return self.is_over

    def cancel(self) -> None:
        """The service ends."""
        self.set_exception(ShuttingDown("this service is being stopped"))

    def set_exception(self, error: Exception) -> None:
        """It has failed, and is told so."""
        if self.is_over:
            return
        self._end()
        self._leave_queue()
        self._tell(error)

    def set_result(self, executed: Executed) -> None:
        """Its rows were executed."""
        self._end()
        self.entry = None  # which refers to us: a cycle would wait for the garbage collector
        try:
            answer = self._answer(executed)
        except Exception as exc:
            self._tell(exc)
            return
        self._tell(answer)
        if self._group.observer is not None:
            try:
                self._group.observer.offer(self.asker, answer)
            except Exception as exc:  # a defect must not harm those in the same execution
                log.error("an answer was not observed", exc_info=exc)

    def _end(self) -> None:
        self.is_over = True
        self._group.model.uses.end()

    def _leave_queue(self) -> None:
        if self.entry is not None:
            entry, self.entry = self.entry, None
            self._group.model.batcher.leave(entry)
        if self.task is not None:
            self.task.cancel()

    def _answer(self, executed: Executed) -> Answer:
        """Raises `NotFinite`."""
        model = self._group.model
        execution, start, stop = executed
        read: Readout | None = execution.read
        if read is None:
            read = execution.read = model.outputs.read_all(execution.outputs)
            model.recorder.predicted(read.distributions)
        degraded = self.degraded
        if read.not_finite and (found := read.not_finite_in(start, stop)):
            model.recorder.not_finite(found)
            model.outputs.refuse(found)
            outputs = [NotFiniteOutput(name, tuple(rows)) for name, rows in found.items()]
            degraded = (*degraded, *outputs)
        return Answer(
            model,
            read.predictions[start:stop],
            degraded,
            self.features,
            self.first_row,
            self.encoded_s,
            execution.started_s,
            execution.finished_s,
            self.instances,
            self.inputs,
            self.first_input,
            executed,
        )


class _Group:
    """Requests that go together: to one model, in one turn of the event loop."""

    __slots__ = ("_is_under_way", "asked", "model", "observer", "rows", "task", "waiting")

    def __init__(self, model: ServedModel, observer: Observer | None) -> None:
        self.model = model
        self.observer = observer
        self.asked: list[Asked] = []
        self.rows = 0
        self.waiting = 0
        self.task: asyncio.Task[None] | None = None
        self._is_under_way = False

    def together(self) -> list[Asked]:
        """Those who still wait. Nobody joins them any more."""
        self._is_under_way = True
        # They refer to us, too: a cycle would wait for the garbage collector.
        asked, self.asked = self.asked, []
        return [each for each in asked if not each.is_over]

    def left(self) -> None:
        """One of them has left. What all have left ends, unless others may still join."""
        self.waiting -= 1
        if not self.waiting and self.task is not None and self._is_under_way:
            self.task.cancel()


_NO_OBSERVERS: Mapping[str, Observer] = {}


class Predictor:
    """Answers with the champion of each model. `models` may be replaced entry by entry while
    requests run: a request keeps the version that it started with.

    What arrives in one turn of the event loop goes together: one read of features, one encoding,
    and rows side by side in front of the batcher. That costs a task a turn, not a task a request.
    """

    def __init__(
        self,
        models: Mapping[str, ServedModel | None],
        clock: FeatureClock,
        observers: Mapping[str, Observer] = _NO_OBSERVERS,
    ) -> None:
        """`observers` by the name of the model; they may change while requests run."""
        self._models = models
        self._clock = clock
        self._observers = observers
        self._gathering: dict[tuple[int, Priority, int], _Group] = {}
        """Groups of this turn."""
        # A reference: the loop holds tasks only weakly (asyncio docs, create_task).
        self._tasks: set[asyncio.Task[None]] = set()

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

    def begin(
        self,
        model: ServedModel,
        instances: Instances,
        deadline: Deadline,
        priority: Priority,
        asker: Asker,
        tell: Tell,
    ) -> Asked:
        """Have the instances predicted; `tell` is told the answer, or whatever refuses the request
        (app/errors.py), once, later in this turn of the loop or in another, and not at all once the
        caller has left.
        """
        rows = len(instances.rows)
        if rows > _MOST_SHARING or instances.overrides:
            group = self._begun(model)
        else:
            left_s = max(deadline.remaining_s(), 1e-6)
            key = (id(model), priority, int(_KINDS_OF_HASTE * log2(left_s)))
            found = self._gathering.get(key)
            if found is None or found.rows + rows > _MOST_TOGETHER:
                found = self._gathering[key] = self._begun(model)
            group = found
        asked = Asked(group, instances, deadline, priority, asker, tell)
        model.uses.begun += 1
        group.asked.append(asked)
        group.rows += rows
        group.waiting += 1
        return asked

    def _begun(self, model: ServedModel) -> _Group:
        """A group that whoever comes in this turn of the loop may join: its first step is taken
        after them."""
        group = _Group(model, self._observers.get(model.id.model))
        if not model.source.plan.views:
            asyncio.get_running_loop().call_soon(self._predict_fields, group)
            return group
        group.task = self._started(self._predict(group))
        return group

    def _started(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.create_task(work, name="predict")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _predict_fields(self, group: _Group) -> None:
        """Of a model that reads no stored feature."""
        self._gathering.clear()
        asked = group.together()
        try:
            self._encode(group.model, asked, None)
        except Exception as exc:  # a defect: nobody may be left waiting
            for each in asked:
                each.set_exception(exc)

    async def _predict(self, group: _Group) -> None:
        self._gathering.clear()
        asked = group.together()
        try:
            await self._fetch(group.model, asked)
        except Exception as exc:  # a defect: nobody may be left waiting
            for each in asked:
                each.set_exception(exc)

    async def _fetch(self, model: ServedModel, asked: Sequence[Asked]) -> None:
        """Read their features and have them executed; each by itself where they fail together, for
        it may be for one's own values."""
        if not asked:
            return
        deadline = min([each.deadline for each in asked], key=_at_s)
        try:
            rows = await model.fetch(together([a.instances for a in asked]), deadline)
        except (FeaturesUnavailable, DeadlineExceeded) as exc:
            for each in asked:
                each.set_exception(exc)
        except Exception as exc:
            if len(asked) == 1:
                asked[0].set_exception(exc)
                return
            await asyncio.gather(*(self._fetch(model, [each]) for each in asked))
        else:
            self._encode(model, asked, rows)

    def _encode(self, model: ServedModel, asked: Sequence[Asked], rows: FeatureRows | None) -> None:
        """Have them executed; each by itself where they cannot be encoded together."""
        if not asked:
            return
        try:
            inputs = self._encoded(model, asked, rows)
        except Exception as exc:
            if len(asked) == 1:
                asked[0].set_exception(exc)
                return
            start = 0
            for each in asked:
                stop = start + each.instances.count
                self._encode(model, [each], None if rows is None else rows.part(start, stop))
                start = stop
            return
        self._enqueue(model.batcher, asked, inputs)

    def _enqueue(self, batcher: DynamicBatcher, asked: Sequence[Asked], inputs: Tensors) -> None:
        """Have their rows, which are those of the inputs, executed."""
        now_s = time.monotonic()
        entries: list[Entry] = []
        start = 0
        for each in asked:
            rows = len(each.instances.rows)
            each.encoded_s = now_s
            each.inputs, each.first_input = inputs, start
            if each.deadline.at_s <= now_s:
                each.set_exception(DeadlineExceeded("the deadline passed before the answer"))
            elif each.is_over:
                pass
            elif rows > batcher.max_rows:
                each.task = self._started(_submit(batcher, each, inputs, start, start + rows))
            else:
                each.entry = Entry(
                    inputs,
                    rows,
                    each.deadline,
                    now_s,
                    each,
                    each.priority,
                    caller=each.asker.caller,
                    start=start,
                )
                entries.append(each.entry)
            start += rows
        if entries:
            batcher.enqueue(entries)

    def _encoded(
        self, model: ServedModel, asked: Sequence[Asked], rows: FeatureRows | None
    ) -> Tensors:
        instances = together([each.instances for each in asked])
        if rows is None:
            return model.encode_fields(instances)
        now_s = self._clock.now_s()
        filled, inputs = model.encode(instances, rows, now_s)
        features = ReadFeatures(rows, filled, now_s)
        _record(model.recorder, features)
        is_degraded = rows.status.size > 0 and rows.status.max() >= _NOT_FOUND
        start = 0
        for each in asked:
            each.features, each.first_row = features, start
            stop = start + len(each.instances.rows)
            if is_degraded:
                each.degraded = _degraded(model.recorder, rows.part(start, stop))
            start = stop
        return inputs


def _at_s(deadline: Deadline) -> float:
    return deadline.at_s


async def _submit(
    batcher: DynamicBatcher, asked: Asked, inputs: Tensors, start: int, stop: int
) -> None:
    """Of a request that is larger than a batch."""
    try:
        executed = await batcher.submit(
            take_rows(inputs, start, stop),
            asked.deadline,
            priority=asked.priority,
            caller=asked.asker.caller,
        )
    except Exception as exc:
        asked.task = None
        asked.set_exception(exc)
    else:
        asked.task = None
        asked.set_result(executed)


def _record(recorder: PredictionRecorder, features: ReadFeatures) -> None:
    rows = features.rows
    recorder.read(rows.status, rows.event_time_s, features.now_s)
    for substitute in features.filled.substitutes:
        recorder.substituted(substitute.by, substitute.positions, substitute.mask)


def _degraded(recorder: PredictionRecorder, rows: FeatureRows) -> Sequence[DegradedReason]:
    """Why the answer of these rows is degraded."""
    reasons = []
    for view, columns in zip(rows.plan.views, rows.plan.view_columns, strict=True):
        worst = rows.status[:, columns].max(axis=1)
        for status in (s for s in ValueStatus if s >= ValueStatus.NOT_FOUND):
            instances = tuple(np.flatnonzero(worst == int(status)).tolist())
            if instances:
                reasons.append(DegradedReason(view.name, status, instances))
                recorder.degraded(view.name, status.name)
    return reasons
