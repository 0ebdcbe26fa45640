"""Shows what callers get while Redis is gone, and how soon answers are fresh once it is back.

    python -m loadtests.prove_redis_outage --outage 30

A real server reads a real Redis (append-only file on) under a steady load; Redis is killed (-9) and
restarted, stopped (SIGSTOP), or cut off by a proxy that lets no byte through. Every answer is held
against what is stored. Exit status 1 on a violation.
"""

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import redis

from app.listener import bind
from app.local.processes import child
from loadtests.fault_proxy import FaultProxy, Pass, Stall
from loadtests.memory import resident_mb, worker_of
from loadtests.open_loop import Asked, OpenLoop
from loadtests.redis_process import RedisProcess
from loadtests.telltale import CLOCK, TELLTALE, city, store, value_of
from tests.tiny_models import stored as score_of
from tests.tiny_models import write_model

Form: TypeAlias = Literal["killed", "stopped", "silent"]

STORED = (1_500, 20)
LOAD_DELAY = "key-load-delay 300"
"""µs a key: a killed Redis answers LOADING for half a second, as one with more data would."""
TIMEOUT_MS = 250
TOLERATED_S = 0.1
"""Over its time-out an answer may come later by this much: we share the machine with the server."""
FRESH_WITHIN_S = 1.0
PROBES_PER_S = 10
P99_RISE_S, P99_NOISE = 0.01, 1.5
"""What an outage may add to the p99, where this machine alone may move it by half."""
P99_FROM_S = 20.0
"""In a shorter outage the reads that were under way when it began are over one in a hundred."""
GROWTH_MB = 20.0
_HEADERS = {"Content-Type": "application/json", "Request-Timeout-Ms": str(TIMEOUT_MS)}
_AT_ONCE_S = 0.02  # until a signal has arrived


@dataclass(frozen=True)
class Load:
    """How long before, during and after the outage, and how many requests a second."""

    before_s: float
    outage_s: float
    after_s: float
    per_s: float
    seed: int


@dataclass
class Report:
    """What came of one outage."""

    form: Form
    latencies_s: dict[str, list[float]]
    """By phase: before, during, after."""
    outcomes: dict[str, Counter[str]]
    fresh_after_s: float | None
    """From Redis' first good reply to the first fresh answer."""
    latest_s: float
    """The longest that a caller waited, from sending."""
    connections: int
    memory_mb: tuple[float, float]
    """Of the worker, before the outage and at the end."""
    log_lines: int
    """Of the server, from the outage on."""
    violations: list[str] = field(default_factory=list)


@dataclass
class _Instants:
    down_s: float = 0.0
    up_s: float = 0.0
    """When Redis was let go on."""
    good_s: float = 0.0
    """Its first good reply."""


