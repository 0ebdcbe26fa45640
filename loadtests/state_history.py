"""Every release state that a Redis was given, as the Redis itself saw it."""

import asyncio
import json
import re
import time
from itertools import pairwise
from types import TracebackType
from typing import NamedTuple, Self

from loadtests.redis_process import RedisProcess

_LINE = rb'\+([0-9.]+) \[[^]]*\] "SET" "hikyaku:release:%b" "(.*)"\r\n'


class Seen(NamedTuple):
    """One state, from a monotonic instant on."""

    at_s: float
    generation: int
    champion: int | None


class StateHistory:
    """Listens while it is entered; `seen` holds the states of one model in order.

    MONITOR shows what of a transaction was executed, when it was.
    """

    def __init__(self, redis: RedisProcess, model: str) -> None:
        self.seen: list[Seen] = []
        self._redis = redis
        self._line = re.compile(_LINE % re.escape(model.encode()))

    async def __aenter__(self) -> Self:
        reader, self._writer = await asyncio.open_connection("127.0.0.1", self._redis.port)
        self._writer.write(b"AUTH %b\r\nMONITOR\r\n" % self._redis.password.encode())
        for _ in range(2):
            answer = await reader.readuntil(b"\r\n")
            if answer != b"+OK\r\n":
                raise ConnectionError(answer)
        self._task = asyncio.create_task(self._listen(reader))
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._task.cancel()
        self._writer.close()
        await asyncio.wait({self._task})

    def gaps(self) -> list[str]:
        """Where a generation does not follow the one before it."""
        numbers = [seen.generation for seen in self.seen]
        return [f"{late} follows {early}" for early, late in pairwise(numbers) if late != early + 1]

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        wall_s = time.time() - time.monotonic()
        while True:
            found = self._line.fullmatch(await reader.readuntil(b"\r\n"))
            if found is None:
                continue
            at_s = float(found[1]) - wall_s
            state = json.loads(found[2].decode("unicode_escape"))["state"]
            champion = state.get("champion")
            version = None if champion is None else int(champion["version"])
            self.seen.append(Seen(at_s, state.get("generation", 0), version))
