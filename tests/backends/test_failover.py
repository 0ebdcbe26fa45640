"""Two backends for one model: which of them executes."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from app.backends import open_backend
from app.backends.backend import Event
from app.backends.execution_times import ExecutionTimes
from app.backends.failover import FailoverBackend
from app.contract import TritonOptions
from app.deadline import Deadline
from app.errors import BackendError, ModelNotReady
from app.tensors import Signature, Tensors
from loadtests.triton_process import TritonProcess
from tests.backends.opened_triton import SIGNATURE, SOON, rows
from tests.tiny_models import onnx_model


class Multiplier:
    """y = factor * x[0]; what a test changes, it obeys."""

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.error: Exception | None = None
        """Raised instead of answering."""
        self.executed = asyncio.Event()
        self.is_closed = False

    @property
    def signature(self) -> Signature:
        return SIGNATURE

    @property
    def concurrency(self) -> int:
        return 3

    async def execute(self, inputs: Tensors, deadline: Deadline) -> Tensors:
        await self.check()
        self.executed.set()
        return {"y": self.factor * inputs["x"][:, :1]}

    async def warm_up(self, example: Tensors, max_rows: int) -> ExecutionTimes:
        await self.check()
        return ExecutionTimes({1: self.factor})

    async def check(self) -> None:
        if self.error is not None:
            raise self.error

    async def close(self) -> None:
        self.is_closed = True


class Pair:
    def __init__(self) -> None:
        self.primary = Multiplier(1)
        self.local = Multiplier(1)
        self.events: list[Event] = []
        self.backend = FailoverBackend(self.primary, self.local, self.events.append)

    def differ(self) -> None:
        """From now on one can tell who answered."""
        self.primary.factor, self.local.factor = 10, 20

    async def answer(self) -> float:
        return float((await self.backend.execute(rows((1, 0)), SOON))["y"][0, 0])


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    pair = Pair()
    yield pair
    await pair.backend.close()


async def test_the_first_one_executes_while_it_is_there(pair: Pair) -> None:
    times = await pair.backend.warm_up(rows(), 4)
    pair.differ()
    assert await pair.answer() == 10
    assert times.predicted_s(1) == 1
    assert (pair.backend.on_fallback, pair.events) == (False, [])


async def test_the_second_one_executes_while_the_first_is_not_there(
    pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    await pair.backend.warm_up(rows(), 4)
    pair.differ()
    pair.primary.error = ModelNotReady("gone")
    assert [await pair.answer() for _ in range(3)] == [20, 20, 20]
    assert (pair.backend.on_fallback, pair.events) == (True, ["executed_locally"] * 3)
    await pair.backend.check()
    pair.primary.error = None
    assert await pair.answer() == 10
    assert len(caplog.messages) == 2


async def test_an_error_of_the_rows_is_no_reason_to_ask_the_second_one(pair: Pair) -> None:
    pair.primary.error = BackendError("bad rows")
    with pytest.raises(BackendError, match="bad rows"):
        await pair.answer()


async def test_it_could_execute_nothing_when_neither_could(pair: Pair) -> None:
    pair.primary.error = ModelNotReady("gone")
    pair.local.error = ModelNotReady("broken")
    with pytest.raises(ModelNotReady, match="broken"):
        await pair.backend.check()


async def test_a_first_one_that_comes_late_is_used_once_it_says_the_same(pair: Pair) -> None:
    pair.primary.error = ModelNotReady("not yet")
    await pair.backend.warm_up(rows(), 4)
    assert await pair.answer() == 1
    assert pair.backend.on_fallback
    pair.primary.error = None
    while pair.backend.on_fallback:
        await asyncio.sleep(0.01)
        await pair.answer()


async def test_a_first_one_that_comes_late_and_says_otherwise_is_not_used(
    pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    pair.primary.error = ModelNotReady("not yet")
    await pair.backend.warm_up(rows(), 4)
    pair.primary.factor = 10
    pair.primary.error = None
    while "it is there but not used" not in caplog.messages:
        assert await pair.answer() == 1
        await asyncio.sleep(0.01)


async def test_a_first_one_with_a_defect_is_looked_at_again(
    pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    pair.primary.error = ModelNotReady("not yet")
    await pair.backend.warm_up(rows(), 4)
    pair.primary.error = KeyError("a defect")
    while "it is there but not used" not in caplog.messages:
        assert await pair.answer() == 1
        await asyncio.sleep(0.01)
    pair.primary.error = None
    while pair.backend.on_fallback:
        assert await pair.answer() == 1
        await asyncio.sleep(0.01)
    assert caplog.messages.count("it is there but not used") == 1


async def test_closing_closes_both(pair: Pair) -> None:
    await pair.backend.close()
    assert pair.primary.is_closed
    assert pair.local.is_closed


async def test_a_model_for_triton_starts_on_its_local_copy(tmp_path: Path) -> None:
    async with _Opened(tmp_path, "127.0.0.1:1") as backend:
        await backend.warm_up(rows(), 4)
        assert await _value(backend) == 5
        assert backend.on_fallback


@pytest.mark.triton
@pytest.mark.parametrize("protocol", ["grpc", "http"])
async def test_no_row_is_lost_when_triton_is_killed_under_load(
    triton: TritonProcess, tmp_path: Path, protocol: str
) -> None:
    async with _Opened(tmp_path, triton.endpoint(protocol), protocol) as backend:
        await backend.warm_up(rows(), 4)
        assert not backend.on_fallback

        async def ask() -> None:
            for _ in range(200):
                assert await _value(backend) == 5

        asking = [asyncio.create_task(ask()) for _ in range(4)]
        await _value(backend)
        triton.kill()
        await asyncio.gather(*asking)
        assert backend.on_fallback
        triton.launch()
        while backend.on_fallback:
            assert await _value(backend) == 5
            await asyncio.sleep(0.01)


class _Opened:
    """The backend on Triton with the local copy behind it."""

    def __init__(self, folder: Path, endpoint: str, protocol: str = "grpc") -> None:
        self._model = folder / "regression" / "1" / "model.onnx"
        self._model.parent.mkdir(parents=True)
        self._model.write_bytes(onnx_model("regression").SerializeToString())
        self._options = TritonOptions.model_validate(
            {"use": "triton", "endpoints": [endpoint], "protocol": protocol, "failover": "onnx"}
        )

    async def __aenter__(self) -> FailoverBackend:
        backend = await open_backend(self._options, self._model, SIGNATURE)
        assert isinstance(backend, FailoverBackend)
        self._backend = backend
        return backend

    async def __aexit__(self, *_: object) -> None:
        await self._backend.close()


async def _value(backend: FailoverBackend) -> float:
    outputs = await backend.execute({"x": np.array([[1, 2]], np.float32)}, SOON)
    return float(outputs["y"][0, 0])
