"""Groups the rows of concurrent requests into batches for one backend."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from app.backends.backend import Backend
from app.backends.execution_times import ExecutionTimes
from app.batching.executor import BatchObserver, Executor, Slot, fail
from app.batching.isolation import IsolationBudget
from app.batching.policy import BatchPolicy
from app.batching.priority import Priority
from app.batching.waiting import (
    Entry,
    Executed,
    Execution,
    Shapes,
    WaitingRows,
)
from app.deadline import Deadline, DeadlineSweep
from app.errors import (
    DeadlineExceeded,
    Overloaded,
    RequestError,
    ShuttingDown,
)
from app.tensors import Tensors, concatenate, row_count

log = logging.getLogger(__name__)

# Different shapes that may wait at once: each makes batches of its own.
_MOST_SHAPES = 32
# A queue that is predicted to the deadline exactly makes half of those who wait late.
_MARGIN = 1.25
# Timers are late by a millisecond and more; a hold must not take the last of a deadline.
_SLACK_S = 0.005
# An execution that nobody waits for any more may take this long before it is given up.
_GRACE_S, _GRACE_TIMES = 1.0, 4.0


class DynamicBatcher:
    """Runs as many executions at a time as the backend takes; rows that arrive meanwhile form the
    next ones.

    `times` says how long an execution takes before the first one ran; the batcher goes on learning.
    `isolation_share` bounds what repeating the rows of failed batches may cost, as a share of all
    executions. `now_s` is the clock of the deadlines. Use it as an async context manager: leaving
    it refuses new rows, answers the queued ones for at most `drain_s` and gives up the rest.
    """

    def __init__(
        self,
        backend: Backend,
        policy: BatchPolicy,
        sweep: DeadlineSweep,
        times: ExecutionTimes,
        observer: BatchObserver,
        *,
        max_batch_rows: int,
        max_queue_rows: int,
        isolation_share: float = 0.05,
        drain_s: float = 10.0,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._backend = backend
        self._policy = policy
        self._sweep = sweep
        self._times = times
        self._observer = observer
        self._max_rows = max_batch_rows
        self._max_queue_rows = max_queue_rows
        self._drain_s = drain_s
        self._now_s = now_s
        self._varies = any(-1 in spec.shape for spec in backend.signature.inputs)
        self._waiting = WaitingRows()
        self._isolation_share = isolation_share
        self._executor = Executor(backend, times, observer, now_s)
        self._slots: list[Slot] = []
        # A reference: the loop holds tasks only weakly (asyncio docs, create_task).
        self._given_up: set[asyncio.Task[None]] = set()
        self._idle: deque[asyncio.Future[None]] = deque()
        self._closing = False

    @property
    def max_rows(self) -> int:
        """Rows of a batch at most; `submit` takes more."""
        return self._max_rows

    @property
    def queued_rows(self) -> int:
        """Rows that wait for an execution."""
        return self._waiting.rows

    async def submit(
        self,
        inputs: Tensors,
        deadline: Deadline,
        *,
        priority: Priority = Priority.LIVE,
        caller: str = "",
    ) -> Executed:
        """What came of these rows, one at least, in order; a request over the batch limit is split
        and joined.

        Raises what `enqueue` raises and what it tells who waits. Cancelling takes the rows out of
        the queue before they are executed and touches no other caller.
        """
        rows = row_count(inputs)
        loop = asyncio.get_running_loop()
        if rows <= self._max_rows:
            answer: asyncio.Future[Executed] = loop.create_future()
            entry = Entry(inputs, rows, deadline, self._now_s(), answer, priority, caller=caller)
            self.enqueue([entry])
            try:
                return await answer
            except BaseException:
                self.leave(entry)
                raise
        self.admit(rows, deadline, priority)
        shapes = self._shapes(inputs)
        answers: list[asyncio.Future[Executed]] = []
        entries: list[Entry] = []
        for start in range(0, rows, self._max_rows):
            answers.append(loop.create_future())
            entry = Entry(
                inputs,
                min(self._max_rows, rows - start),
                deadline,
                self._now_s(),
                answers[-1],
                priority,
                is_part=True,
                shapes=shapes,
                caller=caller,
                alone=caller in self._executor.suspects,
                start=start,
            )
            entries.append(entry)
        self._put(entries)
        return await self._joined(entries, answers)

    def enqueue(self, entries: Sequence[Entry]) -> None:
        """Have these executed: rows of the same tensors, of one priority, each at most as many as a
        batch has. Who waits no longer must `leave`.

        Each waiter is told its rows' outputs, or why there are none: `Overloaded` when the queue is
        full or the answer could not be there by the deadline, `DeadlineExceeded`, `BackendError`
        when the rows could not be executed, `ModelNotReady` when nothing can be, `ShuttingDown`
        while draining. A caller whose rows keep failing is kept apart.
        """
        if self._varies:
            try:
                shapes = self._shapes(entries[0].inputs)
            except Overloaded as exc:
                fail(entries, exc)
                return
            for entry in entries:
                entry.shapes = shapes
        if suspects := self._executor.suspects:
            for entry in entries:
                entry.alone = entry.caller in suspects
        rows = sum([entry.rows for entry in entries])
        soonest = min([entry.deadline.at_s for entry in entries])
        if not self._closing and self._has_plenty(rows, soonest):
            self._put(entries)
            return
        for entry in entries:
            try:
                self.admit(entry.rows, entry.deadline, entry.priority)
            except RequestError as exc:
                fail([entry], exc)
            else:
                self._put([entry])

    def leave(self, entry: Entry) -> None:
        """Nobody waits for the entry any more: it is not executed, unless it is being."""
        if entry.is_over:
            return
        entry.is_over = True
        if self._waiting.remove(entry):
            self._observer.left()
            return
        for slot in self._slots:
            if entry in slot.batch:
                slot.waiting -= 1
                if not slot.waiting:
                    grace_s = max(_GRACE_S, _GRACE_TIMES * slot.predicted_s)
                    asyncio.get_running_loop().call_later(grace_s, self._give_up, slot, slot.batch)

    def admit(self, rows: int, deadline: Deadline, priority: Priority = Priority.LIVE) -> None:
        """Raises `Overloaded` where so many rows would not be answered by the deadline, as things
        stand, or find no room in the queue, and `ShuttingDown` while draining."""
        if self._closing:
            raise ShuttingDown("this model is being closed")
        queued = self._waiting.rows
        # Whatever is predicted, a free backend is tried: else a wrong prediction stayed for ever.
        free = self._executor.under_way < len(self._slots)
        if free and (not queued or queued + rows <= self._max_rows):
            return
        # A request that alone exceeds the limit is welcome while nobody else waits.
        if queued and queued + rows > self._max_queue_rows:
            self._observer.refused("rows")
            raise Overloaded(
                f"{queued} of {self._max_queue_rows} rows are queued",
                retry_after_s=self.predicted_s(rows, priority),
            )
        if self._has_plenty(rows, deadline.at_s):
            return
        predicted_s = self.predicted_s(rows, priority)
        if self._now_s() + _MARGIN * predicted_s > deadline.at_s:
            self._observer.refused("deadline")
            raise Overloaded(
                f"an answer is expected in {predicted_s:.3f} s, too late for the deadline",
                retry_after_s=predicted_s,
            )

    def _has_plenty(self, rows: int, at_s: float) -> bool:
        """Whether there is room for more rows, and time for a batch for each that waits, after any
        slot, the first, is free: then nobody needs to know how many batches it will be."""
        rows += self._waiting.rows
        if rows > self._max_queue_rows or not self._slots:
            return False
        now_s = self._now_s()
        full_s = self._times.predicted_s(self._max_rows) + self._slots[0].left_s(now_s)
        return at_s - now_s > _MARGIN * (rows + 1) * full_s

    async def check(self) -> None:
        """Raises `ModelNotReady` with the reason while the backend could execute nothing."""
        await self._backend.check()

    def predicted_s(self, rows: int, priority: Priority = Priority.LIVE) -> float:
        """Seconds until rows submitted now would be answered: what is under way, the batches
        before them, their own."""
        now_s = self._now_s()
        is_part = rows > self._max_rows
        ahead = self._waiting.ahead(priority, is_part=is_part)
        free_s = min((slot.left_s(now_s) for slot in self._slots), default=0.0)
        batch_rows = self._usual_rows()
        batches = (ahead + rows - 1) // batch_rows
        if not batches:
            return free_s + self._times.predicted_s(ahead + rows)
        full_s = self._times.predicted_s(batch_rows)
        return free_s + full_s * (1 + batches / max(1, len(self._slots)))

    def _usual_rows(self) -> int:
        """Rows of the next batches: fewer than fit where requests may share them only with few."""
        company = min((slot.budget.company for slot in self._slots), default=self._max_rows)
        if company >= self._waiting.entries:
            return self._max_rows
        rows = company * self._waiting.rows // self._waiting.entries
        return max(1, min(rows, self._max_rows))

    def _shapes(self, inputs: Tensors) -> Shapes:
        if not self._varies:
            return ()
        shapes = tuple(tensor.shape[1:] for tensor in inputs.values())
        waiting = self._waiting.shapes
        if shapes not in waiting and len(waiting) >= _MOST_SHAPES:
            self._observer.refused("shapes")
            raise Overloaded(
                f"rows of {len(waiting)} different shapes are queued",
                retry_after_s=self._times.predicted_s(self._max_rows),
            )
        return shapes

    def _put(self, entries: Sequence[Entry]) -> None:
        self._waiting.put_all(entries)
        for entry in entries:
            self._sweep.watch(entry.answer, entry.deadline)
        if self._idle:
            self._wake(len(entries))

    def _wake(self, slots: int) -> None:
        while self._idle and slots:
            idle = self._idle.popleft()
            if not idle.done():
                idle.set_result(None)
                slots -= 1

    def _give_up(self, slot: Slot, batch: Sequence[Entry]) -> None:
        """Nobody has waited for this execution for long: another may have its place."""
        if slot.batch is not batch or slot.runner is None:
            return
        log.error("an execution was given up", extra={"rows": sum(e.rows for e in batch)})
        self._observer.failed("given_up")
        slot.given_up = True
        slot.runner.cancel()
        self._given_up.add(slot.runner)
        slot.runner.add_done_callback(self._given_up.discard)
        self._slots.remove(slot)
        self._open_slot(slot.budget)

    def _open_slot(self, budget: IsolationBudget) -> None:
        slot = Slot(budget)
        slot.runner = asyncio.create_task(self._run(slot), name="batcher")
        slot.runner.add_done_callback(lambda runner: self._ended(slot))
        self._slots.append(slot)

    def _ended(self, slot: Slot) -> None:
        """A runner ends when we close or gave it up. A defect must not take its slot with it."""
        if not self._closing and slot in self._slots:
            log.error("a runner of the batcher ended: another takes its place")
            self._slots.remove(slot)
            self._open_slot(slot.budget)

    async def _run(self, slot: Slot) -> None:
        while not slot.given_up:
            batch = await self._next_batch(slot)
            if not batch:
                return
            await self._execute(slot, batch)
            if self._waiting.rows:
                # An execution in the loop may not have suspended: everybody else gets a turn, and
                # a caller that this batch made leave can take its other rows out of the queue.
                await asyncio.sleep(0)

    async def _next_batch(self, slot: Slot) -> list[Entry]:
        """Wait for rows, hold as long as the policy asks, take what fits; empty when closing."""
        while True:
            while not self._waiting.rows:
                if self._closing:
                    return []
                await self._arrival()
            if self._policy.holds:
                await self._hold()
            if self._waiting.rows and (batch := self._take_live_entries(slot)):
                return batch

    def _arrival(self) -> "asyncio.Future[None]":
        """Done when rows arrive, or the batcher closes."""
        arrival: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._idle.append(arrival)
        return arrival

    async def _hold(self) -> None:
        while self._waiting.rows and not self._closing:
            oldest_wait_s = self._now_s() - self._waiting.oldest_s()
            hold_s = min(self._policy.hold_s(self._waiting.rows, oldest_wait_s), self._spare_s())
            if hold_s <= 0:
                return
            arrival = self._arrival()
            timer = asyncio.get_running_loop().call_later(hold_s, _done, arrival)
            await arrival
            timer.cancel()

    def _spare_s(self) -> float:
        """How long all that wait could go on waiting and still be answered in time."""
        needed_s = _MARGIN * self._times.predicted_s(self._max_rows)
        return self._waiting.earliest_deadline_s() - self._now_s() - needed_s - _SLACK_S

    def _take_live_entries(self, slot: Slot) -> list[Entry]:
        """The next batch. While more wait than it takes, those that it would answer too late are
        left out: what they would cost is of use to others."""
        rows = min(self._policy.batch_rows(self._waiting.rows), self._max_rows)
        now_s = self._now_s()
        crowded = self._waiting.rows > rows
        needed_s = self._times.predicted_s(rows) if crowded else 0.0
        batch, late = self._waiting.take(rows, slot.budget.company, now_s + needed_s)
        if not batch:  # nobody has use for their place: they are tried, whatever is predicted
            for entry in late:
                self._waiting.put(entry)
            batch, late = self._waiting.take(rows, slot.budget.company, now_s)
        for entry in late:
            self._observer.left()
            if not entry.answer.done():
                entry.answer.set_exception(DeadlineExceeded("it could not be executed in time"))
        live = self._executor.live(batch)
        for _ in range(len(batch) - len(live)):
            self._observer.left()
        return live

    async def _execute(self, slot: Slot, batch: list[Entry]) -> None:
        try:
            await self._executor.run(slot, batch)
        except asyncio.CancelledError:
            if slot.given_up:
                self._put_back(batch)
            else:
                fail(batch, ShuttingDown("this model is being closed"))
            raise

    def _put_back(self, batch: Sequence[Entry]) -> None:
        """Nobody waited for the execution, but for the parts that were to follow it."""
        for entry in self._executor.live(batch):
            self._waiting.put(entry)
            self._wake(1)

    async def _joined(
        self, entries: Sequence[Entry], answers: "Sequence[asyncio.Future[Executed]]"
    ) -> Executed:
        """The parts of one request, as one execution. When one fails the others are given up."""
        ended = False

        def end(answer: "asyncio.Future[Executed]") -> None:
            nonlocal ended
            if ended or not (answer.cancelled() or answer.exception() is not None):
                return
            ended = True
            for entry, answer in zip(entries, answers, strict=True):
                answer.cancel()
                self.leave(entry)

        for answer in answers:
            answer.add_done_callback(end)
        parts = await asyncio.gather(*answers)
        rows = sum(entry.rows for entry in entries)
        whole = Execution(
            concatenate([part.outputs for part in parts]),
            rows,
            parts[0].execution.started_s,
            max(part.execution.finished_s for part in parts),
        )
        return Executed(whole, 0, rows)

    def _runners(self) -> "set[asyncio.Task[None]]":
        """Those that have not ended."""
        running = {slot.runner for slot in self._slots if slot.runner is not None}
        return {runner for runner in running | self._given_up if not runner.done()}

    async def __aenter__(self) -> Self:
        for _ in range(self._backend.concurrency):
            self._open_slot(IsolationBudget(self._isolation_share))
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._closing = True
        self._wake(len(self._idle))
        until_s = self._now_s() + self._drain_s
        while (runners := self._runners()) and (left_s := until_s - self._now_s()) > 0:
            await asyncio.wait(runners, timeout=left_s)
        for stuck in self._runners():  # an execution that never ends must not keep the process
            stuck.cancel()
        if runners := self._runners():
            await asyncio.wait(runners, timeout=_GRACE_S)
        for slot in self._slots:  # of runners that do not end when they are told to
            fail(slot.batch, ShuttingDown("this model is being closed"))
        fail(self._waiting.take_all(), ShuttingDown("this model is being closed"))


def _done(arrival: "asyncio.Future[None]") -> None:
    if not arrival.done():
        arrival.set_result(None)
