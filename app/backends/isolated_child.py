"""The program of an isolated process: opens one model and executes what arrives on its socket."""

import asyncio
import os
import socket
import sys
from collections import deque
from pathlib import Path

import uvloop
from pydantic import TypeAdapter

from app.backends import open_backend
from app.backends.backend import Backend
from app.backends.isolated_confinement import confine
from app.backends.isolated_files import only_read
from app.backends.isolated_link import Link
from app.backends.isolated_memory import settled_memory
from app.backends.isolated_wire import (
    Failed,
    Frame,
    Message,
    Open,
    Ran,
    Ready,
    Refused,
    Run,
    WireError,
    check_answer,
    decoded,
    encoded,
)
from app.contract import BackendOptions
from app.deadline import Deadline
from app.errors import BackendError, ConfigurationError, InvalidModel, RequestError

_MAX_REASON = 2_000


def main() -> None:
    """`python -m app.backends.isolated_child <number of the socket that the server gave us>`"""
    connection = socket.socket(fileno=int(sys.argv[1]))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(connection))


async def _serve(connection: socket.socket) -> None:
    """Until the server closes its end; then the process ends."""
    opening: asyncio.Future[Open] = asyncio.get_running_loop().create_future()
    executor: _Executor | None = None

    def take(frame: Frame) -> None:
        if executor is not None:
            executor.take(frame)
        elif isinstance(frame.message, Open):
            opening.set_result(frame.message)

    # Our server may send what fits into our memory.
    link = Link(connection, lambda: 1 << 40, take, _end)
    wanted = await opening
    gaps = confine(wanted.parent, memory_bytes=wanted.memory_mb << 20)
    if wanted.inspect is not None:
        unrestricted = only_read(Path(wanted.model).parent)
        if unrestricted is not None:
            gaps.append(f"may read what the server's user may: {unrestricted}")
    try:
        resident_bytes = _inspected(wanted)
        backend = await _opened(wanted)
    except (InvalidModel, ConfigurationError) as exc:  # the latter: what it needs is not there
        link.send(Refused(str(exc)[:_MAX_REASON]))
    except MemoryError:
        link.send(Refused(f"{wanted.model}: needs more than {wanted.memory_mb} MB to be opened"))
    else:
        executor = _Executor(backend, link)
        link.send(Ready(backend.signature, backend.concurrency, tuple(gaps), resident_bytes))
    await asyncio.Event().wait()


def _inspected(opening: Open) -> int:
    """Look at the file where that is wanted, and say what the process holds in memory before it
    opens the model; 0 where nothing is wanted. Raises `InvalidModel`."""
    if opening.inspect is None:
        return 0
    # Here, because a process that only executes need not know what a file may hold.
    from app.backends.onnx_inspection import inspect_file

    inspect_file(Path(opening.model), opening.inspect.files)
    return settled_memory()


async def _opened(opening: Open) -> Backend:
    options: BackendOptions = TypeAdapter[BackendOptions](BackendOptions).validate_python(
        opening.options
    )
    model, workers = Path(opening.model), opening.workers
    return await open_backend(options, model, opening.signature, workers=workers)


def _end(why: str | None) -> None:
    # At once: a thread in an endless execution must not keep the process.
    os._exit(0 if why is None else 1)


class _Executor:
    """Executes in the order of arrival, as many at once as the backend takes."""

    def __init__(self, backend: Backend, link: Link) -> None:
        self._backend = backend
        self._link = link
        self._waiting: deque[Frame] = deque()
        self._executing = 0
        self._tasks: set[asyncio.Task[None]] = set()  # the loop holds them only weakly

    def take(self, frame: Frame) -> None:
        self._waiting.append(frame)
        if self._executing < self._backend.concurrency:
            self._executing += 1
            task = asyncio.create_task(self._execute_waiting())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _execute_waiting(self) -> None:
        while self._waiting:
            frame = self._waiting.popleft()
            assert isinstance(frame.message, Run)  # all that our server says after the first
            message, tensors = await self._answer(frame.message, frame)
            self._link.send(message, tensors)
        self._executing -= 1

    async def _answer(self, run: Run, frame: Frame) -> tuple[Message, list[memoryview]]:
        """Whatever the backend raises is said to the server: only a death ends this process."""
        try:
            deadline = Deadline(run.deadline_s)
            deadline.check()
            tensors = decoded(run.tensors, frame.payload)
            if run.warm_up_rows is not None:
                await self._backend.warm_up(tensors, run.warm_up_rows)
                return Ran(run.id, ()), []
            headers, buffers = encoded(await self._backend.execute(tensors, deadline))
            # The server kills who sends it another answer: a model that means no harm is told.
            check_answer(headers, self._backend.signature.outputs, run.rows)
            return Ran(run.id, headers), buffers
        except WireError as exc:
            return Failed(run.id, BackendError.code, f"the model answers otherwise: {exc}"), []
        except RequestError as exc:
            return Failed(run.id, exc.code, str(exc)[:_MAX_REASON]), []
        except Exception as exc:
            reason = f"the backend failed: {type(exc).__name__}: {exc}"
            return Failed(run.id, BackendError.code, reason[:_MAX_REASON]), []


if __name__ == "__main__":
    main()
