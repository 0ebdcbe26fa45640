"""Shows that each caller of the batcher gets its own answer, once, whatever happens meanwhile.

    python -m loadtests.prove_batcher --operations 1000000
    python -m loadtests.prove_batcher --poison 0.01
    python -m loadtests.prove_batcher --orders

Callers with rows of many sizes, shapes, priorities and deadlines share a batcher; some leave at any
turn of the loop; the backend refuses rows, fails, dies, hangs and returns too few. Time is virtual,
so that a run repeats exactly. `--orders` tries every order of events of three requests instead.
Exit status 1 on a violation.
"""

import argparse
import asyncio
import gc
import logging
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from app.backends.backend import BackendDied
from app.backends.execution_times import ExecutionTimes
from app.batching.batcher import DynamicBatcher
from app.batching.policy import BatchPolicy, Greedy
from app.batching.priority import Priority
from app.batching.waiting import Executed
from app.deadline import Deadline, DeadlineSweep
from app.errors import (
    BackendError,
    DeadlineExceeded,
    ModelNotReady,
    Overloaded,
    RequestError,
)
from app.tensors import Signature, Tensors, TensorSpec, row_count
from loadtests.prove_no_foreign_values import resident_mb
from tests.batching.interleavings import Setting, try_all
from tests.batching.virtual_loop import EverybodyWaits, VirtualLoop, virtual_loop

SWEEP_S = 0.005
MAX_BATCH_ROWS = 32
MEMORY_GROWTH_MB = 16.0
"""From a tenth of the operations to the last one."""
INNOCENTS_ANSWERED = 0.9999
REPEATED = 0.05
"""Of all executions, those that repeat rows, beside `FIRST_REPEATED` of each of those that may be
under way at a time."""
FIRST_REPEATED = 32
WELL, POISON, DEADLY = 0, 1, 2
"""What the `mark` of a row does to its execution: nothing, fails it, kills what executes it."""


@dataclass(frozen=True)
class Mishaps:
    """How often executions go wrong whatever their rows are, as shares."""

    fails: float = 0.0
    dies: float = 0.0
    defect: float = 0.0
    loses_a_row: float = 0.0
    adds_a_row: float = 0.0
    hangs: float = 0.0
    not_ready: float = 0.0
    slow: float = 0.0
    at_once: float = 0.0

    def draw(self, rng: random.Random) -> str:
        at = rng.random()
        for name, share in vars(self).items():
            at -= share
            if at < 0:
                return str(name)
        return ""


ALL_MISHAPS = Mishaps(
    fails=0.02,
    dies=0.01,
    defect=0.01,
    loses_a_row=0.01,
    adds_a_row=0.005,
    hangs=0.0002,
    not_ready=0.01,
    slow=0.02,
    at_once=0.3,
)


@dataclass(frozen=True)
class Plan:
    """What the callers do, as shares of their requests, and what the backend does."""

    operations: int
    seed: int
    callers: int = 64
    concurrency: int = 2
    policy: BatchPolicy = field(default_factory=lambda: Greedy(MAX_BATCH_ROWS))
    large: float = 0.02
    """Of up to 200 rows."""
    several: float = 0.4
    """Of up to 8 rows; the others have one."""
    shapes: int = 4
    poison: float = 0.01
    """Of all rows."""
    deadly: float = 0.002
    cancelled: float = 0.2
    hasty: float = 0.1
    """With a deadline that may pass before an answer."""
    mishaps: Mishaps = ALL_MISHAPS


@dataclass
class Summary:
    """The ledger of all operations, and what must not be."""

    operations: int = 0
    rows: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    answered_rows: int = 0
    innocent_rows: int = 0
    """Of requests without a marked row that got an answer or an error of the backend."""
    innocent_answered: int = 0
    executions: int = 0
    executed_rows: int = 0
    repeated: int = 0
    events: Counter[str] = field(default_factory=Counter)
    virtual_s: float = 0.0
    duration_s: float = 0.0
    memory_mb: list[float] = field(default_factory=list)
    """Resident, as it went."""
    violations: list[str] = field(default_factory=list)

    @property
    def innocent_share(self) -> float:
        return self.innocent_answered / max(self.innocent_rows, 1)

    @property
    def repeated_share(self) -> float:
        return self.repeated / max(self.executions, 1)

    def lines(self) -> Iterator[str]:
        yield (
            f"{self.operations:,} operations, {self.rows:,} rows in {self.duration_s:.0f} s, which "
            f"were {self.virtual_s:.0f} s to the batcher"
        )
        yield ", ".join(f"{n:,} {name}" for name, n in self.outcomes.most_common())
        yield (
            f"{self.executions:,} executions of {self.executed_rows / self.executions:.1f} rows, "
            f"{self.repeated_share:.2%} of which repeat rows; "
            f"{self.answered_rows / self.virtual_s:,.0f} rows answered a second; "
            f"{self.outcomes['left'] / self.virtual_s:,.0f} cancellations a second"
        )
        yield "events: " + ", ".join(f"{n:,} {name}" for name, n in self.events.most_common())
        yield (
            f"innocent rows answered: {self.innocent_answered:,} of {self.innocent_rows:,} "
            f"({self.innocent_share:.4%})"
        )
        yield f"memory: {self.memory_mb[0]:.1f} MB early, {self.memory_mb[-1]:.1f} MB at the end"
        yield f"violations: {len(self.violations)}"
        yield from self.violations[:20]


