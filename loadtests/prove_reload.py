"""Shows what callers get while the version that serves is changed hundreds of times in a row.

    python -m loadtests.prove_reload --reloads 500 --workers 2

A real server answers an open loop at half of its peak, from many connections. Meanwhile versions
are loaded by `:load`, every tenth change is a `:rollback`. Every answer is held against the oracle
of the version that it names, and against which versions may serve at that instant. Exit status 1 on
a violation. `--verify-again`: each load is of a version that was never verified. `--polled N`: N
more are only published, for the server to find; `--corrupted N`: N more, spoilt, none of which may
serve. `--leak`: a server that keeps what it unloads, and exit status 1 unless that is seen.
"""

import argparse
import asyncio
import gc
import json
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import uvloop

from app.repository.layout import CURRENT_FILE
from app.repository.manifest import MODEL_FILE
from loadtests.checked_load import CheckedLoad, Ledger
from loadtests.corruption import corrupt
from loadtests.memory import resident_mb
from loadtests.oracle_model import (
    INPUTS,
    MODEL,
    Size,
    instance,
    judge,
    publish_next,
    write_contract,
)
from loadtests.prove_redis_outage import percentile
from loadtests.redis_process import RedisProcess
from loadtests.service_process import Operator, Reply, ServiceProcess, serving, worst_lag_s
from loadtests.session_size import measured_mb
from loadtests.spells import Change, Verdict
from loadtests.spells import judge as judge_versions
from loadtests.standstill import Standstill

ROLLBACK_EVERY = 10
P99_RATIO = 1.5
ROLLBACK_WITHIN_S = 0.1
LEAST_LEAK_MB = 10.0
_SERVER = ("app.cli", "serve")
_LEAKING_SERVER = ("loadtests.leaking_server",)
_QUESTIONS = 4_096
_MOST_INSTANCES = 8
_PEAK_S = 3.0
_AFTER_S = 0.1  # belongs to the window of a change
_APART_S = 0.2  # then it counts as quiet
_FOLLOWED_WITHIN_S = 30.0
_MEMORY_EVERY = 10
_MEMORY_FROM, _MEMORY_TO = 50, 300
SPEED_FROM = 100  # fewer reloads have no p99
GREW = "a worker's memory grew"
_POLL_S = 0.2
_REFUSED = "CURRENT names a version that must not serve"
_ONE_ROW = {"instances": [instance((1, 2))]}

WindowKind: TypeAlias = Literal["changing", "afterwards", "quiet"]
"""From a change's begin until shortly after its answer; then; and as long as the first."""


@dataclass(frozen=True)
class Plan:
    """What is to be proved, and how long."""

    reloads: int = 500
    polled: int = 0
    """Versions that are published while the server polls, after the reloads."""
    corrupted: int = 0
    """Of them a file is spoilt; they come last."""
    versions: int = 8
    """That are loaded in turn; a server keeps two ready, all others must be opened."""
    workers: int = 1
    with_redis: bool = True
    size: Size = "small"
    verify_again: bool = False
    leak: bool = False
    share: float = 0.5
    """Of the peak throughput, that is asked for."""
    rate: float | None = None
    """Requests a second, instead of a share of the peak."""
    connections: int = 32
    seed: int = 1
    peak_s: float = _PEAK_S


class Window(NamedTuple):
    """A time, in monotonic instants."""

    from_s: float
    until_s: float


@dataclass
class Report:
    """What came of it."""

    peak_per_s: float = 0.0
    peak_cores: float = 0.0
    """Of processor that the workers used at the peak."""
    asked_per_s: float = 0.0
    answers: int = 0
    load_s: list[float] = field(default_factory=list)
    rollback_s: list[float] = field(default_factory=list)
    followed_s: list[float] = field(default_factory=list)
    """From the begin of a publishing until every worker answered with it."""
    refused_s: list[float] = field(default_factory=list)
    """From the moment that CURRENT named a corrupted version until the log told its refusal."""
    refused_loads: int = 0
    """By the metric."""
    late_s: list[float] = field(default_factory=list)
    """How long after each change's answer the last worker still answered with the version before
    it; 0 where none did."""
    latencies_s: dict[WindowKind, list[float]] = field(default_factory=dict)
    """By the kind of window."""
    ratios: list[float] = field(default_factory=list)
    """p99 in windows of changes over p99 in quiet ones, by tenths of the run."""
    memory_mb: dict[int, float] = field(default_factory=dict)
    """Of the workers, resident, the mean of them, by the number of reloads."""
    session_mb: float = 0.0
    worst_lag_s: float = 0.0
    """Of the workers' event loops: no more than."""
    standstill_s: float = 0.0
    """Of this process: the machine had something else to do."""
    violations: list[str] = field(default_factory=list)


