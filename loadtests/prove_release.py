"""Shows that releases of a real service under load end as they should, whatever happens.

    python -m loadtests.prove_release --parts same faulty decider rollback --json figures.json

Two workers and a Redis answer an open loop, every request with a routing key, most of them new.
Every answer is held against what its version says, and its version against the state of the
release and the place of its key.

`same`: versions that are byte for byte the champion's, and one that was trained alike: none may be
rolled back, and the ledgers must be exact. `faulty`: a dozen candidates that are not as good, each
in its own way: each must be refused or rolled back. `decider`: the worker that decides is killed,
Redis goes away and comes back empty, and a newer release of the software joins: every release must
end as it does without. `rollback`: how long it takes until a share, and a rollback, is in effect in
every worker; who is in at a share stays in at a larger one. `small`: some of it, for a test. Exit
status 1 on a violation.
"""

import argparse
import asyncio
import gc
import itertools
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import redis
import uvloop

from app.canary.exposures import lots_of
from loadtests.prove_redis_outage import percentile
from loadtests.release_versions import FAULTS, MODEL, Fault, Kind, Turns
from loadtests.release_watch import Audit, Seen
from loadtests.released_service import Asking, Outcome, ReleasedService, turns_that_take
from loadtests.seeds import seed_of_commit
from loadtests.service_process import serving, worst_lag_s
from loadtests.standstill import Standstill

Part: TypeAlias = Literal["same", "faulty", "decider", "rollback", "small"]
PARTS: tuple[Part, ...] = ("same", "faulty", "decider", "rollback")
Trouble: TypeAlias = Literal["lost", "flushed", "newer"]
"""Redis is away, or comes back empty; a newer release of the software joins."""
TROUBLES: tuple[Trouble, ...] = get_args(Trouble)
_ROLLBACK_GOAL_S = 0.1
_SHARE_GOAL_S = 1.0
_DECIDED_WITHIN_S = 120.0
_FAULTY_WITHIN_S = 240.0
_KILLS_A_RELEASE = 2
"""A supervisor starts who ends often after ever longer pauses."""
_FOLLOWED_S = 1.0
_REPLACED_WITHIN_S = 60.0

# So wide that a stage takes some seconds.
WIDE = {
    "stages": ["shadow", 50, 100],
    "margins": {"errors": 0.1, "slow": 0.3, "median": 0.3},
    "least_answers": 100,
    "least_minutes": 0,
    "control": 0,
    "watch_hours": 0,
    "slow_factor": 2,
}
FOUR_STAGES = WIDE | {"stages": ["shadow", 10, 50, 100]}
WATCHED = WIDE | {"control": 0.3, "watch_hours": 4 / 3600}
# A candidate that gets what all others leave is open after a minute where a machine is busy.
SHADOW = {"timeout_ms": 1_000, "hold_ms": 5, "isolation": {"nice": 0, "idle": False}}


@dataclass(frozen=True)
class Plan:
    """What is to be proved, and how long."""

    parts: Sequence[Part] = PARTS
    same: int = 50
    """Rollouts."""
    faults: Sequence[Fault] = FAULTS
    kills: int = 100
    lost_s: float = 60.0
    """So long Redis is away."""
    troubles: Sequence[Trouble] = TROUBLES
    rollbacks: int = 100
    per_s: float = 200.0
    connections: int = 32
    workers: int = 2
    seed: int = 1


@dataclass
class Report:
    """What came of it."""

    answers: int = 0
    releases: dict[str, list[Outcome]] = field(default_factory=dict)
    """By what was proved."""
    figures: dict[str, Any] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)

    def entered(self, what: str, outcome: Outcome) -> None:
        self.releases.setdefault(what, []).append(outcome)
        print(_line(what, outcome), file=sys.stderr, flush=True)