def prove(plan: Plan, *, told: bool = False) -> Summary:
    """Carry out the plan on a loop of its own. `told`: print progress."""
    summary = Summary()
    started_s = time.monotonic()
    with virtual_loop() as loop:
        try:
            loop.run_until_complete(_run(plan, summary, loop, told=told))
        except EverybodyWaits:
            summary.violations.append("somebody waits for what never comes")
        gc.collect()  # which makes the loop report what nobody looked at
        summary.violations += loop.reports
        summary.virtual_s = loop.now_s
    summary.duration_s = time.monotonic() - started_s
    if sum(summary.outcomes.values()) != summary.operations:
        summary.violations.append("an operation has no outcome, or more than one")
    if summary.memory_mb[-1] - summary.memory_mb[0] > MEMORY_GROWTH_MB:
        summary.violations.append("memory grew")
    return summary


async def _run(plan: Plan, summary: Summary, loop: VirtualLoop, *, told: bool) -> None:
    proof = _Proof(plan, summary, loop, told=told)
    async with (
        DeadlineSweep(SWEEP_S, now_s=loop.time) as sweep,
        DynamicBatcher(
            proof,
            plan.policy,
            sweep,
            ExecutionTimes({}, unknown_s=0.001),
            _Observer(summary),
            max_batch_rows=MAX_BATCH_ROWS,
            max_queue_rows=1024,
            now_s=loop.time,
        ) as batcher,
    ):
        await asyncio.gather(*(proof.call(batcher) for _ in range(plan.callers)))
        if batcher.queued_rows:
            summary.violations.append(f"{batcher.queued_rows} rows stayed in the queue")
    if len(asyncio.all_tasks()) > 1:
        summary.violations.append("a task outlived the batcher")


class _Observer:
    """Counts what the batcher reports."""

    def __init__(self, summary: Summary) -> None:
        self._summary = summary

    def began(self) -> None: ...

    def ended(self) -> None: ...

    def executed(self, rows: int, waited_s: float, took_s: float) -> None:
        self._summary.events["succeeded"] += 1

    def failed(self, outcome: str) -> None:
        self._summary.events[outcome] += 1

    def repeated(self) -> None:
        self._summary.repeated += 1

    def left(self) -> None:
        self._summary.events["left the queue"] += 1

    def refused(self, reason: str) -> None:
        self._summary.events[f"refused for {reason}"] += 1


@dataclass(eq=False, slots=True)
class _Request:
    rows: int
    marked: bool
    began_s: float
    deadline_s: float
    ended_s: float = 0.0
    left: bool = False
    may_get: set[str] = field(default_factory=set)
    """Errors that executions of its rows account for."""


