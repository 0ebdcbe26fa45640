"""Shows that what a service tells about a candidate is what an offline recomputation from the same
pairs says: counts exactly, all else to 1e-9.

    python -m loadtests.prove_comparison --seconds 240 --workers 2 --seed 1

A service with a Redis answers an open loop of random rows while its candidate is shown all of them.
Meanwhile workers are killed with -9, stopped and continued, Redis is killed and started again, and
the service is restarted. Every worker logs its pairs, with the write of its table that counts
them. In the end `GET …/comparison` is held against the pairs up to the writes that it names: as one
table of all of them, as plain loops over them, and as what the models say about the rows that were
asked. Exit status 1 on a violation. `--alter`: one pair is changed before, and exit status 1 unless
that is seen.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import math
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import msgspec
import numpy as np
import redis

from app.comparison.document import comparison_document
from app.comparison.pairs import NO_DECISION, Pairs
from app.comparison.table import ComparisonTable, Names
from app.shadow.pair_log import LoggedPair, read_pairs
from app.tasks import ended
from loadtests.checked_load import CheckedLoad
from loadtests.paired_models import (
    CANDIDATE,
    CHAMPION,
    INPUTS,
    MODEL,
    candidate,
    champion,
    decision,
    instance,
    publish_both,
    segment_names,
    segments,
)
from loadtests.redis_process import RedisProcess
from loadtests.service_process import Operator, ServiceProcess, serving

_QUESTIONS = 4_096
_MOST_INSTANCES = 8
_SETTLED_WITHIN_S = 60.0
_FOLDED_WITHIN_S = 150.0
_LOOK_EVERY_S = 1.5  # a worker writes every second
_UNWRITTEN_S = 3.0
"""What a worker has answered so long before it ends is perhaps not written yet."""
_DECISIONS = (False, True)
# Neither is in the log: when it was counted, and what was not compared.
_NOT_OF_PAIRS = {"first_s", "last_s", "dropped"}
_SHOWN = 10

Row: TypeAlias = tuple[int, int]
Trouble: TypeAlias = Literal["kill", "pause", "redis"]
"""A worker is killed with -9, or stopped for a while; Redis is killed and started again."""


@dataclass(frozen=True)
class Plan:
    """What is to be proved, and how long."""

    seconds: float = 240
    """Of load. Then it waits until tables of workers that were killed have been folded."""
    restarts: int = 1
    """Of the service."""
    workers: int = 2
    per_s: float = 120
    """Requests."""
    trouble_every_s: float = 12
    """On average."""
    troubles: Sequence[Trouble] = ("kill", "pause", "kill", "redis")
    """In turn."""
    alter: bool = False
    connections: int = 16
    seed: int = 1


class Answered(NamedTuple):
    """A request that was answered."""

    rows: Sequence[Row]
    at_s: float
    """Monotonic."""


@dataclass
class Report:
    """What came of it."""

    answered: dict[str, Answered] = field(default_factory=dict)
    """By request id."""
    faults: Counter[str] = field(default_factory=Counter)
    done: Counter[str] = field(default_factory=Counter)
    uncounted_s: list[tuple[float, float]] = field(default_factory=list)
    """From what may not have been written when a worker was killed, until the one in its place
    shows the candidate what it answers; monotonic."""
    logged: int = 0
    """Pairs."""
    counted: int = 0
    incarnations: int = 0
    document: Mapping[str, Any] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)

    def violated(self, what: str) -> None:
        self.violations.append(what)


class Proof:
    """A service whose workers and Redis are killed under load, several times over."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self._plan = plan
        self._folder = folder
        self._rng = random.Random(plan.seed)
        self.repository = folder / "models"
        self.log = folder / "pairs"
        self.report = Report()
        self._redis: RedisProcess | None = None
        self._redis_gone_s = math.inf
        self._watching: list[asyncio.Task[None]] = []

    async def run(self) -> None:
        plan = self._plan
        await publish_both(self.repository)
        with contextlib.ExitStack() as stack:
            if "redis" in plan.troubles:
                self._redis = stack.enter_context(RedisProcess(self._folder / "redis"))
            for number in range(plan.restarts + 1):
                with serving(self._folder, self.repository, self._settings()) as service:
                    is_last = number == plan.restarts
                    await self._serve(service, plan.seconds / (plan.restarts + 1), is_last)
                if not is_last:
                    self.report.done["restarts"] += 1

    def _settings(self) -> Mapping[str, str]:
        return {
            "HIKYAKU_WORKERS": str(self._plan.workers),
            "HIKYAKU_REPOSITORY_POLL_S": "0",
            "HIKYAKU_COMPARISON_LOG": str(self.log),
            "STATE_REDIS_URL": "" if self._redis is None else self._redis.url,
        }

    async def _serve(self, service: ServiceProcess, seconds: float, is_last: bool) -> None:
        """Under load for so long; in the end the comparison is read."""
        async with AsyncExitStack() as stack:
            load = await stack.enter_async_context(self._load(service.port))
            operator = _Calls(service.port)
            if not self.report.answered:
                await operator.call("POST", f"/v1/models/{MODEL}:shadow", {"version": CANDIDATE})
            await self._shown(operator)
            until_s = time.monotonic() + seconds
            asking = asyncio.create_task(
                load.open_loop(self._plan.per_s, lambda: time.monotonic() > until_s)
            )
            try:
                await self._trouble(service, until_s)
            finally:
                await asking
                for watching in self._watching:
                    await ended(watching)
            self.report.faults += load.ledger.faults
            if is_last:
                await self._folded()
                await self._settle(operator)

    def _load(self, port: int) -> CheckedLoad:
        rng = self._rng
        questions = [
            [
                (rng.randrange(INPUTS), rng.randrange(INPUTS))
                for _ in range(rng.randint(1, _MOST_INSTANCES))
            ]
            for _ in range(_QUESTIONS)
        ]
        bodies = [json.dumps({"instances": [instance(*r) for r in q]}).encode() for q in questions]

        def judge(body: bytes, question: int) -> tuple[int, str]:
            answer = _answers.decode(body)
            rows = questions[question]
            said = [prediction.p for prediction in answer.predictions]
            if said != [champion(*row) for row in rows]:
                return CHAMPION, "wrong"
            self.report.answered[answer.request_id] = Answered(rows, time.monotonic())
            return int(answer.model_version), ""

        path = f"/v1/models/{MODEL}:predict"
        plan = self._plan
        seed = rng.randrange(1_000_000)
        return CheckedLoad(port, path, bodies, judge, connections=plan.connections, seed=seed)

    async def _trouble(self, service: ServiceProcess, until_s: float) -> None:
        troubles: Mapping[Trouble, Callable[[ServiceProcess], Awaitable[None]]] = {
            "kill": self._kill,
            "pause": self._pause,
            "redis": self._restart_redis,
        }
        for trouble in itertools.cycle(self._plan.troubles):
            pause_s = self._rng.uniform(0.3, 1.7) * self._plan.trouble_every_s
            remaining_s = until_s - time.monotonic()
            await asyncio.sleep(max(0.0, min(pause_s, remaining_s)))
            if pause_s > remaining_s:
                return
            await troubles[trouble](service)

    async def _kill(self, service: ServiceProcess) -> None:
        worker = self._rng.choice(service.workers())
        from_s = min(time.monotonic(), self._redis_gone_s) - _UNWRITTEN_S
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)
        self.report.done["workers killed"] += 1
        self._watching.append(asyncio.create_task(self._watch(service.port, worker, from_s)))

    async def _watch(self, port: int, killed: int, from_s: float) -> None:
        try:
            await self._shown(_Calls(port), but=f"-{killed}-")
        finally:
            self.report.uncounted_s.append((from_s, time.monotonic()))

    async def _shown(self, operator: "_Calls", but: str = "no worker") -> None:
        """Until as many workers as planned show the candidate what they answer; none has a name
        with `but` in it."""
        while True:
            document = await operator.call("GET", f"/v1/models/{MODEL}")
            workers: Mapping[str, Any] = document["workers"] or {}
            reasons = [each["candidates"].values() for each in workers.values()]
            ready = all(of_one and not any(of_one) for of_one in reasons)
            if ready and len(workers) == self._plan.workers and but not in " ".join(workers):
                return
            await asyncio.sleep(0.1)

    async def _pause(self, service: ServiceProcess) -> None:
        """For less than it takes to be replaced."""
        worker = self._rng.choice(service.workers())
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGSTOP)
            await asyncio.sleep(self._rng.uniform(1, 5))
            os.kill(worker, signal.SIGCONT)
        self.report.done["workers paused"] += 1

    async def _restart_redis(self, service: ServiceProcess) -> None:
        """A worker may be killed meanwhile."""
        assert self._redis is not None
        self._redis_gone_s = time.monotonic()
        self._redis.kill()
        await asyncio.sleep(self._rng.uniform(0, 3))
        if self._rng.random() < 0.7:
            await self._kill(service)
        self._redis.launch()
        await self._redis.good_reply()
        await asyncio.sleep(2 * _UNWRITTEN_S)
        self._redis_gone_s = math.inf
        self.report.done["restarts of Redis"] += 1

    async def _folded(self) -> None:
        """Until tables of killed workers are in the folded one."""
        if self._redis is None:
            return
        until_s = time.monotonic() + _FOLDED_WITHIN_S
        with redis.Redis.from_url(self._redis.url) as client:
            while time.monotonic() < until_s:
                held = client.keys("hikyaku:held:*")
                self.report.done["workers folded"] = sum(map(client.hlen, held))
                if self.report.done["workers folded"]:
                    return
                await asyncio.sleep(1)
        self.report.violated("no tables of workers that were killed have been folded")

    async def _settle(self, operator: "_Calls") -> None:
        """Until nothing is added any more."""
        until_s = time.monotonic() + _SETTLED_WITHIN_S
        before: Mapping[str, Any] = {}
        while time.monotonic() < until_s:
            await asyncio.sleep(_LOOK_EVERY_S)
            document = await operator.call("GET", f"/v1/models/{MODEL}/comparison")
            [told] = document["candidates"]
            if told == before:
                self.report.document = told
                return
            before = told
        self.report.violated("the comparison does not settle")


