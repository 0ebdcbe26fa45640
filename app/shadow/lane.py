"""One candidate: the rows that wait for it, its executions, and what came of them."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from enum import Enum, auto
from typing import Protocol

from app.backends.backend import BackendDied
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
from app.routing_key import key_of
from app.served_model import Candidate, ServedModel
from app.shadow.block import Block, Offered, Said, decision_numbers
from app.shadow.sampling import SamplingPolicy
from app.tasks import ended
from app.tensors import Tensors, row_count, take_rows

log = logging.getLogger(__name__)

# A block whose rows fail together is executed in parts, so often at most.
_MOST_PARTS = 16


class Compared(Protocol):
    """Is told what came of a candidate's rows; neither raises nor blocks."""

    def answered(self, block: Block, said: Said) -> None:
        """The candidate has answered, or failed."""
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
        policy: SamplingPolicy | None,
        compared: Compared,
        feature_now_s: Callable[[], float],
    ) -> None:
        """Without a `policy` it is shown everything. `feature_now_s` says feature time, seconds
        since 1970."""
        self.candidate = candidate
        self.policy = policy
        self._compared = compared
        self._feature_now_s = feature_now_s
        self._shadow = candidate.contract.shadow
        self._block_rows = self._shadow.block_rows
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
    def pending_rows(self) -> int:
        """Rows that wait for the candidate."""
        return self._rows + (0 if self._open is None else self._open.rows)

    def offer(self, asker: Asker, answer: Answer) -> None:
        """Neither raises nor blocks."""
        policy = self.policy
        if policy is not None and not policy.admits(
            asker.request_id, self._routing_key(asker, answer)
        ):
            return
        rows, most = len(answer.predictions), self._block_rows
        start = max(0, rows - self._shadow.pending_rows)
        if start:  # these would not wait for long
            self._compared.dropped(answer.model, "queue_full", start)
        while start < rows:
            block = self._open
            if block is None or block.champion is not answer.model:
                block = self._another(answer.model)
            stop = min(rows, start + most - block.rows)
            block.offered.append(Offered(asker, answer, start, stop))
            block.rows += stop - start
            if block.rows == most:
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
        if self._shadow.by != "routing_key":
            return None
        return key_of(asker.routing_key, self.candidate.contract.routing_key, answer.instances)

    def _another(self, champion: ServedModel) -> Block:
        """The block that rows of this champion are gathered in from now on."""
        self._close()
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
            self._compared.answered(block, Said(self.candidate, block.rows))
            return
        started_s = time.monotonic()
        try:
            said = await self._said(inputs, deadline)
        except DeadlineExceeded:
            self._drop(block, "timed_out")
        except (ModelNotReady, Overloaded):
            self._drop(block, "not_ready")
        else:
            said.took_s = time.monotonic() - started_s
            self._compared.answered(block, said)

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
            instances.overrides = block.overrides(candidate.source.plan.references)
            rows = await candidate.fetch(instances, deadline)
        return candidate.encode(instances, rows, self._feature_now_s())[1]

    def _meet(self, champion: ServedModel) -> None:
        """How this champion's rows become the candidate's."""
        if champion is self._champion:
            return
        self._champion = champion
        self._way = _way(champion, self.candidate)
        self.candidate.missing.take_over(champion.missing)

    async def _said(self, inputs: Tensors, deadline: Deadline) -> Said:
        """What the candidate says about the rows. A batch that fails is executed in halves, until
        it is known which rows fail or that has cost enough. Raises what is no answer of it:
        `DeadlineExceeded`, `ModelNotReady`, `Overloaded`."""
        rows = row_count(inputs)
        said = Said(self.candidate, rows)
        parts = deque([(0, rows)])
        for _ in range(_MOST_PARTS):
            if not parts:
                break
            start, stop = parts.popleft()
            try:
                part = take_rows(inputs, start, stop)
                outputs = await self.candidate.backend.execute(part, deadline)
                said.fill(start, stop - start, outputs)
            except BackendDied:
                continue  # they may be what killed it: they are not tried again
            except BackendError:
                middle = (start + stop) // 2
                if start < middle:
                    parts += [(start, middle), (middle, stop)]
        return said

    def _named(self) -> dict[str, object]:
        identity = self.candidate.id
        return {"model": identity.model, "candidate": identity.version}


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
    if decision_numbers(ours) != decision_numbers(theirs):
        return _Way.NONE
    if champion.source.plan != candidate.source.plan:
        return _Way.READ_ANEW
    if champion.encoder.makes_the_same_as(candidate.encoder) and champion.missing.gives_the_same_as(
        candidate.missing
    ):
        return _Way.AS_THEY_ARE
    return _Way.ENCODED_ANEW
