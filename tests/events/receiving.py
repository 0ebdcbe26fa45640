"""Receivers on this machine: what they were sent, and listeners that nobody may reach."""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from typing import NamedTuple

from app.events.delivery import Delivery
from app.events.signing import Signer
from app.events.webhooks import Patience, Webhooks
from app.telemetry.metrics import Metrics

SECRET = "whsec_" + "c2VjcmV0IHNlY3JldCBzZWNyZXQgc2VjcmV0ISE="


class Request(NamedTuple):
    line: str
    headers: dict[str, str]
    body: bytes


class Receiver:
    """Answers with these one after the other, and with the last one ever after; waits for ever in
    the place of None. An answer is a status, with header lines after it."""

    def __init__(self, answers: Sequence[str | None]) -> None:
        self._answers = list(answers)
        self.requests: asyncio.Queue[Request] = asyncio.Queue()
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            request = await _read(reader)
            self.requests.put_nowait(request)
            answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
            if answer is None:
                await reader.read()  # until the other side has had enough
            else:
                status, *lines = answer.splitlines()
                head = "\r\n".join([f"HTTP/1.1 {status} X", "content-length: 0", *lines, "", ""])
                writer.write(head.encode())
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # a sender that leaves is none of a receiver's faults
        finally:
            writer.close()


async def _read(reader: asyncio.StreamReader) -> Request:
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    line, *lines = head.rstrip().split("\r\n")
    headers = {name.lower(): value for name, value in (each.split(": ", 1) for each in lines)}
    body = await reader.readexactly(int(headers["content-length"]))
    return Request(line, headers, body)


@asynccontextmanager
async def receiving(
    *answers: str | None, tls: ssl.SSLContext | None = None, host: str = "127.0.0.1"
) -> AsyncIterator[Receiver]:
    receiver = Receiver(answers or ["200"])
    server = await asyncio.start_server(receiver.serve, host, 0, ssl=tls)
    receiver.port = server.sockets[0].getsockname()[1]
    try:
        yield receiver
    finally:
        server.close()


class Canary:
    """A listener that nobody is to reach."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self.port: int = listener.getsockname()[1]

    @property
    def was_reached(self) -> bool:
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return False
        connection.close()
        return True


@contextmanager
def canary(host: str = "", port: int = 0) -> Iterator[Canary]:
    """On every address of this machine, unless there is a host."""
    has_six = not host and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if has_six else socket.AF_INET
    with socket.create_server((host, port), family=family, dualstack_ipv6=has_six) as listener:
        listener.setblocking(False)
        yield Canary(listener)


def told(
    deliveries: Sequence[Delivery], metrics: Metrics, patience: Patience
) -> AbstractAsyncContextManager[Webhooks]:
    return Webhooks(deliveries, Signer.of(SECRET), "urn:hikyaku:test", metrics, patience)


def outcomes(metrics: Metrics) -> dict[str, int]:
    """How many events came to which end."""
    return {
        sample.labels["outcome"]: int(sample.value)
        for family in metrics.registry.collect()
        if family.name == "hikyaku_webhook_deliveries"
        for sample in family.samples
        if sample.value
    }