class _Prediction(msgspec.Struct):
    p: float


class _Answer(msgspec.Struct):
    request_id: str
    model_version: str
    predictions: list[_Prediction]


_answers = msgspec.json.Decoder(_Answer)


class _Calls:
    """Calls of an operator, each on a connection of its own: workers come and go."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def call(self, method: str, path: str, document: Any = None) -> Any:
        while True:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                async with Operator(self._port) as operator:
                    reply = await operator.call(method, path, document)
                if reply.status == 200:
                    return reply.document
                print(reply.document, file=sys.stderr)
            await asyncio.sleep(0.2)


def judge(report: Report, log: Path, *, alter: bool = False) -> None:
    """Hold what was told against the log, and the log against what was asked."""
    told = report.document
    logged = [(worker, pair) for worker, pair in read_pairs(log) if pair.trial == told["trial"]]
    counted = written(told["writes"], logged)
    report.logged, report.counted = len(logged), len(counted)
    report.incarnations = len({worker for worker, _ in logged})
    if alter:
        at = logged.index(counted[len(counted) // 2])
        logged[at] = (logged[at][0], _altered(logged[at][1]))
    report.violations += recomputed(told["comparison"], told["writes"], logged, segment_names())
    _judge_log(report, [pair for _, pair in logged])
    _judge_coverage(report, [pair for _, pair in counted])


def written(
    writes: Mapping[str, int], logged: Sequence[tuple[str, LoggedPair]]
) -> Sequence[tuple[str, LoggedPair]]:
    """Of the pairs of each worker those up to this write."""
    return [(worker, pair) for worker, pair in logged if pair.write <= writes.get(worker, 0)]


def recomputed(
    told: Mapping[str, Any],
    writes: Mapping[str, int],
    logged: Sequence[tuple[str, LoggedPair]],
    names: Names,
) -> Sequence[str]:
    """What of a comparison is not what the pairs say that were logged up to these writes; `names`
    of the segments, by dimension."""
    counted = written(writes, logged)
    pairs, blocks = [pair for _, pair in counted], _numbered(counted)
    by_table = _differences(told, _as_one_table(pairs, blocks, names))
    by_loops = _differences(_of_pairs(told), _by_loops(pairs, blocks))
    return [
        *(f"recomputed as one table: {difference}" for difference in by_table),
        *(f"recomputed by loops: {difference}" for difference in by_loops),
    ]


def _altered(pair: LoggedPair) -> LoggedPair:
    return msgspec.structs.replace(pair, champion_decision=not pair.champion_decision)


def _numbered(counted: Sequence[tuple[str, LoggedPair]]) -> Sequence[int]:
    """The block of each pair, counted over all workers."""
    numbers: dict[tuple[str, int], int] = {}
    return [numbers.setdefault((worker, p.block), len(numbers)) for worker, p in counted]


def _as_one_table(
    pairs: Sequence[LoggedPair], blocks: Sequence[int], names: Names
) -> Mapping[str, Any]:
    table = ComparisonTable.empty(names, len(_DECISIONS), bounded=False)
    numbers = {None: NO_DECISION, False: 0, True: 1}
    places = [{name: number for number, name in enumerate(dimension)} for dimension in names]
    segments_of = [[of[name] for of, name in zip(places, p.segments, strict=True)] for p in pairs]
    table.add(
        Pairs(
            np.array(blocks, np.int32),
            np.array([pair.champion for pair in pairs], np.float64),
            np.array([pair.candidate for pair in pairs], np.float64),
            np.array([numbers[_as_bool(p.champion_decision)] for p in pairs], np.int32),
            np.array([numbers[_as_bool(p.candidate_decision)] for p in pairs], np.int32),
            np.array([pair.failed for pair in pairs]),
            np.array(segments_of, np.int32),
            np.array([pair.champion_s for pair in pairs]),
            np.array([pair.candidate_s for pair in pairs]),
        ),
        now_s=0,
    )
    document = json.loads(json.dumps(comparison_document(table, _DECISIONS)))
    return {name: value for name, value in document.items() if name not in _NOT_OF_PAIRS}


def _as_bool(value: object) -> bool | None:
    return None if value is None else bool(value)


def _of_pairs(comparison: Mapping[str, Any]) -> Mapping[str, Any]:
    """What `_by_loops` recomputes, as it was told."""
    groups = {"": comparison} | {each["name"]: each for each in comparison["segments"]}
    return {"blocks": comparison["blocks"]} | {
        name: {
            "rows": group["rows"],
            "compared": group["compared"],
            "failed": group["failed"]["rows"],
            "not finite": group["not_finite"]["rows"],
            "flips": group["flips"]["rows"],
            "agreement": group["agreement"],
            "decisions": {
                f"{each['champion']} {each['candidate']}": each["rows"]
                for each in group["decisions"]
            },
            "difference": {
                "mean": group["difference"]["mean"],
                "absolute": group["difference"]["mean_absolute"]["mean"],
                "root mean square": group["difference"]["root_mean_square"],
                "min": group["difference"]["min"],
                "max": group["difference"]["max"],
            },
            "champion": group["champion"]["mean"],
            "candidate": group["candidate"]["mean"],
        }
        for name, group in groups.items()
        if group["compared"]
    }


def _by_loops(pairs: Sequence[LoggedPair], blocks: Sequence[int]) -> Mapping[str, Any]:
    """The same without anything of the service's."""
    groups: dict[str, list[LoggedPair]] = defaultdict(list)
    for pair in pairs:
        for name in ("", *pair.segments):
            groups[name].append(pair)
    told: dict[str, Any] = {"blocks": len(set(blocks))}
    for name, group in groups.items():
        answered = [pair for pair in group if not pair.failed]
        both = [
            (pair, pair.champion, pair.candidate)
            for pair in answered
            if pair.champion is not None and pair.candidate is not None
        ]
        if not both:
            continue
        differences = [theirs - ours for _, ours, theirs in both]
        flips = sum(p.champion_decision != p.candidate_decision for p, _, _ in both)
        told[name] = {
            "rows": len(group),
            "compared": len(both),
            "failed": len(group) - len(answered),
            "not finite": sum(pair.candidate is None for pair in answered),
            "flips": flips,
            "agreement": 1 - flips / len(both),
            "decisions": Counter(
                f"{pair.champion_decision} {pair.candidate_decision}" for pair, _, _ in both
            ),
            "difference": {
                "mean": _mean(differences),
                "absolute": _mean([abs(each) for each in differences]),
                "root mean square": math.sqrt(_mean([each**2 for each in differences])),
                "min": min(differences),
                "max": max(differences),
            },
            "champion": _mean([ours for _, ours, _ in both]),
            "candidate": _mean([theirs for _, _, theirs in both]),
        }
    return told


