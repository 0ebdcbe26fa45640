"""One Triton server: what is under way at it, and whether more may be sent."""

import asyncio
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from app.backends.backend import BackendDied
from app.backends.reference import Reference
from app.backends.triton_wire import Answer, Description, InputRefused, Unreachable, Wire
from app.breaker import CircuitBreaker, StillDown
from app.deadline import Deadline
from app.errors import (
    BackendError,
    DeadlineExceeded,
    InvalidModel,
    ModelNotReady,
    Overloaded,
    RequestError,
)
from app.tensors import Signature, Tensors

log = logging.getLogger(__name__)

# Together they bound how long a Triton that hangs is waited for: it answers whether its model is
# ready while the model executes.
_SILENCE_S = 0.05
_PATIENCE_S = 0.15
# What is large is under way for longer, and with gRPC the question waits behind it.
_BYTES_PER_S = 20_000_000
_PROBE_S = 0.3
# What nobody waits for any more goes on, as Triton goes on with it, and keeps its place until then.
_ABANDONED_S = 60.0
_LEAVE_AFTER = 5
# A call is overdue when it takes so many times what they take there, and not less than the floor.
_OVERDUE_TIMES = 3.0
_OVERDUE_FLOOR_S = 1.0
_EJECTED_S = 30.0
_EJECTED_AT_MOST_S = 300.0
_VERIFY_S = 1.0
_DRAIN_S = 1.0


