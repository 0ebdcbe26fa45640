"""Shows that operators who load, unload and roll back at the same time cannot harm a prediction.

    python -m loadtests.prove_admin_races --clients 32 --calls 200 --workers 2

Every call succeeds or is refused as a conflict; every prediction is right and of a version that may
have served; generations follow each other without a gap; at the end all workers agree with the
state. With `--kill-every S` a worker is killed (-9) from time to time: only what it had under way
is lost. Exit status 1 on a violation.
"""

import argparse
import asyncio
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import uvloop

from loadtests.checked_load import CheckedLoad
from loadtests.oracle_model import MODEL, publish_next, write_contract
from loadtests.prove_redis_outage import percentile
from loadtests.prove_reload import oracle_load, point_current
from loadtests.redis_process import RedisProcess
from loadtests.service_process import Operator, Reply, ServiceProcess, serving
from loadtests.spells import CONVERGES_WITHIN_S, Change
from loadtests.spells import judge as judge_versions
from loadtests.state_history import StateHistory

Verb: TypeAlias = Literal["load", "unload", "rollback"]

CONNECTIONS = 32
_WEIGHTS: Mapping[Verb, int] = {"load": 4, "unload": 3, "rollback": 3}
_GIVEN_GENERATION = 0.3
"""The share of calls that are meant for the generation that their client has last heard of."""
_BEGIN_AGAIN_S = 0.1
_LOOK_EVERY_S = 0.02
_AT_REST_S = 0.5
_AGREED_WITHIN_S = 5.0
_RESTARTED_WITHIN_S = 30.0
_CLOCKS_APART_S = 0.01
_PATH = f"/v1/models/{MODEL}"


@dataclass(frozen=True)
class Plan:
    """Who calls how often."""

    clients: int = 32
    calls: int = 200
    versions: int = 6
    workers: int = 2
    with_redis: bool = True
    rate: float = 500
    """Predictions a second."""
    think_s: float = 0.3
    """What a client waits between two calls, at most."""
    kill_every_s: float = 0.0
    seed: int = 1


class Call(NamedTuple):
    """One that was answered, by which worker."""

    verb: Verb
    reply: Reply
    worker: int


@dataclass
class Report:
    """What came of it."""

    outcomes: Counter[tuple[Verb, str]] = field(default_factory=Counter)
    call_s: dict[str, list[float]] = field(default_factory=dict)
    """By verb and outcome."""
    answers: int = 0
    lost_answers: int = 0
    killed: int = 0
    generations: int = 0
    changes: int = 0
    """Of the version that serves."""
    late_s: list[float] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)


