"""Shows what a champion's callers feel of a candidate that hangs, crashes, grows or takes long.

    python -m loadtests.prove_shadow --rounds 30 --control

A real server with one worker answers an open loop at half of its peak, and shows all of it to a
candidate. In each round it is a healthy one and one of each fault, in a random order. Every answer
is held against the oracle, every row that was offered to a candidate must be compared, failed or
dropped, and nothing may stay behind. A fault's figure is p99 over p99 of the healthy one in the
same round. Exit status 1 on a violation. `--control`: some rounds also have a candidate that hangs
in a process that is not put behind the server; exit status 1 unless that is seen.
"""

import argparse
import asyncio
import gc
import json
import math
import random
import re
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import uvloop
from scipy import stats

from loadtests.checked_load import Ledger
from loadtests.faulty_candidates import FAULTS, Fault, faulty_model, turns_to_take
from loadtests.memory import isolated_of, resident_mb
from loadtests.oracle_model import MODEL, Oracle, publish_next, write_contract
from loadtests.prove_reload import oracle_load, point_current
from loadtests.redis_process import RedisProcess
from loadtests.service_process import Operator, ServiceProcess, serving, worst_lag_s
from loadtests.standstill import Standstill

P99_RATIO = 1.15
SPEED_FROM = 10  # fewer rounds have no bound
HEALTHY, AGAIN, NONE, CONTROL = "healthy", "healthy again", "none", "hang, not put behind"
_CHAMPION, _HEALTHY = 1, 2
_SLOWER = 10
_MOST_GROWTH_MB = 10.0
_LOOK_EVERY_S = 0.1
_COUNTED_WITHIN_S = 5.0
_ENDED_WITHIN_S = 5.0
_GROWN_MB = 200
_EXTRA_ROUNDS = 10  # with what is to be seen beside the faults
_ROWS = re.compile(r'hikyaku_shadow_rows_total\{.*outcome="(.*)"\} (.*)')
_CONFIDENCE = 0.95
# Within a run a candidate that hangs is given up, killed and replaced.
_SHADOW = {"timeout_ms": 1_000}
_NOT_BEHIND = {"isolation": {"nice": 0, "idle": False}}


@dataclass(frozen=True)
class Plan:
    """What is to be proved, and how long."""

    rounds: int = 30
    faults: Sequence[Fault] = FAULTS
    healthy: bool = True
    """Each round has a run with a healthy candidate, the first ones also a second such run, which
    shows how far apart equals are, and one without a candidate."""
    control: bool = False
    run_s: float = 4.0
    settle_s: float = 0.7
    """At the begin of a run, not counted."""
    share: float = 0.5
    """Of the peak throughput, that is asked for."""
    rate: float | None = None
    """Requests a second, instead of a share of the peak."""
    connections: int = 32
    seed: int = 1
    peak_s: float = 3.0


@dataclass
class Run:
    """A time in which one candidate was shown requests."""

    round: int
    kind: str
    answers: int = 0
    p50_ms: float = 0.0
    p99_ms: float = 0.0
    rows: Mapping[str, int] = field(default_factory=dict)
    """That were offered to the candidate, by what became of them."""
    worker_mb: float = 0.0
    most_child_mb: float = 0.0
    """Of all isolated processes together."""
    processes: int = 0
    """Isolated ones that were seen."""
    cpu_us: float = 0.0
    """Of the worker, a request."""


class Ratio(NamedTuple):
    """p99 over that of the healthy candidate: the geometric mean of the rounds, with its bounds."""

    mean: float
    lower: float
    upper: float


@dataclass
class Report:
    """What came of it."""

    peak_per_s: float = 0.0
    asked_per_s: float = 0.0
    turns: int = 0
    """Of the loop of a candidate that takes ten times as long."""
    runs: list[Run] = field(default_factory=list)
    grown_mb: float = 0.0
    """The worker, from the second fifth of the runs to the last one."""
    worst_lag_s: float = 0.0
    standstill_s: float = 0.0
    violations: list[str] = field(default_factory=list)

    def of(self, kind: str) -> list[Run]:
        return [run for run in self.runs if run.kind == kind]

    def ratio(self, kind: str) -> Ratio:
        """Of two rounds at least."""
        healthy = {run.round: run.p99_ms for run in self.of(HEALTHY)}
        logs = [math.log(run.p99_ms / healthy[run.round]) for run in self.of(kind)]
        mean = statistics.fmean(logs)
        error = statistics.stdev(logs) / math.sqrt(len(logs))
        apart = float(stats.t.ppf((1 + _CONFIDENCE) / 2, len(logs) - 1)) * error
        return Ratio(*map(math.exp, (mean, mean - apart, mean + apart)))