class Proof:
    """One server under load, whose version is changed."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self._plan = plan
        self.repository = folder / "models"
        self.report = Report()
        self.changes: list[Change] = []
        self._windows: list[dict[WindowKind, Window]] = []
        self._over = asyncio.Event()
        self._champion, self._previous = 1, 0
        self._random = random.Random(plan.seed)

    async def publish(self) -> None:
        """As many versions as are loaded; CURRENT names the first."""
        plan = self._plan
        rollbacks = plan.reloads // ROLLBACK_EVERY
        count = 1 + plan.reloads - rollbacks if plan.verify_again else plan.versions
        write_contract(self.repository)
        for version in range(1, count + 1):
            await publish_next(self.repository, version, plan.size)
        self._published = count
        point_current(self.repository, 1)
        if plan.reloads >= _MEMORY_TO:
            model = self.repository / MODEL / "1" / MODEL_FILE
            self.report.session_mb = measured_mb(model, "x", columns=2)

    async def run(self, service: ServiceProcess) -> None:
        """All changes, under load; fills the report."""
        plan, report = self._plan, self.report
        async with AsyncExitStack() as stack:
            load = await stack.enter_async_context(
                oracle_load(service.port, plan.size, plan.connections, plan.seed)
            )
            self._operator = await stack.enter_async_context(Operator(service.port))
            standstill = await stack.enter_async_context(Standstill())
            await load.closed_loop(plan.peak_s / 3)  # warm
            cpu_s, began_s = service.cpu_s(), time.monotonic()
            report.peak_per_s = await load.closed_loop(plan.peak_s)
            report.peak_cores = (service.cpu_s() - cpu_s) / (time.monotonic() - began_s)
            report.asked_per_s = plan.rate or plan.share * report.peak_per_s
            worker, workers = await self._operator.worker(service), service.workers()
            whose = service.workers_by_port(load.ports())
            asking = asyncio.create_task(load.open_loop(report.asked_per_s, self._over.is_set))
            try:
                await asyncio.sleep(0.5)
                for number in range(1, plan.reloads + 1):
                    await self._change(number, worker)
                    if number % _MEMORY_EVERY == 0:
                        worker_mb = [resident_mb(worker) for worker in service.workers()]
                        report.memory_mb[number] = statistics.mean(worker_mb)
                for _ in range(plan.polled):
                    await self._publish_one_more(load.ledger, whose)
                for _ in range(plan.corrupted):
                    await self._publish_corrupted(service)
                if plan.corrupted:
                    await self._publish_one_more(load.ledger, whose)
            finally:
                self._over.set()
                await asking
            await load.ask_each()
            metrics = (await self._operator.call("GET", "/metrics")).document
            report.worst_lag_s = worst_lag_s(metrics)
            report.standstill_s = standstill.worst_s
            report.refused_loads = _refused_loads(metrics)
        if self.report.refused_loads < plan.corrupted:
            self._violated(f"{self.report.refused_loads} refusals are told as a metric")
        if service.workers() != workers:
            self._violated(f"of the workers {workers} there are {service.workers()} left")
        self._account(load.ledger, whose)

    async def _change(self, number: int, worker: int) -> None:
        """By a verb; then a time for its window, and as long a quiet one."""
        is_rollback = number % ROLLBACK_EVERY == 0
        new = self._previous if is_rollback else self._next_version(number)
        verb = "rollback" if is_rollback else "load"
        document = {} if is_rollback else {"version": str(new)}
        reply = await self._operator.call("POST", f"/v1/models/{MODEL}:{verb}", document)
        took_s = reply.answered_s - reply.asked_s
        (self.report.rollback_s if is_rollback else self.report.load_s).append(took_s)
        if reply.status != 200:
            self._violated(f"{verb} {number}: {reply.status} {reply.document}")
            return
        self.changes.append(Change(new, reply.asked_s, reply.answered_s, worker))
        self._previous, self._champion = self._champion, new
        said = await self._operator.call("POST", f"/v1/models/{MODEL}:predict", _ONE_ROW)
        if said.status != 200 or said.document["model_version"] != str(new):
            self._violated(f"after {verb} {number} to {new}, the same connection: {said.document}")
        await self._rest(reply)

    def _next_version(self, number: int) -> int:
        if self._plan.verify_again:
            return 1 + number - number // ROLLBACK_EVERY
        kept = range(1, self._plan.versions + 1)
        return self._random.choice([v for v in kept if v not in (self._champion, self._previous)])

    async def _rest(self, reply: Reply) -> None:
        changing = Window(reply.asked_s, reply.answered_s + _AFTER_S)
        afterwards = Window(changing.until_s, changing.until_s + _APART_S)
        length_s = changing.until_s - changing.from_s
        quiet = Window(afterwards.until_s, afterwards.until_s + length_s)
        self._windows.append({"changing": changing, "afterwards": afterwards, "quiet": quiet})
        pause_s = self._random.uniform(0, 0.02)  # keeps no step with anything of the server's
        await asyncio.sleep(quiet.until_s + pause_s - time.monotonic())

    async def _publish_one_more(self, ledger: Ledger, whose: Mapping[int, int]) -> None:
        """By the publisher alone: the server polls."""
        self._published += 1
        new, asked_s = self._published, time.monotonic()
        publishing = partial(publish_next, self.repository, new, self._plan.size)
        await asyncio.to_thread(lambda: asyncio.run(publishing()))
        followed_s = await _followed(ledger, new, whose)
        if followed_s is None:
            self._violated(f"version {new} was published, and not served by all workers")
            return
        self.report.followed_s.append(followed_s - asked_s)
        self.changes.append(Change(new, asked_s, followed_s))
        self._previous, self._champion = self._champion, new
        await asyncio.sleep(0.1)

    async def _publish_corrupted(self, service: ServiceProcess) -> None:
        """As the server finds it: whole, under its name, CURRENT names it, and a file is spoilt."""
        self._published += 1
        new, elsewhere = self._published, self.repository.with_name("elsewhere")
        if not elsewhere.exists():
            shutil.copytree(self.repository, elsewhere)
        publishing = partial(publish_next, elsewhere, new, self._plan.size)
        await asyncio.to_thread(lambda: asyncio.run(publishing()))
        version = elsewhere / MODEL / str(new)
        how = corrupt(version, self._random)
        shutil.copytree(version, self.repository / MODEL / str(new))
        asked_s = time.monotonic()
        point_current(self.repository, new)
        while not any(line.get("version") == new for line in service.logged(_REFUSED)):
            if time.monotonic() > asked_s + _FOLLOWED_WITHIN_S:
                return self._violated(f"version {new} was not refused: {how}")
            await asyncio.sleep(0.02)
        self.report.refused_s.append(time.monotonic() - asked_s)

    def _account(self, ledger: Ledger, whose: Mapping[int, int]) -> None:
        report = self.report
        report.answers = len(ledger)
        for kind, count in ledger.faults.items():
            self._violated(f"{count} answers: {kind}")
        report.violations += ledger.samples
        verdict: Verdict = judge_versions(ledger.in_order_of_sending(), 1, self.changes, whose)
        for kind, count in verdict.unlawful.items():
            self._violated(f"{count} answers {kind}")
        report.violations += verdict.samples
        report.late_s = [verdict.late_s.get(number, 0.0) for number in range(len(self.changes))]
        _measure(report, self._windows, ledger)

    def _violated(self, what: str) -> None:
        self.report.violations.append(what)


async def prove(plan: Plan) -> Report:
    """One server, as many changes as planned."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        proof = Proof(plan, folder)
        await proof.publish()
        settings = {
            "HIKYAKU_WORKERS": str(plan.workers),
            "HIKYAKU_REPOSITORY_POLL_S": str(_POLL_S if plan.polled or plan.corrupted else 0),
        }
        if plan.with_redis:
            settings["STATE_REDIS_URL"] = stack.enter_context(RedisProcess(folder / "redis")).url
        command = _LEAKING_SERVER if plan.leak else _SERVER
        service = serving(folder, proof.repository, settings, command=command)
        await proof.run(stack.enter_context(service))
    _judge(proof.report, plan)
    return proof.report


