"""Shows that of what workers have written nothing is lost and nothing counted twice, while the
store and the workers misbehave: connections are cut, stalled and delayed, Redis stands still,
workers end, are paused, taken for gone while they live, and folded by several at a time.

    python -m loadtests.prove_tables --seconds 60 --seed 1

Each number is counted once, by one worker. Whoever reads must find every number of which a worker
was told before that it is stored, and none twice. `--increment`: workers add to one table that is
stored, as an increment does, and exit status 1 unless that is seen.
"""

import argparse
import asyncio
import itertools
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self, TypeAlias

import msgspec

from app.errors import HikyakuError
from app.features.redis_connection import command
from app.release.redis_line import NoAnswer, RedisLine, state_address
from app.release.state import StateUnavailable
from app.release.store import open_tables
from app.release.tables import Additive, StoredTable, TableStore
from loadtests.fault_proxy import Cut, Delay, Fault, FaultProxy, Pass, Refuse, Stall
from tests.topologies import PASSWORD, server

NAMES = ("numbers:m:1-2-ab", "numbers:m:3-4-cd")
_WORKERS = 4
_PROXIES = 3
_HEALED_WITHIN_S = 15.0
Opening: TypeAlias = Callable[[str], Awaitable[TableStore]]


class Numbers:
    """A table that counts how often it was told of each number."""

    def __init__(self, *numbers: int, size: int = 0) -> None:
        """`size` bytes more, when it is encoded."""
        self.counts = Counter(numbers)
        self.size = size

    def __add__(self, other: Self) -> Self:
        both = type(self)(size=max(self.size, other.size))
        both.counts = self.counts + other.counts
        return both

    def __iter__(self) -> Iterator[int]:
        return iter(self.counts)

    def encode(self) -> bytes:
        return msgspec.msgpack.encode((sorted(self.counts.items()), bytes(self.size)))

    @classmethod
    def decode(cls, content: bytes) -> Self:
        try:
            counts, filling = msgspec.msgpack.decode(content)
        except msgspec.MsgspecError as exc:
            raise HikyakuError(str(exc)) from exc
        made = cls(size=len(filling))
        made.counts = Counter(dict(counts))
        return made


KINDS = {"numbers": Numbers.decode}


def total(table: StoredTable) -> Counter[int]:
    """How often each number was counted."""
    return sum((Numbers.decode(each).counts for each in table.contents), Counter[int]())


@dataclass
class Result:
    """What came of it."""

    done: Counter[str] = field(default_factory=Counter)
    stored: set[int] = field(default_factory=set)
    """Numbers of which a worker was told that they are."""
    faults: list[str] = field(default_factory=list)

    def check(self, tables: Mapping[str, StoredTable], stored: set[int]) -> None:
        """`stored`: the numbers that were before the tables were read."""
        counts = sum(map(total, tables.values()), Counter[int]())
        twice = [number for number, count in counts.items() if count != 1]
        lost = stored.difference(counts)
        if twice:
            self.faults.append(f"{len(twice)} numbers are counted twice, such as {twice[0]}")
        if lost:
            self.faults.append(f"{len(lost)} numbers are lost, such as {min(lost)}")


