"""One candidate: the rows that wait for it, its executions, and what came of them."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from enum import Enum, auto
from typing import Protocol

import numpy as np

from app.backends.backend import BackendDied
from app.comparison.pairs import NO_DECISION, FloatArray, Pairs
from app.comparison.segments import SegmentReader
from app.deadline import Deadline
from app.errors import (
    BackendError,
    DeadlineExceeded,
    FeaturesUnavailable,
    InvalidInput,
    ModelNotReady,
    Overloaded,
)
from app.predictor import Answer, Asker
from app.served_model import Candidate, ServedModel
from app.shadow.block import Block, Offered, decision_numbers
from app.shadow.sampling import SamplingPolicy
from app.tasks import ended
from app.tensors import Tensors, row_count, take_rows

log = logging.getLogger(__name__)

# A block whose rows fail together is executed in parts, so often at most.
_MOST_PARTS = 16


class Compared(Protocol):
    """Is told what came of a candidate's rows; neither raises nor blocks."""

    def pairs(self, block: Block, pairs: Pairs, numbers: FloatArray, took_s: float) -> None:
        """Both have answered, or the candidate has failed. `numbers` are the candidate's for each
        row: `[rows]`, or `[rows, labels]` of labelled numbers, NaN where it gave none. `took_s` is
        how long its execution took."""
        ...

    def dropped(self, champion: ServedModel, reason: str, rows: int) -> None:
        """So many rows were not shown to it, or it was not waited for."""
        ...


