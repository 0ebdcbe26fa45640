"""The open loop accounts for every request that it sent."""

import asyncio
from itertools import count

from loadtests.open_loop import OpenLoop

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\no\r\n1\r\nk\r\n0\r\n\r\n"
REFUSED = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class Service:
    """Answers request n with the n-th of `answers`, over and over; empty: it closes instead."""

    def __init__(self, *answers: bytes) -> None:
        self.connections = 0
        self.bodies: list[bytes] = []
        self._answers = answers

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                size = int(head.rpartition("Content-Length: ")[2])
                self.bodies.append(await reader.readexactly(size))
                answer = self._answers[(len(self.bodies) - 1) % len(self._answers)]
                writer.write(answer)
                if answer not in (OK, CHUNKED):
                    return
        except asyncio.IncompleteReadError:
            return
        finally:
            writer.close()


async def run(service: Service, per_s: float, duration_s: float) -> OpenLoop:
    async with await asyncio.start_server(service, "127.0.0.1", 0) as server:
        loop = OpenLoop(server.sockets[0].getsockname()[1], "/ask", {"A": "b"}, per_s, seed=1)
        numbers = count()
        await loop.run(duration_s, lambda: b"%d" % next(numbers))
    return loop


async def test_every_request_has_its_own_outcome() -> None:
    service = Service(OK, REFUSED, b"")
    loop = await run(service, 500, 0.3)
    assert len(loop.ledger) > 50
    assert sorted(asked.body for asked in loop.ledger) == sorted(service.bodies)
    assert {asked.status for asked in loop.ledger} == {200, 503, None}
    assert {asked.answer for asked in loop.ledger if asked.status == 200} == {b"ok"}
    assert all(asked.intended_s <= asked.sent_s <= asked.done_s for asked in loop.ledger)


async def test_connections_are_kept_open() -> None:
    service = Service(OK, CHUNKED)
    loop = await run(service, 200, 0.3)
    assert {asked.answer for asked in loop.ledger} == {b"ok"}
    assert service.connections < len(loop.ledger) / 2


async def test_a_service_that_is_not_there_loses_every_request() -> None:
    loop = OpenLoop(1, "/ask", {}, 100, seed=1)
    await loop.run(0.1, lambda: b"?")
    assert loop.ledger
    assert {asked.status for asked in loop.ledger} == {None}