class Proof:
    """One part after the other, each with a service of its own."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self._plan = plan
        self._folder = folder
        self._rng = random.Random(plan.seed)
        self.report = Report()

    async def run(self) -> None:
        parts: Mapping[Part, Callable[[], Coroutine[Any, Any, None]]] = {
            "same": self._same,
            "faulty": self._faulty,
            "decider": self._decider,
            "rollback": self._rollback,
            "small": self._small,
        }
        for part in self._plan.parts:
            began_s = time.monotonic()
            async with Standstill() as standstill:
                await parts[part]()
            figures = self.report.figures
            figures[f"{part}: seconds"] = round(time.monotonic() - began_s)
            # What others on the machine did to the figures: this process wanted to run.
            figures[f"{part}: stood still, s"] = {
                "longest": round(standstill.worst_s, 3),
                "all": round(standstill.total_s, 2),
            }

    def _service(
        self, name: str, kinds: Sequence[Kind], turns: Turns | None = None, **asking: Any
    ) -> ReleasedService:
        plan = self._plan
        folder = self._folder / name
        folder.mkdir()
        names = ("per_s", "connections", "workers", "seed")
        asked = {name: getattr(plan, name) for name in names}
        return ReleasedService(
            folder,
            Asking(**(asked | asking)),
            kinds,
            turns or Turns(),
            shadow=SHADOW,
            limits={
                "default_timeout_ms": 5_000
            },  # a machine with others on it stands still at times
        )

    async def _same(self) -> None:
        """Versions that are as good, in turn: each is released against the one before."""
        plan, report = self._plan, self.report
        async with self._service("same", ("champion", "champion", "retrained")) as released:
            files = [released.repository / MODEL / str(v) / "model.onnx" for v in (1, 2)]
            assert files[0].read_bytes() == files[1].read_bytes()
            for number in range(plan.same + 1):
                last = number == plan.same
                released.contract(release=_plan_of(number, plan.same))
                version = 3 if last else 2 - number % 2
                what = "trained alike" if last else "byte for byte"
                outcome = await released.release(version, _DECIDED_WITHIN_S)
                report.entered(what, outcome)
                if outcome.how != "promoted":
                    self._violated(f"{what} {number}: {outcome}")
                await released.keep_counted()
            await released.quiet()
            audit = await self._audited("same", released)
            await self._ledgers(released, audit)

    async def _small(self) -> None:
        """Both verdicts, and the share that an operator takes back."""
        async with self._service("small", ("champion", "champion", "20 % errors")) as released:
            released.contract(release=WIDE)
            for version in (2, 3):
                outcome = await released.release(version, _DECIDED_WITHIN_S)
                self.report.entered("small", outcome)
            await released.quiet()
            await self._ledgers(released, await self._audited("small", released))

    async def _ledgers(self, released: ReleasedService, audit: Audit) -> None:
        """Of every stage in which exposures are counted."""
        tables = await released.counted(sorted(audit.keys))
        sums: Counter[str] = Counter()
        for began, table in tables.items():
            keys = audit.keys[began]
            arms = {True: table.candidate, False: table.against}
            both = keys.possible[True] & keys.possible[False]
            for is_candidates, arm in arms.items():
                name = f"generation {began}, {'candidate' if is_candidates else 'champion'}"
                if arm.lost or arm.assigned != arm.resolved:
                    self._violated(f"{name}: {arm.as_json()}")
                least = len(keys.certain[is_candidates] - both)
                most = len(keys.possible[is_candidates])
                if not least <= arm.assigned <= most:
                    self._violated(f"{name}: {arm.assigned} keys of {least} to {most}")
                sums["assigned"] += arm.assigned
                sums["least keys"] += least
                sums["most keys"] += most
            if table.misrouted or table.outside.get("unavailable"):
                self._violated(f"generation {began}: {table.as_json()}")
            sums["misrouted"] += table.misrouted
            sums["not first"] += table.outside.get("not_first", 0)
        self.report.figures["ledgers"] = {"stages": len(tables), **sums}

    async def _faulty(self) -> None:
        """Each released once, by a plan for it."""
        plan = self._plan
        slow: Sequence[Fault] = [f for f in plan.faults if f in {"twice as slow"}]
        others = [fault for fault in plan.faults if fault not in slow]
        if others:
            turns = Turns(large=turns_that_take(0.06))
            async with self._service(
                "faulty", ("champion", *others), turns, large=0.06
            ) as released:
                for fault in others:
                    await self._fault(released, fault)
                await released.quiet()
                await self._audited("faulty", released, only=_EXPECTED)
        if slow:
            turns = Turns(laborious=turns_that_take(0.006))
            kinds: Sequence[Kind] = ("laborious", *slow)
            per_s = plan.per_s / 5
            async with self._service("slow", kinds, turns, per_s=per_s) as released:
                for fault in slow:
                    await self._fault(released, fault)
                await released.quiet()
                await self._audited("slow", released, only=_EXPECTED)
        caught = [each for each in self.report.releases.get("faulty", ()) if _is_caught(each)]
        self.report.figures["faulty: caught"] = f"{len(caught)} of {len(plan.faults)}"

    async def _fault(self, released: ReleasedService, fault: Fault) -> None:
        if fault in released.refused:
            outcome = Outcome(fault, "refused", 0.0, f"publish: {released.refused[fault]}")
        else:
            released.contract(**_faulty_plan(fault))
            outcome = await released.release(released.version(fault), _FAULTY_WITHIN_S)
        self.report.entered("faulty", outcome)
        if not _is_caught(outcome):
            self._violated(f"{fault}: it was not caught: {outcome}")
            if outcome.how == "promoted":
                await released.must("load", version=1, despite_quarantine=True)

    async def _decider(self) -> None:
        """Releases that are to be promoted, and others that are not, while all kinds of things
        happen to who decides."""
        kinds: Sequence[Kind] = ("champion", "champion", "20 % errors")
        async with self._service("decider", kinds) as released:
            released.contract(release=WIDE)
            champion = 1
            replaced: list[asyncio.Task[None]] = []
            for what in ("nothing", "kill", *self._plan.troubles):
                kills = 0
                for number in range(1_000):
                    if number > 1 and (what != "kill" or kills >= self._plan.kills):
                        break
                    is_good = number % 2 == 0
                    version = 3 - champion if is_good else 3
                    trouble = _Trouble(what, released, self._plan, self._rng, replaced)
                    outcome = await released.release(version, 600.0, trouble.make)
                    kills += trouble.made
                    self.report.entered(f"decider: {what}", outcome)
                    if outcome.how != ("promoted" if is_good else "rolled back"):
                        self._violated(f"{what}: {outcome}")
                    if outcome.how == "promoted":
                        champion = version
                    if not trouble.made and what not in {"nothing", "kill"}:
                        self._violated(f"{what}: it did not happen")
                if what == "kill":
                    self.report.figures["decider: kills"] = kills
                await trouble.over()
            await released.quiet()
            await self._audited("decider", released, only=_EXPECTED | _KILLED)

    async def _rollback(self) -> None:
        """By an operator, in the middle of a stage; before it the share grows step by step."""
        plan, report = self._plan, self.report
        rollback_s, told_s, reported_s = [], [], []
        async with self._service("rollback", ("champion", "champion"), sticky=0.5) as released:
            never = WIDE | {"least_answers": 1_000_000, "stages": ["shadow", 10, 30, 60, 100]}
            released.contract(release=never)
            watch = released.watch
            for number in range(plan.rollbacks):
                await released.must(
                    "release", version=2, expected_per_s=1e6, despite_quarantine=True
                )
                # Now and then the share goes all the way, one step after the other.
                for share in (0.1, 0.3, 0.6) if number % 10 == 0 else (0.5,):
                    await released.must("promote", share=share)
                    await asyncio.sleep(0.5)
                asked = len(released.load.ledger)
                reply = await released.must("rollback")
                generation = reply.document["generation"]
                reported_s.append(await _reported(released, generation) - reply.asked_s)
                await watch.until(lambda state: state.rollout is None, 5)
                told_s.append(reply.answered_s - reply.asked_s)
                await asyncio.sleep(0.3)
                rollback_s.append(_last_answer_s(released, 2, asked, reply.asked_s))
                print(f"  rollback {number}: {rollback_s[-1]:.3f} s", file=sys.stderr, flush=True)
            await released.quiet()
            audit = await self._audited("rollback", released)
            self._steps(audit, watch.history)
            self._figures("rollback: last answer by it, s", rollback_s)
            self._figures("rollback: the verb's answer, s", told_s)
            self._figures("rollback: told by every worker, s", reported_s)
            if percentile(rollback_s, 99) > _ROLLBACK_GOAL_S:
                self._violated(f"p99 of a rollback: {percentile(rollback_s, 99):.3f} s")
            metrics = (await released.call("GET", "/metrics")).document
            report.figures["rollback: a loop was late, s"] = worst_lag_s(metrics)

    def _steps(self, audit: Audit, history: Sequence[Seen]) -> None:
        """How late shares came into effect, and whether who was in stays in."""
        late = [
            audit.late_s.get(after.state.generation, 0.0)
            for before, after in itertools.pairwise(history)
            if _share(before) != _share(after)
        ]
        self._figures("a share in effect in every worker, s", late)
        if max(late, default=0.0) > _SHARE_GOAL_S:
            self._violated(f"a share was in effect after {max(late):.2f} s only")
        drawn = 0
        for before, after in itertools.pairwise(history):
            one, other = before.state.rollout, after.state.rollout
            if one is None or other is None or _share(other_seen := after) <= _share(before):
                continue
            lots, same = lots_of(MODEL, one), lots_of(MODEL, other)
            for key in range(200):
                place, again = lots.draw(str(key))[0], same.draw(str(key))[0]
                drawn += 1
                if place < _share(before) and again >= _share(other_seen):
                    self._violated(f"key {key} was in at {_share(before)}, and is no more")
        self.report.figures["keys that stay in"] = drawn

    async def _audited(
        self, name: str, released: ReleasedService, only: set[str] | None = None
    ) -> Audit:
        """All answers against their versions, and the versions against the states. `only`: faults
        of answers that are to be expected, by how they begin."""
        audit = released.audit()
        report = self.report
        report.answers += len(released.load.ledger)
        report.violations += [f"{name}: {each}" for each in audit.violations()]
        for fault, count in released.load.ledger.faults.items():
            if only is None or not any(fault.startswith(each) for each in only):
                self._violated(f"{name}: {count} answers: {fault}")
                report.violations += released.load.ledger.samples
        report.figures[f"{name}: answers"] = {
            "all": len(released.load.ledger),
            "while a candidate had a share": audit.judged,
            "excused": audit.excused,
            "faults": dict(released.load.ledger.faults),
        }
        report.figures[f"{name}: decision log"] = await asyncio.to_thread(released.replayed)
        report.violations += [f"{name}: {each}" for each in released.violations]
        return audit

    def _figures(self, what: str, values: Sequence[float]) -> None:
        if values:
            self.report.figures[what] = {
                "number": len(values),
                "p50": round(percentile(values, 50), 4),
                "p99": round(percentile(values, 99), 4),
                "max": round(max(values), 4),
            }

    def _violated(self, what: str) -> None:
        self.report.violations.append(what)
        print(f"  VIOLATION: {what}", file=sys.stderr, flush=True)


class _Trouble:
    """What happens while a release is under way."""

    def __init__(
        self,
        what: str,
        released: ReleasedService,
        plan: Plan,
        rng: random.Random,
        replaced: list[asyncio.Task[None]],
    ) -> None:
        """`replaced` is for what ends when a killed worker has a successor."""
        self._what = what
        self._released = released
        self._plan = plan
        self._rng = rng
        self._replaced = replaced
        self.made = 0

    async def make(self) -> None:
        released = self._released
        await asyncio.sleep(self._rng.uniform(0.5, 2))
        if self._what == "kill":
            for _ in range(_KILLS_A_RELEASE):
                await self._kill()
        elif self._what == "lost":
            released.redis.kill()
            try:
                await asyncio.sleep(self._plan.lost_s)
            finally:
                released.redis.launch()
                self.made += 1
        elif self._what == "flushed":
            with redis.Redis.from_url(released.redis.url) as client:
                client.flushall()
            self.made += 1
        elif self._what == "newer":
            await self._newer()

    async def over(self) -> None:
        """Until all workers are there again."""
        await asyncio.gather(*self._replaced)
        async with asyncio.timeout(_REPLACED_WITHIN_S):
            while len(await self._released.workers()) < 2:  # noqa: ASYNC110  # of other processes
                await asyncio.sleep(0.2)

    async def _kill(self) -> None:
        began_s = time.monotonic()
        await self._released.kill_decider()
        self.made += 1
        self._replaced.append(asyncio.create_task(self._until_replaced(began_s)))
        await asyncio.sleep(self._rng.uniform(1, 8))

    async def _until_replaced(self, began_s: float) -> None:
        """A supervisor pauses for who ends often, and the successor opens the candidate."""
        released = self._released
        async with asyncio.timeout(_REPLACED_WITHIN_S):
            while not await released.all_route():  # noqa: ASYNC110  # of other processes
                await asyncio.sleep(0.1)
        released.excused.append((began_s, time.monotonic() + _FOLLOWED_S))

    async def _newer(self) -> None:
        """A process of a release of the software with another form of the state: it must neither
        decide nor change anything, and nobody decides while it lives."""
        released, folder = self._released, self._released.folder / "newer"
        folder.mkdir(exist_ok=True)

        def join() -> None:
            command = ("loadtests.newer_server",)
            settings = dict(released.settings()) | {"HIKYAKU_WORKERS": "1"}
            with serving(folder, released.repository, settings, command=command):
                time.sleep(5)

        self.made += 1
        await asyncio.to_thread(join)


_EXPECTED = {"status", "lost"}
_KILLED = {"lost", "no connection: ConnectionResetError"}
"""On connections that were a killed worker's, those among them that it had not accepted yet."""


