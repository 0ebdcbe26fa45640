"""Executes a model with ONNX Runtime, in the event loop while that is cheaper than a thread."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from app.backends.backend import Tell, tell_nobody
from app.backends.execution_threads import ExecutionThreads
from app.backends.execution_times import MAX_INLINE_S, ExecutionTimes, warm_up_batches
from app.backends.onnx_session import CPU, ON_CUDA, WHOLE_RUN, OnnxRun, OnnxSession, OutOfMemory
from app.contract import OnnxOptions
from app.deadline import Deadline
from app.errors import ConfigurationError, InvalidModel, ModelNotReady
from app.tensors import Signature, Tensors, row_count

log = logging.getLogger(__name__)

T = TypeVar("T")

# Each takes a core and holds its rows, so there must be an end to it.
_MOST_STUCK = 3
_REBUILD_EVERY_S = 60.0
_LOAD_AGAIN_AFTER_S = 1.0


class OnnxBackend:
    """One session, which `instances` threads share.

    How long an execution is predicted to take, from the warm-up and from every execution since,
    decides where it runs: up to `MAX_INLINE_S` in the event loop, else in a thread. Cancelling an
    execution in a thread ends it at its next node and puts another thread in its place at once;
    one in the event loop cannot be cancelled.
    """

    def __init__(self, session: OnnxSession, options: OnnxOptions, tell: Tell) -> None:
        self._session = session
        self._tell = tell
        self._instances = options.instances
        self._threads = ExecutionThreads("onnx", options.instances)
        # A GPU tries several kernels for a new size before it keeps to one.
        self._warm_up_runs = (1, 5) if session.provider == CPU else (3, 15)
        # The time of a thread also holds what it waited for the interpreter, which the event loop
        # would not wait; where the thread computes alone its CPU time leaves that out.
        alone = session.provider == CPU and options.threads == options.parallel_nodes == 1
        self._thread_clock: Callable[[], float] = time.thread_time if alone else time.perf_counter
        self._times = ExecutionTimes({}, unknown_s=float("inf"))
        self._batch_rows = 1
        self._out_of_memory_in_a_row = 0
        self._rebuild_from_s = 0.0
        self._loading: asyncio.Task[None] | None = None

    @property
    def signature(self) -> Signature:
        return self._session.signature

    @property
    def concurrency(self) -> int:
        """1 while full batches run in the event loop, which the warm-up finds out, else
        `instances`."""
        return 1 if self._is_inline(self._batch_rows) else self._instances

    async def execute(self, inputs: Tensors, deadline: Deadline) -> Tensors:
        rows = row_count(inputs)
        if not self._session.is_loaded:
            await self._rebuild()
        try:
            if self._is_inline(rows):
                outputs, seconds = self._run(inputs, time.perf_counter)
            else:
                outputs, seconds = await self._run_in_thread(inputs)
        except OutOfMemory:
            self._out_of_memory_in_a_row += 1
            # An arena of the CPU does not stay broken.
            if self._out_of_memory_in_a_row > 1 and self._session.provider != CPU:
                await self._rebuild()
            raise
        self._out_of_memory_in_a_row = 0
        self._times.observe(rows, seconds)
        return outputs

    async def warm_up(self, example: Tensors, max_rows: int) -> ExecutionTimes:
        """What it measures also decides between the event loop and the threads."""
        measured: dict[int, float] = {}
        batch = example
        for rows, batch in warm_up_batches(example, max_rows):
            run = OnnxRun()
            measured[rows] = await self._in_thread(
                partial(self._measured_s, batch, run), run.give_up
            )
        # CUDA's libraries hold state for each thread.
        await asyncio.gather(*(self._run_in_thread(batch) for _ in range(self._instances)))
        self._times = ExecutionTimes(measured, in_loop=True)
        self._batch_rows = self._times.best_rows(max_rows)
        return ExecutionTimes(measured, in_loop=True)

    async def check(self) -> None:
        """Also has a model loaded that could not be loaded again: who is not ready gets no
        executions that would."""
        if not self._session.is_loaded:
            self._load_in_background()
            raise ModelNotReady("ONNX Runtime ran out of memory and the model is not loaded again")
        stuck = self._threads.stuck
        if stuck > _MOST_STUCK:
            raise ModelNotReady(f"{stuck} executions in ONNX Runtime were given up and do not end")

    async def close(self) -> None:
        if self._loading is not None:
            self._loading.cancel()
            await asyncio.wait({self._loading})
        await self._threads.close()

    def _is_inline(self, rows: int) -> bool:
        return self._times.predicted_s(rows) <= MAX_INLINE_S

    async def _run_in_thread(self, inputs: Tensors) -> tuple[Tensors, float]:
        run = OnnxRun()
        return await self._in_thread(
            partial(self._run, inputs, self._thread_clock, run), run.give_up
        )

    async def _in_thread(self, work: Callable[[], T], give_up: Callable[[], None]) -> T:
        await self.check()
        return await self._threads.call(work, give_up)

    def _run(
        self, inputs: Tensors, clock: Callable[[], float], run: OnnxRun = WHOLE_RUN
    ) -> tuple[Tensors, float]:
        """The outputs, and how long they took by that clock, in seconds."""
        started_s = clock()
        outputs = self._session.run(inputs, run)
        return outputs, clock() - started_s

    def _measured_s(self, inputs: Tensors, run: OnnxRun) -> float:
        """Seconds of an execution: the least of a few after those that are discarded, which is the
        model's own time; what else a busy machine does is not."""
        discarded, measured = self._warm_up_runs
        seconds = [
            self._run(inputs, time.perf_counter, run)[1] for _ in range(discarded + measured)
        ]
        return min(seconds[discarded:])

    async def _rebuild(self) -> None:
        """Load the model again, at most once a minute while that succeeds: an arena that ran out of
        memory may never have any again (BFCArena on CUDA), but rows that ask for too much must not
        take the model from everybody else."""
        now_s = time.monotonic()
        if now_s < self._rebuild_from_s:
            return
        self._rebuild_from_s = now_s + _REBUILD_EVERY_S
        self._out_of_memory_in_a_row = 0
        self._tell("loaded_again")
        log.warning("out of memory again: the model is loaded anew")
        try:
            await self._threads.call(self._session.rebuild, _let_it_end)
        except InvalidModel as exc:
            # There is no session any more that loading would take from anybody.
            self._rebuild_from_s = time.monotonic() + _LOAD_AGAIN_AFTER_S
            log.error("the model could not be loaded anew", exc_info=exc)
            raise ModelNotReady(f"out of memory, and loading it again failed: {exc}") from exc

    def _load_in_background(self) -> None:
        if self._loading is None or self._loading.done():
            self._loading = asyncio.create_task(self._load(), name="onnx: loading again")

    async def _load(self) -> None:
        with contextlib.suppress(ModelNotReady):  # it was logged
            await self._rebuild()


async def open_onnx(
    options: OnnxOptions,
    model: Path,
    outputs: Sequence[str],
    tell: Tell = tell_nobody,
    workers: int = 1,
) -> OnnxBackend:
    """Load an ONNX file that computes `outputs`, as one of so many workers. Raises `InvalidModel`
    when it cannot be loaded, `ConfigurationError` when each worker would put it on the GPU."""
    # It may take seconds, in which others are answered.
    session = await asyncio.to_thread(OnnxSession, options, model, outputs)
    require_one_on_the_gpu(session.provider, workers)
    log.info("model in ONNX Runtime", extra={"file": str(model), **session.describe()})
    return OnnxBackend(session, options, tell)


def require_one_on_the_gpu(provider: str, workers: int) -> None:
    """Raises `ConfigurationError` when more than one process would execute there."""
    if workers > 1 and provider in ON_CUDA:
        raise ConfigurationError(
            f"each of {workers} workers would put the model and a CUDA context of its own on the "
            "GPU and wait for the others' executions: let them share a Triton (backend: "
            "{use: triton}), set HIKYAKU_WORKERS to 1, or leave cuda out of `providers`"
        )


def _let_it_end() -> None:
    """Loading cannot be interrupted, and is not in vain when the one who waited has left."""
