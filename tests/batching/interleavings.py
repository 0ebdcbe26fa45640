"""Every order in which things can happen to a few requests, each tried on a batcher of its own."""

import asyncio
import gc
import random
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from app.backends.backend import BackendDied
from app.backends.execution_times import ExecutionTimes
from app.batching.batcher import DynamicBatcher
from app.batching.policy import Greedy
from app.batching.waiting import Executed
from app.deadline import Deadline, DeadlineSweep
from app.errors import BackendError, DeadlineExceeded, Overloaded
from app.tensors import Signature, Tensors
from tests.batching.virtual_loop import VirtualLoop, virtual_loop

NEVER_S = 1e6
SWEEP_S = 0.005
BLOCKER = [0.0]
_ALIKE = 9
"""Choices that orders of a group have in common."""
SETTLES = "settles"


class Event(NamedTuple):
    """What happens next: `asks`, `asks_late`, `leaves` and `expires` name a request; `completes`,
    `fails`, `dies` an execution by its number; `waits` moves the time and ends nobody's patience
    but the batcher's."""

    name: str
    which: int = 0


MOVES_TIME = {"expires", "waits"}


@dataclass(frozen=True)
class Setting:
    """What is enumerated: all orders of these events that the batcher allows."""

    rows: tuple[int, ...] = (1, 1, 1)
    """Of each request. Requests of equal rows ask in their order: they differ in nothing else."""
    concurrency: int = 1
    batch_rows: int = 3
    ends: tuple[str, ...] = ("completes", "fails")
    """How an execution may end."""
    asks: tuple[str, ...] = ("asks",)
    """`asks_late`: with a deadline that has passed."""
    occupied: bool = False
    """An execution of somebody else's is under way at first, so that all can queue behind it."""
    hurries: int = 0
    """So many events at most are followed by the next one before the loop has settled: at once,
    after one turn, or after two."""
    step_s: float = 0.01
    """To where the time is moved first, and four times as far each time after it: nobody is refused
    at the door because an execution has been late. From 1 s on the batcher gives up executions that
    nobody waits for, and where there are such `waits` is possible."""

    def moved_s(self, moves: int) -> float:
        """The time after so many moves."""
        return self.step_s * 4.0 ** (moves - 1) if moves else 0.0


def try_all(
    setting: Setting,
    *,
    share: float = 1.0,
    seed: int = 0,
    told: Callable[[int], None] = lambda _: None,
) -> int:
    """Try every order; how many there were. Raises `Violation` at the first that ends wrong.

    With a `share` below 1, of each group of orders that begin alike either all are tried or one;
    `seed` draws that many of the groups. `told` hears now and then how many were tried.
    """
    choices: _Choices | None = _Choices([])
    orders = 0
    while choices is not None:
        with virtual_loop() as loop:
            for _ in range(500):
                _Run(setting, choices, loop).play()
                orders += 1
                drawn = random.Random(f"{seed} {choices.beginning}").random() < share
                choices = choices.following(None if drawn else _ALIKE)
                if choices is None:
                    break
            gc.collect()  # which makes the loop report what nobody looked at
            _demand(not loop.reports, "; ".join(loop.reports))
        told(orders)
    return orders


class Violation(AssertionError):
    """A promise was broken; says after which events."""


class _Choices:
    """A path through the tree of everything that can be chosen; beyond it, always the first."""

    def __init__(self, path: list[tuple[Sequence[Event], int]]) -> None:
        self._path = path
        self._depth = 0

    @property
    def planned(self) -> list[Event]:
        """All events of this path so far; the first choice, which follows, is never `expires`."""
        return [options[at] for options, at in self._path]

    def among(self, options: Sequence[Event]) -> Event:
        if self._depth == len(self._path):
            self._path.append((options, 0))
        known, at = self._path[self._depth]
        if known != options:
            raise Violation(f"the same events led to {options}, before that to {known}")
        self._depth += 1
        return options[at]

    @property
    def beginning(self) -> list[int]:
        return [at for _, at in self._path[:_ALIKE]]

    def following(self, differs_within: int | None = None) -> "_Choices | None":
        """The next path, which differs within so many choices from this one; None after the
        last."""
        path = self._path[:differs_within]
        while path:
            options, at = path.pop()
            if at + 1 < len(options):
                return _Choices([*path, (options, at + 1)])
        return None


@dataclass(eq=False)
class _Execution:
    """One call of `execute`."""

    number: int
    values: list[float]
    end: "asyncio.Future[str]"
    outcome: str = ""