async def prove(form: Form, load: Load) -> Report:
    """One server, one Redis, one outage."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        process = stack.enter_context(RedisProcess(folder / "redis"))
        store(process.url, *STORED)
        proxy = await stack.enter_async_context(FaultProxy(process.port))
        await write_model(folder / "models", "drivers", "stored", plan=TELLTALE)
        with bind("127.0.0.1", 0) as probe:
            port: int = probe.getsockname()[1]
        url = process.url_through(proxy.port) if form == "silent" else process.url
        log = _Log(folder / "server.log")
        server = stack.enter_context(
            child(
                [sys.executable, "-m", "app.cli", "serve"],
                _environment(folder, url, port),
                stack.enter_context(log.path.open("w")),
            )
        )
        await _ready(port, log)
        client = stack.enter_context(redis.Redis.from_url(process.url))
        loop = OpenLoop(port, "/v1/models/drivers:predict", _HEADERS, load.per_s, load.seed)
        asking = asyncio.create_task(
            loop.run(load.before_s + load.outage_s + load.after_s, _bodies(load.seed).__next__)
        )
        await asyncio.sleep(load.before_s)
        worker = worker_of(server.pid)
        early_mb, early_lines = resident_mb(worker), log.lines()
        connections = _Connections(form, proxy, client)
        instants = await _outage(form, process, proxy, load.outage_s)
        await asking
        report = _report(form, loop.ledger, instants)
        report.connections = connections.since()
        report.memory_mb = (early_mb, resident_mb(worker))
        report.log_lines = log.lines() - early_lines
    _judge(report, load)
    return report


@dataclass(frozen=True)
class _Log:
    path: Path

    def lines(self) -> int:
        return len(self.path.read_text().splitlines())


def _environment(folder: Path, redis_url: str, port: int) -> dict[str, str]:
    return os.environ | {
        "MODEL_REPOSITORY": str(folder / "models"),
        "FEATURE_REDIS_URL": redis_url,
        "STATE_REDIS_URL": "",
        "HIKYAKU_FEATURE_REPO": str(folder / "no feature repository"),
        "HIKYAKU_PORT": str(port),
        "HIKYAKU_REPLAY_CLOCK": CLOCK,
    }


async def _ready(port: int, log: "_Log") -> None:
    """Until the server answers one request as it should."""
    loop = OpenLoop(port, "/v1/models/drivers:predict", _HEADERS, 20, 0)
    for _ in range(300):
        await loop.run(0.1, _bodies(0).__next__)
        if loop.ledger and outcome_of(loop.ledger[-1]) == "fresh":
            return
    raise TimeoutError(log.path.read_text())


def _bodies(seed: int) -> Iterator[bytes]:
    """Requests about drivers and cities that are stored."""
    rng = random.Random(seed)
    while True:
        driver, number = rng.randrange(STORED[0]), rng.randrange(STORED[1])
        instance = {"driver_id": driver, "city": city(number), "distance": rng.randrange(1_000)}
        yield json.dumps({"instances": [instance]}).encode()


async def _outage(
    form: Form, process: RedisProcess, proxy: FaultProxy, outage_s: float
) -> _Instants:
    loop = asyncio.get_running_loop()
    instants = _Instants()
    match form:
        case "killed":
            process.kill()
        case "stopped":
            process.pause()
        case "silent":
            await proxy.switch(Stall())
    instants.down_s = loop.time()
    await asyncio.sleep(outage_s)
    instants.up_s = loop.time()
    match form:
        case "killed":
            process.launch(LOAD_DELAY)
        case "stopped":
            process.resume()
        case "silent":
            await proxy.switch(Pass())
    instants.good_s = await process.good_reply()
    return instants


class _Connections:
    """Counts the server's connections since the start of the outage. Those that a dead Redis
    refuses are counted by nobody: of a killed one, those after its restart."""

    def __init__(self, form: Form, proxy: FaultProxy, client: "redis.Redis[bytes]") -> None:
        self._form = form
        self._proxy = proxy
        self._client = client
        self._before = self._total()

    def since(self) -> int:
        if self._form == "killed":
            self._client.close()  # the one that was open is gone
            return self._total() - 2  # this one, and the one that waited for the good reply
        return self._total() - self._before - (self._form == "stopped")  # which also waited

    def _total(self) -> int:
        if self._form == "silent":
            return self._proxy.connections_opened
        return int(self._client.info("stats")["total_connections_received"])


def outcome_of(asked: Asked) -> str:
    """`fresh`, `flagged`, the code of a refusal, or what must not be: `SILENT`, `WRONG`, `LOST`."""
    if asked.status is None:
        return "LOST"
    answer = json.loads(asked.answer)
    if asked.status != 200:
        return str(answer["error"]["code"])
    instance = json.loads(asked.body)["instances"][0]
    driver, number = instance["driver_id"], int(instance["city"].removeprefix("city"))
    missing = {reason["feature_view"] for reason in answer["degraded_reasons"]}
    if not {reason["status"] for reason in answer["degraded_reasons"]} <= {"UNAVAILABLE"}:
        return "WRONG"
    right = score_of(
        None if "driver" in missing else value_of(0, driver),
        None if "driver" in missing else value_of(1, driver),
        None if "city" in missing else value_of(2, number),
        instance["distance"],
    )
    if answer["predictions"][0]["score"] != right:
        return "WRONG" if answer["degraded"] else "SILENT"
    return "flagged" if answer["degraded"] else "fresh"


def _report(form: Form, ledger: Sequence[Asked], instants: _Instants) -> Report:
    phases = ("before", "during", "after")
    report = Report(
        form,
        {phase: [] for phase in phases},
        {phase: Counter() for phase in phases},
        None,
        max(asked.done_s - asked.sent_s for asked in ledger),
        0,
        (0.0, 0.0),
        0,
    )
    first_fresh_s = float("inf")
    unsettled: Counter[str] = Counter()
    for asked in ledger:
        outcome = outcome_of(asked)
        phase = phases[(asked.sent_s >= instants.down_s) + (asked.sent_s >= instants.good_s)]
        report.outcomes[phase][outcome] += 1
        report.latencies_s[phase].append(asked.latency_s)
        if outcome == "fresh" and asked.done_s >= instants.good_s:
            first_fresh_s = min(first_fresh_s, asked.done_s)
        gone = instants.down_s + _AT_ONCE_S <= asked.sent_s and asked.done_s < instants.up_s
        settled = asked.done_s < instants.down_s or (
            asked.sent_s >= instants.good_s + FRESH_WITHIN_S
        )
        if outcome == "fresh" and gone:
            unsettled["fresh while Redis was gone"] += 1
        if outcome != "fresh" and settled:
            unsettled[f"{outcome} while Redis was there"] += 1
    report.violations += [f"{count} answers were {what}" for what, count in unsettled.items()]
    if first_fresh_s < float("inf"):
        report.fresh_after_s = first_fresh_s - instants.good_s
    return report


def _judge(report: Report, load: Load) -> None:
    outcomes = sum(report.outcomes.values(), Counter[str]())
    for outcome in outcomes.keys() - {"fresh", "flagged"}:
        report.violations.append(f"{outcomes[outcome]} answers: {outcome}")
    if report.latest_s > TIMEOUT_MS / 1000 + TOLERATED_S:
        report.violations.append(f"an answer came after {report.latest_s * 1000:.0f} ms")
    if report.fresh_after_s is None or report.fresh_after_s > FRESH_WITHIN_S:
        report.violations.append(f"fresh answers after {report.fresh_after_s} s")
    allowed = 2 + load.outage_s * PROBES_PER_S
    if report.connections > allowed:
        report.violations.append(f"{report.connections} connections, {allowed:.0f} allowed")
    if load.outage_s >= P99_FROM_S:
        before, during, after = (percentile(v, 99) for v in report.latencies_s.values())
        if during > P99_NOISE * max(before, after) + P99_RISE_S:
            report.violations.append(f"p99 during the outage: {during * 1000:.1f} ms")
    if report.memory_mb[1] - report.memory_mb[0] > GROWTH_MB:
        report.violations.append(
            "the server's memory grew from {:.0f} to {:.0f} MB".format(*report.memory_mb)
        )


def percentile(values: Sequence[float], percent: float) -> float:
    """Of no values 0."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))] if ordered else 0.0


