"""Asks a service over HTTP at a steady rate, whatever it answers: an open loop."""

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

_GIVE_UP_AFTER_S = 10.0


@dataclass(slots=True)
class Asked:
    """One request and what came of it. Instants are monotonic; `status` None: no answer came, the
    connection was lost or we gave up."""

    body: bytes
    intended_s: float
    sent_s: float = 0.0
    done_s: float = 0.0
    status: int | None = None
    answer: bytes = b""

    @property
    def latency_s(self) -> float:
        """From the instant at which it should have been sent: a slow service hides nothing by
        slowing us down."""
        return self.done_s - self.intended_s


class OpenLoop:
    """Sends requests at random instants (Poisson), `per_s` a second on average, over connections
    that are kept open."""

    def __init__(
        self, port: int, path: str, headers: dict[str, str], per_s: float, seed: int
    ) -> None:
        self.ledger: list[Asked] = []
        """Every request that was sent, in order."""
        self._port = port
        lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1"]
        self._head = "\r\n".join(lines + [f"{k}: {v}" for k, v in headers.items()]).encode()
        self._per_s = per_s
        self._random = random.Random(seed)
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def run(self, duration_s: float, next_body: Callable[[], bytes]) -> None:
        """Returns when every request has its outcome."""
        async with asyncio.TaskGroup() as requests:
            at_s = time.monotonic()
            until_s = at_s + duration_s
            while True:
                at_s += self._random.expovariate(self._per_s)
                if at_s > until_s:
                    break
                await asyncio.sleep(at_s - time.monotonic())  # not at all when we are behind
                asked = Asked(next_body(), at_s)
                self.ledger.append(asked)
                requests.create_task(self._ask(asked))
        for _, writer in self._idle:
            writer.close()

    async def _ask(self, asked: Asked) -> None:
        asked.sent_s = time.monotonic()
        try:
            async with asyncio.timeout(_GIVE_UP_AFTER_S):
                await self._post(asked)
        except (OSError, TimeoutError, asyncio.IncompleteReadError):
            asked.status = None
        asked.done_s = time.monotonic()

    async def _post(self, asked: Asked) -> None:
        if self._idle:
            reader, writer = self._idle.pop()
        else:
            reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        kept = False
        try:
            length = b"\r\nContent-Length: %d\r\n\r\n" % len(asked.body)
            writer.write(self._head + length + asked.body)
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            asked.answer = await body_of(reader, head)
            asked.status = int(head.split(b" ", 2)[1])
            kept = b"\r\nconnection: close" not in head
        finally:
            if kept:
                self._idle.append((reader, writer))
            else:
                writer.close()


async def body_of(reader: asyncio.StreamReader, head: bytes) -> bytes:
    """The rest of an answer, by the length that its head says (in small letters) or in chunks."""
    _, length_said, rest = head.partition(b"\r\ncontent-length:")
    if length_said:
        return await reader.readexactly(int(rest.split(b"\r\n", 1)[0]))
    body = b""
    while size := int(await reader.readuntil(b"\r\n"), 16):
        body += (await reader.readexactly(size + 2))[:-2]
    await reader.readexactly(2)
    return body