def _mean(numbers: Sequence[float]) -> float:
    return math.fsum(numbers) / len(numbers)


def _differences(told: Any, recomputed: Any, at: str = "") -> Iterator[str]:
    """Where the two differ: numbers with a fraction by more than 1e-9, all else at all."""
    if isinstance(told, Mapping) and isinstance(recomputed, Mapping):
        for name in sorted({*told, *recomputed} - (_NOT_OF_PAIRS if not at else set())):
            yield from _differences(told.get(name), recomputed.get(name), f"{at}/{name}")
    elif isinstance(told, list) and isinstance(recomputed, list) and len(told) == len(recomputed):
        for number, (one, other) in enumerate(zip(told, recomputed, strict=True)):
            yield from _differences(one, other, f"{at}/{number}")
    elif isinstance(told, float) and isinstance(recomputed, int | float):
        if not math.isclose(told, recomputed, rel_tol=1e-9, abs_tol=1e-9):
            yield f"{at}: told {told}, recomputed {recomputed}"
    elif told != recomputed:
        yield f"{at}: told {told}, recomputed {recomputed}"


def _judge_log(report: Report, logged: Sequence[LoggedPair]) -> None:
    """Each row that was answered is logged once at most, and as the models say."""
    twice = [key for key, n in Counter((p.request_id, p.instance) for p in logged).items() if n > 1]
    if twice:
        report.violated(f"{len(twice)} rows are logged twice, such as {twice[0]}")
    unknown = {pair.request_id for pair in logged} - report.answered.keys()
    if len(unknown) > report.faults["lost"]:
        report.violated(f"{len(unknown)} requests are logged that nobody asked")
    wrong = [
        pair for pair in logged if pair.request_id not in unknown and not _is_right(pair, report)
    ]
    if wrong:
        report.violated(f"{len(wrong)} pairs are not what the models say, such as {wrong[0]}")


