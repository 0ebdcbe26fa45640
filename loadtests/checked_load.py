"""Asks for predictions over connections that are kept open, and judges every answer as it comes.

Unlike `open_loop` it keeps up with a server at half of its peak on the same machine: a request
costs it some 50 µs, the judging of its answer included.
"""

import asyncio
import random
import time
from array import array
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeAlias, cast

import numpy as np

_GIVE_UP_AFTER_S = 10.0
_SAMPLES = 5

LOST, REFUSED, WRONG = -1, -2, -3
"""In place of a version, in the ledger: no answer came; it was no 200; its numbers are wrong."""

Judge: TypeAlias = Callable[[bytes, int], tuple[int, str]]
"""What the body answers to the question of this number: the version that it names, and the fault
of the answer, if any."""


class Asked(NamedTuple):
    """One request and what came of it. Instants are monotonic."""

    intended_s: float
    sent_s: float
    done_s: float
    version: int
    """That the answer names; else `LOST`, `REFUSED` or `WRONG`."""
    connection: int
    """The local port of the connection."""

    @property
    def latency_s(self) -> float:
        """From the instant at which it should have been sent."""
        return self.done_s - self.intended_s


@dataclass
class Ledger:
    """Every request, in the order of the answers."""

    intended_s: "array[float]" = field(default_factory=lambda: array("d"))
    sent_s: "array[float]" = field(default_factory=lambda: array("d"))
    done_s: "array[float]" = field(default_factory=lambda: array("d"))
    versions: "array[int]" = field(default_factory=lambda: array("i"))
    connections: "array[int]" = field(default_factory=lambda: array("i"))
    numbers: "array[int]" = field(default_factory=lambda: array("q"))
    """Of the request, in the order of sending, from 0 on."""
    faults: Counter[str] = field(default_factory=Counter)
    samples: list[str] = field(default_factory=list)
    """Some of the faults, in full."""

    def __len__(self) -> int:
        return len(self.versions)

    def in_order_of_sending(self) -> Iterator[Asked]:
        columns = (self.intended_s, self.sent_s, self.done_s, self.versions, self.connections)
        for number in np.argsort(np.array(self.sent_s)).tolist():
            yield Asked(*[column[number] for column in columns])

    def fault(self, kind: str, sample: str) -> None:
        self.faults[kind] += 1
        if len(self.samples) < _SAMPLES:
            self.samples.append(f"{kind}: {sample}")