class Proof:
    """One server under load, whose candidate is changed."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self._plan = plan
        self.repository = folder / "models"
        self.report = Report()
        self._rows = 0
        self._random = random.Random(plan.seed)
        faulty = {fault: 1 + _HEALTHY + at for at, fault in enumerate(plan.faults)}
        self._versions = {HEALTHY: _HEALTHY, AGAIN: _HEALTHY, **faulty}
        if plan.control:
            self._versions[CONTROL] = faulty["hang"]
        self._counted: Counter[str] = Counter()

    async def publish(self) -> None:
        """The champion, the healthy candidate and the faulty ones; CURRENT names the champion."""
        write_contract(self.repository, {"shadow": _SHADOW})
        self.report.turns = turns_to_take(_SLOWER)
        for version in (_CHAMPION, _HEALTHY):
            await publish_next(self.repository, version)
        for version, fault in enumerate(self._plan.faults, 1 + _HEALTHY):
            model = faulty_model(Oracle(version), fault, self.report.turns)
            await publish_next(self.repository, version, model=model)
        point_current(self.repository, _CHAMPION)

    async def run(self, service: ServiceProcess) -> None:
        """All rounds; fills the report."""
        plan, report = self._plan, self.report
        self._service = service
        async with AsyncExitStack() as stack:
            load = oracle_load(service.port, "small", plan.connections, plan.seed, self._asked)
            self._load = await stack.enter_async_context(load)
            self._operator = await stack.enter_async_context(Operator(service.port))
            standstill = await stack.enter_async_context(Standstill())
            await load.closed_loop(plan.peak_s / 3)  # warm
            report.peak_per_s = await load.closed_loop(plan.peak_s)
            report.asked_per_s = plan.rate or plan.share * report.peak_per_s
            workers = service.workers()
            self._judge_answers("the peak", load.ledger)
            for number in range(plan.rounds):
                extra = number < _EXTRA_ROUNDS
                healthy = (HEALTHY, AGAIN, NONE) if extra else (HEALTHY,)
                kinds = [*(healthy if plan.healthy else ()), *plan.faults]
                if plan.control and extra:
                    kinds.append(CONTROL)
                self._random.shuffle(kinds)
                for kind in kinds:
                    run = await self._run(number, kind)
                    report.runs.append(run)
                    print(_line(run), file=sys.stderr, flush=True)
            metrics = (await self._operator.call("GET", "/metrics")).document
            report.worst_lag_s = worst_lag_s(metrics)
            report.standstill_s = standstill.worst_s
        if service.workers() != workers:
            self._violated(f"of the workers {workers} there are {service.workers()} left")

    def _asked(self, rows: int) -> None:
        self._rows += rows

    async def _run(self, number: int, kind: str) -> Run:
        plan, load, run = self._plan, self._load, Run(number, kind)
        behind = {} if kind != CONTROL else _NOT_BEHIND
        write_contract(self.repository, {"shadow": _SHADOW | behind})
        if kind != NONE:
            await self._call("shadow", kind)
        self._rows, load.ledger = 0, Ledger()
        (worker,) = self._service.workers()
        watching = asyncio.create_task(self._watch(worker, run))
        cpu_s, began_s = self._service.cpu_s(), time.monotonic()
        from_s, until_s = began_s + plan.settle_s, began_s + plan.settle_s + plan.run_s
        await load.open_loop(self.report.asked_per_s, lambda: time.monotonic() > until_s)
        watching.cancel()
        run.cpu_us = (self._service.cpu_s() - cpu_s) / len(load.ledger) * 1e6
        self._judge_answers(kind, load.ledger)
        _measure(run, load.ledger, from_s)
        if kind != NONE:
            await self._call("unload", kind)
            run.rows = await self._rows_counted(kind)
            await self._all_ended(worker, kind)
        return run

    async def _call(self, verb: str, kind: str) -> None:
        document = {"version": str(self._versions[kind])}
        reply = await self._operator.call("POST", f"/v1/models/{MODEL}:{verb}", document)
        if reply.status != 200:
            raise RuntimeError(f"{verb} of {kind}: {reply.status} {reply.document}")

    async def _watch(self, worker: int, run: Run) -> None:
        seen: set[int] = set()
        sizes = []
        while True:
            sizes.append(resident_mb(worker))
            run.worker_mb = statistics.median(sizes)
            children = isolated_of(worker)
            seen.update(children)
            run.processes = len(seen)
            run.most_child_mb = max(run.most_child_mb, sum(children.values()))
            await asyncio.sleep(_LOOK_EVERY_S)

    async def _rows_counted(self, kind: str) -> Mapping[str, int]:
        """What became of all rows of this run: the server counts once a second."""
        until_s = time.monotonic() + _COUNTED_WITHIN_S
        while True:
            metrics = (await self._operator.call("GET", "/metrics")).document
            counted = Counter({o: round(float(n)) for o, n in _ROWS.findall(metrics)})
            rows = counted - self._counted
            if rows.total() == self._rows or time.monotonic() > until_s:
                break
            await asyncio.sleep(_LOOK_EVERY_S)
        if rows.total() != self._rows:
            self._violated(f"{kind}: {self._rows} rows were answered, {dict(rows)} counted")
        self._counted = counted
        return dict(rows)

    async def _all_ended(self, worker: int, kind: str) -> None:
        """No isolated process is left, but for those that take a moment to end."""
        until_s = time.monotonic() + _ENDED_WITHIN_S
        while left := isolated_of(worker):
            if time.monotonic() > until_s:
                return self._violated(f"{kind}: {len(left)} isolated processes are left")
            await asyncio.sleep(_LOOK_EVERY_S)

    def _judge_answers(self, what: str, ledger: Ledger) -> None:
        for kind, count in ledger.faults.items():
            self._violated(f"{what}: {count} answers: {kind}")
        self.report.violations += ledger.samples
        others = len(ledger) - ledger.versions.count(_CHAMPION)
        if others:
            self._violated(f"{what}: {others} answers are not the champion's")

    def _violated(self, what: str) -> None:
        self.report.violations.append(what)


def _measure(run: Run, ledger: Ledger, from_s: float) -> None:
    intended_s = np.array(ledger.intended_s)
    latencies_s = (np.array(ledger.done_s) - intended_s)[intended_s >= from_s]
    run.answers = len(latencies_s)
    run.p50_ms, run.p99_ms = (float(ms) for ms in np.percentile(latencies_s, (50, 99)) * 1000)


async def prove(plan: Plan) -> Report:
    """One server, as many rounds as planned."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        proof = Proof(plan, folder)
        await proof.publish()
        settings = {
            "HIKYAKU_WORKERS": "1",
            "HIKYAKU_REPOSITORY_POLL_S": "0",
            "STATE_REDIS_URL": stack.enter_context(RedisProcess(folder / "redis")).url,
        }
        await proof.run(stack.enter_context(serving(folder, proof.repository, settings)))
    _judge(proof.report, plan)
    return proof.report


