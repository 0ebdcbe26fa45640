"""The program of an isolated process: opens one model and executes what arrives on its socket."""

import asyncio
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import uvloop
from pydantic import TypeAdapter

from app.backends import open_backend
from app.backends.backend import Backend
from app.backends.isolated_confinement import confine
from app.backends.isolated_wire import (
    Failed,
    Frame,
    FrameReader,
    Message,
    Open,
    Ran,
    Ready,
    Refused,
    Run,
    TensorHeader,
    decoded,
    encoded,
    frame,
)
from app.contract import BackendOptions
from app.deadline import Deadline
from app.errors import BackendError, InvalidModel, RequestError

_MAX_PAYLOAD = 1 << 40  # our server may send what fits into our memory
_MAX_REASON = 2_000


def main() -> None:
    """`python -m app.backends.isolated_child <number of the socket that the server gave us>`"""
    connection = socket.socket(fileno=int(sys.argv[1]))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(connection))


async def _serve(connection: socket.socket) -> None:
    connection.setblocking(False)
    link = _Link(connection)
    opening = (await link.receive()).message
    assert isinstance(opening, Open)  # what our server sends first
    limits = opening.limits
    gaps = confine(
        opening.parent, memory_bytes=limits.memory_mb << 20, nice=limits.nice, cpu_s=limits.cpu_s
    )
    options: BackendOptions = TypeAdapter[BackendOptions](BackendOptions).validate_python(
        opening.options
    )
    try:
        backend = await open_backend(options, Path(opening.model), opening.signature)
    except InvalidModel as exc:
        await link.send(Refused(str(exc)[:_MAX_REASON]))
        return
    await link.send(Ready(backend.signature, backend.concurrency, tuple(gaps)))
    async with asyncio.TaskGroup() as tasks:
        for _ in range(backend.concurrency):
            tasks.create_task(_execute_frames(link, backend))


async def _execute_frames(link: "_Link", backend: Backend) -> None:
    while True:
        received = await link.receive()
        assert isinstance(received.message, Run)
        message, tensors = await _answer(backend, received.message, received)
        await link.send(message, tensors)


async def _answer(backend: Backend, run: Run, received: Frame) -> tuple[Message, list[memoryview]]:
    """Whatever the backend raises is said to the server: only a death ends this process."""
    try:
        headers, buffers = await _run(backend, run, received)
    except RequestError as exc:
        return Failed(run.id, exc.code, str(exc)[:_MAX_REASON]), []
    except Exception as exc:
        reason = f"the backend failed: {type(exc).__name__}: {exc}"
        return Failed(run.id, BackendError.code, reason[:_MAX_REASON]), []
    return Ran(run.id, headers), buffers


async def _run(
    backend: Backend, run: Run, received: Frame
) -> tuple[tuple[TensorHeader, ...], list[memoryview]]:
    deadline = Deadline(run.deadline_s)
    deadline.check()
    tensors = decoded(run.tensors, received.payload)
    if run.warm_up_rows is not None:
        await backend.warm_up(tensors, run.warm_up_rows)
        return (), []
    return encoded(await backend.execute(tensors, deadline))


class _Link:
    """The socket to the server, for several tasks: each receives and sends whole frames."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._loop = asyncio.get_running_loop()
        self._reader = FrameReader(_MAX_PAYLOAD)
        self._frames: list[Frame] = []
        self._receiving = asyncio.Lock()
        self._sending = asyncio.Lock()

    async def receive(self) -> Frame:
        """The next frame. When the server has closed its end, this process ends."""
        async with self._receiving:
            while not self._frames:
                count = await self._loop.sock_recv_into(self._connection, self._reader.space())
                if count == 0:
                    # At once: a thread in an endless execution must not keep the process.
                    os._exit(0)
                self._frames = list(self._reader.received(count))
            return self._frames.pop(0)

    async def send(self, message: Message, tensors: Sequence[memoryview] = ()) -> None:
        async with self._sending:
            await self._loop.sock_sendall(self._connection, b"".join(frame(message, tensors)))


if __name__ == "__main__":
    main()
