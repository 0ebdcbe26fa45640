"""A service under load whose versions are released: every answer is kept with its key."""

import asyncio
import json
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from os import kill
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self, TypeAlias

import msgspec
import numpy as np
from onnxruntime import InferenceSession

from app.canary.table import KIND, ExposureTable, began_of
from app.errors import InvalidModel
from app.release.redis_tables import RedisTables
from loadtests.checked_load import CheckedLoad
from loadtests.redis_process import RedisProcess
from loadtests.release_versions import (
    INPUTS,
    LARGE_ROWS,
    MODEL,
    Kind,
    Row,
    Turns,
    instance,
    model,
    publish_next,
    said,
    write_contract,
)
from loadtests.release_watch import Answered, Audit, Auditor, StateWatch
from loadtests.service_process import Operator, Reply, ServiceProcess, serving

_QUESTIONS = 1_024
_MOST_INSTANCES = 3
_STICKY_KEYS = 2_000
_ROUTES = ("champion", "canary", "previous")
_TRIED_TURNS, _TRIED = 2_000, 20
_COUNTED_WITHIN_S = 4.0
"""A worker settles and writes once a second each."""
_CALL_AGAIN_S = 0.05
_GOOD = {"champion", "retrained", "laborious"}

How: TypeAlias = Literal["promoted", "rolled back", "refused", "undecided"]


@dataclass(frozen=True)
class Asking:
    """How the service is asked."""

    per_s: float = 200.0
    connections: int = 32
    sticky: float = 0.2
    """Share of the requests whose key has come before, by a Zipf law; all others are new."""
    large: float = 0.0
    """Share of the requests that have `LARGE_ROWS` instances."""
    workers: int = 2
    seed: int = 1


class Outcome(NamedTuple):
    """What a release has come to."""

    kind: str
    how: How
    seconds: float
    reason: str
    answers: int = 0
    """By the candidate, as such, to callers."""
    harmed: int = 0
    """Of those that began meanwhile: none came, no 200, or not what the champion says."""
    late: int = 0
    """That the candidate gave later than what its stage calls slow."""
    stages: tuple[float, ...] = ()
    """The shares that it came to."""
    slow_s: float | None = None


class _Prediction(msgspec.Struct):
    p: float | None


class _Answer(msgspec.Struct):
    predictions: list[_Prediction]
    model_version: str
    route: str


_answers = msgspec.json.Decoder(_Answer)


def turns_that_take(seconds: float) -> int:
    """Turns of a loop that an execution takes so long for, on this machine as it is now."""
    session = InferenceSession(
        model("laborious", Turns(_TRIED_TURNS)).SerializeToString(),
        providers=["CPUExecutionProvider"],
    )
    took_s = []
    for _ in range(_TRIED):
        began_s = time.perf_counter()
        session.run(None, {"x": np.ones((1, 2), np.float32)})
        took_s.append(time.perf_counter() - began_s)
    return round(seconds / statistics.median(took_s) * _TRIED_TURNS)


