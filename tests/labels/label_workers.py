"""Workers that answer, keep what they answered, take labels and count them, in one process."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.batching.priority import Priority
from app.clock import FeatureClock, ReplayClock
from app.comparison.segments import SegmentReader
from app.deadline import Deadline
from app.labels.bucket import Keys
from app.labels.document import quality_document
from app.labels.feedback import Feedback, Outcome, Told
from app.labels.maturity import Maturity, read_quality
from app.labels.recorder import LabelRecorder
from app.labels.sample import LabelSample
from app.labels.transactions import Transactions
from app.labels.writer import SampleWriter
from app.predictor import Answer, Asker, Predictor
from app.release.redis_line import RedisLine, state_address
from app.served_model import ServedModel, VersionId
from app.telemetry.metrics import Metrics
from tests.tiny_models import loaded, write_model

START = datetime(2013, 10, 1, tzinfo=UTC)
HOUR_S = 3_600.0
LABELS: Mapping[str, Any] = {"horizon": {"after_s": 2 * HOUR_S}}
CANDIDATE = VersionId("m", 2, "22" * 32)
BEGAN = 3
"""In which generation it was first shown requests."""


def clock() -> ReplayClock:
    return ReplayClock(START)


def advance(clock: ReplayClock, seconds: float) -> None:
    clock.advance(datetime.fromtimestamp(clock.now_s() + seconds, UTC))


class Worker:
    """One incarnation of a worker with one model."""

    def __init__(self, url: str, model: ServedModel, clock: FeatureClock) -> None:
        fields = model.contract.request_fields
        self.metrics = Metrics()
        self.model = model
        self.sample = LabelSample(
            model.contract, SegmentReader(model.contract, fields), fields, clock
        )
        self._lines = [RedisLine(state_address(url)) for _ in range(3)]
        keys = Keys("m")
        recorder = LabelRecorder(self.metrics, "m")
        writing, self._taking = Transactions(self._lines[0]), Transactions(self._lines[1])
        self.writer = SampleWriter(self.sample, keys, writing, clock, recorder.kept)
        self.maturity = Maturity(keys, self._taking, clock)
        self.feedback = Feedback(self._lines[2], keys, clock, lambda: self.sample, recorder)
        self.answered: dict[str, list[float]] = {}
        """The probabilities, by request."""
        self._keys = keys
        self._predictor = Predictor({"m": model}, clock, {"m": self.sample})

    def close(self) -> None:
        for line in self._lines:
            line.close("the test ends")

    async def predict(self, *instances: Mapping[str, Any]) -> str:
        """The id of the request."""
        return await self.predict_as(self.sample.ids.next(), *instances)

    async def predict_as(self, request_id: str, *instances: Mapping[str, Any]) -> str:
        decoded = self.model.decoder.decode(json.dumps({"instances": instances}).encode())
        told: asyncio.Future[Answer | Exception] = asyncio.Future()
        asker = Asker(request_id)
        self._predictor.begin(
            self.model, decoded, Deadline.after(10), Priority.LIVE, asker, told.set_result
        )
        answer = await told
        assert isinstance(answer, Answer), answer
        self.answered[request_id] = [p.get("probability", 0.0) for p in answer.predictions]
        return request_id

    async def keep(self, *instances: Mapping[str, Any]) -> str:
        """`predict`, and have it written."""
        request_id = await self.predict(*instances)
        await self.writer.write()
        return request_id

    def compare(self, request_id: str, numbers: NDArray[np.float64], began: int = BEGAN) -> None:
        self.sample.compared(request_id, CANDIDATE, began, 0, numbers)

    async def tell(self, request_id: str, label: Any, instance: int = 0) -> Outcome:
        [outcome] = await self.feedback.tell([Told(request_id, label, instance)])
        return outcome

    async def tell_all(self, labels: Sequence[tuple[str, int, Any]]) -> list[Outcome]:
        return await self.feedback.tell([Told(each, label, at) for each, at, label in labels])

    async def mature(self) -> None:
        while await self.maturity.take_turn(b"me"):
            pass

    async def quality(self) -> dict[str, Any]:
        table = await read_quality(self._taking, self._keys, self.sample.form)
        return quality_document(self.sample.form, table)


@asynccontextmanager
async def tiny_model(folder: Path, **contract: Any) -> AsyncIterator[ServedModel]:
    """The binary one: probability = 1 / (1 + exp(b - a))."""
    kind = contract.pop("kind", "binary")
    await write_model(folder / "models", "m", kind, **({"labels": LABELS} | contract))
    async with loaded(folder / "models" / "m") as model:
        yield model
