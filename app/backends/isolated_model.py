"""A model that is open in an isolated process, and the executions that it has been sent."""

import asyncio
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from app.backends.isolated_process import IsolatedProcess
from app.backends.isolated_wire import (
    Failed,
    Frame,
    Inspection,
    Open,
    Ran,
    Ready,
    Refused,
    Run,
    WireError,
    check_answer,
    decoded,
    most_bytes,
)
from app.contract import EchoOptions, Isolation, OnnxOptions
from app.errors import BackendError, DeadlineExceeded, InvalidModel, ModelNotReady, printable
from app.tensors import Signature, Tensors, TensorSpec

_ERRORS = {error.code: error for error in (BackendError, DeadlineExceeded, ModelNotReady)}
_MAX_CONCURRENCY = 256
# Of executions, so that the process need not wait for us between two: a third more a second.
AHEAD = 1
_MEASURE_EVERY_S = 1.0
_END_S = 1.0
_MAX_REASON = 2_000
# What is behind all others may get no processor for long: of the time it must have had so much.
_COMPUTED = 0.5
_HURRIED_NICE = 10  # of a busy core a tenth: idle it might never be open


@dataclass(frozen=True, slots=True)
class Opening:
    """What an isolated process is to open, and as what."""

    options: EchoOptions | OnnxOptions
    isolation: Isolation
    model: Path
    signature: Signature
    workers: int
    inspect: Inspection | None = None

    def message(self) -> Open:
        isolation = self.isolation
        return Open(
            os.getpid(),
            isolation.memory_mb,
            self.options.model_dump(mode="json", exclude={"isolated"}),
            str(self.model.absolute()),
            self.signature,
            self.workers,
            self.inspect,
        )


@dataclass(slots=True, eq=False)
class Execution:
    """What is to run, its tensors, and who waits for it. It is given up when `answer` is done."""

    run: Run
    tensors: list[memoryview] = field(repr=False)
    answer: "asyncio.Future[Tensors]"
    sent_to: "IsolatedModel | None" = None
    sent_whole_at: int = 0
    """`sent_bytes` of its process from which on that has all of it."""