class TritonEndpoint:
    """Up to `in_flight` executions are under way at once, those that nobody waits for included.

    It is not available after a lost connection that could not be made anew, while it does not
    answer, and while the model is not ready; probes find out when it is back. `changed` is called
    when something ended or it went down.
    """

    def __init__(
        self,
        address: str,
        wire: Wire,
        version: int,
        in_flight: int,
        changed: Callable[[], None],
    ) -> None:
        self.address = address
        self.max_batch_rows = 0
        """By its last description."""
        self.expected: Signature | None = None
        """A Triton whose model has another one is not back."""
        self.reference: Reference | None = None
        """A Triton that answers otherwise is not back."""
        self._wire = wire
        self._version = str(version)
        self._in_flight = in_flight
        self._changed = changed
        self._breaker = CircuitBreaker(f"triton {address}", self._probe)
        self._calls: set[asyncio.Task[Answer]] = set()
        self._overdue: set[asyncio.Task[Answer]] = set()
        self._usual_s = 0.0
        self._waiting = 0
        self._waiting_bytes = 0
        self._watcher: asyncio.Task[None] | None = None
        self._silent: asyncio.Future[None] | None = None
        self._question: asyncio.Task[bool] | None = None
        self._heard_s = 0.0
        self._lost_s: float | None = None
        self._failures = 0
        self._ejections = 0
        self._ejected_until_s = 0.0

    @property
    def in_flight(self) -> int:
        return len(self._calls)

    @property
    def has_room(self) -> bool:
        return len(self._calls) < self._in_flight

    @property
    def is_up(self) -> bool:
        return not self._breaker.is_open

    @property
    def keeps_failing(self) -> bool:
        """Five executions failed in a row, and not because of what was sent; or all that it may
        have under way are overdue."""
        return self._failures >= _LEAVE_AFTER or len(self._overdue) >= self._in_flight

    @property
    def is_ejected(self) -> bool:
        """Not to be used while another one can be."""
        return time.monotonic() < self._ejected_until_s

    @property
    def reason(self) -> str:
        """Why it is not up."""
        return f"{self.address}: {self._breaker.reason}"

    async def describe(self) -> Description:
        """Raises `Unreachable`, `ModelNotReady`, `InvalidModel`."""
        try:
            if not await self._is_ready(_PROBE_S):
                raise ModelNotReady("the model is not ready")
            async with asyncio.timeout(_PROBE_S):
                described = await self._wire.describe()
        except TimeoutError as exc:
            raise Unreachable(f"it says nothing, for {_PROBE_S:g} s") from exc
        self.max_batch_rows = described.max_batch_rows
        return described

    def put_down(self, reason: str) -> None:
        """Not to be asked until a probe succeeds."""
        self._breaker.open(reason)
        self._changed()

    async def execute(self, inputs: Tensors, deadline: Deadline) -> Tensors:
        """Must have room. After the deadline, or when the caller leaves, the call goes on without
        being waited for: Triton executes it anyway, and its cancellation may crash it."""
        started_s = time.monotonic()
        call = self._begin(inputs, deadline)
        silent = self._watch()
        self._waiting += 1
        size = sum(tensor.nbytes for tensor in inputs.values())
        self._waiting_bytes += size
        try:
            either: set[asyncio.Future[Any]] = {call, silent}
            await asyncio.wait(
                either,
                timeout=max(deadline.remaining_s(), 0),
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            self._waiting -= 1
            self._waiting_bytes -= size
            if not call.done() and not silent.done():
                # Our deadline says nothing of Triton: that it takes longer than it ever does, does.
                self._judge(call, max(self._overdue_s(started_s), min(deadline.at_s, _now_s())))
        if call.done():
            return self._outputs(call, started_s)
        if silent.done():
            raise Unreachable(self.reason)
        raise DeadlineExceeded(f"Triton at {self.address} did not answer in time")

    def eject(self) -> None:
        """Not to be used for a while, each time for longer, until it has been well for as long."""
        now_s = time.monotonic()
        if now_s - self._ejected_until_s > self._ejections * _EJECTED_S:
            self._ejections = 0
        self._ejections += 1
        for_s = min(self._ejections * _EJECTED_S, _EJECTED_AT_MOST_S)
        self._ejected_until_s = now_s + for_s
        self._failures = 0
        log.warning("it is ejected", extra={"what": f"triton {self.address}", "for_s": for_s})

    async def close(self) -> None:
        await self._breaker.close()
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.wait({self._watcher})
        if self._question is not None:
            self._question.cancel()
            await asyncio.gather(self._question, return_exceptions=True)
        if self._calls:
            await asyncio.wait(self._calls, timeout=_DRAIN_S)
        for call in self._calls:
            call.cancel()
        await self._wire.close()

    def _begin(self, inputs: Tensors, deadline: Deadline) -> asyncio.Task[Answer]:
        call = asyncio.create_task(self._call(inputs, deadline), name=f"triton {self.address}")
        self._calls.add(call)
        call.add_done_callback(partial(self._ended, _now_s()))
        return call

    async def _call(self, inputs: Tensors, deadline: Deadline) -> Answer:
        remaining_s = max(deadline.remaining_s(), 0)
        try:
            async with asyncio.timeout(remaining_s + _ABANDONED_S):
                return await self._wire.infer(inputs, remaining_s)
        except TimeoutError as exc:
            raise DeadlineExceeded("Triton never answered") from exc

    def _ended(self, started_s: float, call: asyncio.Task[Answer]) -> None:
        self._calls.discard(call)
        self._overdue.discard(call)
        if not call.cancelled():
            error = call.exception()
            if not isinstance(error, Unreachable):
                self._heard_s = _now_s()
            if error is None:
                self._follow(_now_s() - started_s)
        self._changed()

    def _follow(self, seconds: float) -> None:
        """Upwards sooner than downwards: the large batches decide what is overdue."""
        self._usual_s += (seconds - self._usual_s) * (0.3 if seconds > self._usual_s else 0.05)

    def _overdue_s(self, started_s: float) -> float:
        """The instant from which a call is overdue."""
        return started_s + max(_OVERDUE_TIMES * self._usual_s, _OVERDUE_FLOOR_S)

    def _judge(self, call: asyncio.Task[Answer], due_s: float) -> None:
        """Whether a call that nobody waits for is overdue, at that instant or soon after."""
        late_s = _now_s() - due_s
        loop = asyncio.get_running_loop()
        if call.done():
            return
        if late_s > _SILENCE_S:  # it was we who did not listen
            loop.call_later(_PATIENCE_S, self._judge, call, _now_s() + _PATIENCE_S)
        elif late_s < 0:
            loop.call_later(-late_s, self._judge, call, due_s)
        else:
            self._overdue.add(call)
            self._failures += 1
            self._changed()

    def _outputs(self, call: asyncio.Task[Answer], started_s: float) -> Tensors:
        try:
            answer = call.result()
        except Unreachable as exc:
            self._lost(started_s, str(exc))
            raise
        except ModelNotReady as exc:
            self.put_down(str(exc))
            raise
        except BackendDied as exc:  # Triton goes on calling the model ready, and starts none anew
            self.put_down(str(exc))
            raise
        except (InputRefused, Overloaded):
            raise
        except DeadlineExceeded:  # Triton dropped it, when we had told it to
            if _now_s() > self._overdue_s(started_s):
                self._failures += 1
            raise
        except BackendError:
            self._failures += 1
            raise
        if answer.version != self._version:
            reason = f"version {answer.version} answered for version {self._version}"
            log.error("a wrong version answered", extra={"what": self.address, "reason": reason})
            self.put_down(reason)
            raise ModelNotReady(self.reason)
        self._failures = 0
        self._lost_s = None
        return answer.outputs

    def _lost(self, started_s: float, reason: str) -> None:
        """A connection that is lost takes all its calls along; a call that was begun after that and
        is lost too tells that it cannot be made anew."""
        if self._lost_s is None:
            self._lost_s = time.monotonic()
        elif started_s >= self._lost_s:
            self._lost_s = None
            self.put_down(reason)

    def _watch(self) -> "asyncio.Future[None]":
        """Done when it is found silent while a caller waits."""
        if self._silent is None or self._silent.done():
            self._silent = asyncio.get_running_loop().create_future()
        if self._watcher is None or self._watcher.done():
            self._heard_s = time.monotonic()
            self._watcher = asyncio.create_task(self._find_silence(self._silent))
        return self._silent

    async def _find_silence(self, silent: "asyncio.Future[None]") -> None:
        await asyncio.sleep(_SILENCE_S)
        while self._waiting and self.is_up:
            quiet_s = time.monotonic() - self._heard_s
            if quiet_s < _SILENCE_S:
                await asyncio.sleep(_SILENCE_S - quiet_s)
                continue
            asked_s = time.monotonic()
            patience_s = _PATIENCE_S + self._waiting_bytes / _BYTES_PER_S
            try:
                ready = await self._is_ready(patience_s)
            except (TimeoutError, Unreachable) as exc:
                if time.monotonic() - asked_s > 2 * patience_s:
                    continue  # it was we who did not listen
                self.put_down(str(exc) or f"it says nothing, for {_SILENCE_S + patience_s:g} s")
                silent.set_result(None)
                return
            except RequestError:  # an answer, though of an error
                ready = True
            self._heard_s = time.monotonic()
            if not ready:
                self.put_down("the model is not ready")  # what is under way may still be answered
                return

    async def _is_ready(self, patience_s: float) -> bool:
        """One question is under way at a time, and goes on when nobody waits for it any longer: a
        Triton that was stopped would find hundreds of them taken back, and crash of it."""
        if self._question is None:
            self._question = asyncio.create_task(self._wire.ready(), name="triton: ready?")
        question = self._question
        await asyncio.wait({question}, timeout=patience_s)
        if not question.done():
            raise TimeoutError
        self._question = None
        return question.result()

    async def _probe(self) -> None:
        try:
            described = await self.describe()
        except (RequestError, InvalidModel) as exc:
            raise StillDown(str(exc)) from exc
        if self.expected is not None and described.fitted_to(self.expected) != self.expected:
            raise StillDown("its model has another signature")
        if self.reference is not None:
            await self._verify(self.reference)
        self._lost_s = None
        self._failures = 0

    async def _verify(self, reference: Reference) -> None:
        """Its first execution, which may also warm it up, must say what it said before."""
        if not self.has_room:
            raise StillDown("what it was sent before is still under way")
        call = self._begin(reference.inputs, Deadline.after(_VERIFY_S))
        await asyncio.wait({call}, timeout=_VERIFY_S)
        if not call.done():
            raise StillDown(f"it executed nothing in {_VERIFY_S:g} s")
        try:
            output = reference.differs(call.result().outputs)
        except RequestError as exc:
            raise StillDown(str(exc)) from exc
        if output:
            raise StillDown(f"output {output!r} is not what it was when the model was verified")


def _now_s() -> float:
    """On the clock of the deadlines."""
    return time.monotonic()