class _SteppedBackend:
    """Doubles `x`; each execution ends when and how the enumeration says."""

    signature = Signature((), ())

    def __init__(self, concurrency: int, forbidden: Callable[[list[float]], str]) -> None:
        self.concurrency = concurrency
        self.executions: list[_Execution] = []
        self.under_way: list[_Execution] = []
        self.faults: list[str] = []
        self._forbidden = forbidden

    async def execute(self, inputs: Tensors, deadline: Deadline) -> Tensors:
        values = inputs["x"][:, 0].tolist()
        end = asyncio.get_running_loop().create_future()
        execution = _Execution(len(self.executions), values, end)
        self.executions.append(execution)
        self.under_way.append(execution)
        if fault := self._forbidden(values):
            self.faults.append(fault)
        if len(self.under_way) > self.concurrency:
            self.faults.append(f"{len(self.under_way)} executions at a time")
        try:
            execution.outcome = await end
        except asyncio.CancelledError:
            execution.outcome = "given up"
            raise
        finally:
            self.under_way.remove(execution)
        if execution.outcome == "fails":
            raise BackendError("failed")
        if execution.outcome == "dies":
            raise BackendDied("died")
        return {"y": inputs["x"] * 2}

    async def warm_up(self, example: Tensors, max_rows: int) -> ExecutionTimes:
        return ExecutionTimes({})

    async def check(self) -> None: ...

    async def close(self) -> None: ...


class _Silent:
    """A `BatchObserver` to whom nothing matters."""

    def began(self) -> None: ...

    def ended(self) -> None: ...

    def executed(self, rows: int, waited_s: float, took_s: float) -> None: ...

    def failed(self, outcome: str) -> None: ...

    def repeated(self) -> None: ...

    def left(self) -> None: ...

    def refused(self, reason: str) -> None: ...


@dataclass(eq=False)
class _Request:
    number: int
    values: list[float]
    deadline_s: float
    task: "asyncio.Task[Executed]"
    joined_s: float | None = None
    """When the loop had first settled since it asked."""
    left: bool = False
    """It was cancelled before it had ended."""

    def outcome(self) -> str:
        if self.task.cancelled():
            return "left"
        error = self.task.exception()
        if error is not None:
            return type(error).__name__
        answer = self.task.result().outputs["y"][:, 0].tolist()
        return "answered" if answer == [2 * value for value in self.values] else f"got {answer}"


