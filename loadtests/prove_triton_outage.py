"""Shows what callers get while Triton is gone, and how soon it executes again once it is back.

    python -m loadtests.prove_triton_outage --outage 30

Rows go through the batcher and the backend to a real Triton at a steady rate; it is killed (-9) and
restarted, or stopped (SIGSTOP), without and with a local copy of the model. Every answer is held
against what it must be. Exit status 1 on a violation.
"""

import argparse
import asyncio
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias, get_args

# The process forks to restart Triton while gRPC's threads run; the child only executes.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

import numpy as np

from app.backends import open_backend
from app.backends.backend import Backend, Event
from app.backends.failover import FailoverBackend
from app.batching.batcher import DynamicBatcher
from app.batching.policy import Greedy
from app.contract import TritonOptions
from app.deadline import Deadline, DeadlineSweep
from app.errors import RequestError
from app.tensors import Signature, TensorSpec
from loadtests.prove_redis_outage import percentile
from loadtests.triton_process import TritonProcess
from tests.tiny_models import onnx_model, regression

Form: TypeAlias = Literal["killed", "stopped"]
Protocol: TypeAlias = Literal["grpc", "http"]

SIGNATURE = Signature((TensorSpec("x", "float32", (2,)),), (TensorSpec("y", "float32", (1,)),))
TIMEOUT_S = 1.0
FAIL_WITHIN_S = 0.25
BACK_WITHIN_S = 1.0
TOLERATED_S = 0.1
"""Over what it may take an answer may come later by this much: we share the machine with Triton."""
RETRIED_SHARE, RETRIED_AT_ONCE = 0.1, 5
MAX_BATCH_ROWS = 64


@dataclass(frozen=True)
class Load:
    """How long before, during and after the outage, and how many rows a second."""

    before_s: float
    outage_s: float
    after_s: float
    per_s: float
    seed: int


@dataclass(slots=True)
class Asked:
    """One row and what came of it: `triton`, `local`, `WRONG`, or the code of a refusal. Instants
    are monotonic."""

    sent_s: float
    done_s: float = 0.0
    outcome: str = "LOST"


@dataclass
class Report:
    """What came of one outage."""

    form: Form
    failover: bool
    protocol: Protocol
    waits_s: dict[str, list[float]]
    """How long callers waited, by phase: before, during, after."""
    outcomes: dict[str, Counter[str]]
    back_after_s: float | None
    """From Triton's being ready to its first answer."""
    retries: int
    violations: list[str] = field(default_factory=list)


class _Unobserved:
    def began(self) -> None: ...

    def ended(self) -> None: ...

    def executed(self, rows: int, waited_s: float, took_s: float) -> None: ...
    def failed(self, outcome: str) -> None: ...
    def repeated(self) -> None: ...
    def left(self) -> None: ...
    def refused(self, reason: str) -> None: ...


