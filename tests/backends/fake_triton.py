"""A server that speaks Triton's HTTP and misbehaves as no real one does on demand."""

import asyncio
import contextlib
import json
from types import TracebackType
from typing import Any, Self


class FakeTriton:
    """Answers as a Triton with the model `regression` would; what a test changes, it obeys."""

    def __init__(self) -> None:
        self.version = "1"
        """The version that says it answered."""
        self.failing = False
        """Whether executions fail with an error of the server."""
        self.outputs: list[dict[str, Any]] = [
            {"name": "y", "datatype": "FP32", "shape": [-1, 1]},
        ]
        """What it says the model returns."""
        self.hang_up_after = 1_000_000
        """Requests of a connection after which it is closed without a word."""
        self.dies = False
        """Whether each execution closes its connection, unanswered."""
        self.hangs = False
        """Whether executions are never answered."""
        self.takes_s = 0.0
        """How long an execution takes."""
        self.answers = [5.0, 11.0]
        """The output of each execution, whatever is sent."""
        self.is_ready = True
        self.was_asked = asyncio.Event()
        """Set once somebody has asked whether the model is ready."""
        self.asked = 0
        """Executions that were asked for."""
        self._connections: set[asyncio.StreamWriter] = set()

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._server.close()
        for writer in self._connections:
            writer.close()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.add(writer)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            for number in range(1_000_000):
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                if number >= self.hang_up_after:
                    break
                path = head.split(" ", 2)[1]
                lengths = [
                    line.split(":")[1]
                    for line in head.split("\r\n")
                    if line.lower().startswith("content-length")
                ]
                await reader.readexactly(int(lengths[0]) if lengths else 0)
                status, document = self._answer(path)
                if path.endswith("/infer"):
                    if self.dies:
                        break
                    if self.hangs:
                        await asyncio.Event().wait()
                    await asyncio.sleep(self.takes_s)
                body = json.dumps(document).encode() if document else b""
                writer.write(b"HTTP/1.1 %d x\r\nContent-Length: %d\r\n\r\n" % (status, len(body)))
                writer.write(body)
        self._connections.discard(writer)
        writer.close()

    def _answer(self, path: str) -> tuple[int, dict[str, Any]]:
        if path.endswith("/infer"):
            self.asked += 1
            if self.failing:
                return 500, {"error": "the server's fault"}
            outputs = [{"name": "y", "datatype": "FP32", "shape": [2, 1], "data": self.answers}]
            return 200, {"model_version": self.version, "outputs": outputs}
        if path.endswith("/config"):
            return 200, {"max_batch_size": 8}
        if path.endswith("/ready"):
            self.was_asked.set()
            return (200 if self.is_ready else 400), {}
        inputs = [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}]
        return 200, {"inputs": inputs, "outputs": self.outputs}