@dataclass(eq=False)
class _Run:
    """One order of events, and the ledger that it is held against."""

    setting: Setting
    choices: _Choices
    loop: VirtualLoop
    requests: list[_Request] = field(default_factory=list)
    hurries: int = 0
    moves: int = 0

    def play(self) -> None:
        self.loop.now_s = 0.0
        self.backend = _SteppedBackend(self.setting.concurrency, self._forbidden)
        try:
            self._play()
        except (Violation, AssertionError) as exc:
            events = ", ".join(f"{name} {which}" for name, which in self.choices.planned)
            raise Violation(f"{exc}; {self.setting}; after: {events}") from exc

    def _play(self) -> None:
        stack = AsyncExitStack()
        self.loop.run_until_complete(self._open(stack))
        self.loop.settle()
        if self.setting.occupied:
            self.blocker = self._submit(BLOCKER, NEVER_S)
            self.loop.settle()
        while events := self._possible():
            self._let(self.choices.among(events))
            self._pause()
            if not self._possible():
                self.loop.settle()
        _demand(all(request.task.done() for request in self.requests), "a request hangs")
        for request in self.requests:
            self._judge(request)
        self._check_a_fresh_request()
        self.loop.run_until_complete(stack.aclose())
        _demand(not self.backend.faults, "; ".join(self.backend.faults))
        _demand(not self.loop.reports, "; ".join(self.loop.reports))
        _demand(not asyncio.all_tasks(self.loop), "a task outlived the batcher")

    async def _open(self, stack: AsyncExitStack) -> None:
        sweep = await stack.enter_async_context(DeadlineSweep(SWEEP_S, now_s=self.loop.time))
        self.batcher = await stack.enter_async_context(
            DynamicBatcher(
                self.backend,
                Greedy(self.setting.batch_rows),
                sweep,
                ExecutionTimes({}),
                _Silent(),
                max_batch_rows=self.setting.batch_rows,
                max_queue_rows=100,
                now_s=self.loop.time,
            )
        )

    def _possible(self) -> list[Event]:
        """What can happen now; empty when all is over. The first is never `expires`."""
        asking = len(self.requests) < len(self.setting.rows)
        waiting = [request for request in self.requests if not request.task.done()]
        staying = [request for request in waiting if not request.left]
        under_way = self._ending()
        if not asking and not staying and not under_way:
            return []
        events = [Event(name, len(self.requests)) for name in self.setting.asks if asking]
        events += [Event(n, e.number) for e in under_way for n in self._ends(e)]
        events += [Event("leaves", request.number) for request in staying]
        if any(self._too_late(request) for request in waiting) or (
            self.setting.step_s >= 1 and self._forsaken(under_way)
        ):
            events.append(Event("waits"))
        events += [Event("expires", r.number) for r in staying if r.deadline_s > self.loop.now_s]
        return events

    def _ends(self, execution: _Execution) -> tuple[str, ...]:
        return ("completes",) if execution.values == BLOCKER else self.setting.ends

    def _too_late(self, request: _Request) -> bool:
        """Its deadline had passed before it joined the queue, and there was no sweep since."""
        joined_s = self.loop.now_s if request.joined_s is None else request.joined_s
        return request.deadline_s <= joined_s and self.loop.now_s < joined_s + SWEEP_S

    def _ending(self) -> list[_Execution]:
        return [e for e in self.backend.under_way if not e.end.done()]

    def _forsaken(self, executions: Sequence[_Execution]) -> bool:
        return any(
            all(r.task.done() for r in self.requests if set(r.values) & set(execution.values))
            for execution in executions
            if execution.values != BLOCKER
        )

    def _let(self, event: Event) -> None:
        if event.name in ("asks", "asks_late"):
            self._ask(event.which, late=event.name == "asks_late")
        elif event.name == "leaves":
            self.requests[event.which].left = self.requests[event.which].task.cancel()
        elif event.name in MOVES_TIME:
            self.moves += 1
            self.loop.now_s = self.setting.moved_s(self.moves)
        else:
            self.backend.executions[event.which].end.set_result(event.name)

    def _ask(self, number: int, *, late: bool) -> None:
        values = [10.0 * (number + 1) + row for row in range(self.setting.rows[number])]
        moves = [event for event in self.choices.planned if event.name in MOVES_TIME]
        deadline_s = NEVER_S
        if late:
            deadline_s = self.loop.now_s - 0.001
        elif Event("expires", number) in moves:
            deadline_s = 0.9 * self.setting.moved_s(1 + moves.index(Event("expires", number)))
        task = self._submit(values, deadline_s)
        self.requests.append(_Request(number, values, deadline_s, task))

    def _submit(self, values: list[float], deadline_s: float) -> "asyncio.Task[Executed]":
        inputs = {"x": np.array([[value] for value in values])}
        return self.loop.create_task(self.batcher.submit(inputs, Deadline(deadline_s)))

    def _pause(self) -> None:
        """Let the loop settle, or not yet."""
        pauses = [Event(SETTLES)]
        if self.hurries < self.setting.hurries:
            pauses += [Event("turns", turns) for turns in range(3)]
        pause = self.choices.among(pauses)
        if pause.name == SETTLES:
            self.loop.settle()
            for request in self.requests:
                if request.joined_s is None:
                    request.joined_s = self.loop.now_s
            self._check_the_rest()
            return
        self.hurries += 1
        for _ in range(pause.which):
            self.loop.turn()

    def _check_the_rest(self) -> None:
        """Of a loop that has settled: nobody waits who need not."""
        waiting = [r for r in self.requests if not r.task.done() and not self._too_late(r)]
        for request in waiting:
            _demand(not request.left, f"{request.number} left and still waits")
            _demand(request.deadline_s > self.loop.now_s, f"{request.number} waits too long")
        under_way = len(self.backend.under_way)
        _demand(not waiting or bool(under_way), "all wait for nothing")
        if self.batcher.queued_rows:
            _demand(under_way == self.setting.concurrency, "rows wait beside a free slot")

    def _forbidden(self, values: list[float]) -> str:
        """Why these rows may not be executed now; empty where they may."""
        for request in self.requests:
            if not set(values) & set(request.values):
                continue
            if len(request.values) > self.setting.batch_rows:
                continue  # its other parts leave the queue one turn after it left
            if request.left:
                return f"{request.number} was executed after it left"
            if request.deadline_s <= self.loop.now_s:
                return f"{request.number} was executed after its deadline"
        return ""

    def _judge(self, request: _Request) -> None:
        """Its outcome must be one that the events account for."""
        outcome = request.outcome()
        late = Event("asks_late", request.number) in self.choices.planned
        if request.left:
            allowed = {"left"}
        elif late:
            allowed = {DeadlineExceeded.__name__, Overloaded.__name__}
        elif self._refused(request):
            allowed = {BackendError.__name__, BackendDied.__name__}
        else:
            allowed = {"answered"}
        if request.deadline_s <= self.loop.now_s and not request.left:
            allowed.add(DeadlineExceeded.__name__)
            if self.hurries:  # it may have expired before it began
                allowed.add(Overloaded.__name__)
        _demand(outcome in allowed, f"{request.number}: {outcome}, not {allowed}")

    def _refused(self, request: _Request) -> bool:
        """Whether rows of this request were executed a last time by themselves, and failed."""
        last = {value: e for e in self.backend.executions for value in e.values}
        return any(
            set(last[value].values) <= set(request.values)
            and last[value].outcome in ("fails", "dies")
            for value in request.values
            if value in last
        )

    def _check_a_fresh_request(self) -> None:
        _demand(self.batcher.queued_rows == 0, f"{self.batcher.queued_rows} rows are left behind")
        fresh = _Request(-1, [1.0], NEVER_S, self._submit([1.0], NEVER_S))
        self.loop.settle()
        _demand(len(self._ending()) == 1, "a fresh request is not executed")
        self._ending()[0].end.set_result("completes")
        self.loop.settle()
        _demand(fresh.task.done() and fresh.outcome() == "answered", "a fresh request hangs")


def _demand(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Violation(otherwise)
