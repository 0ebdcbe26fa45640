"""Shows that no read gets another entity's values, however reads are left and Redis misbehaves.

    python -m loadtests.prove_no_foreign_values --reads 1000000

Readers with random deadlines and random cancellations share one `RedisFeatures`, which reads a real
Redis through a proxy whose faults change all the time. Every value that comes tells whose it is.
Exit status 1 on a violation.
"""

import argparse
import asyncio
import faulthandler
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Coroutine, Iterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvloop

from app.clock import ReplayClock
from app.deadline import Deadline
from app.errors import FeaturesUnavailable
from app.features.redis_address import parse_address
from app.features.redis_features import RedisFeatures
from app.features.redis_source import RedisSource
from app.features.source import FeatureRows, ValueStatus
from loadtests.fault_proxy import Cut, Delay, Fault, FaultProxy, Pass, Refuse, Split, Stall
from loadtests.memory import resident_mb
from loadtests.redis_process import RedisProcess
from loadtests.telltale import READ_AT, WIDE, asked, faults_of, store

STORED = (2_000, 50)
UNKNOWN_DRIVERS = 50
HOT_DRIVERS = 8
"""Asked about in every third read, so that reads share what is in flight."""
SHARE_CANCELLED = 0.2
SHARE_HASTY = 0.2
"""Of reads whose deadline is some milliseconds away."""
HUNG_AFTER_S = 5.0
"""Over its deadline by this much, a read hangs."""
PROBES_PER_S = 10
"""While Redis is gone, attempts to find it: one every 100 ms at most."""
MEMORY_GROWTH_MB = 16.0
"""From a tenth of the reads to the last one."""
TURN_CPU_S = 1.0
"""No turn of the event loop may compute longer."""
_LOOK_EVERY_S = 0.01


@dataclass
class Summary:
    """The ledger of all reads, and what must not be. `reads` = fresh + partly + refused + cancelled
    + violations found in answers."""

    reads: int = 0
    fresh: int = 0
    """Every value of every row came, or is rightly not found."""
    partly: int = 0
    """Some values were UNAVAILABLE."""
    refused: int = 0
    cancelled: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    connections: int = 0
    connections_allowed: int = 0
    worst_overrun_s: float = 0.0
    """How long after its deadline the latest answer came."""
    worst_lag_s: float = 0.0
    """The longest that a turn of the event loop took, which readers, proxy and proof share."""
    worst_turn_cpu_s: float = 0.0
    """The most that a turn computed: a turn that lasts without computing is the machine's."""
    memory_mb: list[float] = field(default_factory=list)
    """Resident, as it went."""
    duration_s: float = 0.0
    violations: list[str] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        yield f"{self.reads:,} reads in {self.duration_s:.0f} s"
        yield (
            f"{self.fresh:,} fresh, {self.partly:,} in part, {self.refused:,} refused, "
            f"{self.cancelled:,} cancelled"
        )
        yield "faults: " + ", ".join(f"{name} {n}" for name, n in sorted(self.faults.items()))
        yield f"connections opened: {self.connections}, at most {self.connections_allowed} allowed"
        yield (
            f"latest answer: {self.worst_overrun_s * 1000:.0f} ms after its deadline; longest turn "
            f"of the event loop: {self.worst_lag_s * 1000:.0f} ms, computing at most "
            f"{self.worst_turn_cpu_s * 1000:.0f} ms"
        )
        if self.memory_mb:
            early, late = self.memory_mb[0], self.memory_mb[-1]
            yield f"memory: {early:.1f} MB early, {late:.1f} MB at the end"
        yield f"violations: {len(self.violations)}"
        yield from self.violations[:20]


async def prove(reads: int, concurrency: int, seed: int, *, told: bool = False) -> Summary:
    """Start a Redis, read through the proxy while faults change, and count. `told`: print
    progress."""
    summary = Summary()
    tasks_before = asyncio.all_tasks()
    started_s = time.monotonic()
    asyncio.get_running_loop().set_exception_handler(
        lambda _, context: summary.violations.append(
            f"{context['message']}: {context.get('exception')!r}"
        )
    )
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        redis = stack.enter_context(RedisProcess(Path(folder) / "redis"))
        store(redis.url, *STORED)
        proxy = await stack.enter_async_context(FaultProxy(redis.port, seed))
        address = parse_address(redis.url_through(proxy.port))
        async with RedisFeatures(address) as features:
            source = RedisSource(features, WIDE, ReplayClock(READ_AT))
            readers = _Readers(source, summary, reads, seed)
            await _run(readers, proxy, concurrency, seed, told=told)
        summary.connections = proxy.connections_opened
        left = asyncio.all_tasks() - tasks_before - {asyncio.current_task()}
        hung = [task.get_name() for task in left if "Redis" in task.get_name()]
    summary.duration_s = time.monotonic() - started_s
    summary.violations += [f"a task outlived its owner: {name}" for name in hung]
    _judge(summary)
    return summary