class _Proof:
    """The callers, and the backend, which knows whose rows it executes."""

    signature = Signature((TensorSpec("x", "float64", (-1,)), TensorSpec("mark", "int64", ())), ())

    def __init__(self, plan: Plan, summary: Summary, loop: VirtualLoop, *, told: bool) -> None:
        self.concurrency = plan.concurrency
        self._plan = plan
        self._summary = summary
        self._loop = loop
        self._told = told
        self._random = random.Random(plan.seed)
        self._requests: dict[int, _Request] = {}
        self._under_way = 0

    async def call(self, batcher: DynamicBatcher) -> None:
        """One request after the other until there were enough."""
        while self._summary.operations < self._plan.operations:
            self._summary.operations += 1
            self._keep_memory()
            await self._one(batcher, self._summary.operations)

    async def _one(self, batcher: DynamicBatcher, number: int) -> None:
        rng, plan = self._random, self._plan
        inputs, request = self._drawn(number)
        self._requests[number] = request
        self._summary.rows += request.rows
        asking = asyncio.create_task(
            batcher.submit(
                inputs,
                Deadline(request.deadline_s),
                priority=rng.choice(list(Priority)),
                caller=f"caller {rng.randrange(1000)}" if rng.random() < 0.9 else "",
            )
        )
        asking.add_done_callback(lambda _: self._ended(request))
        if rng.random() < plan.cancelled:
            await self._turns_or_time()
            request.left = asking.cancel()
        await asyncio.wait({asking})
        del self._requests[number]
        outcome = self._outcome(asking, inputs, request)
        self._summary.outcomes[outcome] += 1
        if outcome == Overloaded.__name__:
            await asyncio.sleep(rng.uniform(0.001, 0.1))  # or refusals would use up the operations

    def _ended(self, request: _Request) -> None:
        request.ended_s = self._loop.now_s

    async def _turns_or_time(self) -> None:
        if self._random.random() < 0.5:
            for _ in range(self._random.randrange(50)):
                await asyncio.sleep(0)
        else:
            await asyncio.sleep(self._random.uniform(0, 0.02))

    def _drawn(self, number: int) -> tuple[Tensors, _Request]:
        rng, plan = self._random, self._plan
        kind = rng.random()
        rows = 1
        if kind < plan.large:
            rows = rng.randint(1, 200)
        elif kind < plan.large + plan.several:
            rows = rng.randint(1, 8)
        width = rng.randint(1, plan.shapes) if rng.random() < 0.5 else 1
        # Each value is there once: it says whose row it is, and which of its columns.
        first = number * 200.0 * 64
        x = first + np.arange(rows)[:, None] * 64.0 + np.arange(width)
        mark = np.full(rows, WELL)
        for row in range(rows):
            at = rng.random()
            if at < plan.poison:
                mark[row] = POISON
            elif at < plan.poison + plan.deadly:
                mark[row] = DEADLY
        hasty = rng.random() < plan.hasty
        timeout_s = rng.uniform(-0.001, 0.01) if hasty else rng.uniform(0.2, 2.0)
        now_s = self._loop.now_s
        request = _Request(rows, bool(mark.any()), now_s, now_s + timeout_s)
        return {"x": x, "mark": mark}, request

    def _outcome(self, asking: "asyncio.Task[Executed]", inputs: Tensors, request: _Request) -> str:
        """What became of it; a violation where nothing accounts for that."""
        overdue_s = request.ended_s - max(request.deadline_s, request.began_s)
        if overdue_s > SWEEP_S + 1e-6:
            self._violated(f"an answer came {overdue_s:.3f} s after the deadline")
        if asking.cancelled():
            if not request.left:
                self._violated("cancelled without a reason")
            return "left"
        if request.left:
            self._violated("a cancellation was swallowed")
        error = asking.exception()
        backends = isinstance(error, BackendError)
        if not request.marked and (error is None or backends):
            self._summary.innocent_rows += request.rows
            self._summary.innocent_answered += 0 if backends else request.rows
        if error is None:
            outputs = asking.result().outputs
            self._summary.answered_rows += request.rows
            if not np.array_equal(outputs["y"], 2 * inputs["x"] + 1):
                self._violated(f"got {outputs['y'].tolist()} for {inputs['x'].tolist()}")
            if request.marked:
                self._violated("rows that are refused were answered")
            return "answered"
        name = type(error).__name__
        # The batcher refuses sooner what waits and could not be executed in time.
        expired = request.deadline_s <= self._loop.now_s or "could not be executed" in str(error)
        if not (
            name in request.may_get
            or (name == DeadlineExceeded.__name__ and expired)
            or name == Overloaded.__name__
        ):
            self._violated(f"{error!r} without a reason")
        return name

    def _violated(self, what: str) -> None:
        self._summary.violations.append(f"at {self._loop.now_s:.4f} s: {what}")

    def _keep_memory(self) -> None:
        tenth = max(self._plan.operations // 10, 1)
        if self._summary.operations % tenth == 0:
            self._summary.memory_mb.append(resident_mb("self"))
            if self._told:
                print(
                    f"  {self._summary.operations:>9,} operations, "
                    f"{self._summary.memory_mb[-1]:.1f} MB, "
                    f"{len(self._summary.violations)} violations",
                    flush=True,
                )

    async def execute(self, inputs: Tensors, deadline: Deadline) -> Tensors:
        requests = self._requests_of(inputs)
        rows = row_count(inputs)
        self._summary.executions += 1
        self._summary.executed_rows += rows
        self._under_way += 1
        if self._under_way > self.concurrency:
            self._violated(f"{self._under_way} executions at a time")
        if rows > MAX_BATCH_ROWS:
            self._violated(f"{rows} rows in a batch")
        for request in requests:
            if request.rows <= MAX_BATCH_ROWS and request.left:
                self._violated("executed after its caller left")
            if request.rows <= MAX_BATCH_ROWS and request.deadline_s <= self._loop.now_s:
                self._violated("executed after its deadline")
        try:
            return await self._outputs(inputs, rows, requests)
        finally:
            self._under_way -= 1

    def _requests_of(self, inputs: Tensors) -> list[_Request]:
        numbers = set((inputs["x"][:, 0] // (200 * 64)).astype(int).tolist())
        requests = [self._requests[number] for number in numbers if number in self._requests]
        if len(requests) < len(numbers):
            self._violated("rows were executed whose caller has its answer")
        return requests

    async def _outputs(self, inputs: Tensors, rows: int, requests: Sequence[_Request]) -> Tensors:
        mishap = self._plan.mishaps.draw(self._random)
        if mishap != "at_once":
            seconds = (0.001 + 0.00005 * rows) * self._random.uniform(0.8, 1.2)
            await asyncio.sleep(seconds * (50 if mishap == "slow" else 1))
        y = 2 * inputs["x"] + 1
        error: Exception | None = None
        if (inputs["mark"] == DEADLY).any() or mishap == "dies":
            error = BackendDied("died")
        elif (inputs["mark"] == POISON).any() or mishap == "fails":
            error = BackendError("failed")
        elif mishap == "not_ready":
            error = ModelNotReady("not loaded")
        elif mishap == "defect":
            error = ZeroDivisionError("a defect")
        elif mishap == "loses_a_row":
            y = y[1:]
        elif mishap == "adds_a_row":
            y = np.concatenate([y, y[:1]])
        elif mishap == "hangs":
            await self._loop.create_future()
        if error is not None or len(y) != rows:
            refusal = type(error) if isinstance(error, RequestError) else BackendError
            for request in requests:
                request.may_get.add(refusal.__name__)
        if error is not None:
            raise error
        return {"y": y}

    async def warm_up(self, example: Tensors, max_rows: int) -> ExecutionTimes:
        return ExecutionTimes({})

    async def check(self) -> None: ...

    async def close(self) -> None: ...


def without_mishaps(operations: int, seed: int, *, poison: float, cancelled: float = 0.0) -> Plan:
    """Callers of few rows, and a backend that only poison makes fail."""
    return Plan(
        operations,
        seed,
        large=0.0,
        several=0.3,
        shapes=1,
        poison=poison,
        deadly=0.0,
        cancelled=cancelled,
        hasty=0.0,
        mishaps=Mishaps(),
    )


def _isolation(plan: Plan) -> Summary:
    """Says what poison does to the others, and judges that."""
    summary = prove(plan)
    if summary.innocent_share < INNOCENTS_ANSWERED:
        summary.violations.append(f"{summary.innocent_share:.4%} of innocent rows were answered")
    first = FIRST_REPEATED * plan.concurrency
    if summary.repeated > REPEATED * summary.executions + first:
        summary.violations.append(f"{summary.repeated_share:.2%} of executions repeat rows")
    return summary


def try_orders() -> int:
    """Every order of events of three requests; how many there were."""
    ends = ("completes", "fails", "dies")
    settings = [Setting(concurrency=c, batch_rows=rows) for c in (1, 2) for rows in (1, 2, 3)]
    settings += [Setting(ends=ends), Setting(occupied=True), Setting(step_s=10.0)]
    settings += [Setting(asks=("asks", "asks_late")), Setting(rows=(2, 1, 1), batch_rows=1)]
    total = 0
    for setting in settings:
        orders = try_all(setting)
        total += orders
        print(f"{orders:>9,} orders: {setting}", flush=True)
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--operations", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=random.randrange(1_000_000))
    parser.add_argument("--poison", type=float, help="the share of poisonous rows, and no mishaps")
    parser.add_argument("--cancelled", type=float, default=0.0, help="with --poison")
    parser.add_argument("--concurrency", type=int, default=2)
    parser.add_argument("--orders", action="store_true", help="every order of three requests")
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)  # each execution that fails would be logged
    if arguments.orders:
        print(f"{try_orders():,} orders, and each request ended once, as it should")
        return 0
    print(f"{arguments.operations:,} operations, seed {arguments.seed}", flush=True)
    if arguments.poison is None:
        plan = Plan(arguments.operations, arguments.seed, concurrency=arguments.concurrency)
        summary = prove(plan, told=True)
    else:
        plan = without_mishaps(
            arguments.operations,
            arguments.seed,
            poison=arguments.poison,
            cancelled=arguments.cancelled,
        )
        summary = _isolation(replace(plan, concurrency=arguments.concurrency))
    print("\n".join(summary.lines()))
    return 1 if summary.violations else 0


if __name__ == "__main__":
    sys.exit(main())