class IsolatedModel:
    """One process; `on_progress` is called when it answered or grew too large. `hurried`: it is not
    wholly put behind others until it serves, because somebody waits for that."""

    def __init__(
        self,
        opening: Opening,
        on_progress: Callable[["IsolatedModel"], None],
        *,
        hurried: bool = False,
    ) -> None:
        self._opening = opening
        self._on_progress = on_progress
        self._loop = asyncio.get_running_loop()
        self._opened: asyncio.Future[Ready] = self._loop.create_future()
        self._in_flight: dict[int, Execution] = {}
        self._concurrency = 1
        self._outputs: tuple[TensorSpec, ...] = ()
        self._retired = False
        self._measure_at_s = 0.0
        self._worn_bytes = float("inf")
        self.worn = False
        self._process = IsolatedProcess(opening.model, self._most_bytes, self._on_frame)
        isolation = opening.isolation
        if hurried:
            self._process.put_behind(min(isolation.nice, _HURRIED_NICE), idle=False)
        else:
            self._process.put_behind(isolation.nice, idle=isolation.idle)
        self._process.send(opening.message())

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def has_room(self) -> bool:
        return (
            self._process.running
            and not self._retired
            and len(self._in_flight) < self._concurrency + AHEAD
        )

    async def opened(self) -> Ready:
        """Wait until it is open. Raises `InvalidModel` when it cannot be opened."""
        ready = await self._opened
        if not 0 < ready.concurrency <= _MAX_CONCURRENCY:
            raise InvalidModel(f"{self._opening.model}: {ready.concurrency} executions at once")
        self._concurrency = ready.concurrency
        self._outputs = ready.signature.outputs
        return ready

    def accept(self) -> None:
        """It is warm: from here on it may take half of the memory that is left."""
        isolation = self._opening.isolation
        self._process.put_behind(isolation.nice, idle=isolation.idle)
        limit = isolation.memory_mb << 20
        fresh = self._process.private_bytes()
        self._worn_bytes = fresh + (limit - fresh) / 2 if fresh else float("inf")

    def peak_bytes(self) -> int:
        """The most memory of the machine that it ever held; 0 where the system does not say."""
        return self._process.peak_bytes()

    def send(self, execution: Execution) -> None:
        execution.sent_to = self
        self._in_flight[execution.run.id] = execution
        execution.sent_whole_at = self._process.send(execution.run, execution.tensors)

    def give_up(self, execution: Execution) -> None:
        """Nobody waits for it any more: it may take `stuck_s` from now, or from its beginning, and
        as long as it is not let compute."""
        if execution.run.id in self._in_flight:
            self._wait_for(execution, self._process.computing().cpu_s)

    def _wait_for(self, execution: Execution, cpu_s: float) -> None:
        stuck_s = self._opening.isolation.stuck_s
        had_begun = self._begun(execution)
        self._loop.call_later(stuck_s, self._overdue, execution, had_begun, cpu_s)

    def kill(self, why: str) -> None:
        self._process.kill(why)

    def retire(self) -> None:
        """It gets no more executions, and ends when nobody waits for one of it."""
        self._retired = True
        if all(execution.answer.done() for execution in self._in_flight.values()):
            self._process.finish()
            self._loop.call_later(_END_S, self._process.kill, "it did not end by itself")

    async def ended(self) -> str:
        """Wait for its end, and say what it was."""
        why = await self._process.ended()
        if not self._opened.done():
            reason = f"{self._opening.model}: the process that opened it ended: {why}"
            self._opened.set_exception(InvalidModel(reason))
            self._opened.exception()  # seen, whether somebody waits for it or not
        return why

    def unanswered(self) -> tuple[list[Execution], list[Execution]]:
        """Those that it may have begun, and those that it cannot have: it takes them in order, and
        begins none of which it has only a part."""
        executions = list(self._in_flight.values())
        self._in_flight.clear()
        sent_bytes = self._process.sent_bytes
        whole = sum(execution.sent_whole_at <= sent_bytes for execution in executions)
        begun = min(whole, self._concurrency)
        return executions[:begun], executions[begun:]

    def _begun(self, execution: Execution) -> bool:
        return execution in list(self._in_flight.values())[: self._concurrency]

    def _overdue(self, execution: Execution, had_begun: bool, cpu_s: float) -> None:
        """`cpu_s` is what the process had computed when nobody waited any more."""
        if execution.run.id not in self._in_flight:
            return
        stuck_s = self._opening.isolation.stuck_s
        now = self._process.computing()
        if not had_begun:
            self.give_up(execution)
        elif now.waits_for_cpu and now.cpu_s - cpu_s < stuck_s * _COMPUTED:
            self._wait_for(execution, cpu_s)  # others have the processor: that is not its fault
        else:
            self.kill(f"it was stuck: nobody had waited for {stuck_s:g} s for what it executed")

    def _most_bytes(self) -> int:
        """What its next answer may take: nothing where none is due."""
        due = max((most_bytes(sent.run.rows) for sent in self._in_flight.values()), default=0)
        return min(due, self._opening.isolation.memory_mb << 20)

    def _on_frame(self, frame: Frame) -> None:
        message = frame.message
        match message:
            case Ready() if not self._opened.done():
                self._opened.set_result(message)
            case Refused() if not self._opened.done():
                self._opened.set_exception(InvalidModel(_said(message.reason)))
                self._opened.exception()  # seen, whether somebody waits for it or not
            case Ran() if message.id in self._in_flight:
                self._ran(self._in_flight[message.id], message, frame)
            case Failed() if message.id in self._in_flight:
                execution = self._in_flight.pop(message.id)
                if not execution.answer.done():
                    error = _ERRORS.get(message.error, BackendError)
                    execution.answer.set_exception(error(_said(message.reason)))
                self._progressed()
            case _:
                raise WireError(f"{message.__class__.__name__} where none was due")

    def _ran(self, execution: Execution, message: Ran, frame: Frame) -> None:
        due = self._outputs if execution.run.warm_up_rows is None else ()
        check_answer(message.tensors, due, execution.run.rows)
        outputs = decoded(message.tensors, frame.payload)
        del self._in_flight[message.id]
        if not execution.answer.done():
            execution.answer.set_result(outputs)
        self._progressed()

    def _progressed(self) -> None:
        now_s = time.monotonic()
        if now_s >= self._measure_at_s:
            self._measure_at_s = now_s + _MEASURE_EVERY_S
            self.worn = self._process.private_bytes() > self._worn_bytes
        if self._retired:
            self.retire()
        self._on_progress(self)


def _said(reason: str) -> str:
    """What a process says may come from its model: it is shown, but shows nothing by itself."""
    return printable(reason[:_MAX_REASON])
