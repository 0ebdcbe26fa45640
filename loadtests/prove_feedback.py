"""Shows that every label counts once, and what the quality is, while everything is restarted.

    python -m loadtests.prove_feedback --calls 1000000 --workers 2

A real service with a state Redis answers predictions. Then labels are told, shuffled: for most of
the predictions, a fifth of all twice, a twentieth for ids that never were, one by one and in
batches, from many connections. Meanwhile workers are killed (-9), the service is restarted, the
Redis is restarted and killed. A call without an answer, or with a 503, is made again. At the end of
each round the replay clock passes the horizon, and the quality table is held against the same rows
offline. Exit status 1 unless all counts are exact. In the end more is predicted than the byte cap
lets in.
"""

import argparse
import asyncio
import contextlib
import os
import random
import re
import secrets
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import redis
import uvloop
from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score

from app.labels.bucket import Keys
from app.labels.document import quality_document
from app.labels.form import LabelForm
from app.labels.maturity import read_quality
from app.labels.transactions import Transactions
from app.release.redis_line import RedisLine, state_address
from app.release.state import StateUnavailable
from loadtests.redis_process import RedisProcess
from loadtests.service_process import Operator, Reply, ServiceProcess, serving
from tests.tiny_models import write_model

MODEL = "m"
_START = datetime(2013, 10, 1, tzinfo=UTC)
_HORIZON_S = 3_600
_ROUND = timedelta(seconds=2 * _HORIZON_S)
_FORM = LabelForm("binary", "probability", (), (("a=..0", "a=0..", "a=other"),))
_DUPLICATES, _UNKNOWN, _VOID, _MISSING, _LATE = 0.2, 0.05, 0.02, 0.05, 0.01
_CONNECTIONS = 24
_MOST_WAITING = 5_000
_OUTCOME = re.compile(r'hikyaku_label_predictions_total\{model="m",outcome="(\w+)"\} (\S+)')
_MOST_S = 120.0
_EXACT = 1e-9


@dataclass(frozen=True)
class Plan:
    """What is to be proved, and how much of it."""

    calls: int = 1_000_000
    """Labels told, duplicates and unknown ids among them, repetitions of lost calls not."""
    alone: int = 20_000
    """So many of them one by one."""
    rounds: int = 5
    workers: int = 2
    megabytes: int = 40
    disturbances: Sequence[str] = ("worker", "redis", "service", "worker", "redis killed", "worker")
    """In each round, evenly spread."""
    seed: int = 1
    flood: bool = True
    """Whether more is predicted in the end than the cap lets in."""


@dataclass
class Prediction:
    """One row, and what was told about it."""

    request: str
    instance: int
    score: float
    label: bool | None
    is_told: bool
    accepted: int = 0
    duplicate: int = 0
    lost: int = 0
    """Calls about it that had no answer."""


@dataclass
class Report:
    """What was seen."""

    told: Counter[str] = field(default_factory=Counter)
    lost_calls: int = 0
    disturbed: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    predictions: int = 0
    calls: int = 0
    seconds: float = 0.0
    telling_s: float = 0.0
    most_charged: int = 0
    most_used: int = 0
    cap: int = 0
    not_kept: int = 0

    def expect(self, what: str, seen: Any, expected: Any) -> None:
        if seen != expected:
            self.faults.append(f"{what}: {seen}, not {expected}")