class Races:
    """Clients at one server, and what they have seen."""

    def __init__(self, plan: Plan, service: ServiceProcess, history: StateHistory | None) -> None:
        self.report = Report()
        self._history = history
        self.calls: list[Call] = []
        self._plan = plan
        self._service = service
        self._heard = 0
        self._killed_at_s: list[float] = []
        self._whose: dict[int, int] = {}
        self._over = asyncio.Event()

    async def run(self) -> None:
        plan = self._plan
        async with AsyncExitStack() as stack:
            load = await stack.enter_async_context(
                oracle_load(self._service.port, "small", CONNECTIONS, plan.seed)
            )
            asking = asyncio.create_task(load.open_loop(plan.rate, self._over.is_set))
            killing = asyncio.create_task(self._kill(load))
            clients = [self._client(random.Random(f"{plan.seed} {n}")) for n in range(plan.clients)]
            await asyncio.gather(*clients)
            killing.cancel()
            await self._agreed(load)
            await self._each_can_load()
            await self._agreed(load)
            self._over.set()
            await asking
            await load.ask_each()
            self._learn_ports(load)
        self._account(load)

    async def _client(self, rng: random.Random) -> None:
        calls = 0
        while calls < self._plan.calls:
            with suppress(OSError, asyncio.IncompleteReadError):
                async with Operator(self._service.port) as operator:
                    self._whose[operator.port] = await operator.worker(self._service)
                    while calls < self._plan.calls:
                        calls += 1
                        await self._call(operator, rng)
                        await asyncio.sleep(rng.uniform(0, self._plan.think_s))
            if calls < self._plan.calls:
                await asyncio.sleep(_BEGIN_AGAIN_S)

    async def _call(self, operator: Operator, rng: random.Random) -> None:
        """Raises `OSError` or `IncompleteReadError` where the worker is killed meanwhile."""
        verb = rng.choices(list(_WEIGHTS), list(_WEIGHTS.values()))[0]
        document: dict[str, Any] = {}
        if verb != "rollback":
            document["version"] = str(rng.randint(1, self._plan.versions))
        if rng.random() < _GIVEN_GENERATION:
            document["generation"] = self._heard
        try:
            reply = await operator.call("POST", f"{_PATH}:{verb}", document)
        except (OSError, asyncio.IncompleteReadError):
            self.report.outcomes[verb, "lost"] += 1
            if not self._was_killed_just_now():
                self._violated(f"a connection was lost in {verb} {document}, nobody was killed")
            raise
        self.calls.append(Call(verb, reply, self._whose[operator.port]))
        outcome = str(reply.status)
        if reply.status == 200:
            self._heard = max(self._heard, reply.document["generation"])
            outcome = "changed" if reply.document["changed"] else "unchanged"
        elif reply.status != 409 or reply.document["error"]["code"] != "conflict":
            self._violated(f"{verb} {document}: {reply.status} {reply.document}")
        self.report.outcomes[verb, outcome] += 1
        took_s = reply.answered_s - reply.asked_s
        self.report.call_s.setdefault(f"{verb} {outcome}", []).append(took_s)

    async def _kill(self, load: CheckedLoad) -> None:
        """A worker, now and then; the next one only once another serves in its place."""
        if not self._plan.kill_every_s:
            return
        rng = random.Random(self._plan.seed)
        while True:
            await asyncio.sleep(self._plan.kill_every_s)
            self._learn_ports(load)
            worker = rng.choice(self._service.workers())
            self._killed_at_s.append(time.monotonic())
            self.report.killed += 1
            os.kill(worker, signal.SIGKILL)
            until_s = time.monotonic() + _RESTARTED_WITHIN_S
            while not await self._is_replaced(worker):
                if time.monotonic() > until_s:
                    self._violated(f"worker {worker} was killed, and not replaced")
                    return
                await asyncio.sleep(_BEGIN_AGAIN_S)

    async def _is_replaced(self, worker: int) -> bool:
        present = self._service.workers()
        if worker in present or len(present) < self._plan.workers:
            return False
        return len(await self._ask_each("GET", _PATH, within_s=0.5)) == self._plan.workers

    def _was_killed_just_now(self) -> bool:
        return bool(self._killed_at_s) and time.monotonic() - self._killed_at_s[-1] < 5

    def _learn_ports(self, load: CheckedLoad) -> None:
        self._whose |= self._service.workers_by_port(load.ports())

    async def _agreed(self, load: CheckedLoad) -> None:
        """Every worker says the same about the model, and what it says of the others holds."""
        until_s = time.monotonic() + _AGREED_WITHIN_S
        while True:
            replies = await self._ask_each("GET", _PATH)
            documents = {worker: reply.document for worker, reply in replies.items()}
            disagreement = _disagreement(documents, self._plan.workers)
            if not disagreement:
                break
            if time.monotonic() > until_s:
                self._violated(f"at the end {disagreement}: {documents}")
                return
            await asyncio.sleep(_LOOK_EVERY_S)
        (champion,) = {document["version"] for document in documents.values()}
        (generation,) = {document["release"]["generation"] for document in documents.values()}
        self.report.generations = generation
        await asyncio.sleep(_AT_REST_S)
        seen = len(load.ledger)
        await asyncio.sleep(_AT_REST_S)
        named = set(load.ledger.versions[seen:])
        if named != {int(champion)}:
            self._violated(f"at the end version {champion} serves, and {named} answer")

    async def _each_can_load(self) -> None:
        """Nothing that was left behind keeps a worker from it."""
        for version in (1, 2):
            load = ("POST", f"{_PATH}:load", {"version": str(version)})
            for worker, reply in (await self._ask_each(*load)).items():
                self.calls.append(Call("load", reply, worker))
                if reply.status != 200:
                    self._violated(f"at rest, a load by worker {worker}: {reply.document}")

    async def _ask_each(
        self, method: str, path: str, document: Any = None, within_s: float = _AGREED_WITHIN_S
    ) -> dict[int, Reply]:
        """What each worker answers, as far as connections come to each of them."""
        replies: dict[int, Reply] = {}
        until_s = time.monotonic() + within_s
        while len(replies) < self._plan.workers and time.monotonic() < until_s:
            with suppress(OSError, asyncio.IncompleteReadError, TimeoutError):
                async with asyncio.timeout(within_s), Operator(self._service.port) as operator:
                    worker = await operator.worker(self._service)
                    if worker not in replies:
                        replies[worker] = await operator.call(method, path, document)
        return replies

    def _account(self, load: CheckedLoad) -> None:
        report, ledger = self.report, load.ledger
        report.answers = len(ledger)
        lost = ledger.faults.pop("lost", 0)
        report.lost_answers = lost
        if lost > CONNECTIONS * report.killed:
            self._violated(f"{lost} predictions were lost with {report.killed} killed workers")
        for kind, count in ledger.faults.items():
            self._violated(f"{count} predictions: {kind}")
        if ledger.faults:
            report.violations += ledger.samples
        told = list(self._changes_told())
        changes = told if self._history is None else list(self._changes_seen(self._history))
        if not report.killed:  # else some were made and never told
            if self._history is not None and len(told) != len(changes):
                self._violated(f"{len(told)} changes were told, {len(changes)} made")
            changes = told
        report.changes = len(changes)
        verdict = judge_versions(ledger.in_order_of_sending(), 1, changes, self._whose)
        for kind, count in verdict.unlawful.items():
            self._violated(f"{count} predictions {kind}")
        report.violations += verdict.samples
        report.late_s = [verdict.late_s.get(number, 0.0) for number in range(len(changes))]

    def _changes_seen(self, history: StateHistory) -> Iterator[Change]:
        """What Redis has seen: another worker may lag for a second."""
        for gap in history.gaps():
            self._violated(f"generation {gap}")
        if self.report.generations != history.seen[-1].generation:
            self._violated(f"the latest generation is {history.seen[-1].generation}")
        version = 1
        for seen in history.seen:
            if seen.champion is not None and seen.champion != version:
                version = seen.champion
                yield Change(version, seen.at_s - _CLOCKS_APART_S, seen.at_s + CONVERGES_WITHIN_S)

    def _changes_told(self) -> Iterator[Change]:
        """What the successful calls have changed, in the order of their generations. An answer may
        come after that of a later change: what serves has changed before."""
        done = [c for c in self.calls if c.reply.status == 200 and c.reply.document["changed"]]
        done.sort(key=_generation)
        for one, two in pairwise(done):
            if _generation(one) == _generation(two):
                self._violated(f"two changes of one generation: {one} and {two}")
            if two.reply.answered_s < one.reply.asked_s:
                self._violated(f"a later change has an earlier generation: {one} and {two}")
        asked = list(accumulate([c.reply.asked_s for c in reversed(done)], min))[::-1]
        answered = list(accumulate([c.reply.answered_s for c in done], max))
        version = 1
        for call, asked_s, answered_s in zip(done, asked, answered, strict=True):
            new = int(call.reply.document["version"])
            if call.verb == "unload" or new == version:
                continue
            version = new
            yield Change(new, asked_s, answered_s, call.worker)

    def _violated(self, what: str) -> None:
        self.report.violations.append(what)