class Trouble:
    """Workers that count, end, pause, fold and read for a time."""

    def __init__(self, opening: Opening, seed: int) -> None:
        self.result = Result()
        self._open = opening
        self._rng = random.Random(seed)
        self._numbers = itertools.count(1)
        self._incarnations = itertools.count(1)
        self._living: set[str] = set()

    async def run(self, until_s: float) -> None:
        reader, *folders = [await self._open(f"other{n}") for n in range(3)]
        await asyncio.gather(
            *(self._worker(until_s) for _ in range(_WORKERS)),
            *(self._folder(folder, until_s) for folder in folders),
            self._reader(reader, until_s),
        )
        await self._read(reader, time.monotonic() + _HEALED_WITHIN_S)

    async def _worker(self, until_s: float) -> None:
        """One incarnation after the other; the last writes all that it has counted."""
        rng, result = self._rng, self.result
        while time.monotonic() < until_s:
            worker = f"w{next(self._incarnations)}"
            self._living.add(worker)
            store = await self._open(worker)
            counted: set[int] = set()
            while (is_over := time.monotonic() > until_s) or rng.random() > 0.02:
                if not is_over:
                    counted |= await self._write(store, counted)
                    await asyncio.sleep(rng.choice([0, 0, 0.01, 0.3 * (rng.random() < 0.1)]))
                    continue
                await _healed(store, time.monotonic() + _HEALED_WITHIN_S)
                result.stored |= counted
                break
            self._living.discard(worker)
            await store.close()
            result.done["incarnations"] += 1

    async def _write(self, store: TableStore, unsure: set[int]) -> set[int]:
        """The numbers that it was given when it is not known whether they are stored."""
        rng = self._rng
        numbers = {name: next(self._numbers) for name in NAMES if rng.random() < 0.7}
        writing = asyncio.create_task(
            store.write({name: Numbers(number) for name, number in numbers.items()})
        )
        if rng.random() < 0.05:
            await asyncio.sleep(rng.uniform(0, 0.003))
            writing.cancel()
        await asyncio.wait({writing})
        if writing.cancelled():
            self.result.done["writes cancelled"] += 1
        elif isinstance(writing.exception(), StateUnavailable):
            self.result.done["writes refused"] += 1
        else:
            writing.result()
            self.result.done["writes"] += 1
            self.result.stored |= unsure | set(numbers.values())
            unsure.clear()
            return set()
        return set(numbers.values())

    async def _folder(self, store: TableStore, until_s: float) -> None:
        """Also of workers that live."""
        while time.monotonic() < until_s:
            missing = {w for w in self._living if self._rng.random() < 0.1}
            try:
                self.result.done["folded"] += await store.fold(self._living - missing)
            except StateUnavailable:
                self.result.done["folds refused"] += 1
            await asyncio.sleep(self._rng.uniform(0, 0.05))

    async def _reader(self, store: TableStore, until_s: float) -> None:
        while time.monotonic() < until_s:
            await self._read(store, until_s)
            await asyncio.sleep(self._rng.uniform(0, 0.02))

    async def _read(self, store: TableStore, until_s: float) -> None:
        while True:
            stored = set(self.result.stored)
            try:
                self.result.check(await store.read("numbers:"), stored)
            except StateUnavailable:
                self.result.done["reads refused"] += 1
                if time.monotonic() > until_s:
                    return
                await asyncio.sleep(0.02)
            else:
                self.result.done["reads"] += 1
                return


async def _healed(store: TableStore, until_s: float) -> None:
    while True:
        try:
            return await store.write({})
        except StateUnavailable:
            if time.monotonic() > until_s:
                raise
            await asyncio.sleep(0.05)


async def misbehave_in_files(folder: Path, seconds: float, seed: int) -> Result:
    async with AsyncExitStack() as stack:
        trouble = Trouble(
            lambda worker: stack.enter_async_context(
                open_tables(None, folder, worker, KINDS, _refused, gone_s=0)
            ),
            seed,
        )
        await trouble.run(time.monotonic() + seconds)
    return trouble.result


async def misbehave_in_redis(
    port: int, process: int, folder: Path, seconds: float, seed: int, *, increment: bool = False
) -> Result:
    """The Redis on this port, of this process. `increment`: as no store may do it."""
    until_s = time.monotonic() + seconds
    async with AsyncExitStack() as stack:
        proxies = [
            await stack.enter_async_context(FaultProxy(port, seed + n)) for n in range(_PROXIES)
        ]
        turns = itertools.cycle(proxies)

        def opening(worker: str) -> Awaitable[TableStore]:
            url = f"redis://:{PASSWORD}@127.0.0.1:{next(turns).port}"
            if increment:
                return stack.enter_async_context(_incrementing(url))
            return stack.enter_async_context(
                open_tables(url, folder, worker, KINDS, _refused, gone_s=0)
            )

        trouble = Trouble(opening, seed)
        rng = random.Random(seed)
        await asyncio.gather(
            trouble.run(until_s),
            _stops(process, until_s, rng),
            *(_faults(proxy, until_s, rng) for proxy in proxies),
        )
    return trouble.result


