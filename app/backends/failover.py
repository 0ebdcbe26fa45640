"""Two backends for one model: while the first is not there, the second executes."""

import asyncio
import logging

from app.backends.backend import Backend, Tell, tell_nobody
from app.backends.execution_times import ExecutionTimes
from app.backends.reference import Reference, reference_rows
from app.deadline import Deadline
from app.errors import InvalidModel, ModelNotReady
from app.tensors import Signature, Tensors

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.25
_VERIFY_S = 10.0


class FailoverBackend:
    """`primary` executes; what it answers with `ModelNotReady` is executed by `fallback`, which
    must have the same signature.

    A primary that is not there at warm-up is verified when it comes: it is used once it says what
    the fallback says about the example.
    """

    def __init__(self, primary: Backend, fallback: Backend, tell: Tell = tell_nobody) -> None:
        self._primary = primary
        self._fallback = fallback
        self._tell = tell
        self._room = asyncio.Semaphore(fallback.concurrency)
        self._arrival: asyncio.Task[None] | None = None
        self._verified = True
        self._on_fallback = False

    @property
    def signature(self) -> Signature:
        return self._primary.signature

    @property
    def concurrency(self) -> int:
        return self._primary.concurrency

    @property
    def on_fallback(self) -> bool:
        """Whether the last execution was left to the fallback."""
        return self._on_fallback

    async def execute(self, inputs: Tensors, deadline: Deadline) -> Tensors:
        if self._verified:
            try:
                outputs = await self._primary.execute(inputs, deadline)
            except ModelNotReady as exc:
                self._turn_to_fallback(str(exc))
            else:
                self._turn_to_primary()
                return outputs
        async with self._room:
            deadline.check()
            self._tell("executed_locally")
            return await self._fallback.execute(inputs, deadline)

    async def warm_up(self, example: Tensors, max_rows: int) -> ExecutionTimes:
        """The times of the primary where it is there."""
        times = await self._fallback.warm_up(example, max_rows)
        try:
            return await self._primary.warm_up(example, max_rows)
        except ModelNotReady as exc:
            self._verified = False
            self._turn_to_fallback(str(exc))
            rows = reference_rows(example, max_rows)
            outputs = await self._fallback.execute(rows, Deadline.after(_VERIFY_S))
            self._arrival = asyncio.create_task(
                self._verify_on_arrival(Reference(rows, outputs), example, max_rows),
                name="failover: arrival",
            )
            return times

    async def check(self) -> None:
        try:
            await self._primary.check()
        except ModelNotReady:
            await self._fallback.check()

    async def close(self) -> None:
        if self._arrival is not None:
            self._arrival.cancel()
            await asyncio.wait({self._arrival})
        await self._primary.close()
        await self._fallback.close()

    async def _verify_on_arrival(
        self, reference: Reference, example: Tensors, max_rows: int
    ) -> None:
        told = ""
        while not self._verified:
            await asyncio.sleep(_LOOK_EVERY_S)
            try:
                await self._verify(reference, example, max_rows)
            except ModelNotReady:
                continue
            except Exception as exc:  # also a defect: else nobody would look again
                text = f"{type(exc).__name__}: {exc}"
                if text != told:
                    told = text
                    log.error("it is there but not used", exc_info=exc)

    async def _verify(self, reference: Reference, example: Tensors, max_rows: int) -> None:
        await self._primary.check()
        await self._primary.warm_up(example, max_rows)
        outputs = await self._primary.execute(reference.inputs, Deadline.after(_VERIFY_S))
        differs = reference.differs(outputs)
        if differs:
            raise InvalidModel(f"output {differs!r} is not what the local copy says")
        self._verified = True

    def _turn_to_fallback(self, reason: str) -> None:
        if not self._on_fallback:
            self._on_fallback = True
            log.warning("the local copy executes", extra={"reason": reason})

    def _turn_to_primary(self) -> None:
        if self._on_fallback:
            self._on_fallback = False
            log.warning("the local copy executes no longer")
