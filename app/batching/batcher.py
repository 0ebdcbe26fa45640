"""Groups the rows of concurrent requests into batches for one backend."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from app.backends.backend import Backend
from app.batching.policy import BatchPolicy
from app.deadline import Deadline, DeadlineSweep
from app.errors import BackendError, Overloaded, RequestError, ShuttingDown
from app.tensors import Tensors, concatenate, row_count, take_rows

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Execution:
    """The outputs of one request's rows, and where its time went (monotonic seconds)."""

    outputs: Tensors
    started_s: float
    finished_s: float


@dataclass(slots=True)
class _Entry:
    inputs: Tensors
    rows: int
    deadline: Deadline
    enqueued_s: float
    answer: "asyncio.Future[Execution]" = field(repr=False)


class DynamicBatcher:
    """Runs one execution at a time; rows that arrive meanwhile form the next batch.

    `observe_batch` is told the rows of each execution. Use it as an async context manager: leaving
    it refuses new rows, answers the queued ones for at most `drain_s` and gives up the rest.
    """

    def __init__(
        self,
        backend: Backend,
        policy: BatchPolicy,
        sweep: DeadlineSweep,
        *,
        max_batch_rows: int,
        max_queue_rows: int,
        observe_batch: Callable[[int], None],
        drain_s: float = 10.0,
    ) -> None:
        self._backend = backend
        self._policy = policy
        self._sweep = sweep
        self._max_batch_rows = max_batch_rows
        self._max_queue_rows = max_queue_rows
        self._observe_batch = observe_batch
        self._drain_s = drain_s
        self._queue: deque[_Entry] = deque()
        self._queued_rows = 0
        self._row_s = 0.0
        self._arrival = asyncio.Event()
        self._closing = False
        self._runner: asyncio.Task[None] | None = None

    @property
    def queued_rows(self) -> int:
        """Rows that wait for an execution, those of callers that have left included."""
        return self._queued_rows

    async def submit(self, inputs: Tensors, deadline: Deadline) -> Execution:
        """Outputs for these rows, in order; a request over the batch limit is split and joined.

        Raises `Overloaded` when the queue is full, `DeadlineExceeded`, `BackendError` when the
        batch failed, `ShuttingDown` while draining. Cancelling takes the rows out of the queue
        before they are executed and touches no other caller.
        """
        rows = row_count(inputs)
        self._admit(rows)
        entries = [
            self._enqueue(take_rows(inputs, start, start + self._max_batch_rows), deadline)
            for start in range(0, rows, self._max_batch_rows)
        ]
        if len(entries) == 1:
            return await entries[0].answer
        return await _joined(entries)

    def _admit(self, rows: int) -> None:
        if self._closing:
            raise ShuttingDown("this model is being closed")
        # A request that alone exceeds the limit is welcome while nobody else waits.
        if self._queued_rows and self._queued_rows + rows > self._max_queue_rows:
            raise Overloaded(
                f"{self._queued_rows} of {self._max_queue_rows} rows are queued",
                retry_after_s=self._queued_rows * self._row_s,
            )

    def _enqueue(self, inputs: Tensors, deadline: Deadline) -> _Entry:
        answer: asyncio.Future[Execution] = asyncio.get_running_loop().create_future()
        entry = _Entry(inputs, row_count(inputs), deadline, time.monotonic(), answer)
        self._queue.append(entry)
        self._queued_rows += entry.rows
        self._sweep.watch(answer, deadline)
        self._arrival.set()
        return entry

    async def _run(self) -> None:
        while True:
            batch = await self._next_batch()
            if not batch:
                return
            await self._execute(batch)
            # An execution in the loop may not have suspended: everybody else gets a turn, and a
            # caller that this batch made leave can take its other rows out of the queue.
            await asyncio.sleep(0)

    async def _next_batch(self) -> list[_Entry]:
        """Wait for rows, hold as long as the policy asks, take what fits; empty when closing."""
        while True:
            while not self._queue:
                if self._closing:
                    return []
                self._arrival.clear()
                await self._arrival.wait()
            await self._hold()
            batch = self._take_live_entries()
            if batch:  # all may have been cancelled while we held
                return batch

    async def _hold(self) -> None:
        while self._queue and not self._closing:
            oldest_wait_s = time.monotonic() - self._queue[0].enqueued_s
            hold_s = self._policy.hold_s(self._queued_rows, oldest_wait_s)
            if hold_s <= 0:
                return
            self._arrival.clear()
            timer = asyncio.get_running_loop().call_later(hold_s, self._arrival.set)
            await self._arrival.wait()
            timer.cancel()

    def _take_live_entries(self) -> list[_Entry]:
        batch: list[_Entry] = []
        rows = 0
        now_s = time.monotonic()
        while self._queue and rows + self._queue[0].rows <= self._max_batch_rows:
            entry = self._queue.popleft()
            self._queued_rows -= entry.rows
            if entry.answer.done():  # its caller left, or the sweep answered it
                continue
            if entry.deadline.at_s <= now_s:
                continue  # not executed; the sweep answers it at its next turn
            batch.append(entry)
            rows += entry.rows
        return batch

    async def _execute(self, batch: Sequence[_Entry]) -> None:
        rows = sum(entry.rows for entry in batch)
        started_s = time.monotonic()
        try:
            outputs = await self._backend.execute(
                concatenate([entry.inputs for entry in batch]),
                max((entry.deadline for entry in batch), key=lambda deadline: deadline.at_s),
            )
            _check_rows(outputs, rows)
        except asyncio.CancelledError:
            _fail(batch, ShuttingDown("this replica is shutting down"))
            raise
        except RequestError as exc:
            log.error("execution failed", extra={"rows": rows}, exc_info=exc)
            _fail(batch, exc)
            return
        except Exception as exc:  # a defect of the backend must not end the loop that serves all
            log.error("defect of the backend", extra={"rows": rows}, exc_info=exc)
            _fail(batch, BackendError(f"the backend failed: {type(exc).__name__}"))
            return
        finished_s = time.monotonic()
        self._row_s = 0.8 * self._row_s + 0.2 * (finished_s - started_s) / rows
        self._observe_batch(rows)
        _distribute(batch, outputs, started_s, finished_s)

    async def __aenter__(self) -> Self:
        self._runner = asyncio.create_task(self._run(), name="batcher")
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._closing = True
        self._arrival.set()
        if self._runner is None:
            return
        await asyncio.wait({self._runner}, timeout=self._drain_s)
        if not self._runner.done():  # an execution that never ends must not keep the process
            self._runner.cancel()
            await asyncio.wait({self._runner})
            _fail(self._queue, ShuttingDown("this replica is shutting down"))


