"""Tries a model in one isolated process that is never replaced: its end is the trial's end."""

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from app.backends.backend import BackendDied
from app.backends.isolated_model import Execution, IsolatedModel, Opening
from app.backends.isolated_wire import Ready, Run, encoded
from app.deadline import Deadline
from app.errors import DeadlineExceeded, InvalidModel
from app.tensors import Signature, Tensors

log = logging.getLogger(__name__)


class IsolatedTrial:
    """A model that is open. After the first execution that failed nothing more can be executed."""

    def __init__(self, model: IsolatedModel, ready: Ready, end: "asyncio.Task[str]") -> None:
        self._model = model
        self._ready = ready
        self._end = end
        self._numbers = itertools.count()

    @property
    def signature(self) -> Signature:
        return self._ready.signature

    def memory_bytes(self) -> int:
        """What opening and executing have taken at most of the machine's memory; 0 where the system
        does not say."""
        return max(0, self._model.peak_bytes() - self._ready.resident_bytes)

    async def execute(self, inputs: Tensors, deadline: Deadline) -> Tensors:
        """Raises `BackendError` with what the model raises, `BackendDied` when its process ends,
        `DeadlineExceeded`."""
        headers, tensors = encoded(inputs)
        run = Run(next(self._numbers), deadline.at_s, headers)
        execution = Execution(run, tensors, asyncio.get_running_loop().create_future())
        self._model.send(execution)
        waited_for: set[asyncio.Future[Any]] = {execution.answer, self._end}
        remaining_s = max(deadline.remaining_s(), 0)
        await asyncio.wait(waited_for, timeout=remaining_s, return_when=asyncio.FIRST_COMPLETED)
        if execution.answer.done():
            return execution.answer.result()
        execution.answer.cancel()
        if self._end.done():
            raise BackendDied(f"the isolated process: {self._end.result()}")
        raise DeadlineExceeded("the deadline passed before the isolated process answered")


@asynccontextmanager
async def open_trial(opening: Opening, within_s: float) -> AsyncIterator[IsolatedTrial]:
    """The model, open within that time in a process that is killed at the end.

    Raises `InvalidModel` with what that process says, and when it says nothing in time.
    """
    try:
        model = IsolatedModel(opening, _let_it_be)
    except OSError as exc:
        raise InvalidModel(f"{opening.model}: no process for it: {exc}") from exc
    end = asyncio.create_task(model.ended(), name="isolated trial")
    try:
        try:
            async with asyncio.timeout(within_s):
                ready = await model.opened()
        except TimeoutError as exc:
            reason = f"{opening.model}: was not open within {within_s:g} s"
            raise InvalidModel(reason) from exc
        log.info(
            "a model is tried in an isolated process",
            extra={"model": str(opening.model), "pid": model.pid},
        )
        if ready.gaps:
            log.warning(
                "an isolated process is less confined than it should be",
                extra={"model": str(opening.model), "pid": model.pid, "gaps": ready.gaps},
            )
        yield IsolatedTrial(model, ready, end)
    finally:
        model.kill("the trial is over")
        await asyncio.wait({end})


def _let_it_be(model: IsolatedModel) -> None:
    """A trial has one execution at a time, and waits for its answer itself."""