def _judge(summary: Summary) -> None:
    if summary.connections > summary.connections_allowed:
        summary.violations.append(f"{summary.connections} connections were opened")
    if summary.worst_turn_cpu_s > TURN_CPU_S:
        summary.violations.append(f"a turn computed for {summary.worst_turn_cpu_s:.1f} s")
    answered = summary.fresh + summary.partly + summary.refused + summary.cancelled
    if answered != summary.reads:
        summary.violations.append(f"{summary.reads - answered} reads have no outcome of their own")
    if summary.memory_mb and summary.memory_mb[-1] - summary.memory_mb[0] > MEMORY_GROWTH_MB:
        summary.violations.append("memory grew")


async def _run(
    readers: "_Readers", proxy: FaultProxy, concurrency: int, seed: int, *, told: bool
) -> None:
    """Read until all reads are done, while faults come and go; who hangs is left behind."""
    reading = [asyncio.create_task(readers.read_on()) for _ in range(concurrency)]
    faults = asyncio.create_task(_misbehave(proxy, readers.summary, random.Random(seed)))
    watch = asyncio.create_task(readers.watch(told=told))
    done = asyncio.gather(*reading, watch)  # or the first exception
    await asyncio.wait({done, faults}, return_when=asyncio.FIRST_COMPLETED)
    faults.cancel()
    await proxy.switch(Pass())
    _, hung = await asyncio.wait([*reading, watch], timeout=HUNG_AFTER_S)
    readers.summary.violations += ["a reader hangs" for _ in hung]
    done.cancel()
    for task in [*reading, watch]:
        task.cancel()
    for outcome in await asyncio.gather(done, *reading, watch, faults, return_exceptions=True):
        if isinstance(outcome, Exception):
            readers.summary.violations.append(f"a read raised {outcome!r}")


async def _misbehave(proxy: FaultProxy, summary: Summary, rng: random.Random) -> None:
    """A fault, then peace for a while, for ever. Keeps the number of connections that they justify:
    each fault that ends connections, one; silence and refusal, one probe every 100 ms too."""
    summary.connections_allowed = 1
    while True:
        fault = _next_fault(rng)
        lasts_s = rng.uniform(0.01, 0.08)
        summary.faults[type(fault).__name__] += 1
        await proxy.switch(fault)
        if isinstance(fault, Pass):  # cut what is open, in the midst of whatever it is doing
            proxy.cut(reset=rng.random() < 0.5)
        if isinstance(fault, Cut):
            summary.connections_allowed += fault.times
        elif not isinstance(fault, Delay | Split):
            summary.connections_allowed += 1
        if isinstance(fault, Stall | Refuse):
            summary.connections_allowed += round(lasts_s * PROBES_PER_S)
        await asyncio.sleep(lasts_s)
        await proxy.switch(Pass())
        await asyncio.sleep(rng.uniform(0.05, 0.4))


def _next_fault(rng: random.Random) -> Fault:
    return rng.choice(
        [
            Delay(rng.uniform(0.0005, 0.02), rng.uniform(0, 0.02)),
            Delay(rng.uniform(0.0005, 0.005), rng.uniform(0, 0.005)),
            Split(rng.choice([1, 7, 64, 1024])),
            Split(rng.choice([64, 1024])),
            Cut(rng.randrange(0, 20_000), reset=rng.random() < 0.5, times=rng.randint(1, 3)),
            Pass(),
            Stall(),
            Refuse(),
        ]
    )