def _is_right(pair: LoggedPair, report: Report) -> bool:
    row = report.answered[pair.request_id].rows[pair.instance]
    ours, theirs = champion(*row), candidate(*row)
    if pair.segments != segments(*row) or pair.champion != ours:
        return False
    if pair.champion_decision != decision(ours):
        return False
    if pair.failed:  # perhaps for another row's sake
        return pair.candidate is None and pair.candidate_decision is None
    if theirs is None:
        return False
    said = None if math.isnan(theirs) else theirs
    return pair.candidate == said and pair.candidate_decision == decision(theirs)


def _judge_coverage(report: Report, counted: Collection[LoggedPair]) -> None:
    """What was answered is counted, unless it was dropped, or a worker was killed just then."""
    known = {(pair.request_id, pair.instance) for pair in counted}
    missing = sum(
        (request_id, number) not in known
        for request_id, answered in report.answered.items()
        if not any(from_s <= answered.at_s <= until_s for from_s, until_s in report.uncounted_s)
        for number in range(len(answered.rows))
    )
    dropped = sum(report.document["comparison"]["dropped"].values())
    if missing > dropped:
        report.violated(f"{missing} rows are not counted, of which {dropped} were dropped")


async def prove(plan: Plan) -> Report:
    with tempfile.TemporaryDirectory() as folder:
        proof = Proof(plan, Path(folder))
        await proof.run()
        if proof.report.document:
            judge(proof.report, proof.log, alter=plan.alter)
        return proof.report


