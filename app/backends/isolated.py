"""Executes a model in a process of its own, which is replaced when it dies, hangs or leaks."""

import asyncio
import itertools
import logging
import time
from collections import deque
from pathlib import Path

from app.backends.backend import BackendDied, Tell, tell_nobody
from app.backends.execution_times import ExecutionTimes, warm_up_batches
from app.backends.isolated_model import AHEAD, Execution, IsolatedModel, Opening
from app.backends.isolated_wire import Run, TensorHeader, encoded
from app.contract import EchoOptions, Isolation, OnnxOptions
from app.deadline import Deadline
from app.errors import DeadlineExceeded, HikyakuError, InvalidModel, ModelNotReady
from app.tensors import Signature, Tensors

log = logging.getLogger(__name__)

_FIRST_PAUSE_S = 0.25
_MAX_PAUSE_S = 10.0
_MEASURED = 5


class IsolatedBackend:
    """The backend of `open_isolated`.

    A process that ends fails with `BackendDied` the executions that it may have begun, and no other
    one. The next is started at once, and after failures in a row with growing pauses: an execution
    waits for a start until its deadline, but in a pause it is `ModelNotReady`.
    """

    def __init__(self, opening: Opening, tell: Tell = tell_nobody) -> None:
        self._opening = opening
        self._tell = tell
        self._loop = asyncio.get_running_loop()
        self._signature = opening.signature
        self._concurrency = 1
        self._numbers = itertools.count()
        self._model: IsolatedModel | None = None
        self._waiting: deque[Execution] = deque()
        self._warm: tuple[tuple[TensorHeader, ...], list[memoryview], int] | None = None
        self._failures = 0
        self._proven_at_s = 0.0
        """An answer after this monotonic instant shows that the process is none that fails."""
        self._reason = "it has not been started"
        self._pausing = False
        self._replacement_due = asyncio.Event()
        self._supervisor: asyncio.Task[None] | None = None
        self._watches: dict[asyncio.Task[None], IsolatedModel] = {}

    @property
    def signature(self) -> Signature:
        return self._signature

    @property
    def concurrency(self) -> int:
        return self._concurrency

    async def start(self) -> None:
        """Raises `InvalidModel` when the process cannot open the model."""
        model = await self._opened(hurried=True)
        self._serve_from(model)
        self._supervisor = asyncio.create_task(self._supervise(), name="isolated")

    async def execute(self, inputs: Tensors, deadline: Deadline) -> Tensors:
        headers, tensors = encoded(inputs)
        return await self._run(Run(next(self._numbers), deadline.at_s, headers), tensors)

    async def warm_up(self, example: Tensors, max_rows: int) -> ExecutionTimes:
        """Later processes are warmed with the same example before they serve."""
        headers, tensors = encoded(example)
        self._warm = headers, [memoryview(bytes(part)) for part in tensors], max_rows
        await self._run(self._warm_up_run(headers, max_rows), tensors)
        measured: dict[int, float] = {}
        for rows, batch in warm_up_batches(example, max_rows):
            measured[rows] = await self._measured_s(batch)
        return ExecutionTimes(measured)

    async def check(self) -> None:
        if self._model is None:
            raise self._not_ready()

    async def close(self) -> None:
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.wait({self._supervisor})
        self._pausing = True
        self._reason = "it is closed"
        self._refuse_waiting()
        model, self._model = self._model, None
        if model is not None:
            model.retire()
        await self._end_all()

    async def _end_all(self) -> None:
        """Those that have not ended by themselves when their time is over are killed."""
        if self._watches:
            await asyncio.wait(self._watches, timeout=self._opening.isolation.stuck_s)
        for model in self._watches.values():
            model.kill("it is closed")
        if self._watches:
            await asyncio.wait(self._watches)

    async def _run(self, run: Run, tensors: list[memoryview]) -> Tensors:
        execution = Execution(run, tensors, self._loop.create_future())
        if self._pausing and self._model is None:
            raise self._not_ready()
        self._waiting.append(execution)
        self._dispatch()
        remaining_s = Deadline(run.deadline_s).remaining_s()
        timer = self._loop.call_later(max(remaining_s, 0), self._expire, execution)
        try:
            return await execution.answer
        finally:
            timer.cancel()
            if execution.sent_to is not None:
                execution.sent_to.give_up(execution)

    def _dispatch(self) -> None:
        while self._waiting and self._model is not None and self._model.has_room:
            execution = self._waiting.popleft()
            if not execution.answer.done():
                self._model.send(execution)

    def _expire(self, execution: Execution) -> None:
        if execution.answer.done():
            return
        started = self._model is not None or execution.sent_to is not None
        execution.answer.set_exception(
            DeadlineExceeded("the deadline passed before the isolated process answered")
            if started
            else self._not_ready()
        )

    def _progressed(self, model: IsolatedModel) -> None:
        if model is not self._model:
            return
        if model.worn:
            self._replacement_due.set()
        elif time.monotonic() >= self._proven_at_s:
            self._failures = 0
        self._dispatch()

    async def _supervise(self) -> None:
        while True:
            await self._replacement_due.wait()
            if self._model is not None:
                log.warning("an isolated process has grown", extra=self._named(self._model))
            replacement = await self._replacement()
            if self._model is not None:
                self._model.retire()
            self._serve_from(replacement)
            self._replacement_due.clear()

    async def _replacement(self) -> IsolatedModel:
        """Start one after another until one is open; those that wait know when that takes long."""
        while True:
            if self._failures > 1:
                self._pausing = True
                if self._model is None:
                    self._refuse_waiting()
                pause_s = min(_FIRST_PAUSE_S * 2 ** (self._failures - 2), _MAX_PAUSE_S)
                await asyncio.sleep(pause_s)
                self._pausing = False
            try:
                return await self._opened()
            except HikyakuError as exc:
                self._failures += 1
                self._reason = str(exc)
                log.error(
                    "an isolated process did not start",
                    extra={"model": str(self._opening.model), "reason": self._reason},
                )

    async def _opened(self, *, hurried: bool = False) -> IsolatedModel:
        """A process that is open and warm. Raises `InvalidModel`, or what the warm-up raised."""
        try:
            model = IsolatedModel(self._opening, self._progressed, hurried=hurried)
        except OSError as exc:
            raise InvalidModel(f"{self._opening.model}: no process for it: {exc}") from exc
        watch = asyncio.create_task(self._watch(model), name="isolated process")
        self._watches[watch] = model
        watch.add_done_callback(self._watches.pop)
        start_s = self._opening.isolation.start_s
        try:
            async with asyncio.timeout(start_s):
                ready = await model.opened()
                if self._warm is not None:
                    headers, tensors, max_rows = self._warm
                    run = self._warm_up_run(headers, max_rows)
                    execution = Execution(run, tensors, self._loop.create_future())
                    model.send(execution)
                    await execution.answer
        except BaseException as exc:
            model.kill(f"it is given up: {exc}")
            await asyncio.wait({watch})
            if isinstance(exc, TimeoutError):
                reason = f"{self._opening.model}: was not open and warm within {start_s:g} s"
                raise InvalidModel(reason) from exc
            raise
        if ready.gaps:
            log.warning(
                "an isolated process is less confined than it should be",
                extra=self._named(model) | {"gaps": ready.gaps},
            )
        self._signature, self._concurrency = ready.signature, ready.concurrency + AHEAD
        return model

    def _serve_from(self, model: IsolatedModel) -> None:
        model.accept()
        self._model = model
        self._proven_at_s = time.monotonic() + self._opening.isolation.proven_s
        log.info("an isolated process serves", extra=self._named(model))
        self._dispatch()

    async def _watch(self, model: IsolatedModel) -> None:
        """Until the process has ended: then those that it had are answered, or wait again."""
        why = await model.ended()
        begun, untouched = model.unanswered()
        for execution in begun:
            if not execution.answer.done():
                execution.answer.set_exception(BackendDied(f"the isolated process: {why}"))
        for execution in reversed(untouched):
            execution.sent_to = None
            self._waiting.appendleft(execution)
        if model is not self._model:
            self._dispatch()
            return
        self._model = None
        self._failures += 1
        self._reason = why
        self._tell("process_ended")
        log.error("an isolated process has ended", extra=self._named(model) | {"reason": why})
        self._replacement_due.set()

    def _refuse_waiting(self) -> None:
        while self._waiting:
            execution = self._waiting.popleft()
            if not execution.answer.done():
                execution.answer.set_exception(self._not_ready())

    def _not_ready(self) -> ModelNotReady:
        return ModelNotReady(f"the isolated process is not there: {self._reason}")

    def _warm_up_run(self, headers: tuple[TensorHeader, ...], max_rows: int) -> Run:
        deadline = Deadline.after(self._opening.isolation.start_s)
        return Run(next(self._numbers), deadline.at_s, headers, max_rows)

    async def _measured_s(self, batch: Tensors) -> float:
        """Seconds of an execution as we wait for it: the median of a few."""
        seconds = []
        for _ in range(_MEASURED):
            started_s = time.perf_counter()
            await self.execute(batch, Deadline.after(self._opening.isolation.start_s))
            seconds.append(time.perf_counter() - started_s)
        return sorted(seconds)[_MEASURED // 2]

    def _named(self, model: IsolatedModel) -> dict[str, object]:
        return {"model": str(self._opening.model), "pid": model.pid}


async def open_isolated(
    options: EchoOptions | OnnxOptions,
    isolation: Isolation,
    model: Path,
    signature: Signature,
    tell: Tell = tell_nobody,
    workers: int = 1,
) -> IsolatedBackend:
    """Open the model in a process of its own, as one of so many workers.

    Raises `InvalidModel` with what that process says.
    """
    backend = IsolatedBackend(Opening(options, isolation, model, signature, workers), tell)
    await backend.start()
    return backend