async def prove(form: Form, failover: bool, protocol: Protocol, load: Load) -> Report:
    """One Triton, one outage."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model = folder / "published" / "regression" / "1" / "model.onnx"
        model.parent.mkdir(parents=True)
        model.write_bytes(onnx_model("regression").SerializeToString())
        process = TritonProcess(folder / "triton")
        process.put("regression", model.read_bytes())
        stack.enter_context(process)
        options = {"use": "triton", "protocol": protocol, "endpoints": [process.endpoint(protocol)]}
        if failover:
            options["failover"] = "onnx"
        events: list[Event] = []
        backend = await open_backend(
            TritonOptions.model_validate(options), model, SIGNATURE, events.append
        )
        stack.push_async_callback(backend.close)
        times = await backend.warm_up({"x": np.ones((1, 2), np.float32)}, MAX_BATCH_ROWS)
        batcher = await stack.enter_async_context(
            DynamicBatcher(
                backend,
                Greedy(MAX_BATCH_ROWS),
                await stack.enter_async_context(DeadlineSweep()),
                times,
                _Unobserved(),
                max_batch_rows=MAX_BATCH_ROWS,
                max_queue_rows=16_384,
            )
        )
        asking = asyncio.create_task(_ask_steadily(batcher, backend, load))
        await asyncio.sleep(load.before_s)
        down_s = time.monotonic()
        process.kill() if form == "killed" else process.pause()
        await asyncio.sleep(load.outage_s)
        process.launch() if form == "killed" else process.resume()
        good_s = await asyncio.to_thread(process.ready)
        await asyncio.sleep(load.after_s)
        asking.cancel()
        ledger = await asking
        report = _report(form, failover, protocol, ledger, down_s, good_s)
        report.retries = events.count("sent_again")
    _judge(report, ledger, down_s, good_s)
    return report


async def _ask_steadily(batcher: DynamicBatcher, backend: Backend, load: Load) -> list[Asked]:
    """One row at random instants (Poisson) until cancelled; then what came of each."""
    rng = random.Random(load.seed)
    ledger: list[Asked] = []
    asking: set[asyncio.Task[None]] = set()
    at_s = time.monotonic()
    try:
        while True:
            at_s += rng.expovariate(load.per_s)
            await asyncio.sleep(at_s - time.monotonic())
            asked = Asked(time.monotonic())
            ledger.append(asked)
            row = (rng.randrange(1000), rng.randrange(1000))
            task = asyncio.create_task(_ask(batcher, backend, row, asked))
            asking.add(task)
            task.add_done_callback(asking.discard)
    except asyncio.CancelledError:
        await asyncio.gather(*asking)
        return ledger


async def _ask(
    batcher: DynamicBatcher, backend: Backend, row: tuple[int, int], asked: Asked
) -> None:
    try:
        execution = await batcher.submit(
            {"x": np.array([row], np.float32)}, Deadline.after(TIMEOUT_S)
        )
    except RequestError as exc:
        asked.outcome = exc.code
    else:
        local = isinstance(backend, FailoverBackend) and backend.on_fallback
        asked.outcome = "local" if local else "triton"
        if execution.outputs["y"].tolist() != [[regression(*row)]]:
            asked.outcome = "WRONG"
    asked.done_s = time.monotonic()


def _report(
    form: Form,
    failover: bool,
    protocol: Protocol,
    ledger: Sequence[Asked],
    down_s: float,
    good_s: float,
) -> Report:
    phases = ("before", "during", "after")
    report = Report(
        form,
        failover,
        protocol,
        {phase: [] for phase in phases},
        {phase: Counter() for phase in phases},
        None,
        0,
    )
    for asked in ledger:
        phase = phases[(asked.done_s >= down_s) + (asked.sent_s >= good_s)]
        report.outcomes[phase][asked.outcome] += 1
        report.waits_s[phase].append(asked.done_s - asked.sent_s)
    back = (a.done_s for a in ledger if a.outcome == "triton" and a.done_s >= good_s)
    first_s = min(back, default=None)
    report.back_after_s = None if first_s is None else first_s - good_s
    return report


def _judge(report: Report, ledger: Sequence[Asked], down_s: float, good_s: float) -> None:
    expected = {"triton", "local"} if report.failover else {"triton", "model_not_ready"}
    outcomes = sum(report.outcomes.values(), Counter[str]())
    for outcome in outcomes.keys() - expected:
        report.violations.append(f"{outcomes[outcome]} answers: {outcome}")
    settled = [a for a in ledger if a.done_s < down_s or a.sent_s >= good_s + BACK_WITHIN_S]
    elsewhere = sum(asked.outcome != "triton" for asked in settled)
    if elsewhere:
        report.violations.append(f"{elsewhere} rows were not Triton's while it was there")
    worst_s = max(report.waits_s["during"], default=0.0)
    if worst_s > FAIL_WITHIN_S + TOLERATED_S:
        report.violations.append(f"a caller waited {worst_s * 1000:.0f} ms during the outage")
    if report.back_after_s is None or report.back_after_s > BACK_WITHIN_S:
        report.violations.append(f"back after {report.back_after_s} s")
    allowed = RETRIED_AT_ONCE + RETRIED_SHARE * len(ledger)
    if report.retries > allowed:
        report.violations.append(f"{report.retries} executions were sent again")


def lines(report: Report) -> Iterator[str]:
    local = "with a local copy" if report.failover else "without a local copy"
    yield f"{report.form}, {report.protocol}, {local}:"
    yield f"  {'':8} {'sent':>7} {'p50 ms':>8} {'p99 ms':>8} {'max ms':>8}  outcomes"
    for phase, values in report.waits_s.items():
        p50, p99, worst = (percentile(values, p) * 1000 for p in (50, 99, 100))
        outcomes = ", ".join(f"{n} {what}" for what, n in sorted(report.outcomes[phase].items()))
        yield f"  {phase:8} {len(values):7} {p50:8.2f} {p99:8.2f} {worst:8.2f}  {outcomes}"
    back = "never" if report.back_after_s is None else f"{report.back_after_s * 1000:.0f} ms"
    yield f"  Triton's first answer after it was ready: {back}"
    yield f"  executions that were sent again: {report.retries}"
    yield from (f"  VIOLATION: {violation}" for violation in report.violations)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--forms", nargs="+", choices=get_args(Form), default=get_args(Form))
    parser.add_argument("--protocol", choices=get_args(Protocol), default="grpc")
    parser.add_argument("--before", type=float, default=10, help="seconds")
    parser.add_argument("--outage", type=float, default=30, help="seconds")
    parser.add_argument("--after", type=float, default=10, help="seconds")
    parser.add_argument("--rate", type=float, default=300, help="rows a second")
    parser.add_argument("--seed", type=int, default=random.randrange(1_000_000))
    arguments = parser.parse_args()
    load = Load(arguments.before, arguments.outage, arguments.after, arguments.rate, arguments.seed)
    print(
        f"Triton is gone for {load.outage_s:g} s at {load.per_s:g} rows/s, each with a time-out of "
        f"{TIMEOUT_S * 1000:g} ms; seed {load.seed}",
        flush=True,
    )
    broken = False
    for form in arguments.forms:
        for failover in (False, True):
            report = asyncio.run(prove(form, failover, arguments.protocol, load))
            print("\n".join(lines(report)), flush=True)
            broken |= bool(report.violations)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
