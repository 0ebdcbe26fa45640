"""Executes a model on Triton servers: one model version, one or more equal endpoints."""

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path

from app.backends.backend import Tell, tell_nobody
from app.backends.execution_times import ExecutionTimes, warm_up_batches
from app.backends.reference import Reference, reference_rows
from app.backends.retry_budget import RetryBudget
from app.backends.triton_endpoint import TritonEndpoint
from app.backends.triton_wire import Description, ModelOnTriton, Wire
from app.contract import TritonOptions
from app.deadline import Deadline
from app.errors import InvalidModel, ModelNotReady, RequestError
from app.tensors import Signature, Tensors, concatenate, row_count, take_rows

_ASK_EVERY_S = 0.2
_WARM_UP_S = 60.0


class TritonBackend:
    """An execution goes to the endpoint with the least under way. What a lost connection or a
    model that is not ready refused is sent again, elsewhere where possible, within the deadline
    and for a tenth of the executions at most: a model computes, so sending again is safe."""

    def __init__(
        self,
        endpoints: Sequence[TritonEndpoint],
        signature: Signature,
        in_flight: int,
        changes: "Changes",
        tell: Tell,
    ) -> None:
        self._endpoints = list(endpoints)
        self._signature = signature
        self._flat = {spec.name for spec in signature.outputs if not spec.shape}
        self._concurrency = len(self._endpoints) * in_flight
        self._changes = changes
        self._tell = tell
        self._budget = RetryBudget()
        self._turn = 0

    @property
    def signature(self) -> Signature:
        return self._signature

    @property
    def concurrency(self) -> int:
        return self._concurrency

    async def execute(self, inputs: Tensors, deadline: Deadline) -> Tensors:
        """More rows than Triton takes at once go in parts, one after the other."""
        rows = row_count(inputs)
        known = [e.max_batch_rows for e in self._endpoints if e.max_batch_rows]
        most = min(known, default=rows)
        if rows <= most:
            return await self._execute(inputs, deadline)
        parts = (take_rows(inputs, start, start + most) for start in range(0, rows, most))
        return concatenate([await self._execute(part, deadline) for part in parts])

    async def _execute(self, inputs: Tensors, deadline: Deadline) -> Tensors:
        self._budget.earn()
        failed: TritonEndpoint | None = None
        while True:
            endpoint = await self._endpoint(deadline, failed)
            try:
                return self._shaped(await endpoint.execute(inputs, deadline))
            except ModelNotReady:
                if not self._up() or not self._budget.spend():
                    raise
                self._tell("sent_again")
                failed = endpoint
            finally:
                if endpoint.keeps_failing:
                    self._leave(endpoint)

    async def warm_up(self, example: Tensors, max_rows: int) -> ExecutionTimes:
        """Raises `InvalidModel` when Triton takes smaller batches, or when what two endpoints
        answer differs; from then on an endpoint that comes back must answer as it does now."""
        self._check_batch(max_rows)
        up = self._up()
        if not up:
            raise self._down()
        rows = reference_rows(example, max_rows)
        reference = Reference(rows, await up[0].execute(rows, Deadline.after(_WARM_UP_S)))
        for endpoint in up[1:]:
            differs = reference.differs(await endpoint.execute(rows, Deadline.after(_WARM_UP_S)))
            if differs:
                raise InvalidModel(
                    f"output {differs!r} is not the same at {up[0].address} and {endpoint.address}"
                )
        measured: dict[int, float] = {}
        for size, batch in warm_up_batches(example, max_rows):
            for endpoint in reversed(up):
                measured[size] = await _measure_s(endpoint, batch)
        for endpoint in self._endpoints:
            endpoint.reference = reference
        return ExecutionTimes(measured)

    async def check(self) -> None:
        if not self._up():
            raise self._down()

    async def close(self) -> None:
        await asyncio.gather(*(endpoint.close() for endpoint in self._endpoints))

    async def _endpoint(self, deadline: Deadline, failed: TritonEndpoint | None) -> TritonEndpoint:
        """One with room, another than the one that failed while there is one."""
        while True:
            deadline.check()
            up = self._up()
            if not up:
                raise self._down()
            usable = [e for e in up if not e.is_ejected] or up
            usable = [e for e in usable if e is not failed] or usable
            free = [e for e in usable if e.has_room]
            if free:
                self._turn += 1
                turned = self._turn % len(free)
                return min(free[turned:] + free[:turned], key=lambda e: e.in_flight)
            failing = [e for e in usable if e.keeps_failing]
            for endpoint in failing:
                self._leave(endpoint)
            if not failing:
                await self._changes.wait(deadline)

    def _up(self) -> list[TritonEndpoint]:
        return [endpoint for endpoint in self._endpoints if endpoint.is_up]

    def _down(self) -> ModelNotReady:
        return ModelNotReady("no Triton: " + "; ".join(e.reason for e in self._endpoints))

    def _leave(self, endpoint: TritonEndpoint) -> None:
        """Eject it while others can do its work, for half of them at most; else put it down: then
        the probe has it execute, and it is back as soon as it does that well."""
        others = [e for e in self._up() if e is not endpoint and not e.is_ejected]
        if others and endpoint.is_ejected:
            return
        ejected = sum(e.is_ejected for e in self._endpoints)
        if others and 2 * (ejected + 1) <= len(self._endpoints):
            endpoint.eject()
        else:
            endpoint.put_down("it keeps failing")

    def _shaped(self, outputs: Tensors) -> Tensors:
        """Triton has no tensor of the batch axis alone: it answers those as one column."""
        if not self._flat:
            return outputs
        return {n: t.reshape(-1) if n in self._flat else t for n, t in outputs.items()}

    def _check_batch(self, max_rows: int) -> None:
        for endpoint in self._up():
            if endpoint.max_batch_rows < max_rows:
                raise InvalidModel(
                    f"batching.max_batch_rows is {max_rows}, max_batch_size of the model at Triton "
                    f"{endpoint.address} is {endpoint.max_batch_rows}"
                )


