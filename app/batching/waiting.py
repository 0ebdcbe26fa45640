"""The rows that wait for an execution, and which of them go next."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

from app.batching.priority import WEIGHTS, Priority
from app.deadline import Deadline
from app.tensors import Tensors, concatenate, take_rows

Shapes: TypeAlias = tuple[tuple[int, ...], ...]
"""Of each input tensor without the row axis: only rows of equal shapes can share an execution."""


class Execution:
    """One execution of a batch: its outputs, and where its time went (monotonic seconds).

    `read` is what is made of the outputs once for all its callers, by the first of them.
    """

    __slots__ = ("finished_s", "outputs", "read", "rows", "started_s")

    def __init__(self, outputs: Tensors, rows: int, started_s: float, finished_s: float) -> None:
        self.outputs = outputs
        self.rows = rows
        self.started_s = started_s
        self.finished_s = finished_s
        self.read: Any = None


class Executed(NamedTuple):
    """The rows `start` to `stop` of an execution: those of one entry."""

    execution: Execution
    start: int
    stop: int

    @property
    def outputs(self) -> Tensors:
        """Of these rows, in order."""
        return take_rows(self.execution.outputs, self.start, self.stop)


class Waiter(Protocol):
    """Who waits for an entry: a future is one. It is told once, unless it is done before."""

    def done(self) -> bool:
        """Whether it waits no longer."""
        ...

    def set_result(self, executed: Executed, /) -> None:
        """Must neither raise nor block."""
        ...

    def set_exception(self, error: Exception, /) -> None:
        """Must neither raise nor block."""
        ...

    def cancel(self) -> object:
        """It will not be told."""
        ...


class Entry:
    """A request's rows, or one part of them, and who waits for them: `rows` rows of `inputs`, from
    `start` on."""

    # Made for every request: a dataclass takes half as long again.
    __slots__ = (
        *("alone", "answer", "caller", "deadline", "enqueued_s", "inputs", "is_over", "is_part"),
        *("priority", "rows", "shapes", "start", "succeeded"),
    )

    def __init__(
        self,
        inputs: Tensors,
        rows: int,
        deadline: Deadline,
        enqueued_s: float,
        answer: Waiter,
        priority: Priority = Priority.LIVE,
        is_part: bool = False,
        shapes: Shapes = (),
        caller: str = "",
        alone: bool = False,
        start: int = 0,
    ) -> None:
        self.inputs = inputs
        self.rows = rows
        self.deadline = deadline
        self.enqueued_s = enqueued_s
        self.answer = answer
        self.priority = priority
        self.is_part = is_part
        """Of a request that is larger than a batch."""
        self.shapes = shapes
        self.caller = caller
        self.alone = alone
        """Shares no execution: its caller's rows keep failing."""
        self.start = start
        self.succeeded = False
        """It was executed."""
        self.is_over = False
        """Nobody waits for it any more, and the batcher knows."""


def gathered(entries: Sequence[Entry]) -> Tensors:
    """The rows of all entries, in order. Entries that stand side by side in the same tensors, as
    those that came together do, are not copied."""
    runs: list[tuple[Tensors, int, int]] = []
    inputs, start, stop = entries[0].inputs, entries[0].start, entries[0].start
    for entry in entries:
        if entry.inputs is not inputs or entry.start != stop:
            runs.append((inputs, start, stop))
            inputs, start = entry.inputs, entry.start
        stop = entry.start + entry.rows
    runs.append((inputs, start, stop))
    return concatenate([take_rows(*run) for run in runs])


Lane: TypeAlias = "OrderedDict[Entry, None]"


class _Flow:
    """Entries of one kind, in order of arrival among those of equal shapes."""

    __slots__ = ("lanes", "rows", "served", "weight")

    def __init__(self, weight: int) -> None:
        self.weight = weight
        self.rows = 0
        self.served = 0.0
        """Rows that went, over the weight: the flow with the least is next."""
        self.lanes: dict[Shapes, Lane] = {}

    def put(self, entry: Entry) -> None:
        lane = self.lanes.get(entry.shapes)
        if lane is None:
            lane = self.lanes[entry.shapes] = OrderedDict()
        lane[entry] = None
        self.rows += entry.rows

    def put_all(self, entries: Sequence[Entry], shapes: Shapes) -> int:
        """Behind others of these shapes; how many rows they are."""
        rows = sum([entry.rows for entry in entries])
        self.lanes[shapes].update(dict.fromkeys(entries))
        self.rows += rows
        return rows

    def remove(self, entry: Entry) -> bool:
        lane = self.lanes.get(entry.shapes)
        if lane is None or entry not in lane:
            return False
        del lane[entry]
        self._took(entry, lane)
        return True

    def take_all(self, lane: Lane) -> list[Entry]:
        """Of the only lane."""
        self.served += self.rows / self.weight
        self.rows = 0
        self.lanes.clear()
        return list(lane)

    def oldest_lane(self) -> Lane:
        if len(self.lanes) == 1:
            return next(iter(self.lanes.values()))
        return min(self.lanes.values(), key=lambda lane: next(iter(lane)).enqueued_s)

    def _took(self, entry: Entry, lane: Lane) -> None:
        self.rows -= entry.rows
        if not lane:  # shapes that nobody waits with take no room
            del self.lanes[entry.shapes]