class _Increments:
    """Adds to what is stored, and once more when no answer comes: what may have been done is done
    again."""

    next_write = 0

    def __init__(self, url: str) -> None:
        self._line = RedisLine(state_address(url))

    async def write(self, counted: Mapping[str, Additive]) -> None:
        numbers = [n for table in counted.values() if isinstance(table, Numbers) for n in table]
        words = [command(b"HINCRBY", b"numbers", b"%d" % number, b"1") for number in numbers]
        with suppress(NoAnswer):
            await self._line.ask(*words, command(b"PING"), within_s=1)
            return
        await self._line.ask(*words, command(b"PING"), within_s=1)

    async def read(self, prefix: str) -> Mapping[str, StoredTable]:
        [flat] = await self._line.ask(command(b"HGETALL", b"numbers"), within_s=1)
        counts = Numbers()
        counts.counts = Counter(dict(zip(map(int, flat[::2]), map(int, flat[1::2]), strict=True)))
        return {prefix: StoredTable([counts.encode()], {})}

    async def remove(self, name: str) -> None:
        raise NotImplementedError

    async def fold(self, living: Collection[str]) -> int:
        return 0

    async def close(self) -> None:
        self._line.close("it ends")


@asynccontextmanager
async def _incrementing(url: str) -> AsyncIterator[TableStore]:
    store = _Increments(url)
    try:
        yield store
    finally:
        await store.close()


def _refused(kind: str) -> None:
    raise AssertionError(f"a table of numbers is too large: {kind}")


async def _faults(proxy: FaultProxy, until_s: float, rng: random.Random) -> None:
    while time.monotonic() < until_s:
        faults: list[Fault] = [
            *(Cut(rng.randrange(400), reset=rng.random() < 0.5, times=2) for _ in range(4)),
            *(Delay(0.005, 0.01), Stall(), Refuse(), *[Pass()] * 12),
        ]
        await proxy.switch(rng.choice(faults))
        await asyncio.sleep(rng.uniform(0.01, 0.15))
    await proxy.switch(Pass())


async def _stops(process: int, until_s: float, rng: random.Random) -> None:
    """Redis itself stands still now and then, with what it was sent in its hands."""
    while time.monotonic() < until_s:
        await asyncio.sleep(rng.uniform(1, 4))
        os.kill(process, signal.SIGSTOP)
        try:
            await asyncio.sleep(rng.uniform(0.1, 2.5))
        finally:
            os.kill(process, signal.SIGCONT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--increment", action="store_true")
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        server(Path(folder) / "redis", "appendonly yes") as redis,
    ):
        seconds, seed = arguments.seconds / 2, arguments.seed
        results = {
            "Redis": asyncio.run(
                misbehave_in_redis(
                    redis.port,
                    redis.process.pid,
                    Path(folder),
                    seconds,
                    seed,
                    increment=arguments.increment,
                )
            )
        }
        if not arguments.increment:
            results["files"] = asyncio.run(misbehave_in_files(Path(folder), seconds, seed))
    for kind, result in results.items():
        print(f"{kind}: {len(result.stored)} numbers stored")
        print("  " + ", ".join(f"{count} {what}" for what, count in sorted(result.done.items())))
        for fault in result.faults[:20]:
            print(f"  {fault}")
    faulty = any(result.faults for result in results.values())
    sys.exit(0 if faulty == arguments.increment else 1)


if __name__ == "__main__":
    main()
