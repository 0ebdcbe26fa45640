"""What it costs to show a healthy candidate everything: processor time a prediction.

    make bench-shadow      (BENCH="--rounds 10 --rate 1000")

One worker answers an open loop of requests with one instance each, for the gradient boosted trees
of `make bench`, and a copy of them is the candidate. Rounds without a candidate and with blocks of
several sizes take turns, in a random order; the price is the difference within a round.
"""

import argparse
import asyncio
import gc
import json
import math
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import uvloop
import yaml
from scipy import stats

from loadtests.bench.workload import Workload, tensor_workload
from loadtests.checked_load import CheckedLoad, Ledger
from loadtests.memory import isolated_of
from loadtests.service_process import Operator, ServiceProcess, cpu_s, serving

_WORK = Path(".hikyaku/bench")  # what `make bench` has built there serves, too
_BLOCK_ROWS = (8, 32, 128)
_CANDIDATE = "2"
_TOLERANCE = 1e-5
_SETTLE_S = 0.5
_CONNECTIONS = 32
_PEAK_S = 3.0
_LOOK_EVERY_S = 0.1
_CONFIDENCE = 0.95
_DROPPED = re.compile(r'hikyaku_shadow_rows_total\{.*outcome="(?!compared)\w+"\} (.*)')


@dataclass(frozen=True)
class Reading:
    """A run; times are a prediction's."""

    round: int
    block_rows: int
    """0: no candidate."""
    predictions: int
    worker_us: float
    child_us: float
    p50_ms: float
    p99_ms: float
    dropped: float
    """Share of the predictions that the candidate was not shown."""


class _Prediction(msgspec.Struct):
    probability: float


class _Answer(msgspec.Struct):
    predictions: list[_Prediction]
    model_version: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--share", type=float, default=0.5, help="of the peak that is asked for")
    parser.add_argument("--rate", type=float, help="requests a second, instead of such a share")
    parser.add_argument("--block-rows", type=int, nargs="+", default=_BLOCK_ROWS)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="a file for all figures")
    options = parser.parse_args()
    gc.disable()  # its pauses would be the server's
    with ExitStack() as stack:
        workload = stack.enter_context(tensor_workload("gbdt", _WORK))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        repository = _with_candidate(workload, folder)
        settings = {"HIKYAKU_WORKERS": "1", "HIKYAKU_REPOSITORY_POLL_S": "0"}
        service = stack.enter_context(serving(folder, repository, settings))
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            rate, readings = runner.run(_Bench(service, workload, repository, options).run())
    _tell(rate, readings, options.block_rows)
    if options.json is not None:
        document = {"rate": rate, "readings": [asdict(reading) for reading in readings]}
        options.json.write_text(json.dumps(document, indent=1))


def _with_candidate(workload: Workload, folder: Path) -> Path:
    """A repository of its own, with the workload's model as version 1 and once more as 2."""
    repository = folder / "models"
    shutil.copytree(workload.repository, repository)
    subprocess.run(
        [
            *(sys.executable, "-m", "app.cli", "publish", "--keep-current"),
            *(workload.name, str(workload.model.parent)),
        ],
        env=os.environ | {"MODEL_REPOSITORY": str(repository)},
        check=True,
    )
    return repository