def oracle_load(
    port: int,
    size: Size,
    connections: int,
    seed: int,
    tell_rows: Callable[[int], None] = lambda rows: None,
) -> CheckedLoad:
    """Of varied rows, 1 to 8 instances a request, each answer judged by its version's oracle.
    `tell_rows` is told how many rows an answer is of."""
    rng = random.Random(seed)
    questions = [
        [
            (rng.randrange(INPUTS), rng.randrange(INPUTS))
            for _ in range(rng.randint(1, _MOST_INSTANCES))
        ]
        for _ in range(_QUESTIONS)
    ]
    bodies = [json.dumps({"instances": [*map(instance, rows)]}).encode() for rows in questions]

    def judged(body: bytes, question: int) -> tuple[int, str]:
        tell_rows(len(questions[question]))
        return judge(body, questions[question], size)

    path = f"/v1/models/{MODEL}:predict"
    return CheckedLoad(port, path, bodies, judged, connections=connections, seed=seed)


def point_current(repository: Path, version: int) -> None:
    """CURRENT names the version from now on, as a publisher would have it."""
    staged = repository / MODEL / ".staging-current"
    staged.write_text(f"{version}\n")
    staged.rename(repository / MODEL / CURRENT_FILE)


def _refused_loads(metrics: str) -> int:
    lines = [line for line in metrics.splitlines() if 'outcome="refused"' in line]
    return sum(round(float(line.rpartition(" ")[2])) for line in lines)