async def _joined(entries: Sequence[_Entry]) -> Execution:
    """The parts of one request, as one execution. When one fails the others are given up."""
    try:
        parts = [await entry.answer for entry in entries]
    except BaseException:  # a cancelled caller too must not leave its other parts to be executed
        for entry in entries:
            entry.answer.cancel()
            if entry.answer.done() and not entry.answer.cancelled():
                entry.answer.exception()  # seen, so that asyncio does not report it as lost
        raise
    return Execution(
        concatenate([part.outputs for part in parts]),
        parts[0].started_s,
        max(part.finished_s for part in parts),
    )


def _check_rows(outputs: Tensors, rows: int) -> None:
    for name, tensor in outputs.items():
        if len(tensor) != rows:
            raise BackendError(f"output {name!r} has {len(tensor)} rows for a batch of {rows}")


def _distribute(
    batch: Sequence[_Entry], outputs: Tensors, started_s: float, finished_s: float
) -> None:
    start = 0
    for entry in batch:
        stop = start + entry.rows
        if not entry.answer.done():
            entry.answer.set_result(
                Execution(take_rows(outputs, start, stop), started_s, finished_s)
            )
        start = stop


def _fail(batch: Iterable[_Entry], error: RequestError) -> None:
    for entry in batch:
        if not entry.answer.done():
            entry.answer.set_exception(error)