class _Readers:
    """Reads that draw what they ask, how long they wait and whether they are cancelled."""

    def __init__(self, source: RedisSource, summary: Summary, reads: int, seed: int) -> None:
        self.summary = summary
        self._source = source
        self._reads = reads
        self._random = random.Random(seed + 1)
        self._under_way: dict[int, float] = {}  # read → its deadline
        self._done = asyncio.Event()

    async def read_on(self) -> None:
        """One read after the other until all are done."""
        while self.summary.reads < self._reads:
            number = self.summary.reads
            self.summary.reads += 1
            try:
                await self._read(number)
            finally:
                self._under_way.pop(number, None)
        self._done.set()

    async def _read(self, number: int) -> None:
        rng = self._random
        rows = rng.choice([1, 1, 1, 2, 5, 40])
        drivers = [self._driver() for _ in range(rows)]
        cities = [rng.randrange(STORED[1]) for _ in range(rows)]
        hasty = rng.random() < SHARE_HASTY
        timeout_s = rng.uniform(0, 0.01) if hasty else rng.uniform(0.05, 0.5)
        deadline = Deadline.after(timeout_s)
        self._under_way[number] = deadline.at_s
        fetch = self._source.fetch(asked(drivers, cities), rows, deadline)
        try:
            if rng.random() < SHARE_CANCELLED:
                answer = await self._cancelled_perhaps(asyncio.create_task(fetch))
            else:
                answer = await self._timed(fetch, deadline)
        except FeaturesUnavailable:
            self.summary.refused += 1
            await asyncio.sleep(rng.uniform(0.05, 0.5))  # or refusals would use up all reads
            return
        if answer is None:
            self.summary.cancelled += 1
            return
        faults = list(faults_of(answer, drivers, cities, STORED))
        self.summary.violations += faults
        if faults:
            return
        if (answer.status == ValueStatus.UNAVAILABLE).any():
            self.summary.partly += 1
        else:
            self.summary.fresh += 1

    def _driver(self) -> int:
        if self._random.random() < 1 / 3:
            return self._random.randrange(HOT_DRIVERS)
        return self._random.randrange(STORED[0] + UNKNOWN_DRIVERS)

    async def _cancelled_perhaps(self, fetch: "asyncio.Task[FeatureRows]") -> FeatureRows | None:
        """None when it was cancelled before it had an answer."""
        if self._random.random() < 0.5:
            for _ in range(self._random.randrange(12)):
                await asyncio.sleep(0)
        else:
            await asyncio.sleep(self._random.uniform(0, 0.02))
        fetch.cancel()
        await asyncio.wait({fetch})  # which lets a cancellation of our own through
        return None if fetch.cancelled() else fetch.result()

    async def _timed(
        self, fetch: Coroutine[Any, Any, FeatureRows], deadline: Deadline
    ) -> FeatureRows:
        try:
            return await fetch
        finally:
            overrun_s = -deadline.remaining_s()
            self.summary.worst_overrun_s = max(self.summary.worst_overrun_s, overrun_s)

    async def watch(self, *, told: bool) -> None:
        """Until all reads are done: look for reads that hang, keep the memory, tell progress."""
        marks = [self._reads * tenth // 10 for tenth in range(1, 11)]
        overdue: Mapping[int, int] = {}
        while not self._done.is_set():
            await self._time_a_turn()
            overdue = self._overdue(overdue)
            while marks and self.summary.reads >= marks[0]:
                marks.pop(0)
                self.summary.memory_mb.append(resident_mb("self"))
                if told:
                    self._tell()

    async def _time_a_turn(self) -> None:
        asleep_s, computed_s = time.monotonic(), time.process_time()
        # Says on stderr what a turn is at that does not end.
        faulthandler.dump_traceback_later(5 * TURN_CPU_S)
        await asyncio.sleep(_LOOK_EVERY_S)
        faulthandler.cancel_dump_traceback_later()
        s = self.summary
        s.worst_lag_s = max(s.worst_lag_s, time.monotonic() - asleep_s - _LOOK_EVERY_S)
        s.worst_turn_cpu_s = max(s.worst_turn_cpu_s, time.process_time() - computed_s)

    def _overdue(self, looks: Mapping[int, int]) -> Mapping[int, int]:
        """How often each read that is past its deadline was looked at. Raises `TimeoutError` for
        one that hangs. Counted in looks, as a machine that stood still makes no read hang."""
        now_s = time.monotonic()
        overdue = {
            number: looks.get(number, 0) + 1
            for number, deadline_s in self._under_way.items()
            if deadline_s < now_s
        }
        for number, count in overdue.items():
            if count * _LOOK_EVERY_S > HUNG_AFTER_S:
                raise TimeoutError(f"read {number} hangs")
        return overdue

    def _tell(self) -> None:
        s = self.summary
        print(
            f"  {s.reads:>9,} reads: {s.fresh:,} fresh, {s.refused:,} refused, "
            f"{s.cancelled:,} cancelled; {sum(s.faults.values())} faults; "
            f"{s.memory_mb[-1]:.1f} MB; {len(s.violations)} violations",
            flush=True,
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reads", type=int, default=1_000_000)
    parser.add_argument("--concurrency", type=int, default=256)
    parser.add_argument("--seed", type=int, default=random.randrange(1_000_000))
    arguments = parser.parse_args()
    print(
        f"{arguments.reads:,} reads, {arguments.concurrency} at a time, seed {arguments.seed}",
        flush=True,
    )
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        summary = runner.run(
            prove(arguments.reads, arguments.concurrency, arguments.seed, told=True)
        )
    print("\n".join(summary.lines()))
    return 1 if summary.violations else 0


if __name__ == "__main__":
    sys.exit(main())
