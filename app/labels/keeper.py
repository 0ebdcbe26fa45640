"""Everything that one worker does about labels, as an async context manager."""

import asyncio
import logging
import secrets
import time
from collections.abc import Collection, Sequence
from types import TracebackType
from typing import Self

from app.clock import FeatureClock
from app.contract import Contract
from app.errors import ModelNotReady, NotFound
from app.features.redis_connection import command
from app.labels.bucket import Keys
from app.labels.document import live_quality
from app.labels.feedback import Feedback, Outcome, Told
from app.labels.maturity import Maturity, read_quality
from app.labels.quality import QualityTable
from app.labels.recorder import LabelRecorder
from app.labels.sample import LabelSample, SegmentReader
from app.labels.transactions import Transactions
from app.labels.writer import SampleWriter
from app.release.redis_line import RedisLine, state_address
from app.release.state import StateUnavailable
from app.tasks import ended
from app.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

_WRITE_EVERY_S = 0.1
_LOOK_EVERY_S = 1.0
_LAST_WRITE_S = 2.0
_LONGEST_PAUSE_S = 1.0


class LabelKeeper:
    """Keeps the predictions of each model that has labels, joins what is told about them, and
    counts them once their horizon has passed, in the Redis at `url`.

    Three connections: two are for transactions, of those who write and of those who take out.
    """

    def __init__(self, url: str, clock: FeatureClock, metrics: Metrics) -> None:
        """Raises `ConfigurationError` for an address that is none; asks nothing yet."""
        address = state_address(url)
        lines = [RedisLine(address, longest_pause_s=_LONGEST_PAUSE_S) for _ in range(3)]
        self._lines = lines
        self._writing, self._taking = Transactions(lines[0]), Transactions(lines[1])
        self._telling = lines[2]
        self._clock = clock
        self._metrics = metrics
        self._worker = secrets.token_hex(8).encode()
        self._models: dict[str, _Model] = {}
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        for work, name in ((self._write, "labels kept"), (self._look, "labels due")):
            self._tasks.append(asyncio.create_task(work(), name=name))
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for task in self._tasks:
            await ended(task)
        try:
            async with asyncio.timeout(_LAST_WRITE_S):
                await self._write_all()
        except (StateUnavailable, TimeoutError) as failure:
            log.warning("the last predictions were not kept for labels", exc_info=failure)
        for model in self._models.values():
            model.give_up()
        for line in self._lines:
            line.close("the worker ends")

    def sample(
        self, name: str, contract: Contract, segments: SegmentReader, fields: Collection[str]
    ) -> LabelSample:
        """Of a model whose contract has labels; the same while the contract is the same. `fields`
        are the names that its instances have. Raises `InvalidModel`."""
        model = self._models.get(name)
        if model is not None and model.sample.contract == contract:
            return model.sample
        sample = LabelSample(contract, segments, fields, self._clock)
        if model is None:
            model = self._models[name] = _Model(
                name,
                self._writing,
                self._taking,
                self._telling,
                self._clock,
                sample,
                self._metrics,
            )
        model.begin(sample)
        return sample

    async def tell(self, name: str, labels: Sequence[Told]) -> list[Outcome]:
        """What became of each label, in order (`Feedback.tell`). Raises `NotFound` for a model
        without labels, `InvalidInput`, and `ModelNotReady` while the Redis does not answer: what
        was told may have been accepted then, and may be told again."""
        if name not in self._models:
            raise NotFound("this model takes no labels: its model.yaml declares none")
        try:
            return await self._models[name].feedback.tell(labels)
        except StateUnavailable as exc:
            raise ModelNotReady(f"labels cannot be kept now: {exc}") from exc

    async def quality(self, name: str) -> tuple[LabelSample, QualityTable] | None:
        """Of the model's predictions whose horizon has passed; None of one without labels. Raises
        `StateUnavailable`."""
        model = self._models.get(name)
        if model is None:
            return None
        table = await read_quality(self._taking, model.keys, model.sample.form)
        return model.sample, table

    async def _write(self) -> None:
        trouble = ""
        while True:
            await asyncio.sleep(_WRITE_EVERY_S)
            try:
                await self._write_all()
                trouble = ""
            except StateUnavailable as exc:
                if not trouble:  # it is tried again ten times a second
                    trouble = str(exc)
                    log.warning("predictions wait to be kept", extra={"reason": trouble})
            except Exception as exc:
                log.error("predictions were not kept: a defect", exc_info=exc)

    async def _write_all(self) -> None:
        for model in self._models.values():
            await model.write()

    async def _look(self) -> None:
        """The more there is to be done the less pause there is."""
        more = False
        while True:
            await asyncio.sleep(0 if more else _LOOK_EVERY_S)
            more = False
            for model in self._models.values():
                try:
                    more |= await model.mature(self._worker)
                except StateUnavailable as exc:
                    log.debug("no predictions are taken out", extra={"reason": str(exc)})
                except Exception as exc:
                    log.error("predictions were not taken out: a defect", exc_info=exc)


class _Model:
    """What is kept of one model. Its contract may change: what was sampled by the one before is
    still written."""

    def __init__(
        self,
        name: str,
        writing: Transactions,
        taking: Transactions,
        telling: RedisLine,
        clock: FeatureClock,
        sample: LabelSample,
        metrics: Metrics,
    ) -> None:
        self.sample = sample
        self.keys = Keys(name)
        self._recorder = LabelRecorder(metrics, name)
        self._writing, self._taking, self._clock = writing, taking, clock
        self._writers: list[SampleWriter] = []
        self._maturity = Maturity(self.keys, taking, clock)
        self.feedback = Feedback(telling, self.keys, clock, lambda: self.sample, self._recorder)
        self._shown: tuple[bytes, int] | None = None
        """The form of the quality that is told by the metrics, and when it changed."""
        self._shown_s = 0.0

    def begin(self, sample: LabelSample) -> None:
        self.sample = sample
        self._writers.append(
            SampleWriter(sample, self.keys, self._writing, self._clock, self._recorder.kept)
        )

    async def write(self) -> None:
        for writer in self._writers:
            await writer.write()
        # What the others have sampled is written. Their requests may still be under way.
        del self._writers[:-_MOST_WRITERS]

    def give_up(self) -> None:
        for writer in self._writers:
            writer.give_up()

    async def mature(self, worker: bytes) -> bool:
        more = await self._maturity.take_turn(worker)
        if not more:
            await self._maturity.gather(self.sample.form)
            await self._show()
        return more

    async def _show(self) -> None:
        """The metrics of quality, when it has changed."""
        if time.monotonic() - self._shown_s < _SHOW_EVERY_S:
            return
        self._shown_s = time.monotonic()
        form = self.sample.form
        async with self._taking.alone():
            reads = (command(b"GET", key) for key in (self.keys.changes, self.keys.charged))
            changes, charged = await self._taking.read(*reads)
        labels = self.sample.contract.labels
        assert labels is not None
        self._recorder.filled(int(charged or 0), 1_000_000 * labels.max_megabytes)
        shown = (form.digest, int(changes or 0))
        if shown != self._shown and shown[1]:
            table = await read_quality(self._taking, self.keys, form)
            self._recorder.quality(*await asyncio.to_thread(live_quality, form, table))
            self._shown = shown


_MOST_WRITERS = 4
_SHOW_EVERY_S = 10.0