def _plan_of(number: int, of: int) -> Mapping[str, Any]:
    """Most in two stages, some in three, some watched afterwards."""
    if number % 10 == 7:
        return FOUR_STAGES
    return WATCHED if number % 10 == 3 else WIDE


def _faulty_plan(fault: Fault) -> Mapping[str, Any]:
    """Sections of model.yaml: the margins that are the default, and short stages."""
    same = {"swapped classes", "bias", "wrong segment", "not deterministic"}
    release = {
        "stages": ["shadow", 50, 100],
        "least_answers": 200,
        "least_minutes": 0,
        "control": 0,
        "watch_hours": 0,
    }
    if fault not in same:
        return {"release": release | {"kind": "retrain"}}
    # The labels say that the score is a probability; nobody tells any.
    labels = {"kind": "binary", "horizon": {"after_s": 1}}
    return {"release": release | {"kind": "equivalent"}, "labels": labels}


def _is_caught(outcome: Outcome) -> bool:
    """Only what cannot be compared is refused."""
    return outcome.how == ("refused" if outcome.kind == "wrong dtype" else "rolled back")


def _share(seen: Seen) -> float:
    rollout = seen.state.rollout
    return 0.0 if rollout is None else rollout.stages[-1].stage.share


async def _reported(released: ReleasedService, generation: int) -> float:
    """The instant at which every worker had told that it has done what this generation says."""
    while True:
        reply = await released.call("GET", f"/v1/models/{MODEL}")
        workers = reply.document["workers"]
        if workers and all(each["generation"] >= generation for each in workers.values()):
            return reply.answered_s