def _judge(report: Report, plan: Plan) -> None:
    for fault in plan.faults:
        if not any(_is_seen(run) for run in report.of(fault)):
            report.violations.append(f"{fault}: it was not seen")
    if plan.rounds < SPEED_FROM:
        return
    for fault in plan.faults:
        ratio = report.ratio(fault)
        if ratio.upper > P99_RATIO:
            report.violations.append(f"{fault}: p99 by {ratio.upper:.3f} at the upper bound")
    if plan.control and report.ratio(CONTROL).lower <= P99_RATIO:
        report.violations.append("the control was not seen")
    sizes = [run.worker_mb for run in report.runs]
    fifth = len(sizes) // 5
    report.grown_mb = statistics.median(sizes[-fifth:]) - statistics.median(
        sizes[fifth : 2 * fifth]
    )
    if report.grown_mb > _MOST_GROWTH_MB:
        report.violations.append(f"the worker's memory grew by {report.grown_mb:.1f} MB")


def _is_seen(run: Run) -> bool:
    """The candidate has done what it is here for."""
    if run.kind == "hang":
        return run.rows.get("timed_out", 0) > 0
    if run.kind == "crash":
        return run.rows.get("failed", 0) > 0
    if run.kind == "grow":
        return run.most_child_mb > _GROWN_MB
    return run.rows.get("compared", 0) > 0