class Lane:
    """Shows a candidate what the champion answered, one block after the other.

    Everything is bounded by the contract's `shadow`: rows that wait, the time that they wait for
    company, and the time that they are waited for. The oldest rows are dropped for newer ones, and
    new ones while the champion's own rows queue.
    """

    def __init__(
        self,
        candidate: Candidate,
        policy: SamplingPolicy,
        compared: Compared,
        feature_now_s: Callable[[], float],
    ) -> None:
        """`feature_now_s` says feature time, seconds since 1970."""
        self.candidate = candidate
        self.policy = policy
        self._compared = compared
        self._feature_now_s = feature_now_s
        self._shadow = candidate.contract.shadow
        self._segments = SegmentReader(candidate.contract, candidate.decoder.required)
        self._decision_numbers = decision_numbers(candidate.contract)
        self._open: Block | None = None
        self._closing: asyncio.TimerHandle | None = None
        self._waiting: deque[Block] = deque()
        self._rows = 0
        """Of the blocks that wait, the open one aside."""
        self._arrived = asyncio.Event()
        self._champion: ServedModel | None = None
        self._way = _Way.NONE
        self._runner = asyncio.create_task(self._run(), name="shadow")

    @property
    def segment_names(self) -> tuple[tuple[str, ...], ...]:
        """Of the segments that pairs are told apart by, by dimension."""
        return self._segments.names

    @property
    def pending_rows(self) -> int:
        """Rows that wait for the candidate."""
        return self._rows + (0 if self._open is None else self._open.rows)

    def offer(self, asker: Asker, answer: Answer) -> None:
        """Neither raises nor blocks."""
        if not self.policy.admits(asker.request_id, self._routing_key(asker, answer)):
            return
        start, rows = 0, len(answer.predictions)
        while start < rows:
            block = self._block(answer.model)
            stop = min(rows, start + self._shadow.block_rows - block.rows)
            block.add(Offered(asker, answer, start, stop))
            if block.rows == self._shadow.block_rows:
                self._close()
            start = stop

    async def close(self) -> None:
        """What waits is given up, and so is what is executed."""
        await ended(self._runner)
        if self._closing is not None:
            self._closing.cancel()
        if self._open is not None:
            self._waiting.append(self._open)
            self._open = None
        for block in self._waiting:
            self._drop(block, "ended")
        self._waiting.clear()

    def _routing_key(self, asker: Asker, answer: Answer) -> str | None:
        field = self.candidate.contract.routing_key
        if self._shadow.by != "routing_key" or asker.routing_key is not None or field is None:
            return asker.routing_key
        instances = answer.instances
        if field not in instances.positions:
            return None
        value = instances.rows[0][instances.positions[field]]
        return None if value is None else str(value)

    def _block(self, champion: ServedModel) -> Block:
        """The one that is being gathered, of this champion."""
        if self._open is not None and self._open.champion is not champion:
            self._close()
        if self._open is None:
            self._open = Block(champion, time.monotonic())
            loop = asyncio.get_running_loop()
            self._closing = loop.call_later(self._shadow.hold_ms / 1000, self._close)
        return self._open

    def _close(self) -> None:
        """The rows that were gathered wait to be executed."""
        block, self._open = self._open, None
        if self._closing is not None:
            self._closing.cancel()
        if block is None:
            return
        batcher = block.champion.batcher
        if batcher.queued_rows > batcher.max_rows:
            self._drop(block, "overloaded")
            return
        self._waiting.append(block)
        self._rows += block.rows
        while self._rows > self._shadow.pending_rows:
            oldest = self._waiting.popleft()
            self._rows -= oldest.rows
            self._drop(oldest, "queue_full")
        self._arrived.set()

    def _drop(self, block: Block, reason: str) -> None:
        self._compared.dropped(block.champion, reason, block.rows)

    async def _run(self) -> None:
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            while self._waiting:
                block = self._waiting.popleft()
                self._rows -= block.rows
                try:
                    await self._compare(block)
                except asyncio.CancelledError:
                    self._drop(block, "ended")
                    raise
                except Exception as exc:  # a defect: the candidate must go on being shown others
                    log.error("a comparison failed", extra=self._named(), exc_info=exc)
                    self._drop(block, "defect")
                # A turn for everybody else, whatever the candidate takes.
                await asyncio.sleep(0)

    async def _compare(self, block: Block) -> None:
        deadline = Deadline(block.opened_s + self._shadow.timeout_ms / 1000)
        if deadline.at_s <= time.monotonic():
            self._drop(block, "timed_out")
            return
        self._meet(block.champion)
        if self._way is _Way.NONE:
            self._drop(block, "not_comparable")
            return
        try:
            inputs = await self._inputs(block, deadline)
        except (FeaturesUnavailable, DeadlineExceeded):
            self._drop(block, "features_unavailable")
            return
        except (InvalidInput, BackendError) as exc:
            log.warning("no inputs for a candidate", extra=self._named() | {"reason": str(exc)})
            self._tell(block, _Said(self.candidate, block.rows), 0.0)
            return
        started_s = time.monotonic()
        try:
            said = await self._said(inputs, deadline)
        except DeadlineExceeded:
            self._drop(block, "timed_out")
        except (ModelNotReady, Overloaded):
            self._drop(block, "not_ready")
        else:
            self._tell(block, said, time.monotonic() - started_s)

    async def _inputs(self, block: Block, deadline: Deadline) -> Tensors:
        """The very rows of the champion, as this candidate takes them; stored features are read
        anew only where its plan is another one. Raises as `fetch` and `encode` do."""
        candidate = self.candidate
        if self._way is _Way.AS_THEY_ARE:
            return block.inputs()
        instances = block.instances(candidate.decoder.required)
        if not candidate.source.plan.views:
            return candidate.encode_fields(instances)
        if self._way is _Way.ENCODED_ANEW:
            rows = block.features()
        else:
            rows = await candidate.fetch(instances, deadline)
        return candidate.encode(instances, rows, self._feature_now_s())[1]

    def _meet(self, champion: ServedModel) -> None:
        """How this champion's rows become the candidate's."""
        if champion is self._champion:
            return
        self._champion = champion
        self._way = _way(champion, self.candidate)
        self.candidate.missing.take_over(champion.missing)

    async def _said(self, inputs: Tensors, deadline: Deadline) -> "_Said":
        """What the candidate says about the rows. A batch that fails is executed in halves, until
        it is known which rows fail or that has cost enough. Raises what is no answer of it:
        `DeadlineExceeded`, `ModelNotReady`, `Overloaded`."""
        rows = row_count(inputs)
        said = _Said(self.candidate, rows)
        parts = deque([(0, rows)])
        for _ in range(_MOST_PARTS):
            if not parts:
                break
            start, stop = parts.popleft()
            try:
                said.fill(
                    start,
                    await self.candidate.backend.execute(take_rows(inputs, start, stop), deadline),
                    stop - start,
                )
            except BackendDied:
                continue  # they may be what killed it: they are not tried again
            except BackendError:
                middle = (start + stop) // 2
                if start < middle:
                    parts += [(start, middle), (middle, stop)]
        return said

    def _tell(self, block: Block, said: "_Said", took_s: float) -> None:
        champion = block.champion_numbers()
        candidate = said.numbers
        if champion.ndim == 2:
            # What both say about the label that the champion says; where it says none, all is NaN.
            label = np.where(np.isfinite(champion), champion, -np.inf).argmax(axis=1)[:, None]
            champion_score = np.take_along_axis(champion, label, axis=1)[:, 0]
            candidate_score = np.take_along_axis(candidate, label, axis=1)[:, 0]
        else:
            champion_score, candidate_score = champion, candidate
        pairs = Pairs(
            np.zeros(block.rows, np.int32),
            champion_score,
            candidate_score,
            block.champion_decisions(),
            said.decisions,
            said.failed,
            self._segments.read(block.fields(), block.rows),
            block.champion_row_s(),
            np.full(block.rows, took_s / block.rows),
        )
        self._compared.pairs(block, pairs, candidate, took_s)

    def _named(self) -> dict[str, object]:
        identity = self.candidate.id
        return {"model": identity.model, "candidate": identity.version}