class Changes:
    """Lets those who wait for room look again."""

    def __init__(self) -> None:
        self._next: asyncio.Future[None] | None = None

    def tell(self) -> None:
        if self._next is not None:
            self._next.set_result(None)
            self._next = None

    async def wait(self, deadline: Deadline) -> None:
        """Until something changed or the deadline passed."""
        if self._next is None:
            self._next = asyncio.get_running_loop().create_future()
        await asyncio.wait({self._next}, timeout=max(deadline.remaining_s(), 0))


async def open_triton(
    options: TritonOptions, model: Path, signature: Signature, tell: Tell = tell_nobody
) -> TritonBackend:
    """The version that `model` (`<repository>/<name>/<version>/model.onnx`) was published as,
    unless the options name another one. `signature` is what is wanted of it.

    Waits until an endpoint has it ready. Raises `InvalidModel` when none has after
    `options.start_timeout_s` and there is no failover, or when one cannot be served.
    """
    wanted = _wanted(options, model, signature)
    changes = Changes()
    endpoints = [
        TritonEndpoint(
            address,
            _wire(options, address, wanted),
            wanted.version,
            options.in_flight,
            changes.tell,
        )
        for address in options.endpoints
    ]
    backend: TritonBackend | None = None
    try:
        found = await _found(options, endpoints, signature)
        backend = TritonBackend(endpoints, found, options.in_flight, changes, tell)
    finally:
        if backend is None:
            await asyncio.gather(*(endpoint.close() for endpoint in endpoints))
    return backend


def _wanted(options: TritonOptions, model: Path, signature: Signature) -> ModelOnTriton:
    version = options.version
    if version is None:
        if not model.parent.name.isdecimal():
            raise InvalidModel(f"{model}: not in a published version; backend.version names one")
        version = int(model.parent.name)
    name = options.model or model.parent.parent.name
    return ModelOnTriton(name, version, tuple(spec.name for spec in signature.outputs))


def _wire(options: TritonOptions, address: str, model: ModelOnTriton) -> Wire:
    # Imported where it is used: gRPC and aiohttp take a third of a second and more.
    try:
        if options.protocol == "grpc":
            from app.backends.triton_grpc import GrpcWire

            return GrpcWire(address, model)
        from app.backends.triton_http import HttpWire

        return HttpWire(address, model, options.in_flight)
    except ImportError as exc:
        raise InvalidModel(
            f"backend triton: {exc.name} is not installed; the extra `triton` has it"
        ) from exc


async def _found(
    options: TritonOptions, endpoints: Sequence[TritonEndpoint], wanted: Signature
) -> Signature:
    """Tell the endpoints what to expect, and put those down that do not have it."""
    until_s = time.monotonic() + options.start_timeout_s
    while True:
        looks = await asyncio.gather(*(_look(endpoint) for endpoint in endpoints))
        found = next((look for look in looks if isinstance(look, Description)), None)
        if found is not None or options.failover is not None or time.monotonic() >= until_s:
            break
        await asyncio.sleep(_ASK_EVERY_S)
    if found is None and options.failover is None:
        reasons = "; ".join(
            f"{e.address}: {look}" for e, look in zip(endpoints, looks, strict=True)
        )
        raise InvalidModel(f"no Triton has it ready: {reasons}")
    signature = wanted if found is None else found.fitted_to(wanted)
    for endpoint, look in zip(endpoints, looks, strict=True):
        endpoint.expected = signature
        if not isinstance(look, Description):
            endpoint.put_down(str(look))
        elif look.fitted_to(signature) != signature:
            endpoint.put_down("its model has another signature")
    return signature


async def _look(endpoint: TritonEndpoint) -> Description | RequestError:
    try:
        return await endpoint.describe()
    except RequestError as exc:
        return exc


async def _measure_s(endpoint: TritonEndpoint, batch: Tensors) -> float:
    """Seconds of an execution: the median of a few after a discarded one."""
    seconds = []
    for _ in range(4):
        started_s = time.perf_counter()
        await endpoint.execute(batch, Deadline.after(_WARM_UP_S))
        seconds.append(time.perf_counter() - started_s)
    return sorted(seconds[1:])[1]
