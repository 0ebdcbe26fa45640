"""Tables that take long to add up: nobody else waits for them."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Self

import pytest

from app.local.redis_server import own_redis
from app.release.store import open_tables
from app.release.tables import TableStore

NAME = "slow:m:1-2-ab"
_PATIENCE_S = 5


class Gate:
    """What is done behind it is done when the event loop has had a turn, and not before."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()

    def passed(self) -> None:
        turn = threading.Event()
        self._loop.call_soon_threadsafe(turn.set)
        assert turn.wait(_PATIENCE_S), "the event loop waits for this"


class Slow:
    """A count that is added, encoded and decoded behind a gate."""

    def __init__(self, gate: Gate, count: int) -> None:
        self._gate = gate
        self.count = count

    def __add__(self, other: Self) -> Self:
        self._gate.passed()
        return type(self)(self._gate, self.count + other.count)

    def encode(self) -> bytes:
        self._gate.passed()
        return b"%d" % self.count


@pytest.fixture(scope="module", params=["redis", "files"])
def redis_url(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str | None]:
    if request.param == "files":
        yield None
        return
    with own_redis(tmp_path_factory.mktemp("redis")) as url:
        yield url


@asynccontextmanager
async def opened(
    redis_url: str | None, folder: Path, worker: str, gate: Gate
) -> AsyncIterator[TableStore]:
    def decode(content: bytes) -> Slow:
        gate.passed()
        return Slow(gate, int(content))

    def refused(kind: str) -> None:
        raise AssertionError(kind)

    kinds = {"slow": decode}
    async with open_tables(redis_url, folder, worker, kinds, refused, gone_s=0) as store:
        yield store


async def test_nobody_waits_for_tables_that_are_added_up(
    redis_url: str | None, tmp_path: Path
) -> None:
    gate = Gate()
    async with opened(redis_url, tmp_path, "gone", gate) as gone:
        await gone.write({NAME: Slow(gate, 1)})
        await gone.write({NAME: Slow(gate, 2)})
        await gone.write({NAME: Slow(gate, 4)})
    async with opened(redis_url, tmp_path, "other", gate) as other:
        await other.write({NAME: Slow(gate, 8)})
        assert await other.fold(["other"]) == 1
        contents = (await other.read(NAME))[NAME].contents
    assert sorted(contents) == [b"7", b"8"]
