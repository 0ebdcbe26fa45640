"""A door in process: predictions that the test answers itself, behind a real server."""

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, cast

import httptools
import uvicorn
from fastapi import FastAPI, Request
from prometheus_client.samples import Sample

from app.api.admit import Doorkeeper
from app.api.answers import Reply, refusal
from app.api.body import BodyReader
from app.api.gateway import Gateway
from app.api.hot_paths import HotPaths
from app.api.http_door import HttpDoor, HttpLimits
from app.api.http_protocol import protocol_of
from app.api.operators import LoopbackOperator, Operators
from app.api.predictions import PredictOperation
from app.errors import NotFound, RequestError
from app.telemetry.metrics import Metrics

PREDICT = "/v1/models/m:predict"
MAX_BODY_BYTES = 1000
THIS_MACHINE = LoopbackOperator()


class EchoCall:
    """Answers with its body, at once or when the test says so."""

    def __init__(self, predictions: "EchoPredictions", answered: Callable[[Reply], None]) -> None:
        self._predictions = predictions
        self._answered = answered
        self.body: bytes | None = None
        self.left = asyncio.Event()

    def begin(self, body: bytes) -> None:
        self.body = body
        self._predictions.begun.put_nowait(self)
        if not self._predictions.held:
            self.answer()

    def answer(self) -> None:
        assert self.body is not None
        self._answered(Reply(200, self._predictions.answer or self.body))

    def leave(self) -> None:
        self.left.set()


@dataclass
class EchoPredictions:
    """Of the model `m`, as `PredictOperation` has them."""

    held: bool = False
    """Calls wait for `EchoCall.answer`."""
    refusal: RequestError | None = None
    """Of whatever is asked."""
    answer: bytes = b""
    """Instead of the echo."""
    opened: list[EchoCall] = field(default_factory=list)
    begun: "asyncio.Queue[EchoCall]" = field(default_factory=asyncio.Queue)

    def label(self, name: str) -> str:
        return name if name == "m" else "unknown"

    def open(
        self,
        name: str,
        headers: Mapping[bytes, bytes],
        received_s: float,
        peer: str,
        answered: Callable[[Reply], None],
    ) -> EchoCall | None:
        if self.refusal is not None:
            answered(refusal(self.refusal, "id", "/v1/"))
            return None
        if name != "m":
            answered(refusal(NotFound("no such model"), "id", "/v1/"))
            return None
        self.opened.append(EchoCall(self, answered))
        return self.opened[-1]


def application_of(
    predictions: EchoPredictions,
    metrics: Metrics,
    max_body_bytes: int = MAX_BODY_BYTES,
    operators: Operators = THIS_MACHINE,
) -> Gateway:
    """In front of a FastAPI that echoes at `/echo`."""
    rest = FastAPI()

    @rest.post("/echo")
    async def echo(request: Request) -> Any:
        return {"length": len(await request.body()), "query": request.url.query}

    @rest.get("/echo")
    async def look() -> Any:
        return {"length": 0}

    operation = cast(PredictOperation, predictions)
    hot_paths = HotPaths(Doorkeeper(max_body_bytes, operators), operation, metrics)
    return Gateway(hot_paths, rest, BodyReader(max_body_bytes, 0.2, hot_paths.bodies, 0.05))


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes


class Client:
    """One connection, byte by byte."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._answers: list[Answer] = []
        self._status = 0
        self._headers: dict[str, str] = {}
        self._body = b""
        self._parser = httptools.HttpResponseParser(self)

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def answer(self) -> Answer:
        """The next one. Raises `EOFError` when the server closed, `ConnectionError` when it reset
        the connection."""
        async with asyncio.timeout(10):
            while not self._answers:
                data = await self._reader.read(65536)
                if not data:
                    raise EOFError
                self._parser.feed_data(data)
        return self._answers.pop(0)

    async def raw(self, size: int) -> bytes:
        async with asyncio.timeout(10):
            return await self._reader.readexactly(size)

    async def raw_rest(self) -> bytes:
        """All until the server ends the connection."""
        async with asyncio.timeout(10):
            return await self._reader.read()

    async def is_closed(self) -> bool:
        """The server ends the connection, with nothing more to say."""
        async with asyncio.timeout(10):
            return not self._answers and await self._reader.read(1) == b""

    def reset(self) -> None:
        """Go without a word: what is closed like this says that it is gone, not that it ended."""
        sock = self._writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()

    def pause(self) -> None:
        cast(asyncio.ReadTransport, self._writer.transport).pause_reading()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._writer.close()

    def on_status(self, status: bytes) -> None:
        self._headers = {}
        self._body = b""

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode().lower()] = value.decode()

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        self._answers.append(Answer(status, self._headers, self._body))


@dataclass(frozen=True)
class Serving:
    port: int
    server: uvicorn.Server
    application: Gateway
    predictions: EchoPredictions
    metrics: Metrics

    async def connect(self, receive_bytes: int | None = None) -> Client:
        """`receive_bytes` makes the client's buffer in the kernel small."""
        sock = socket.socket(proto=socket.IPPROTO_TCP)
        if receive_bytes is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self.port))
        return Client(*await asyncio.open_connection(sock=sock))

    async def ask(self, data: bytes) -> Answer:
        async with await self.connect() as client:
            await client.send(data)
            return await client.answer()

    def counted(self, metric: str) -> dict[str, float]:
        """The samples of a metric that are not 0, by their labels' values."""
        samples: list[Sample] = [
            sample
            for family in self.metrics.registry.collect()
            for sample in family.samples
            if sample.name == metric
        ]
        return {",".join(s.labels.values()): s.value for s in samples if s.value}


@asynccontextmanager
async def served(
    application: Gateway, http: Any, drain_s: int = 5
) -> AsyncIterator[uvicorn.Server]:
    """On a free port of the loopback, as `app.server` sets uvicorn; `http` is its protocol."""
    config = uvicorn.Config(
        application,
        http=http,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=drain_s,
    )
    server = uvicorn.Server(config)
    # By its protocol, or asyncio would leave Nagle's delay on.
    with socket.socket(proto=socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        task = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
            await asyncio.sleep(0)
        try:
            yield server
        finally:
            server.should_exit = True
            await task


def port_of(server: uvicorn.Server) -> int:
    port: int = server.servers[0].sockets[0].getsockname()[1]
    return port


@asynccontextmanager
async def serving(
    limits: HttpLimits | None = None, max_body_bytes: int = MAX_BODY_BYTES
) -> AsyncIterator[Serving]:
    """Predictions that the test answers, behind our protocol."""
    metrics, predictions = Metrics(), EchoPredictions()
    application = application_of(predictions, metrics, max_body_bytes)
    http = protocol_of(HttpDoor(application.hot_paths, metrics, limits))
    async with served(application, http) as server:
        yield Serving(port_of(server), server, application, predictions, metrics)


def request(
    body: bytes = b"{}",
    *headers: str,
    method: str = "POST",
    target: str = PREDICT,
    version: str = "1.1",
    framing: str | None = None,
) -> bytes:
    """A request with its content-length, or with the line `framing` instead."""
    framing = f"Content-Length: {len(body)}" if framing is None else framing
    lines = [f"{method} {target} HTTP/{version}", "Host: localhost", *headers, framing, "", ""]
    return "\r\n".join(line for line in lines[:-2] if line).encode() + b"\r\n\r\n" + body


def chunked(*chunks: bytes, trailer: bytes = b"") -> bytes:
    framed = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks)
    return framed + b"0\r\n" + trailer + b"\r\n"