def lines(report: Report) -> Iterator[str]:
    yield f"{report.form}:"
    yield f"  {'':8} {'sent':>7} {'p50 ms':>8} {'p99 ms':>8} {'max ms':>8}  outcomes"
    for phase, values in report.latencies_s.items():
        p50, p99, worst = (percentile(values, p) * 1000 for p in (50, 99, 100))
        outcomes = ", ".join(f"{n} {what}" for what, n in sorted(report.outcomes[phase].items()))
        yield f"  {phase:8} {len(values):7} {p50:8.2f} {p99:8.2f} {worst:8.2f}  {outcomes}"
    fresh = "never" if report.fresh_after_s is None else f"{report.fresh_after_s * 1000:.0f} ms"
    early_mb, late_mb = report.memory_mb
    yield f"  fresh after Redis' first good reply: {fresh}"
    yield f"  connections since the outage began: {report.connections}"
    yield f"  server's memory: {early_mb:.1f} MB before, {late_mb:.1f} MB at the end"
    yield f"  server's log lines since the outage began: {report.log_lines}"
    yield from (f"  VIOLATION: {violation}" for violation in report.violations)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--forms", nargs="+", choices=get_args(Form), default=get_args(Form))
    parser.add_argument("--before", type=float, default=10, help="seconds")
    parser.add_argument("--outage", type=float, default=30, help="seconds")
    parser.add_argument("--after", type=float, default=10, help="seconds")
    parser.add_argument("--rate", type=float, default=300, help="requests a second")
    parser.add_argument("--seed", type=int, default=random.randrange(1_000_000))
    arguments = parser.parse_args()
    load = Load(arguments.before, arguments.outage, arguments.after, arguments.rate, arguments.seed)
    print(
        f"Redis is gone for {load.outage_s:g} s at {load.per_s:g} requests/s, each with a time-out "
        f"of {TIMEOUT_MS} ms; seed {load.seed}",
        flush=True,
    )
    broken = False
    for form in arguments.forms:
        report = asyncio.run(prove(form, load))
        print("\n".join(lines(report)), flush=True)
        broken |= bool(report.violations)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