class CheckedLoad:
    """So many connections to a server, one request at a time on each.

    `bodies` are asked in a random order of this seed; `judge` says what an answer to one of them
    means. As an async context manager it connects, and reconnects what is closed.
    """

    def __init__(
        self,
        port: int,
        path: str,
        bodies: Sequence[bytes],
        judge: Judge,
        *,
        connections: int = 32,
        seed: int = 1,
        header: Callable[[int], str] = lambda number: "",
    ) -> None:
        """`header` are more lines for the request of this number, each with its end."""
        self.ledger = Ledger()
        self._port = port
        self._requests = [_request(path, body) for body in bodies]
        self._header = header
        self._sent = 0
        self._judge = judge
        self._random = random.Random(seed)
        self._target = connections
        self._open: set[_Connection] = set()
        self._free: deque[_Connection] = deque()
        """The one that has been free for longest comes first, so that all are used alike."""
        self._late: deque[float] = deque()
        self._asks_again = False
        self._under_way = 0
        self._settled = asyncio.Event()
        self._settled.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_over = False

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        for _ in range(self._target):
            await self._connect()
        self._start(self._give_up())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._is_over = True
        for task in self._tasks:
            task.cancel()
        for connection in self._open:
            connection.close()

    def ports(self) -> set[int]:
        """The local ports of the connections that are open."""
        return {connection.port for connection in self._open}

    async def closed_loop(self, duration_s: float) -> float:
        """Ask again as soon as answered, on every connection: answers a second."""
        before, began_s = len(self.ledger), time.monotonic()
        self._asks_again = True
        while self._free:
            self._send(self._free.popleft(), time.monotonic())
        await asyncio.sleep(duration_s)
        self._asks_again = False
        rate = (len(self.ledger) - before) / (time.monotonic() - began_s)
        await self.settled()
        return rate

    async def open_loop(self, per_s: float, until: Callable[[], bool]) -> None:
        """Ask at random instants (Poisson), `per_s` a second on average, until told to end; returns
        when every request has its outcome. What finds no free connection is sent late."""
        at_s = time.monotonic()
        while not until():
            at_s += self._random.expovariate(per_s)
            wait_s = at_s - time.monotonic()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            if self._free:
                self._send(self._free.popleft(), at_s)
            else:
                self._late.append(at_s)
                self._settled.clear()
        await self.settled()

    async def settled(self) -> None:
        """Until every request has its outcome."""
        await self._settled.wait()

    async def ask_each(self) -> None:
        """One request on every connection, while nothing else is asked."""
        for _ in range(len(self._free)):
            self._send(self._free.popleft(), time.monotonic())
        await self.settled()

    def answered(self, connection: "_Connection", status: int, body: bytes) -> None:
        """What came on a connection, which is free again."""
        version, fault = REFUSED, f"status {status}"
        if status == 200:
            version, fault = self._judge(body, connection.question)
            if fault:
                version, fault = WRONG, f"{fault} answer"
        if fault:
            self.ledger.fault(fault, repr(body[:300]))
        self._enter(connection, version)

    def freed(self, connection: "_Connection") -> None:
        """It may be asked again."""
        if self._asks_again:
            self._send(connection, time.monotonic())
        elif self._late:
            self._send(connection, self._late.popleft())
        else:
            self._free.append(connection)

    def lost(self, connection: "_Connection", why: str) -> None:
        """It is closed; another one takes its place."""
        self._open.discard(connection)
        if connection in self._free:
            self._free.remove(connection)
        if self._is_over:
            return
        if connection.is_asking:
            self.ledger.fault("lost", why)
            self._enter(connection, LOST)
        self._start(self._reconnect())

    def _send(self, connection: "_Connection", intended_s: float) -> None:
        question = self._random.randrange(len(self._requests))
        self._under_way += 1
        self._settled.clear()
        head, body = self._requests[question]
        request = b"%b%b\r\n%b" % (head, self._header(self._sent).encode(), body)
        connection.number = self._sent
        self._sent += 1
        connection.ask(request, question, intended_s)

    def _enter(self, connection: "_Connection", version: int) -> None:
        ledger = self.ledger
        ledger.intended_s.append(connection.intended_s)
        ledger.sent_s.append(connection.sent_s)
        ledger.done_s.append(time.monotonic())
        ledger.versions.append(version)
        ledger.connections.append(connection.port)
        ledger.numbers.append(connection.number)
        self._under_way -= 1
        if not self._under_way and not self._late:
            self._settled.set()

    async def _connect(self) -> None:
        _, connection = await self._loop.create_connection(
            lambda: _Connection(self), "127.0.0.1", self._port
        )
        self._open.add(connection)
        self.freed(connection)

    async def _reconnect(self) -> None:
        while True:
            try:
                return await self._connect()
            except OSError as exc:
                self.ledger.faults[f"no connection: {type(exc).__name__}"] += 1
                await asyncio.sleep(0.02)

    async def _give_up(self) -> None:
        while True:
            await asyncio.sleep(1)
            late_s = time.monotonic() - _GIVE_UP_AFTER_S
            for connection in list(self._open):
                if connection.is_asking and connection.sent_s < late_s:
                    connection.close()

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _Connection(asyncio.Protocol):
    """One connection, which has one request under way at most."""

    def __init__(self, load: CheckedLoad) -> None:
        self.question = self.number = 0
        self.intended_s = self.sent_s = 0.0
        self.is_asking = False
        self.port = 0
        self._load = load
        self._received = b""

    def ask(self, request: bytes, question: int, intended_s: float) -> None:
        self.question, self.intended_s = question, intended_s
        self.sent_s = time.monotonic()
        self.is_asking = True
        self._transport.write(request)

    def close(self) -> None:
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        self.port = transport.get_extra_info("sockname")[1]

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, found, body = self._received.partition(b"\r\n\r\n")
        if not found:
            return
        head = head.lower()
        length = head.partition(b"\r\ncontent-length:")[2].partition(b"\r\n")[0]
        if len(body) < int(length):
            return
        self._received = b""
        self.is_asking = False
        self._load.answered(self, int(head[9:12]), body)
        if b"\r\nconnection: close" in head:
            self._transport.close()
        else:
            self._load.freed(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._load.lost(self, repr(exc) if exc else "the server closed the connection")


def _request(path: str, body: bytes) -> tuple[bytes, bytes]:
    """Its head without the empty line, and its body."""
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: 127.0.0.1",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
    ]
    return "\r\n".join(lines).encode() + b"\r\n", body
