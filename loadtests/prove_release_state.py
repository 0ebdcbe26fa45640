"""Shows that no change of the release state is lost, doubled or told wrongly while Redis stands
still and the way to it misbehaves: clients behind proxies that cut, stall, refuse and delay change
one state against each other, and what each was told is held against the chain of states that came
about.

    python -m loadtests.prove_release_state --seconds 60 --seed 1
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
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

from app.release.redis_state import RedisState
from app.release.state import Chosen, ReleaseState, StateUnavailable, WorkerReport
from loadtests.fault_proxy import Cut, Delay, Fault, FaultProxy, Pass, Refuse, Stall
from tests.topologies import PASSWORD, server

MODEL = "m"
_LONGEST_CALL_S = 3.0  # a second, and what a busy machine takes


@dataclass
class Result:
    """What the clients were told. Every state has a number of its own, and names the one before."""

    told: Counter[str] = field(default_factory=Counter)
    made: dict[int, int] = field(default_factory=dict)
    """By generation, the number of the change that was told to have succeeded."""
    not_made: set[int] = field(default_factory=set)
    seen: dict[int, Chosen] = field(default_factory=dict)
    """By generation, what was read."""
    faults: list[str] = field(default_factory=list)

    def saw(self, state: ReleaseState) -> None:
        if state.champion is None:
            return
        known = self.seen.setdefault(state.generation, state.champion)
        if known != state.champion:
            self.faults.append(f"generation {state.generation} was {known} and {state.champion}")

    def check(self) -> None:
        """The states are one chain, in which is what was told to have been made, and nothing that
        was told not to have been."""
        for generation, chosen in self.seen.items():
            before = self.seen.get(generation - 1)
            if before is not None and chosen.sha256 != str(before.version):
                self.faults.append(f"generation {generation} does not go on from the one before")
            if self.made.get(generation, chosen.version) != chosen.version:
                self.faults.append(f"generation {generation} is not the change that was made")
            if chosen.version in self.not_made:
                self.faults.append(f"generation {generation} was told not to have been made")
            follows = self.made.get(generation - 1)
            if follows is not None and chosen.sha256 != str(follows):
                self.faults.append(f"generation {generation - 1} is lost")


async def misbehave(
    port: int, process: int, folder: Path, seconds: float, seed: int, clients: int = 8
) -> Result:
    """Change the state of `MODEL` in the Redis on this port, of this process, for so long."""
    result = Result()
    until_s = time.monotonic() + seconds
    numbers = itertools.count(1)
    async with AsyncExitStack() as stack:
        proxies = [await stack.enter_async_context(FaultProxy(port, seed + n)) for n in range(3)]
        stores = [
            RedisState(f"redis://:{PASSWORD}@127.0.0.1:{proxies[n % 3].port}", folder / str(n))
            for n in range(clients)
        ]
        tasks = [
            *(_client(store, n, numbers, until_s, result, seed) for n, store in enumerate(stores)),
            *(_faults(proxy, until_s, random.Random(seed + n)) for n, proxy in enumerate(proxies)),
            _stops(process, until_s, random.Random(seed)),
        ]
        await asyncio.gather(*tasks)
        result.saw(await _finally(stores[0]))
        for store in stores:
            await store.close()
    result.check()
    return result


async def _client(
    store: RedisState,
    name: int,
    numbers: "itertools.count[int]",
    until_s: float,
    result: Result,
    seed: int,
) -> None:
    rng = random.Random(seed * 1000 + name)
    report = WorkerReport(str(name), {})
    while time.monotonic() < until_s:
        began_s = time.monotonic()
        try:
            state = (await store.exchange(report, [MODEL]))[MODEL]
            result.saw(state)
            await asyncio.sleep(rng.uniform(0, 0.02))
            began_s = time.monotonic()
            await _change(store, state, next(numbers), result, rng)
        except StateUnavailable:
            result.told["unavailable"] += 1
            await asyncio.sleep(rng.uniform(0, 0.05))
        if time.monotonic() - began_s > _LONGEST_CALL_S:
            result.faults.append(f"a call took {time.monotonic() - began_s:.1f} s")


async def _change(
    store: RedisState, state: ReleaseState, number: int, result: Result, rng: random.Random
) -> None:
    generation = state.generation
    before = 0 if state.champion is None else state.champion.version
    following = ReleaseState(generation + 1, Chosen(number, str(before)))
    change = asyncio.create_task(store.compare_and_set(MODEL, generation, following))
    if rng.random() < 0.1:
        await asyncio.sleep(rng.uniform(0, 0.003))
        change.cancel()
    await asyncio.wait({change})
    if change.cancelled():
        result.told["cancelled"] += 1
    elif change.result():
        result.told["made"] += 1
        if result.made.setdefault(generation + 1, number) != number:
            result.faults.append(f"two were told to have made generation {generation + 1}")
    else:
        result.told["not made"] += 1
        result.not_made.add(number)


async def _faults(proxy: FaultProxy, until_s: float, rng: random.Random) -> None:
    while time.monotonic() < until_s:
        faults: list[Fault] = [
            *(Cut(rng.randrange(400), reset=rng.random() < 0.5, times=2) for _ in range(8)),
            *(Delay(0.01, 0.03), Stall(), Refuse(), *[Pass()] * 9),
        ]
        await proxy.switch(rng.choice(faults))
        await asyncio.sleep(rng.uniform(0.01, 0.15))
        if rng.random() < 0.05:
            proxy.silence()
    await proxy.switch(Pass())


async def _stops(process: int, until_s: float, rng: random.Random) -> None:
    """Redis itself stands still now and then, with what it was sent in its hands."""
    while time.monotonic() < until_s:
        await asyncio.sleep(rng.uniform(1, 4))
        os.kill(process, signal.SIGSTOP)
        try:
            await asyncio.sleep(rng.uniform(0.1, 1.3))
        finally:
            os.kill(process, signal.SIGCONT)


async def _finally(store: RedisState) -> ReleaseState:
    give_up_s = time.monotonic() + 10
    while True:
        try:
            return (await store.exchange(WorkerReport("last", {}), [MODEL]))[MODEL]
        except StateUnavailable:
            if time.monotonic() > give_up_s:
                raise
            await asyncio.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        server(Path(folder) / "redis", "appendonly yes") as redis,
    ):
        result = asyncio.run(
            misbehave(
                redis.port, redis.process.pid, Path(folder), arguments.seconds, arguments.seed
            )
        )
    print(", ".join(f"{count} {kind}" for kind, count in sorted(result.told.items())))
    print(f"{len(result.seen)} states seen, the last of generation {max(result.seen)}")
    for fault in result.faults:
        print(f"  {fault}")
    sys.exit(1 if result.faults else 0)


if __name__ == "__main__":
    main()