def lines(report: Report) -> Iterator[str]:
    """What a person reads."""
    answers = sum(run.answers for run in report.runs)
    yield (
        f"  peak {report.peak_per_s:,.0f} requests/s; asked for {report.asked_per_s:,.0f}/s; "
        f"{answers:,} answers in {len(report.runs)} runs; slow: {report.turns} turns"
    )
    yield (
        f"  {'candidate':22} {'runs':>4} {'p50 ms':>7} {'p99 ms':>7} {'p99 ratio':>9} "
        f"{'95 %':>13} {'cpu µs':>6} {'MB':>5} {'procs':>5}  rows"
    )
    for kind in dict.fromkeys(run.kind for run in report.runs):
        yield _row(report, kind)
    yield (
        f"  the worker grew by {report.grown_mb:.1f} MB; its loop was late by "
        f"{report.worst_lag_s:g} s at most, this process by {report.standstill_s:.2f} s"
    )
    yield from (f"  VIOLATION: {violation}" for violation in report.violations)


def _row(report: Report, kind: str) -> str:
    runs = report.of(kind)
    rows: defaultdict[str, int] = defaultdict(int)
    for run in runs:
        for outcome, count in run.rows.items():
            rows[outcome] += count
    p50, p99, cpu = (
        statistics.median(getattr(run, name) for run in runs)
        for name in ("p50_ms", "p99_ms", "cpu_us")
    )
    figures = f"{'':9} {'':13}"
    if kind != HEALTHY and len(runs) > 1:
        ratio = report.ratio(kind)
        figures = f"{ratio.mean:9.3f} {ratio.lower:6.3f}-{ratio.upper:6.3f}"
    said = ", ".join(
        f"{outcome} {count / sum(rows.values()):.1%}" for outcome, count in rows.items()
    )
    child_mb = max(run.most_child_mb for run in runs)
    processes = statistics.fmean(run.processes for run in runs)
    return (
        f"  {kind:22} {len(runs):4} {p50:7.2f} {p99:7.2f} {figures} {cpu:6.0f} {child_mb:5.0f} "
        f"{processes:5.1f}  {said}"
    )


def _line(run: Run) -> str:
    return (
        f"  {run.round:3} {run.kind:22} p50 {run.p50_ms:6.2f} p99 {run.p99_ms:6.2f} ms, "
        f"{run.processes} processes, {run.most_child_mb:.0f} MB, {dict(run.rows)}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=FAULTS)
    parser.add_argument("--control", action="store_true", help="one that must be caught, too")
    parser.add_argument("--run-s", type=float, default=4.0)
    parser.add_argument("--settle-s", type=float, default=0.7)
    parser.add_argument("--share", type=float, default=0.5, help="of the peak that is asked for")
    parser.add_argument("--rate", type=float, help="requests a second, instead of such a share")
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--seed", type=int, default=random.randrange(1_000_000))
    parser.add_argument("--json", type=Path, help="a file for all figures")
    arguments = vars(parser.parse_args())
    written: Path | None = arguments.pop("json")
    plan = Plan(**arguments)
    print(f"{plan}", flush=True)
    gc.disable()  # its pauses would be the server's
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        report = runner.run(prove(plan))
    print("\n".join(lines(report)), flush=True)
    if written is not None:
        document: dict[str, Any] = {"plan": asdict(plan), **asdict(report)}
        written.write_text(json.dumps(document, indent=1))
    return 1 if report.violations else 0


if __name__ == "__main__":
    sys.exit(main())