class ReleasedService:
    """An async context manager: a Redis, a service with its versions, who asks it all the time,
    and who watches its state."""

    def __init__(
        self, folder: Path, asking: Asking, kinds: Sequence[Kind], turns: Turns, **sections: Any
    ) -> None:
        """`kinds` are the versions from 1 on, of which the first one serves; `sections` those of
        model.yaml."""
        self.folder = folder
        self._asking = asking
        self._kinds = kinds
        self._turns = turns
        self._sections = sections
        self.repository = folder / "models"
        self.versions: dict[int, Kind] = {}
        self.refused: dict[Kind, str] = {}
        """Why a version could not be published."""
        self.keys: list[str] = []
        """By the number of the request."""
        self.violations: list[str] = []
        self._counted: dict[int, ExposureTable] = {}
        """By the generation in which the stage began."""
        self.excused: list[tuple[float, float]] = []
        """Times in which a new worker may not have a candidate open."""
        self._rng = random.Random(asking.seed)
        self._over = asyncio.Event()
        self._stack = AsyncExitStack()

    @property
    def log(self) -> Path:
        """The decision log."""
        return self.folder / "work" / "decisions" / f"{MODEL}.jsonl"

    def version(self, kind: Kind, number: int = 0) -> int:
        """The first one of this kind, or a later one."""
        return [version for version, of in self.versions.items() if of == kind][number]

    def contract(self, **sections: Any) -> None:
        """Another model.yaml."""
        write_contract(self.repository, **(self._sections | sections))

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            self.contract()
            for kind in self._kinds:
                await self._publish(kind)
            (self.repository / MODEL / "CURRENT").write_text("1\n")
            self.redis = stack.enter_context(RedisProcess(self.folder / "redis"))
            self.service: ServiceProcess = stack.enter_context(
                serving(self.folder, self.repository, self.settings())
            )
            self.watch = await stack.enter_async_context(StateWatch(self.redis.url, MODEL))
            self.load = await stack.enter_async_context(self._checked_load())
            asking = asyncio.create_task(self.load.open_loop(self._asking.per_s, self._over.is_set))
            stack.push_async_callback(self._asked_to_the_end, asking)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._stack.aclose()

    def settings(self) -> Mapping[str, str]:
        return {
            "HIKYAKU_WORKERS": str(self._asking.workers),
            "HIKYAKU_REPOSITORY_POLL_S": "0",
            "STATE_REDIS_URL": self.redis.url,
        }

    async def quiet(self) -> None:
        """Nobody asks any more, and all that was asked has its outcome."""
        self._over.set()
        await self.load.settled()

    async def call(self, method: str, path: str, document: Any = None) -> Reply:
        """Over a connection of its own, again where its worker is killed meanwhile."""
        while True:
            try:
                async with Operator(self.service.port) as operator:
                    return await operator.call(method, path, document)
            except (OSError, asyncio.IncompleteReadError):
                await asyncio.sleep(_CALL_AGAIN_S)

    async def verb(self, verb: str, **document: Any) -> Reply:
        return await self.call("POST", f"/v1/models/{MODEL}:{verb}", document)

    async def must(self, verb: str, **document: Any) -> Reply:
        """Raises `RuntimeError` unless it is done."""
        reply = await self.verb(verb, **document)
        if reply.status != 200:
            raise RuntimeError(f"{verb} {document}: {reply.status} {reply.document}")
        return reply

    async def release(
        self,
        version: int,
        within_s: float,
        meanwhile: Callable[[], Awaitable[None]] | None = None,
    ) -> Outcome:
        """Until it is decided; what is not `within_s` is rolled back, and `undecided`."""
        kind = self.versions[version]
        began_s, first = time.monotonic(), len(self.watch.history)
        reply = await self.verb(
            "release", version=version, expected_per_s=self._asking.per_s, despite_quarantine=True
        )
        if reply.status != 200:
            return Outcome(kind, "refused", time.monotonic() - began_s, str(reply.document))
        generation = reply.document["generation"]
        troubling = None if meanwhile is None else asyncio.ensure_future(meanwhile())
        decided = await self.watch.until(
            lambda state: state.generation > generation and state.rollout is None, within_s
        )
        if troubling is not None:
            troubling.cancel()
            await asyncio.wait({troubling})
        if not decided:
            await self.verb("rollback")
            await self.watch.until(lambda state: state.rollout is None, 10)
        return self._outcome(version, began_s, first, decided)

    def _outcome(self, version: int, began_s: float, first: int, decided: bool) -> Outcome:
        state = self.watch.state
        champion = state.champion
        assert champion is not None
        reason = ""
        how: How = "promoted"
        if champion.version != version:
            how = "rolled back" if decided else "undecided"
            reason = state.quarantined[-1].reason
        rollouts = [seen.state.rollout for seen in self.watch.history[first:] if seen.state.rollout]
        stages = rollouts[-1].stages if rollouts else ()
        slow_s = stages[-1].stage.slow_s if stages else None
        ended_s = self.watch.history[-1].seen_s
        answers, harmed, late = self._felt(version, began_s, ended_s, slow_s)
        return Outcome(
            self.versions[version],
            how,
            ended_s - began_s,
            reason,
            answers,
            harmed,
            late,
            tuple(begun.stage.share for begun in stages),
            slow_s,
        )

    def _felt(
        self, version: int, began_s: float, ended_s: float, slow_s: float | None
    ) -> tuple[int, int, int]:
        """Answers by the candidate, those that are harmed, and those that are slow."""
        ledger = self.load.ledger
        sent_s = np.array(ledger.sent_s)
        codes = np.array(ledger.versions)[(sent_s >= began_s) & (sent_s <= ended_s)]
        took_s = (np.array(ledger.done_s) - sent_s)[(sent_s >= began_s) & (sent_s <= ended_s)]
        its = (codes >= 0) & ((codes & 0x3FF) == version) & ((codes >> 10 & 3) == 1)
        harmed = (codes < 0) | (its & ((codes >> 12) == 1))
        late = its & (took_s > (slow_s or np.inf))
        return int(its.sum()), int(harmed.sum()), int(late.sum())

    def answers(self) -> Iterator[Answered]:
        """Of all requests that a version has answered, so far."""
        ledger = self.load.ledger
        for number, sent_s, done_s, code in zip(
            ledger.numbers, ledger.sent_s, ledger.done_s, ledger.versions, strict=True
        ):
            if code >= 0:
                route = _ROUTES[code >> 10 & 3]
                yield Answered(self.keys[number], sent_s, done_s, code & 0x3FF, route)

    def audit(self, within_s: float = 1.0) -> Audit:
        """Of all answers so far."""
        return Auditor(MODEL, self.watch.history, within_s).audit([*self.answers()], self.excused)

    def faults(self) -> Iterator[str]:
        """Answers that are none, or not what their version says."""
        for what, count in self.load.ledger.faults.items():
            yield f"{count} answers: {what}"
        yield from self.load.ledger.samples

    async def counted(self, began: Sequence[int]) -> Mapping[int, ExposureTable]:
        """What all workers have counted in the stages that began in these generations."""
        await asyncio.sleep(_COUNTED_WITHIN_S)
        await self.keep_counted()
        return {generation: self._counted.get(generation, ExposureTable()) for generation in began}

    async def keep_counted(self) -> None:
        """The service keeps what was counted in the last stages only."""
        tables = RedisTables(
            self.redis.url, "proof", {KIND: ExposureTable.decode}, lambda refused: None
        )
        for name, stored in (await tables.read(f"{KIND}:{MODEL}:")).items():
            decoded = map(ExposureTable.decode, stored.contents)
            self._counted[began_of(name)] = sum(decoded, ExposureTable())
        await tables.close()

    async def workers(self) -> Sequence[str]:
        """The names of those that live, in order: the first one decides."""
        document = (await self.call("GET", f"/v1/models/{MODEL}")).document
        return sorted(document["workers"] or ())

    async def all_route(self) -> bool:
        """Whether as many workers as there are to be live, and route by a release that shares keys,
        if there is any: one that starts in the shadow stage has the candidate to open yet."""
        document = (await self.call("GET", f"/v1/models/{MODEL}")).document
        told = {
            int(name.split("-")[-2]): each for name, each in (document["workers"] or {}).items()
        }
        living = self.service.workers()
        rollout = document["release"]["rollout"]
        is_shared = rollout is None or rollout["stages"][-1]["stage"]["share"] > 0
        return (
            is_shared
            and len(living) == self._asking.workers
            and all(
                process in told and (rollout is None or told[process]["routes"])
                for process in living
            )
        )

    async def kill_decider(self) -> None:
        """kill -9 of the worker that decides."""
        names = await self.workers()
        living = set(self.service.workers())
        for name in names:
            process = int(name.split("-")[-2])
            if process in living:
                kill(process, signal.SIGKILL)
                return

    def replayed(self) -> str:
        """What `hikyaku decisions` says of the log; another verdict is a violation."""
        done = subprocess.run(
            [sys.executable, "-m", "app.cli", "decisions", str(self.log)],
            capture_output=True,
            text=True,
            check=False,
        )
        last = done.stdout.strip().rpartition("\n")[2]
        if done.returncode:
            self.violations.append(f"hikyaku decisions: {last or done.stderr[-500:]}")
        return last

    async def _publish(self, kind: Kind) -> None:

        try:
            self.versions[await publish_next(self.repository, kind, self._turns)] = kind
        except InvalidModel as exc:
            self.refused[kind] = str(exc)

    async def _asked_to_the_end(self, asking: "asyncio.Task[None]") -> None:
        self._over.set()
        await asking

    def _checked_load(self) -> CheckedLoad:
        rng, asking = self._rng, self._asking
        questions = [self._rows() for _ in range(_QUESTIONS)]
        bodies = [json.dumps({"instances": [*map(instance, rows)]}).encode() for rows in questions]
        # By a Zipf law: the first keys come most often.
        weights = 1 / np.arange(1, _STICKY_KEYS + 1)
        bounds = np.cumsum(weights / weights.sum()).tolist()

        def header(number: int) -> str:
            key = f"new-{asking.seed}-{number}"
            if rng.random() < asking.sticky:
                key = f"sticky-{np.searchsorted(bounds, rng.random())}"
            self.keys.append(key)
            return f"Routing-Key: {key}\r\n"

        def judged(body: bytes, question: int) -> tuple[int, str]:
            answer = _answers.decode(body)
            version = int(answer.model_version)
            kind = self.versions[version]
            code = version | _ROUTES.index(answer.route) << 10
            rows = questions[question]
            is_good = kind in _GOOD
            right = [said(kind if is_good else "champion", row) for row in rows]
            if [each.p for each in answer.predictions] == right:
                return code, ""
            return (code, "wrong") if is_good else (code | 1 << 12, "")

        path = f"/v1/models/{MODEL}:predict"
        return CheckedLoad(
            self.service.port,
            path,
            bodies,
            judged,
            connections=asking.connections,
            seed=asking.seed,
            header=header,
        )

    def _rows(self) -> list[Row]:
        rng = self._rng
        is_large = rng.random() < self._asking.large
        count = LARGE_ROWS if is_large else rng.randint(1, _MOST_INSTANCES)
        return [(rng.randrange(INPUTS), rng.randrange(INPUTS)) for _ in range(count)]
