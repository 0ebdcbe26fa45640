"""Executes batches, and repeats the rows of those that failed until the culprits are found."""

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from app.backends.backend import Backend, BackendDied
from app.backends.execution_times import ExecutionTimes
from app.batching.isolation import IsolationBudget, Run, Suspects, isolate, most_runs, split
from app.batching.waiting import Entry, Executed, Execution, gathered
from app.deadline import Deadline
from app.errors import BackendError, DeadlineExceeded, ModelNotReady, RequestError
from app.tensors import Tensors

log = logging.getLogger(__name__)


class BatchObserver(Protocol):
    """Is told what becomes of batches and rows; must neither raise nor block."""

    def began(self) -> None:
        """An execution has begun."""
        ...

    def ended(self) -> None:
        """It is over, however it ended."""
        ...

    def executed(self, rows: int, waited_s: float, took_s: float) -> None:
        """An execution succeeded; its first row had waited `waited_s`."""
        ...

    def failed(self, outcome: str) -> None:
        """An execution did not: `failed`, `died`, `not_executed` or `given_up`."""
        ...

    def repeated(self) -> None:
        """An execution began that repeats rows of a failed batch."""
        ...

    def left(self) -> None:
        """A caller left, or its deadline passed, before its rows were executed."""
        ...

    def refused(self, reason: str) -> None:
        """Rows were refused at the door: `rows`, `deadline` or `shapes`."""
        ...


class Slot:
    """Room for one execution, and the task that runs one after the other in it."""

    __slots__ = ("batch", "budget", "given_up", "predicted_s", "runner", "started_s", "waiting")

    def __init__(self, budget: IsolationBudget) -> None:
        self.budget = budget
        """Of its own: nobody else spends what a batch counted on when it was taken."""
        self.runner: asyncio.Task[None] | None = None
        self.batch: Sequence[Entry] = ()
        self.waiting = 0
        """Entries of the batch whose callers still wait for it."""
        self.started_s = 0.0
        self.predicted_s = 0.0
        self.given_up = False

    def left_s(self, now_s: float) -> float:
        """Until it is free, as predicted; one that takes longer is expected to take as long again
        as it is late."""
        if not self.batch:
            return 0.0
        return abs(self.started_s + self.predicted_s - now_s)