class _Bench:
    def __init__(
        self,
        service: ServiceProcess,
        workload: Workload,
        repository: Path,
        options: argparse.Namespace,
    ) -> None:
        self._service = service
        self._model = workload.name
        self._contract = repository / workload.name / "model.yaml"
        self._options = options
        self._expected = workload.expected
        bodies = [json.dumps({"instances": [one]}).encode() for one in workload.instances]
        path = f"/v1/models/{self._model}:predict"
        self._load = CheckedLoad(
            *(service.port, path, bodies, self._judge),
            connections=_CONNECTIONS,
            seed=options.seed,
        )
        self._answers = msgspec.json.Decoder(_Answer)

    async def run(self) -> tuple[float, list[Reading]]:
        """Requests a second that were asked for, and every run."""
        options, readings = self._options, []
        order = random.Random(options.seed)
        async with self._load as load, Operator(self._service.port) as self._operator:
            await load.closed_loop(_PEAK_S / 3)  # warm
            rate = options.rate or options.share * await load.closed_loop(_PEAK_S)
            for number in range(options.rounds):
                kinds = [0, *options.block_rows]
                order.shuffle(kinds)
                for block_rows in kinds:
                    reading = await self._read(number, block_rows, rate)
                    readings.append(reading)
                    print(f"  {reading}", file=sys.stderr, flush=True)
        return rate, readings

    def _judge(self, body: bytes, question: int) -> tuple[int, str]:
        answer = self._answers.decode(body)
        (said,) = answer.predictions
        wrong = abs(said.probability - self._expected[question]) > _TOLERANCE
        return int(answer.model_version), "wrong" if wrong else ""

    async def _read(self, number: int, block_rows: int, rate: float) -> Reading:
        if block_rows:
            await self._show(block_rows)
        load, (worker,) = self._load, self._service.workers()
        await self._ask(rate, _SETTLE_S)
        load.ledger = Ledger()
        children = isolated_of(worker)
        dropped = await self._dropped()
        before_s = [cpu_s(process) for process in (worker, *children)]
        await self._ask(rate, self._options.seconds)
        after_s = [cpu_s(process) for process in (worker, *children)]
        dropped = await self._dropped() - dropped
        if load.ledger.faults or set(load.ledger.versions) != {1}:
            sys.exit(f"not every answer was right: {load.ledger.faults}")
        if block_rows:
            await self._verb("unload", {"version": _CANDIDATE})
            while isolated_of(worker):  # noqa: ASYNC110  no event is set by another process
                await asyncio.sleep(_LOOK_EVERY_S)
        return _reading(number, block_rows, load.ledger, before_s, after_s, dropped)

    async def _dropped(self) -> float:
        metrics = (await self._operator.call("GET", "/metrics")).document
        return sum(map(float, _DROPPED.findall(metrics)))

    async def _ask(self, rate: float, seconds: float) -> None:
        until_s = time.monotonic() + seconds
        await self._load.open_loop(rate, lambda: time.monotonic() > until_s)

    async def _show(self, block_rows: int) -> None:
        contract: dict[str, Any] = yaml.safe_load(self._contract.read_text())
        contract["shadow"] = {"block_rows": block_rows}
        self._contract.write_text(yaml.safe_dump(contract))
        await self._verb("shadow", {"version": _CANDIDATE})

    async def _verb(self, verb: str, document: Mapping[str, str]) -> None:
        reply = await self._operator.call("POST", f"/v1/models/{self._model}:{verb}", document)
        if reply.status != 200:
            sys.exit(f"{verb}: {reply.status} {reply.document}")


def _reading(
    number: int,
    block_rows: int,
    ledger: Ledger,
    before_s: Sequence[float],
    after_s: Sequence[float],
    dropped: float,
) -> Reading:
    used_us = [1e6 * (b - a) / len(ledger) for a, b in zip(before_s, after_s, strict=True)]
    latencies_ms = (np.array(ledger.done_s) - np.array(ledger.intended_s)) * 1000
    p50_ms, p99_ms = (float(ms) for ms in np.percentile(latencies_ms, (50, 99)))
    return Reading(
        number,
        block_rows,
        len(ledger),
        used_us[0],
        sum(used_us[1:]),
        p50_ms,
        p99_ms,
        dropped / len(ledger),
    )


def _tell(rate: float, readings: Sequence[Reading], sizes: Sequence[int]) -> None:
    without = {reading.round: reading for reading in readings if not reading.block_rows}
    spent = statistics.median(reading.worker_us for reading in without.values())
    p99_ms = statistics.median(reading.p99_ms for reading in without.values())
    print(
        f"{rate:,.0f} requests/s of one instance, {os.cpu_count()} cores, {len(without)} rounds; "
        f"without a candidate {spent:.0f} µs of processor a prediction, p99 {p99_ms:.2f} ms"
    )
    print("A candidate that is shown everything, µs of processor a prediction (mean, 95 %):")
    print(
        f"{'block rows':>10} {'worker':>14} {'its process':>14} {'together':>14} "
        f"{'p99 ratio':>17} dropped"
    )
    for size in sizes:
        shown = [reading for reading in readings if reading.block_rows == size]
        worker = [reading.worker_us - without[reading.round].worker_us for reading in shown]
        child = [reading.child_us for reading in shown]
        both = [a + b for a, b in zip(worker, child, strict=True)]
        slower = [math.log(reading.p99_ms / without[reading.round].p99_ms) for reading in shown]
        mean, apart = _interval(slower)
        cells = [f"{m:.1f} ± {a:.1f}" for m, a in map(_interval, (worker, child, both))]
        ratio = f"{math.exp(mean):.2f} ({math.exp(mean - apart):.2f}-{math.exp(mean + apart):.2f})"
        dropped = statistics.fmean(reading.dropped for reading in shown)
        print(f"{size:10} {cells[0]:>14} {cells[1]:>14} {cells[2]:>14} {ratio:>17} {dropped:7.1%}")


def _interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and how far its 95 % interval reaches on either side."""
    error = statistics.stdev(values) / math.sqrt(len(values))
    factor = float(stats.t.ppf((1 + _CONFIDENCE) / 2, len(values) - 1))
    return statistics.fmean(values), factor * error


if __name__ == "__main__":
    main()
