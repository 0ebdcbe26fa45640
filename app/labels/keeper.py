"""Everything that one worker does about labels, as an async context manager."""

import asyncio
import logging
import secrets
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, Self

from app.clock import FeatureClock
from app.comparison.pairs import FloatArray
from app.comparison.segments import SegmentReader
from app.errors import ModelNotReady, NotFound
from app.features.redis_connection import command
from app.labels.bucket import Keys
from app.labels.document import live_quality, quality_document
from app.labels.feedback import Feedback, Outcome, Told
from app.labels.form import LabelForm
from app.labels.losses import Losses, losses_by_segment
from app.labels.maturity import Maturity, read_quality
from app.labels.quality import QualityTable, pair_name, version_name
from app.labels.recorder import LabelRecorder
from app.labels.sample import LabelSample
from app.labels.transactions import Transactions
from app.labels.writer import SampleWriter
from app.predictor import Answer, Asker, Observer
from app.release.redis_line import RedisLine, state_address
from app.release.state import Chosen, StateUnavailable
from app.request_ids import RequestIds
from app.served_model import ServedModel, VersionId
from app.tasks import ended
from app.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

_WRITE_EVERY_S = 0.1
_LOOK_EVERY_S = 1.0
_LAST_WRITE_S = 2.0
_LONGEST_PAUSE_S = 1.0


class Labels(Observer, Protocol):
    """What becomes of labels in one worker. It observes all models."""

    def new_id(self, model: ServedModel) -> str:
        """The id of a request to this model."""
        ...

    def compared(
        self,
        model: str,
        request_id: str,
        candidate: VersionId,
        began: int,
        first: int,
        numbers: FloatArray,
    ) -> None:
        """What a candidate says about a request that was offered (`LabelSample.compared`)."""
        ...

    async def tell(self, model: str, labels: Sequence[Told]) -> list[Outcome]:
        """What became of each label, in order (`Feedback.tell`). Raises `NotFound` for a model
        that takes none, `InvalidInput`, and `ModelNotReady` while they cannot be kept: what was
        told may have been accepted then, and may be told again."""
        ...

    async def losses(
        self, model: str, champion: Chosen, candidate: Chosen, began: int
    ) -> Mapping[str, Losses]:
        """What labels say about the candidate beside the champion, by segment, of requests that it
        was shown in the trial that began in this generation; nothing of a model without labels.
        Raises `StateUnavailable`."""
        ...

    async def document(self, model: str) -> dict[str, Any] | None:
        """How good predictions past their horizon were (`quality_document`); None of a model
        without labels. Raises `StateUnavailable`."""
        ...


class NoLabels:
    """Without a state Redis."""

    def __init__(self) -> None:
        self._ids = RequestIds()

    def new_id(self, model: ServedModel) -> str:
        return self._ids.next()

    def offer(self, asker: Asker, answer: Answer) -> None: ...

    def compared(
        self,
        model: str,
        request_id: str,
        candidate: VersionId,
        began: int,
        first: int,
        numbers: FloatArray,
    ) -> None: ...

    async def tell(self, model: str, labels: Sequence[Told]) -> list[Outcome]:
        raise NotFound("labels are kept in the state Redis: STATE_REDIS_URL is not set")

    async def losses(
        self, model: str, champion: Chosen, candidate: Chosen, began: int
    ) -> Mapping[str, Losses]:
        return {}

    async def document(self, model: str) -> dict[str, Any] | None:
        return None