class Executor:
    """Runs batches on the backend, several at a time in slots of their own, and tells each entry's
    waiter what came of its rows.

    `times` learns from every execution; `now_s` is the clock of the deadlines.
    """

    def __init__(
        self,
        backend: Backend,
        times: ExecutionTimes,
        observer: BatchObserver,
        now_s: Callable[[], float],
    ) -> None:
        self._backend = backend
        self._times = times
        self._observer = observer
        self._now_s = now_s
        self.suspects = Suspects()
        """Callers whose rows keep failing: they must share no execution."""
        self.under_way = 0
        """Executions."""

    def live(self, entries: Iterable[Entry]) -> list[Entry]:
        """Those to execute. Where the deadline has passed the sweep answers at its next turn."""
        now_s = self._now_s()
        return [e for e in entries if not e.answer.done() and e.deadline.at_s > now_s]

    async def run(self, slot: Slot, batch: list[Entry]) -> None:
        """Execute the batch in the slot and tell everybody in it how that ended.

        When it is cancelled nobody is told.
        """
        slot.budget.executed()
        try:
            error = await self._answered(slot, batch)
            if error is not None:
                await self._settle(slot, batch, error)
        except asyncio.CancelledError:
            raise
        except BaseException as exc:  # it ends the runner; what waits must not wait for ever
            fail(batch, BackendError(f"the backend failed: {type(exc).__name__}"))
            raise

    async def _settle(self, slot: Slot, batch: list[Entry], error: BackendError) -> None:
        """Repeat the rows of a failed batch in parts; what fails for good is refused."""

        async def run(entries: list[Entry]) -> BackendError | None:
            await asyncio.sleep(0)
            entries = self.live(entries)
            if not entries:
                return None
            slot.budget.repeated()
            self._observer.repeated()
            return await self._answered(slot, entries)

        if isinstance(error, BackendDied):
            await self._run_once_more(batch, error, run, slot.budget)
            return
        refused = await isolate(batch, error, run, slot.budget)
        is_a_row = any([entry.succeeded for entry in batch])
        for entries, fault in refused:
            if len(entries) > 1:
                # Of somebody else's row, perhaps: what it says is not for these callers.
                fail(entries, BackendError("rows failed together, and which of them is not known"))
                continue
            if is_a_row and not entries[0].answer.done():
                self.suspects.failed(entries[0].caller)
            fail(entries, fault)

    async def _run_once_more(
        self,
        batch: list[Entry],
        error: BackendDied,
        run: Run,
        budget: IsolationBudget,
    ) -> None:
        """What executed these rows died. Once is no row's fault for sure, twice is: they are run
        once more, in as many parts as isolation may cost."""
        runs = min(most_runs(len(batch)), budget.runs)
        for part in split(batch, runs) if runs else [batch]:
            fault = await run(part) if runs else error
            if fault is not None:
                fail(part, BackendDied("what executed these rows died of them, or beside them"))

    async def _answered(self, slot: Slot, batch: Sequence[Entry]) -> BackendError | None:
        """Execute the batch and answer its callers; what says nothing about the rows is their
        answer too, a fault that may be a row's is returned."""
        rows = sum([entry.rows for entry in batch])
        started_s = self._now_s()
        slot.batch, slot.waiting = batch, len(batch)
        slot.started_s, slot.predicted_s = started_s, self._times.predicted_s(rows)
        self.under_way += 1
        self._observer.began()
        try:
            outputs = await self._backend.execute(
                gathered(batch),
                batch[0].deadline if len(batch) == 1 else _last_deadline(batch),
            )
            _check_rows(outputs, rows)
        except asyncio.CancelledError as exc:
            if (task := asyncio.current_task()) is None or task.cancelling():
                raise
            return self._fault(exc, rows)
        except BackendError as exc:
            return self._fault(exc, rows)
        except RequestError as exc:
            refusal = exc
        except Exception as exc:  # a defect of the backend must not end the loop that serves all
            return self._fault(exc, rows)
        else:
            self._succeeded(batch, Execution(outputs, rows, started_s, self._now_s()), rows)
            return None
        finally:
            self._observer.ended()
            slot.batch = ()
            self.under_way -= 1
        self._observer.failed("not_executed")
        if isinstance(refusal, DeadlineExceeded):  # it takes that long at least
            self._times.observe(rows, self._now_s() - started_s)
        elif isinstance(refusal, ModelNotReady):
            # Addresses and paths are the operator's: /v2/health/ready and the log have them.
            log.debug("not executed", extra={"rows": rows, "reason": str(refusal)})
            refusal = ModelNotReady("what executes this model is not there, or not ready")
        fail(batch, refusal)
        return None

    def _fault(self, exc: BaseException, rows: int) -> BackendError:
        """Log and count an execution that failed; what its callers are told."""
        outcome = "died" if isinstance(exc, BackendDied) else "failed"
        log.error("execution failed", extra={"rows": rows, "outcome": outcome}, exc_info=exc)
        self._observer.failed(outcome)
        if isinstance(exc, BackendError):
            return exc
        if isinstance(exc, asyncio.CancelledError):
            return BackendError("the backend gave the execution up")
        return BackendError(f"the backend failed: {type(exc).__name__}")

    def _succeeded(self, batch: Sequence[Entry], execution: Execution, rows: int) -> None:
        took_s = execution.finished_s - execution.started_s
        self._times.observe(rows, took_s)
        self._observer.executed(rows, execution.started_s - batch[0].enqueued_s, took_s)
        start = 0
        for entry in batch:
            stop = start + entry.rows
            entry.succeeded = True
            if not entry.answer.done():
                entry.is_over = True
                entry.answer.set_result(Executed(execution, start, stop))
            start = stop
        if self.suspects:
            for entry in batch:
                self.suspects.succeeded(entry.caller)


def _check_rows(outputs: Tensors, rows: int) -> None:
    for name, tensor in outputs.items():
        if len(tensor) != rows:
            raise BackendError(f"output {name!r} has {len(tensor)} rows for a batch of {rows}")


def fail(batch: Iterable[Entry], error: RequestError) -> None:
    """Tell those who still wait."""
    for entry in batch:
        if not entry.answer.done():
            entry.answer.set_exception(error)


def _last_deadline(batch: Iterable[Entry]) -> Deadline:
    return max((entry.deadline for entry in batch), key=lambda deadline: deadline.at_s)