class _Said:
    """What a candidate says about the rows of a block; of those that it does not answer nothing."""

    __slots__ = ("_candidate", "decisions", "failed", "numbers")

    def __init__(self, candidate: Candidate, rows: int) -> None:
        contract = candidate.contract
        labels = contract.outputs[contract.score].labels
        self._candidate = candidate
        self.numbers = np.full((rows,) if labels is None else (rows, len(labels)), np.nan)
        self.decisions = np.full(rows, NO_DECISION, np.int32)
        self.failed = np.ones(rows, np.bool_)

    def fill(self, start: int, outputs: Tensors, rows: int) -> None:
        """Of so many rows from `start` on. Raises `BackendError` for another number of them."""
        for name, tensor in outputs.items():
            if len(tensor) != rows:
                raise BackendError(f"output {name!r} has {len(tensor)} rows for a block of {rows}")
        candidate, stop = self._candidate, start + rows
        self.numbers[start:stop] = candidate.outputs.numbers(candidate.contract.score, outputs)
        self.decisions[start:stop] = candidate.outputs.decisions(outputs)
        self.failed[start:stop] = False


class _Way(Enum):
    """From the champion's rows to the candidate's."""

    AS_THEY_ARE = auto()
    ENCODED_ANEW = auto()
    """From the same values of the same features."""
    READ_ANEW = auto()
    NONE = auto()
    """They cannot be compared."""


def _way(champion: ServedModel, candidate: Candidate) -> _Way:
    ours, theirs = champion.contract, candidate.contract
    if ours.score != theirs.score or not set(candidate.decoder.required) <= set(
        champion.decoder.required
    ):
        return _Way.NONE
    if ours.outputs[ours.score].labels != theirs.outputs[theirs.score].labels:
        return _Way.NONE
    if champion.source.plan != candidate.source.plan:
        return _Way.READ_ANEW
    if champion.encoder.makes_the_same_as(candidate.encoder) and champion.missing.gives_the_same_as(
        candidate.missing
    ):
        return _Way.AS_THEY_ARE
    return _Way.ENCODED_ANEW