class LabelKeeper:
    """Keeps the predictions of every model that has labels, joins what is told about them, and
    judges them once their horizon has passed, in the Redis at `url`; an async context manager,
    which writes what is left when it is left itself.

    It has three connections: two are for transactions, of what is kept and of what is taken out.
    """

    def __init__(
        self,
        url: str,
        models: Mapping[str, ServedModel | None],
        clock: FeatureClock,
        metrics: Metrics,
    ) -> None:
        """`models` are those that serve, and may change. Raises `ConfigurationError` for an
        address that is none; asks nothing yet."""
        address = state_address(url)
        lines = [RedisLine(address, longest_pause_s=_LONGEST_PAUSE_S) for _ in range(3)]
        self._lines = lines
        self._writing, self._taking = Transactions(lines[0]), Transactions(lines[1])
        self._telling = lines[2]
        self._served = models
        self._clock = clock
        self._metrics = metrics
        self._worker = secrets.token_hex(8).encode()
        self._plain_ids = RequestIds()
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

    def new_id(self, model: ServedModel) -> str:
        sample = self._sample(model)
        return self._plain_ids.next() if sample is None else sample.ids.next()

    def offer(self, asker: Asker, answer: Answer) -> None:
        sample = self._giver(answer.model.id.model, asker.request_id)
        if sample is not None:
            sample.offer(asker, answer)

    def compared(
        self,
        model: str,
        request_id: str,
        candidate: VersionId,
        began: int,
        first: int,
        numbers: FloatArray,
    ) -> None:
        sample = self._giver(model, request_id)
        if sample is not None:
            sample.compared(request_id, candidate, began, first, numbers)

    async def tell(self, model: str, labels: Sequence[Told]) -> list[Outcome]:
        served = self._served.get(model)
        if served is None:
            raise ModelNotReady(f"model {model!r} is not ready yet")
        if self._sample(served) is None:
            raise NotFound("this model takes no labels: its model.yaml declares none")
        try:
            return await self._models[model].feedback.tell(labels)
        except StateUnavailable as exc:
            raise ModelNotReady(f"labels cannot be kept now: {exc}") from exc

    async def losses(
        self, model: str, champion: Chosen, candidate: Chosen, began: int
    ) -> Mapping[str, Losses]:
        found = await self._quality(model)
        if found is None:
            return {}
        form, table = found
        mine, theirs = (version_name(each.version, each.sha256) for each in (champion, candidate))
        pair = table.pairs.get(pair_name(mine, theirs, began))
        return {} if pair is None else losses_by_segment(form, pair)

    async def document(self, model: str) -> dict[str, Any] | None:
        found = await self._quality(model)
        return None if found is None else await asyncio.to_thread(quality_document, *found)

    async def _quality(self, model: str) -> tuple[LabelForm, QualityTable] | None:
        """Of predictions past their horizon; None of a model without labels."""
        served = self._served.get(model)
        if served is None or self._sample(served) is None:
            return None
        form, keys = self._models[model].sample.form, self._models[model].keys
        return form, await read_quality(self._taking, keys, form)

    def _sample(self, champion: ServedModel) -> LabelSample | None:
        """By its contract; None of one without labels. A prediction asks, too."""
        contract = champion.contract
        if contract.labels is None:
            return None
        known = self._models.get(champion.id.model)
        if known is not None and known.digest == contract.label_digest:
            return known.sample
        return self._begun(champion)

    def _begun(self, champion: ServedModel) -> LabelSample:
        """From now on it is the one of the model; one that had been it before goes on."""
        name, contract = champion.id.model, champion.contract
        known = self._models.get(name)
        if known is not None and known.resume(contract.label_digest):
            return known.sample
        fields = champion.decoder.required
        sample = LabelSample(contract, SegmentReader(contract, fields), fields, self._clock)
        if known is None:
            lines = (self._writing, self._taking, self._telling)
            known = _Model(name, *lines, self._clock, sample, self._metrics)
            self._models[name] = known
        known.begin(sample)
        return sample

    def _giver(self, model: str, request_id: str) -> LabelSample | None:
        """The sample that gave the id: whoever answers it, and whatever was reloaded since, all
        about a request goes into one bucket by one numbering of versions."""
        known = self._models.get(model)
        return None if known is None else known.giver(request_id)

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
        for model in list(self._models.values()):
            await model.write()

    async def _look(self) -> None:
        """The more there is to be done the less pause there is."""
        more = False
        while True:
            await asyncio.sleep(0 if more else _LOOK_EVERY_S)
            more = False
            for served in self._served.values():
                if served is not None and self._sample(served) is not None:
                    champion = version_name(served.id.version, served.id.sha256)
                    self._models[served.id.model].champion = champion
            for model in list(self._models.values()):
                try:
                    more |= await model.mature(self._worker)
                except StateUnavailable as exc:
                    log.debug("no predictions are taken out", extra={"reason": str(exc)})
                except Exception as exc:
                    log.error("predictions were not taken out: a defect", exc_info=exc)


class _Model:
    """What is kept of one model. Its contract may change, and change back: what was sampled by the
    few before is still written, and requests that began by them are still told there."""

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
        """By the champion's contract."""
        self.digest = sample.contract.label_digest
        self.champion = ""
        """Whose figures are told as the champion's (`version_name`)."""
        self.keys = Keys(name)
        self._recorder = LabelRecorder(metrics, name)
        self._writing, self._taking, self._clock = writing, taking, clock
        self._writers: dict[bytes, SampleWriter] = {}
        """By the digest of the contract, the one that was the champion's last at the end."""
        self._maturity = Maturity(self.keys, taking, clock)
        self.feedback = Feedback(telling, self.keys, clock, lambda: self.sample, self._recorder)
        self._shown: tuple[bytes, int, str] | None = None
        """The form of the quality that is told by the metrics, when it changed, and whose it is."""
        self._shown_s = 0.0

    def begin(self, sample: LabelSample) -> None:
        self.sample, self.digest = sample, sample.contract.label_digest
        self._writers[self.digest] = SampleWriter(
            sample, self.keys, self._writing, self._clock, self._recorder.kept
        )

    def resume(self, digest: bytes) -> bool:
        """The sample of this digest is the one of the model again; whether there is one."""
        writer = self._writers.pop(digest, None)
        if writer is None:
            return False
        self._writers[digest] = writer
        self.sample, self.digest = writer.sample, digest
        return True

    def giver(self, request_id: str) -> LabelSample | None:
        """The sample that gave this id; None where none has, or it is no longer known."""
        if self.sample.ids.gave(request_id):
            return self.sample
        for writer in self._writers.values():
            if writer.sample.ids.gave(request_id):
                return writer.sample
        return None

    async def write(self) -> None:
        for writer in tuple(self._writers.values()):
            await writer.write()
        # Requests of the others may still be under way.
        for digest, writer in tuple(self._writers.items())[:-_MOST_WRITERS]:
            if writer.is_idle:
                del self._writers[digest]

    def give_up(self) -> None:
        for writer in self._writers.values():
            writer.give_up()

    async def mature(self, worker: bytes) -> bool:
        more = await self._maturity.take_turn(worker)
        # Also between turns: after a jump of the clock there would be thousands of tables, more
        # than are read in time.
        await self._maturity.gather(self.sample.form)
        if not more:
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
        shown = (form.digest, int(changes or 0), self.champion)
        if shown != self._shown and shown[1]:
            table = await read_quality(self._taking, self.keys, form)
            self._recorder.quality(
                *await asyncio.to_thread(live_quality, form, table, self.champion)
            )
            self._shown = shown


_MOST_WRITERS = 4
_SHOW_EVERY_S = 10.0