def _generation(call: Call) -> int:
    return int(call.reply.document["generation"])


def _disagreement(documents: Mapping[int, Any], workers: int) -> str:
    """Empty when all is as it should be."""
    if len(documents) < workers:
        return f"only {len(documents)} workers answer"
    said = list(documents.values())
    if len({each["release"]["generation"] for each in said}) > 1:
        return "workers know different generations"
    for each in said:
        champion = each["release"]["champion"]
        if each["version"] != str(champion["version"]):
            return "a worker serves another version than the state says"
        if each["release"]["preparing"] is not None:
            return "a version is being prepared, and nobody loads one"
        others = each["workers"].values()
        if len(others) != workers or any(other["serves"] != champion for other in others):
            return "a worker is said to serve another version than the state says"
    return ""


async def prove(plan: Plan) -> Report:
    """One server, all calls."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        repository = folder / "models"
        write_contract(repository)
        for version in range(1, plan.versions + 1):
            await publish_next(repository, version)
        point_current(repository, 1)
        settings = {"HIKYAKU_WORKERS": str(plan.workers), "HIKYAKU_REPOSITORY_POLL_S": "0"}
        history: StateHistory | None = None
        if plan.with_redis:
            redis = stack.enter_context(RedisProcess(folder / "redis"))
            settings["STATE_REDIS_URL"] = redis.url
            history = await stack.enter_async_context(StateHistory(redis, MODEL))
        service = stack.enter_context(serving(folder, repository, settings))
        races = Races(plan, service, history)
        await races.run()
    return races.report


def lines(report: Report) -> Iterator[str]:
    """What a person reads."""
    killed = f"; {report.killed} workers killed" if report.killed else ""
    yield (
        f"  {report.answers:,} predictions, {report.lost_answers} of them lost; "
        f"{report.changes} changes in {report.generations} generations{killed}"
    )
    yield f"  {'calls':22} {'number':>7} {'p50 ms':>8} {'p99 ms':>8} {'max ms':>8}"
    for (verb, outcome), count in sorted(report.outcomes.items()):
        values = report.call_s.get(f"{verb} {outcome}", [])
        p50, p99, worst = (percentile(values, p) * 1000 for p in (50, 99, 100))
        yield f"  {verb + ' ' + outcome:22} {count:7} {p50:8.1f} {p99:8.1f} {worst:8.1f}"
    if report.late_s:
        late = [percentile(report.late_s, p) * 1000 for p in (50, 99, 100)]
        yield "  ms until the last worker had followed: p50 {:.0f}, p99 {:.0f}, max {:.0f}".format(
            *late
        )
    yield from (f"  VIOLATION: {violation}" for violation in report.violations)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--calls", type=int, default=200, help="of each client")
    parser.add_argument("--versions", type=int, default=6)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--without-redis", action="store_true")
    parser.add_argument("--rate", type=float, default=500, help="predictions a second")
    parser.add_argument("--think-s", type=float, default=0.3, help="a pause between calls, at most")
    parser.add_argument("--kill-every-s", type=float, default=0, help="0: nobody is killed")
    parser.add_argument("--seed", type=int, default=random.randrange(1_000_000))
    arguments = vars(parser.parse_args())
    plan = Plan(with_redis=not arguments.pop("without_redis"), **arguments)
    if plan.kill_every_s and not plan.with_redis:
        parser.error("--kill-every-s: only a Redis can tell what the killed ones have changed")
    print(f"{plan}", flush=True)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        report = runner.run(prove(plan))
    print("\n".join(lines(report)), flush=True)
    return 1 if report.violations else 0


if __name__ == "__main__":
    sys.exit(main())