def _last_answer_s(released: ReleasedService, version: int, first: int, asked_s: float) -> float:
    """How long after it was asked for the last request was sent that the version answered."""
    ledger = released.load.ledger
    codes = np.array(ledger.versions[first:])
    sent_s = np.array(ledger.sent_s[first:])[(codes >= 0) & ((codes & 0x3FF) == version)]
    return max(float(sent_s.max()) - asked_s, 0.0) if len(sent_s) else 0.0


async def prove(plan: Plan, folder: Path) -> Report:
    proof = Proof(plan, folder)
    await proof.run()
    return proof.report


def lines(report: Report) -> Iterator[str]:
    """What a person reads."""
    yield f"  {report.answers:,} answers"
    for what, outcomes in report.releases.items():
        if what == "faulty":
            continue
        counted = Counter(outcome.how for outcome in outcomes)
        seconds = [outcome.seconds for outcome in outcomes]
        yield (
            f"  {what:24} {len(outcomes):4} releases: {dict(counted)}; "
            f"seconds {statistics.median(seconds):.1f}, at most {max(seconds):.1f}"
        )
    for outcome in report.releases.get("faulty", ()):
        yield _line("", outcome)
    for what, figure in report.figures.items():
        yield f"  {what}: {figure}"
    yield from (f"  VIOLATION: {violation}" for violation in report.violations)