def lines(report: Report) -> Iterator[str]:
    """What a person reads."""
    rows = sum(len(answered.rows) for answered in report.answered.values())
    yield f"  {len(report.answered):,} requests of {rows:,} rows answered; " + (
        ", ".join(f"{count} {what}" for what, count in sorted(report.done.items()))
    )
    if report.document:
        told = report.document["comparison"]
        dropped = sum(told["dropped"].values())
        yield (
            f"  told: {told['rows']:,} rows in {told['blocks']:,} blocks ({dropped:,} more were "
            f"dropped), {told['flips']['rows']:,} flips, {told['failed']['rows']:,} failed, "
            f"{told['not_finite']['rows']:,} not finite"
        )
    yield (
        f"  logged: {report.logged:,} pairs by {report.incarnations} workers, of which "
        f"{report.counted:,} had been written"
    )
    yield from (f"  VIOLATION: {violation}" for violation in report.violations[:_SHOWN])
    if len(report.violations) > _SHOWN:
        yield f"  and {len(report.violations) - _SHOWN} more"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=Plan.seconds)
    parser.add_argument("--restarts", type=int, default=Plan.restarts)
    parser.add_argument("--workers", type=int, default=Plan.workers)
    parser.add_argument("--per-s", type=float, default=Plan.per_s, help="requests")
    parser.add_argument("--without-redis", action="store_true", help="tables in files")
    parser.add_argument("--alter", action="store_true", help="one pair, which must be seen")
    parser.add_argument("--seed", type=int, default=random.randrange(1_000_000))
    arguments = vars(parser.parse_args())
    if arguments.pop("without_redis"):
        arguments["troubles"] = ("kill", "pause", "kill")
    plan = Plan(**arguments)
    print(f"{plan}", flush=True)
    report = asyncio.run(prove(plan))
    print("\n".join(lines(report)), flush=True)
    return 0 if bool(report.violations) == plan.alter else 1


if __name__ == "__main__":
    sys.exit(main())