class WaitingRows:
    """A weighted fair queue of entries.

    There is a flow for each priority, and one more for the parts of its large requests, so that a
    request of a thousand rows does not stand before everybody else. Those that are kept alone have
    one too, of the least weight, and each of them counts as a full batch: that is what it costs the
    others. Each flow gets rows by its weight; one that was empty starts level with the others,
    whatever it saved up.
    """

    def __init__(self) -> None:
        self._flows = [_Flow(WEIGHTS[priority]) for priority in Priority for _ in (False, True)]
        self._alone = _Flow(min(WEIGHTS.values()))
        self._busy: list[_Flow] = []
        """Those in which something waits."""
        self._level = 0.0
        self.rows = 0
        """Rows of all entries."""
        self.entries = 0

    @property
    def shapes(self) -> set[Shapes]:
        """The different shapes that wait."""
        return {shapes for flow in self._busy for shapes in flow.lanes}

    def put(self, entry: Entry) -> None:
        """Last among those of its kind."""
        flow = self._flow(entry)
        if not flow.rows:
            flow.served = max(flow.served, self._level)
            self._busy.append(flow)
        flow.put(entry)
        self.rows += entry.rows
        self.entries += 1

    def put_all(self, entries: Sequence[Entry]) -> None:
        """`put` each, which are of one priority and of equal shapes, all parts or none."""
        if any([entry.alone for entry in entries]):
            for entry in entries:
                self.put(entry)
            return
        first = entries[0]
        self.put(first)
        flow = self._flow(first)
        rows = flow.put_all(entries[1:], first.shapes)
        self.rows += rows
        self.entries += len(entries) - 1

    def remove(self, entry: Entry) -> bool:
        """Take it out, wherever it stands; False when it is not waiting."""
        flow = self._flow(entry)
        return flow.rows > 0 and self._removed(flow, entry)

    def earliest_deadline_s(self) -> float:
        """Of all that wait. Something must be waiting."""
        return min(
            entry.deadline.at_s
            for flow in self._busy
            for lane in flow.lanes.values()
            for entry in lane
        )

    def oldest_s(self) -> float:
        """The instant since which the first has been waiting. Something must be waiting."""
        return min(
            next(iter(lane)).enqueued_s for flow in self._busy for lane in flow.lanes.values()
        )

    def ahead(self, priority: Priority, *, is_part: bool) -> int:
        """Rows that go before such an entry put now: its own flow's, and of each other flow what
        its weight lets pass meanwhile."""
        own = self._flows[2 * priority + is_part]
        rows = own.rows
        if rows == self.rows:
            return rows
        for flow in self._busy:
            if flow is not own:
                rows += min(flow.rows, (own.rows + 1) * flow.weight // own.weight)
        return rows

    def take(
        self, max_rows: int, max_entries: int, ends_s: float
    ) -> tuple[list[Entry], list[Entry]]:
        """The next batch, and those before it whose deadline is not after `ends_s`.

        A batch has entries of equal shapes, or one by itself whose caller is kept alone or that is
        larger than `max_rows`. Something must be waiting.
        """
        flow = self._next(self._busy)
        lane = flow.oldest_lane()
        if flow is self._alone:
            entry = next(iter(lane))
            self._removed(flow, entry)
            flow.served += max(max_rows, entry.rows) / flow.weight
            return [entry], []
        if len(self._busy) > 1 or len(flow.lanes) > 1:
            return self._picked(next(iter(lane)).shapes, max_rows, max_entries, ends_s)
        if self.rows <= max_rows and len(lane) <= max_entries:
            self.rows = self.entries = 0
            self._busy.clear()
            return flow.take_all(lane), []
        return self._first(flow, lane, max_rows, max_entries, ends_s)

    def _first(
        self, flow: _Flow, lane: Lane, max_rows: int, max_entries: int, ends_s: float
    ) -> tuple[list[Entry], list[Entry]]:
        """Of the only lane, as long as they fit. Some stay: not all would."""
        batch: list[Entry] = []
        late: list[Entry] = []
        rows = 0
        for entry in lane:
            if len(batch) == max_entries:
                break
            if entry.deadline.at_s <= ends_s:
                late.append(entry)
                continue
            if batch and rows + entry.rows > max_rows:
                break
            batch.append(entry)
            rows += entry.rows
        for entry in (*batch, *late):
            self._removed(flow, entry)
        flow.served += rows / flow.weight
        return batch, late

    def _picked(
        self, shapes: Shapes, max_rows: int, max_entries: int, ends_s: float
    ) -> tuple[list[Entry], list[Entry]]:
        """Entry by entry of the flow that got least, as long as they fit."""
        flows = [f for f in self._busy if shapes in f.lanes and f is not self._alone]
        batch: list[Entry] = []
        late: list[Entry] = []
        rows = 0
        while flows and len(batch) < max_entries:
            flow = self._next(flows)
            lane = flow.lanes[shapes]
            entry = next(iter(lane))
            in_time = entry.deadline.at_s > ends_s
            if in_time and batch and rows + entry.rows > max_rows:
                break
            self._removed(flow, entry)
            if not lane:
                flows.remove(flow)
            if not in_time:
                late.append(entry)
                continue
            flow.served += entry.rows / flow.weight
            batch.append(entry)
            rows += entry.rows
        return batch, late

    def take_all(self) -> list[Entry]:
        """Everything that waits."""
        entries = [e for flow in self._busy for lane in flow.lanes.values() for e in lane]
        for entry in entries:
            self.remove(entry)
        return entries

    def _removed(self, flow: _Flow, entry: Entry) -> bool:
        if not flow.remove(entry):
            return False
        if not flow.rows:
            self._busy.remove(flow)
        self.rows -= entry.rows
        self.entries -= 1
        return True

    def _next(self, flows: list[_Flow]) -> _Flow:
        flow = flows[0] if len(flows) == 1 else min(flows, key=lambda flow: flow.served)
        self._level = max(self._level, flow.served)
        return flow

    def _flow(self, entry: Entry) -> _Flow:
        return self._alone if entry.alone else self._flows[2 * entry.priority + entry.is_part]
