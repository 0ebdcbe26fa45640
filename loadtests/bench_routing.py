"""What routing costs a request: processor time in this process, without sockets.

    make bench-routing          (BENCH="--rounds 200 --at-once 16")
    python -m loadtests.bench_routing --beside ../before    # another checkout, in turns

A tiny model is asked the same requests through the predict operation: while no release is under
way, in a stage that shows the candidate requests only, and in one that routes a tenth of the keys.
The variants take turns, so that whatever else the machine does meets all. The candidate is the
champion's twin; requests that come together in one turn of the loop are two executions where both
answer some of them. Told are the median over rounds, and how much more than the first variant in
the same round: the median and the quartiles of that.
"""

import argparse
import asyncio
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import uvloop

from app.api.answers import Reply
from app.api.predictions import PredictOperation
from app.clock import WallClock
from app.predictor import Predictor
from app.served_model import ServedModel
from app.server import GARBAGE_AT_ONCE
from app.telemetry.metrics import Metrics
from tests.tiny_models import loaded, write_model

_REQUESTS = 800
_WARM_ROUNDS = 2
_BODY = json.dumps({"instances": [{"a": 1.0, "b": 2.0}]}).encode()
_PROCESSES = 9
"""Of each checkout: where a process's memory lies makes a microsecond of difference."""

Result = TypeVar("Result")
Headers = Iterator[Mapping[bytes, bytes]]


class Asker:
    """Asks one operation, some requests at once."""

    def __init__(self, operation: PredictOperation, headers: Headers, at_once: int) -> None:
        self._at_once = at_once
        self._operation = operation
        self._headers = headers

    async def round(self) -> float:
        """Microseconds of processor time a request."""
        started_s = time.process_time()
        for _ in range(_REQUESTS // self._at_once):
            await self._ask()
        return (time.process_time() - started_s) / _REQUESTS * 1e6

    async def _ask(self) -> None:
        done = asyncio.get_running_loop().create_future()
        replies: list[Reply] = []

        def answered(reply: Reply) -> None:
            replies.append(reply)
            if len(replies) == self._at_once:
                done.set_result(None)

        for _ in range(self._at_once):
            call = self._operation.open("m", next(self._headers), time.monotonic(), "", answered)
            assert call is not None
            call.begin(_BODY)
        await done
        assert all(reply.status == 200 for reply in replies)


def without_key() -> Headers:
    while True:
        yield {}


def keys_of(number: int) -> Headers:
    """So many keys again and again, as many requests have them."""
    headers = [{b"routing-key": b"user-%d" % n} for n in range(number)]
    while True:
        yield from headers


def new_keys() -> Headers:
    for n in count():
        yield {b"routing-key": b"user-%d" % n}


@asynccontextmanager
async def versions(folder: Path) -> AsyncIterator[tuple[ServedModel, ServedModel]]:
    """The champion, and its twin."""
    async with AsyncExitStack() as stack:
        opened = []
        for _ in range(2):
            await write_model(folder / "models", "m", "binary")
            opened.append(await stack.enter_async_context(loaded(folder / "models" / "m")))
        yield opened[0], opened[1]


async def plain(folder: Path, rounds: int, at_once: int) -> list[float]:
    """Nothing is routed."""
    async with versions(folder) as (champion, _):
        operation = PredictOperation(Predictor({"m": champion}, WallClock()), Metrics())
        asker = Asker(operation, without_key(), at_once)
        took_us = [await asker.round() for _ in range(rounds + _WARM_ROUNDS)]
        return took_us[_WARM_ROUNDS:]


async def routed(folder: Path, rounds: int, at_once: int) -> Mapping[str, list[float]]:
    """By what is under way. A round is settled once, as a second of so many requests would be."""
    # Not of a checkout from before there was any routing.
    from app.canary.canary import Canary
    from app.canary.first_seen import open_first_seen
    from tests.canary.releases import release

    async with (
        versions(folder) as (champion, candidate),
        open_first_seen(None, folder, "w") as first_seen,
    ):
        variants: dict[str, tuple[Asker, Canary]] = {}
        for number, (name, share, headers) in enumerate(
            (
                ("no release", None, without_key()),
                ("shown requests only", 0.0, without_key()),
                ("10 %, one key", 0.1, keys_of(1)),
                ("10 %, 1,000 keys", 0.1, keys_of(1_000)),
                ("10 %, no key", 0.1, without_key()),
                ("10 %, each key new", 0.1, new_keys()),
            )
        ):
            metrics = Metrics()
            canary = Canary("m", first_seen, metrics, lambda: None)
            if share is not None:
                rollout = release(
                    share,
                    keys=20,
                    slow_s=0.01,
                    candidate=candidate.id,
                    against=champion.id,
                    stage_began=number,
                )
                canary.follow(rollout, candidate, champion)
            operation = PredictOperation(
                Predictor({"m": champion}, WallClock()), metrics, canaries={"m": canary}
            )
            variants[name] = Asker(operation, headers, at_once), canary
        took_us: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(rounds + _WARM_ROUNDS):
            for name, (asker, canary) in variants.items():
                request_us = await asker.round()
                started_s = time.process_time()
                await canary.settle()
                canary.take()
                settled_us = (time.process_time() - started_s) / _REQUESTS * 1e6
                took_us[name].append(request_us + settled_us)
        return {name: took[_WARM_ROUNDS:] for name, took in took_us.items()}


def run(
    what: Callable[[Path, int, int], Coroutine[Any, Any, Result]], rounds: int, at_once: int
) -> Result:
    with (
        tempfile.TemporaryDirectory() as folder,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        gc.collect()
        gc.freeze()  # as `hikyaku serve` does: what start-up made is not walked again
        gc.set_threshold(GARBAGE_AT_ONCE)
        return runner.run(what(Path(folder), rounds, at_once))


def beside(folder: Path, rounds: int, at_once: int) -> Mapping[str, list[float]]:
    """Nothing is routed: by the code of another checkout, and by ours, in turns."""
    ours = Path(__file__).parent.parent
    took_us: dict[str, list[float]] = {"before": [], "now, no release": []}
    for _ in range(_PROCESSES):
        for name, checkout in zip(took_us, (folder.resolve(), ours), strict=True):
            words = [sys.executable, __file__, "--plain"]
            words += ["--rounds", str(rounds), "--at-once", str(at_once)]
            environment = os.environ | {"PYTHONPATH": str(checkout)}
            said = subprocess.run(
                words, cwd=checkout, env=environment, check=True, capture_output=True
            )
            took_us[name].append(statistics.median(json.loads(said.stdout)))
    return took_us


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--at-once", type=int, default=1, help="requests of one turn of the loop")
    parser.add_argument("--beside", type=Path, help="a checkout to compare with")
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.plain:
        print(json.dumps(run(plain, arguments.rounds, arguments.at_once)))
        return
    took_us = (
        run(routed, arguments.rounds, arguments.at_once)
        if arguments.beside is None
        else beside(arguments.beside, arguments.rounds, arguments.at_once)
    )
    firsts = next(iter(took_us.values()))
    print(f"{'µs of processor time a request':<32}{'median':>8}{'more':>7}{'quartiles':>16}")
    for name, took in took_us.items():
        more = [mine - first for mine, first in zip(took, firsts, strict=True)]
        low, median, high = statistics.quantiles(more, n=4)
        quartiles = f"{low:+.1f} … {high:+.1f}"
        print(f"{name:<32}{statistics.median(took):>8.1f}{median:>+7.1f}{quartiles:>16}")


if __name__ == "__main__":
    main()
