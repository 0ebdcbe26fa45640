"""A lane whose candidate is executed by the test."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.backends.execution_times import ExecutionTimes
from app.batching.priority import Priority
from app.clock import WallClock
from app.comparison.pairs import Pairs
from app.comparison.segments import SegmentReader
from app.deadline import Deadline
from app.predictor import Answer, Asker, Predictor
from app.served_model import Candidate, OpenVersion, ServedModel
from app.shadow.block import Block, Said, pairs_of
from app.shadow.lane import Lane
from app.shadow.sampling import SamplingPolicy
from app.tensors import Signature, Tensors
from tests.tiny_models import Kind, loaded, write_model

Execute = Callable[[Tensors], Tensors]


class Gated:
    """A backend behind a gate: it answers with `execute`, which may raise."""

    signature = Signature((), ())
    concurrency = 1

    def __init__(self, execute: Execute) -> None:
        self.execute_now = execute
        self.gate = asyncio.Event()
        self.gate.set()
        self.executed: list[Tensors] = []
        self.begun = asyncio.Event()

    async def execute(self, inputs: Tensors, deadline: Deadline) -> Tensors:
        self.executed.append(inputs)
        self.begun.set()
        await self.gate.wait()
        return self.execute_now(inputs)

    async def warm_up(self, example: Tensors, max_rows: int) -> ExecutionTimes:
        return ExecutionTimes({})

    async def check(self) -> None: ...

    async def close(self) -> None: ...


class Told:
    """What a lane told of its rows."""

    def __init__(self) -> None:
        self.compared: list[Pairs] = []
        self.said: list[Said] = []
        self.drops: list[tuple[str, int]] = []
        self._news = asyncio.Event()

    def answered(self, block: Block, said: Said) -> None:
        champion = block.champion
        segments = SegmentReader(champion.contract, champion.decoder.required)
        self.compared.append(pairs_of([(block, said)], segments))
        self.said.append(said)
        self._news.set()

    def dropped(self, champion: ServedModel, reason: str, rows: int) -> None:
        self.drops.append((reason, rows))
        self._news.set()

    @property
    def rows(self) -> int:
        return sum(map(len, self.compared)) + sum(rows for _, rows in self.drops)

    async def about(self, rows: int) -> "Told":
        """Once it was told of so many rows."""
        async with asyncio.timeout(20):
            while self.rows < rows:
                self._news.clear()
                await self._news.wait()
        return self

    def column(self, name: str) -> list[Any]:
        """Of all pairs."""
        return [value for pairs in self.compared for value in getattr(pairs, name).tolist()]


class Setting:
    """A champion that answers, and a lane that is offered its answers."""

    def __init__(self, champion: ServedModel, lane: Lane, backend: Gated, told: Told) -> None:
        self.champion = champion
        self.lane = lane
        self.backend = backend
        self.told = told
        self.predictor = Predictor(
            {champion.id.model: champion}, WallClock(), {champion.id.model: lane}
        )
        self.answers: list[Answer] = []

    async def ask(
        self, *instances: Mapping[str, Any], request_id: str = "0" * 32, key: str | None = None
    ) -> Answer:
        """Answered by the champion; what it was answered has been offered."""
        body = json.dumps({"instances": instances}).encode()
        decoded = self.champion.decoder.decode(body)
        answered: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()

        def tell(answer: Answer | Exception) -> None:
            if isinstance(answer, Exception):
                answered.set_exception(answer)
            else:
                answered.set_result(answer)

        asker = Asker(request_id, "", key)
        self.predictor.begin(self.champion, decoded, Deadline.after(20), Priority.LIVE, asker, tell)
        return await answered


def probabilities(yes: NDArray[Any]) -> Tensors:
    """What a binary model says."""
    return {"probabilities": np.stack([1 - yes, yes], axis=1).astype(np.float32)}


def as_champion(inputs: Tensors) -> Tensors:
    """What a tiny binary model says."""
    a, b = inputs["x"].astype(np.float64).T
    return probabilities(1 / (1 + np.exp(b - a)))


@asynccontextmanager
async def lane(
    folder: Path,
    execute: Execute = as_champion,
    *,
    kind: Kind = "binary",
    policy: SamplingPolicy | None = None,
    candidate: Mapping[str, Any] | None = None,
    **contract: Any,
) -> AsyncIterator[Setting]:
    """Of a tiny model; `candidate` has the parts of the candidate that are not the champion's,
    `contract` sections of the model.yaml."""
    await write_model(folder / "models", "m", kind, **contract)
    async with loaded(folder / "models" / "m") as champion:
        parts = {part.name: getattr(champion, part.name) for part in fields(OpenVersion)}
        backend, told = Gated(execute), Told()
        shown = Candidate(**parts | dict(candidate or {}), backend=backend)
        made = Lane(shown, policy, told, lambda: 0.0)
        try:
            yield Setting(champion, made, backend, told)
        finally:
            backend.gate.set()
            await made.close()