async def _followed(ledger: Ledger, new: int, whose: Mapping[int, int]) -> float | None:
    """The instant at which the last worker had answered with this version; None: one did not."""
    waited_for = set(whose.values())
    until_s, seen = time.monotonic() + _FOLLOWED_WITHIN_S, 0
    while time.monotonic() < until_s:
        for number in range(seen, len(ledger)):
            if ledger.versions[number] == new:
                waited_for.discard(whose[ledger.connections[number]])
        seen = len(ledger)
        if not waited_for:
            return ledger.done_s[-1]
        await asyncio.sleep(0.005)
    return None


def _measure(
    report: Report, windows: Sequence[Mapping[WindowKind, Window]], ledger: Ledger
) -> None:
    """Latencies by the kind of window in which a request was to be sent."""
    intended_s = np.array(ledger.intended_s)
    latencies_s = np.array(ledger.done_s) - intended_s
    order = np.argsort(intended_s)
    intended_s, latencies_s = intended_s[order], latencies_s[order]

    def during(kind: WindowKind, some: Sequence[Mapping[WindowKind, Window]]) -> list[float]:
        bounds = (np.searchsorted(intended_s, window[kind]) for window in some)
        return [float(s) for first, last in bounds for s in latencies_s[first:last]]

    report.latencies_s = {kind: during(kind, windows) for kind in get_args(WindowKind)}
    size = max(1, len(windows) // 10)
    for start in range(0, len(windows) - size + 1, size):
        tenth = windows[start : start + size]
        changing, quiet = (percentile(during(kind, tenth), 99) for kind in ("changing", "quiet"))
        report.ratios.append(changing / quiet if quiet else 0.0)


def _judge(report: Report, plan: Plan) -> None:
    if plan.reloads < SPEED_FROM:
        return
    changing, quiet = (percentile(report.latencies_s[kind], 99) for kind in ("changing", "quiet"))
    if changing > P99_RATIO * quiet:
        report.violations.append(f"p99 while it is changed: {changing / quiet:.2f} times the other")
    if percentile(report.rollback_s, 99) > ROLLBACK_WITHIN_S:
        report.violations.append(f"p99 of a rollback: {percentile(report.rollback_s, 99):.3f} s")
    if plan.reloads >= _MEMORY_TO:
        grown_mb = report.memory_mb[_MEMORY_TO] - report.memory_mb[_MEMORY_FROM]
        if grown_mb > max(LEAST_LEAK_MB, report.session_mb):
            report.violations.append(f"{GREW} by {grown_mb:.1f} MB")


def lines(report: Report, plan: Plan) -> Iterator[str]:
    """What a person reads."""
    yield (
        f"  peak {report.peak_per_s:,.0f} requests/s with {report.peak_cores:.2f} cores of the "
        f"workers; asked for {report.asked_per_s:,.0f}/s; {report.answers:,} answers"
    )
    yield f"  {'seconds of':28} {'number':>7} {'p50':>8} {'p99':>8} {'max':>8}"
    for what, values in (
        ("a load", report.load_s),
        ("a rollback", report.rollback_s),
        ("following a publishing", report.followed_s),
        ("refusing a corrupted one", report.refused_s),
        ("another worker's delay", report.late_s),
    ):
        if values:
            p50, p99, worst = (percentile(values, p) for p in (50, 99, 100))
            yield f"  {what:28} {len(values):7} {p50:8.3f} {p99:8.3f} {worst:8.3f}"
    if report.load_s:
        yield f"  {'ms of an answer, window':28} {'number':>7} {'p50':>8} {'p99':>8} {'p99.9':>8}"
    for kind, values in report.latencies_s.items() if report.load_s else ():
        p50, p99, rare = (percentile(values, p) * 1000 for p in (50, 99, 99.9))
        yield f"  {kind:28} {len(values):7} {p50:8.2f} {p99:8.2f} {rare:8.2f}"
    if report.ratios:
        ratios = ", ".join(f"{ratio:.2f}" for ratio in report.ratios)
        yield f"  p99 changing / quiet, by tenths of the run: {ratios}"
    if report.memory_mb:
        shown = {n: mb for n, mb in report.memory_mb.items() if n % 50 == 0 or n == _MEMORY_EVERY}
        memory = ", ".join(f"{mb:.0f} after {number}" for number, mb in shown.items())
        yield f"  MB of a worker: {memory} reloads; one session takes {report.session_mb:.1f}"
    yield (
        f"  a worker's loop was late by {report.worst_lag_s:g} s at most, "
        f"this process by {report.standstill_s:.2f} s"
    )
    yield from (f"  VIOLATION: {violation}" for violation in report.violations)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reloads", type=int, default=500)
    parser.add_argument("--polled", type=int, default=0, help="versions that the server must find")
    parser.add_argument("--corrupted", type=int, default=0, help="versions that must be refused")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--without-redis", action="store_true")
    parser.add_argument("--size", choices=get_args(Size), default="small")
    parser.add_argument("--versions", type=int, default=8, help="that are loaded in turn")
    parser.add_argument("--verify-again", action="store_true", help="each load is of a new version")
    parser.add_argument("--leak", action="store_true", help="a server that leaks, to be caught")
    parser.add_argument("--share", type=float, default=0.5, help="of the peak that is asked for")
    parser.add_argument("--rate", type=float, help="requests a second, instead of such a share")
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--seed", type=int, default=random.randrange(1_000_000))
    arguments = vars(parser.parse_args())
    plan = Plan(with_redis=not arguments.pop("without_redis"), **arguments)
    print(f"{plan}", flush=True)
    gc.disable()  # its pauses would be the server's
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        report = runner.run(prove(plan))
    print("\n".join(lines(report, plan)), flush=True)
    if plan.leak:
        return 0 if any(GREW in violation for violation in report.violations) else 1
    return 1 if report.violations else 0


if __name__ == "__main__":
    sys.exit(main())