def _line(what: str, outcome: Outcome) -> str:
    stages = ", ".join(f"{share:.0%}" for share in outcome.stages)
    return (
        f"  {what:18} {outcome.kind:22} {outcome.how:11} {outcome.seconds:6.1f} s, at {stages}; "
        f"{outcome.answers} answers by it, {outcome.harmed} harmed, {outcome.late} late; "
        f"{outcome.reason[:160]}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=get_args(Part), default=PARTS)
    parser.add_argument(
        "--same", type=int, default=50, help="releases of a version that is as good"
    )
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=FAULTS)
    parser.add_argument("--kills", type=int, default=100, help="of the worker that decides")
    parser.add_argument("--troubles", nargs="*", choices=TROUBLES, default=TROUBLES)
    parser.add_argument("--lost-s", type=float, default=60.0, help="so long Redis is away")
    parser.add_argument("--rollbacks", type=int, default=100)
    parser.add_argument("--per-s", type=float, default=200.0, help="requests")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=seed_of_commit())
    parser.add_argument("--json", type=Path, help="a file for all figures")
    arguments = vars(parser.parse_args())
    written: Path | None = arguments.pop("json")
    plan = Plan(**arguments)
    print(f"{plan}", flush=True)
    gc.disable()  # its pauses would be the server's
    with (
        tempfile.TemporaryDirectory() as folder,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        report = runner.run(prove(plan, Path(folder)))
    print("\n".join(lines(report)), flush=True)
    if written is not None:
        releases = {
            what: [outcome._asdict() for outcome in outcomes]
            for what, outcomes in report.releases.items()
        }
        document = {"plan": asdict(plan), **asdict(report), "releases": releases}
        written.write_text(json.dumps(document, indent=1))
    return 1 if report.violations else 0


if __name__ == "__main__":
    sys.exit(main())