class Proof:
    """One run; what is run is restarted as one goes."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan = plan
        self.report = Report(cap=plan.megabytes * 1_000_000)
        self._folder = folder
        self._rng = random.Random(plan.seed)
        self._redis = RedisProcess(folder / "redis", "appendfsync always")
        self._service_stack = ExitStack()
        self._service: ServiceProcess
        self._is_serving = asyncio.Event()
        self._progress = asyncio.Event()
        """Set with each call that is begun."""
        self._now = _START
        self._keys = Keys(MODEL)
        self._of_last_round: list[Prediction] = []
        self._judged: list[Prediction] = []

    async def run(self) -> Report:
        began_s = time.monotonic()
        await write_model(
            self._folder / "models",
            MODEL,
            "binary",
            labels={
                "horizon": {"after_s": _HORIZON_S},
                "max_megabytes": self.plan.megabytes,
            },
            segments={"a": {"edges": [0]}},
            limits={"max_instances": 1_000, "default_timeout_ms": 20_000},
        )
        with self._redis, self._service_stack:
            await self._start()
            empty = await self._used()
            for number in range(self.plan.rounds):
                await self._round(number, empty)
            if self.plan.flood:
                await self._flood(empty)
        self.report.seconds = time.monotonic() - began_s
        return self.report

    async def _start(self) -> None:
        settings = {
            "STATE_REDIS_URL": self._redis.url,
            "HIKYAKU_WORKERS": str(self.plan.workers),
            "HIKYAKU_REPLAY_CLOCK": self._now.isoformat(),
        }
        context = serving(self._folder, self._folder / "models", settings)
        self._service = await asyncio.to_thread(self._service_stack.enter_context, context)
        self._is_serving.set()

    async def _stop(self) -> None:
        self._is_serving.clear()
        stack = self._service_stack.pop_all()
        await asyncio.to_thread(stack.close)

    async def _round(self, number: int, empty: int) -> None:
        plan = self.plan
        of_round = plan.calls // plan.rounds
        duplicates, unknown = int(_DUPLICATES * of_round), int(_UNKNOWN * of_round)
        late = int(_LATE * of_round) if self._of_last_round else 0
        told = of_round - duplicates - unknown - late
        predictions = await self._predict(int(told / (1 - _MISSING)))
        self._look_at_bytes(empty, await self._used(), await self._charged())
        outcomes = await self._outcomes()
        if outcomes.keys() > {"kept"}:
            self.report.faults.append(f"predictions were left out: {dict(outcomes)}")
        calls = await self._tell(predictions, told, duplicates, unknown, late)
        self._look_at_bytes(empty, await self._used(), await self._charged())
        self._check_labels(predictions, told)
        await self._mature()
        await self._check_quality()
        self._of_last_round = predictions
        print(
            f"round {number + 1}: {len(predictions):,} predictions, {calls:,} labels,"
            f" {dict(self.report.told)}, faults {len(self.report.faults)}",
            flush=True,
        )

    async def _predict(self, rows: int) -> list[Prediction]:
        """Of requests of all sizes."""
        sizes = []
        while rows > sum(sizes):
            sizes.append(1 if self._rng.random() < 0.5 else self._rng.randint(2, 1_000))
        predictions: list[Prediction] = []
        left = iter(sizes)
        before = sum((await self._outcomes()).values())
        slow = asyncio.Lock()

        async def written(most_waiting: int) -> None:
            """Wait until so few are not written yet: with many more some would be left out."""
            until_s = time.monotonic() + _MOST_S
            async with slow:
                while sum((await self._outcomes()).values()) - before < (
                    len(predictions) - most_waiting
                ):
                    if time.monotonic() > until_s:
                        self.report.faults.append("predictions are never written")
                        return
                    await asyncio.sleep(0.05)

        seeds = [self._rng.random() for _ in range(_CONNECTIONS)]

        async def client(seed: float) -> None:
            rng = random.Random(seed)
            async with Operator(self._service.port) as caller:
                for number, size in enumerate(left):
                    if number % 4 == 0:
                        await written(_MOST_WAITING)
                    a = [round(rng.gauss(0, 2), 3) for _ in range(size)]
                    body = {"instances": [{"a": each, "b": 0.0} for each in a]}
                    reply = await caller.call("POST", f"/v1/models/{MODEL}:predict", body)
                    assert reply.status == 200, reply
                    request = reply.document["request_id"]
                    for at, said in enumerate(reply.document["predictions"]):
                        score = said["probability"]
                        label = None if rng.random() < _VOID else rng.random() < score
                        predictions.append(Prediction(request, at, score, label, True))

        await asyncio.gather(*map(client, seeds))
        await written(0)
        self.report.predictions += len(predictions)
        return predictions

    async def _tell(
        self,
        predictions: Sequence[Prediction],
        told: int,
        duplicates: int,
        unknown: int,
        late: int,
    ) -> int:
        """How many labels were told, in any order."""
        order = list(predictions)
        self._rng.shuffle(order)
        for prediction in order[told:]:
            prediction.is_told = False
        some = order[:told]
        entries: list[tuple[Prediction, str]] = [(each, "known") for each in some]
        entries += [(each, "known") for each in self._rng.choices(some, k=duplicates)]
        for number in range(unknown):
            request = secrets.token_hex(16)
            if number % 2:  # as if this worker had given it
                request = self._rng.choice(some).request[:14] + request[14:]
            entries.append((Prediction(request, 0, 0.0, True, False), "unknown"))
        if late:
            entries += [(each, "late") for each in self._rng.choices(self._of_last_round, k=late)]
        self._rng.shuffle(entries)
        alone = self.plan.alone // self.plan.rounds
        calls: list[list[tuple[Prediction, str]]] = [[each] for each in entries[:alone]]
        rest = entries[alone:]
        while rest:
            size = self._rng.randint(1, 4_000)
            calls.append(rest[:size])
            rest = rest[size:]
        self._rng.shuffle(calls)
        began_s = time.monotonic()
        disturbing = asyncio.create_task(self._disturb(calls))
        await self._all_told(calls)
        self.report.telling_s += time.monotonic() - began_s
        await disturbing
        self.report.calls += len(entries)
        return len(entries)

    async def _all_told(self, calls: list[list[tuple[Prediction, str]]]) -> None:
        async def client() -> None:
            while calls:
                call = calls.pop()
                self._progress.set()
                while not await self._one_told(call):
                    self.report.lost_calls += 1
                    for prediction, _ in call:
                        prediction.lost += 1
                    await asyncio.sleep(0.05)

        await asyncio.gather(*(client() for _ in range(_CONNECTIONS)))

    async def _one_told(self, call: Sequence[tuple[Prediction, str]]) -> bool:
        """Whether there was an answer. A connection each, so that all workers are told some."""
        labels = [
            {"request_id": each.request, "instance": each.instance, "label": each.label}
            for each, _ in call
        ]
        is_alone = len(labels) == 1
        body = labels[0] if is_alone else {"labels": labels}
        async with AsyncExitStack() as stack:
            caller = await self._connected(stack)
            try:
                reply = await caller.call("POST", f"/v1/models/{MODEL}:feedback", body)
            except (OSError, asyncio.IncompleteReadError):
                return False
        if reply.status == 503:
            return False
        statuses = [_status(reply)] if is_alone else _statuses(reply)
        for (prediction, kind), status in zip(call, statuses, strict=True):
            self._told(prediction, kind, status)
        return True

    async def _connected(self, stack: AsyncExitStack) -> Operator:
        """As soon as there is somebody."""
        while True:
            await self._is_serving.wait()
            with contextlib.suppress(OSError):
                return await stack.enter_async_context(Operator(self._service.port))
            await asyncio.sleep(0.05)

    def _told(self, prediction: Prediction, kind: str, status: str) -> None:
        self.report.told[f"{kind} {status}" if kind != "known" else status] += 1
        match kind, status:
            case "known", "accepted":
                prediction.accepted += 1
            case "known", "duplicate":
                prediction.duplicate += 1
            case ("unknown", "unknown") | ("late", "expired"):
                pass
            case _:
                self.report.faults.append(f"{kind} label was told to be {status}")

    async def _disturb(self, calls: Sequence[Any]) -> None:
        """Everything in its turn, evenly spread over the calls."""
        whole = len(calls)
        for number, what in enumerate(self.plan.disturbances):
            left = whole * (1 - (number + 0.5) / len(self.plan.disturbances))
            while len(calls) > left:
                self._progress.clear()
                await self._progress.wait()
            await self._disturbed(what)
            self.report.disturbed[what] += 1

    async def _disturbed(self, what: str) -> None:
        match what:
            case "worker":
                os.kill(self._rng.choice(self._service.workers()), signal.SIGKILL)
            case "service":
                await self._stop()
                await self._start()
            case "redis":
                with self._asked() as client:
                    client.shutdown()
                self._redis.kill()  # it has ended
                self._redis.launch()
                await self._redis.good_reply()
            case "redis killed":
                self._redis.kill()
                self._redis.launch()
                await self._redis.good_reply()

    def _check_labels(self, predictions: Sequence[Prediction], told: int) -> None:
        """Each was accepted once. An answer that was lost may have said so."""
        self.report.expect("labels told", sum(each.is_told for each in predictions), told)
        for each in predictions:
            if each.is_told and each.accepted != 1 and (each.accepted > 1 or not each.lost):
                self.report.faults.append(f"accepted {each.accepted} times: {each}")
            if not each.is_told and each.accepted + each.duplicate:
                self.report.faults.append(f"was never told: {each}")
            if each.is_told and not each.accepted + each.duplicate:
                self.report.faults.append(f"is not known to be there: {each}")
        self._judged += predictions

    async def _mature(self) -> None:
        """The horizon passes; a worker is killed meanwhile, unless there is only one."""
        self._now += _ROUND
        async with Operator(self._service.port) as caller:
            instant = {"now": self._now.isoformat()}
            reply = await caller.call("PUT", "/v1/replay-clock", instant)
            assert reply.status == 200, reply
        if self.plan.disturbances:
            await asyncio.sleep(self._rng.uniform(0.2, 1.5))
            await self._disturbed("worker")
        until_s = time.monotonic() + _MOST_S
        with self._asked() as client:
            while client.zcard(self._keys.due):
                if time.monotonic() > until_s:
                    self.report.faults.append("predictions are never judged")
                    return
                await asyncio.sleep(0.1)
        self.report.expect("bytes when all are judged", await self._charged(), 0)

    async def _check_quality(self) -> None:
        [version] = (await self._quality())["versions"]
        told = [each for each in self._judged if each.is_told]
        kept = [each for each in told if each.label is not None]
        self.report.expect("due", version["due"], len(self._judged))
        self.report.expect("labelled", version["labelled"], len(kept))
        self.report.expect("void", version["void"], len(told) - len(kept))
        self.report.expect("missing", version["missing"], len(self._judged) - len(told))
        truth = np.array([each.label for each in kept], np.bool_)
        scores = np.array([each.score for each in kept])
        for name, seen, offline in (
            ("auc", version["auc"]["value"], roc_auc_score(truth, scores)),
            ("log loss", version["losses"]["log_loss"]["value"], log_loss(truth, scores)),
            ("brier", version["losses"]["brier"]["value"], brier_score_loss(truth, scores)),
        ):
            if abs(seen - offline) > _EXACT:
                self.report.faults.append(f"{name}: {seen!r}, offline {offline!r}")

    async def _quality(self) -> dict[str, Any]:
        line = RedisLine(state_address(self._redis.url))
        try:
            for _ in range(20):
                try:
                    table = await read_quality(Transactions(line), self._keys, _FORM)
                    return quality_document(_FORM, table)
                except StateUnavailable:
                    await asyncio.sleep(0.1)
            raise TimeoutError("the quality cannot be read")
        finally:
            line.close("the proof ends")

    async def _flood(self, empty: int) -> None:
        """More is predicted than may be kept."""
        predictions = await self._predict(self.plan.megabytes * 1_000_000 // 60)
        self._look_at_bytes(empty, await self._used(), await self._charged())
        self.report.not_kept = (await self._outcomes())["full"]
        if not 0 < self.report.not_kept < len(predictions):
            self.report.faults.append(f"{self.report.not_kept} predictions over the cap")

    async def _outcomes(self) -> Counter[str]:
        """Predictions by whether they are kept, since the service was started."""
        async with Operator(self._service.port) as caller:
            metrics = (await caller.call("GET", "/metrics")).document
        return Counter({outcome: int(float(count)) for outcome, count in _OUTCOME.findall(metrics)})

    def _look_at_bytes(self, empty: int, used: int, charged: int) -> None:
        report = self.report
        report.most_charged = max(report.most_charged, charged)
        report.most_used = max(report.most_used, used - empty)
        if charged > report.cap:
            report.faults.append(f"{charged:,} bytes are accounted for")
        if used - empty > report.cap:
            report.faults.append(f"{used - empty:,} bytes are used")

    async def _used(self) -> int:
        """Bytes that the Redis has for what is kept: without its connections, its buffers, and the
        quality table."""
        with self._asked() as redis:
            memory = redis.info("memory")
            tables = sum(redis.memory_usage(key) for key in redis.keys("*:quality:*"))
        beside = memory["mem_clients_normal"] + memory["mem_aof_buffer"]
        return int(memory["used_memory"] - beside - tables)

    async def _charged(self) -> int:
        with self._asked() as redis:
            return int(redis.get(self._keys.charged) or 0)

    def _asked(self) -> "redis.Redis[Any]":
        return redis.Redis(port=self._redis.port, password=self._redis.password)


async def prove(plan: Plan, folder: Path) -> Report:
    """Run it; what it keeps is in `folder`."""
    return await Proof(plan, folder).run()


def _status(reply: Reply) -> str:
    """Of a label that was told alone."""
    if reply.status == 200:
        return str(reply.document["status"])
    return str(reply.document["error"]["message"].partition(":")[0])


def _statuses(reply: Reply) -> Sequence[str]:
    assert reply.status == 200, reply
    statuses = [result["status"] for result in reply.document["results"]]
    assert all(reply.document[status] == n for status, n in Counter(statuses).items())
    return statuses


def shown(report: Report) -> Iterator[str]:
    """What was seen, in lines."""
    yield f"{report.predictions:,} predictions, of which {report.calls:,} labels were told, in "
    yield f"  {report.seconds:.0f} s ({report.calls / report.telling_s:,.0f} labels a second)"
    yield f"  disturbed by {dict(report.disturbed)}; {report.lost_calls} calls without an answer"
    yield f"  told: {dict(sorted(report.told.items()))}"
    yield (
        f"  kept: at most {report.most_charged:,} bytes accounted for, {report.most_used:,} used,"
        f" of {report.cap:,}; {report.not_kept:,} predictions over that were not kept"
    )
    kinds = {fault.partition(":")[0]: fault for fault in report.faults}
    for fault in list(kinds.values())[:20]:  # the last of each kind
        yield f"  FAULT: {fault}"
    yield f"  {len(report.faults)} faults"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=Plan.calls)
    parser.add_argument("--alone", type=int, default=Plan.alone)
    parser.add_argument("--rounds", type=int, default=Plan.rounds)
    parser.add_argument("--workers", type=int, default=Plan.workers)
    parser.add_argument("--megabytes", type=int, default=Plan.megabytes)
    parser.add_argument("--seed", type=int, default=Plan.seed)
    plan = Plan(**vars(parser.parse_args()))
    with tempfile.TemporaryDirectory() as folder:
        report = uvloop.run(prove(plan, Path(folder)))
    print("\n".join(shown(report)))
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main())
