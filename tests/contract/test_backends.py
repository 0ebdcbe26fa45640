"""What every backend promises to the batcher."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from app.backends import open_backend
from app.backends.backend import Backend
from app.contract import BackendOptions, EchoOptions, Isolation, OnnxOptions, TritonOptions
from app.deadline import Deadline
from app.errors import BackendError
from app.tensors import Signature, TensorSpec
from loadtests.triton_process import TritonProcess
from tests.tiny_models import onnx_model

SIGNATURE = Signature((TensorSpec("x", "float32", (2,)),), (TensorSpec("y", "float32", (1,)),))


def options(name: str, request: pytest.FixtureRequest) -> BackendOptions:
    match name.split("-"):
        case ["echo"]:
            return EchoOptions(use="echo")
        case ["triton", "grpc" | "http" as protocol]:
            triton: TritonProcess = request.getfixturevalue("triton")
            endpoint = triton.endpoint(protocol)
            return TritonOptions(use="triton", protocol=protocol, endpoints=(endpoint,))
    return ONNX[name]


ONNX = {
    "onnx": OnnxOptions(use="onnx"),
    "onnx, three instances": OnnxOptions(use="onnx", instances=3),
    "onnx, bound": OnnxOptions(use="onnx", io_binding=True),
    "isolated": OnnxOptions(use="onnx", isolated=Isolation()),
}
BACKENDS = [
    "echo",
    *ONNX,
    pytest.param("triton-grpc", marks=pytest.mark.triton),
    pytest.param("triton-http", marks=pytest.mark.triton),
]
SOON = Deadline.after(3_600)


@dataclass(frozen=True)
class Case:
    """An open backend that takes `x` `[n, 2]`, and what its output `y` must be for it."""

    backend: Backend
    expected: Callable[[NDArray[np.float32]], NDArray[np.float32]]


@pytest.fixture(params=BACKENDS)
async def case(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Case]:
    model = tmp_path / "regression" / "1" / "model.onnx"
    model.parent.mkdir(parents=True)
    model.write_bytes(onnx_model("regression").SerializeToString())
    backend = await open_backend(options(request.param, request), model, SIGNATURE)
    if request.param == "echo":
        yield Case(backend, lambda x: x)
    else:
        yield Case(backend, lambda x: x[:, :1] + 2 * x[:, 1:])
    await backend.close()


def rows(count: int, start: int = 0) -> NDArray[np.float32]:
    """Rows that differ from each other, in whole numbers: float32 adds them exactly."""
    return np.arange(2 * start, 2 * (start + count), dtype=np.float32).reshape(count, 2)


async def assert_answers(case: Case, x: NDArray[np.float32]) -> None:
    outputs = await case.backend.execute({"x": x}, SOON)
    assert list(outputs) == ["y"]
    np.testing.assert_array_equal(outputs["y"], case.expected(x))


@pytest.mark.parametrize("count", [1, 2, 63, 64, 1000])
async def test_every_row_is_answered_in_order(case: Case, count: int) -> None:
    await assert_answers(case, rows(count))


async def test_rows_that_are_a_view_of_a_larger_batch_are_answered(case: Case) -> None:
    await assert_answers(case, rows(9)[3:6])


async def test_rows_that_lie_apart_in_memory_are_answered(case: Case) -> None:
    await assert_answers(case, np.asfortranarray(rows(9))[::2])


async def test_inputs_are_not_changed(case: Case) -> None:
    x = rows(5)
    x.flags.writeable = False
    await case.backend.execute({"x": x}, SOON)
    np.testing.assert_array_equal(x, rows(5))


async def test_concurrent_executions_are_answered_with_their_own_rows(case: Case) -> None:
    await asyncio.gather(*(assert_answers(case, rows(7, start)) for start in range(0, 210, 7)))


@pytest.mark.parametrize("max_rows", [1, 2, 64])
async def test_a_warm_backend_answers_as_a_cold_one(case: Case, max_rows: int) -> None:
    example = rows(3)
    example.flags.writeable = False
    cold = await case.backend.execute({"x": rows(11)}, SOON)
    await case.backend.warm_up({"x": example}, max_rows)
    warm = await case.backend.execute({"x": rows(11)}, SOON)
    np.testing.assert_array_equal(warm["y"], cold["y"])


async def test_concurrent_executions_of_a_warm_backend_are_answered_with_their_own_rows(
    case: Case,
) -> None:
    await case.backend.warm_up({"x": rows(1)}, 1)
    counts = (1, 2000, 1, 3, 2000)  # the large ones are not worth the event loop's time
    await asyncio.gather(*(assert_answers(case, rows(count, count)) for count in counts))


async def test_a_warm_up_says_how_long_every_size_takes(case: Case) -> None:
    times = await case.backend.warm_up({"x": rows(1)}, 6)
    assert all(0 < times.predicted_s(count) < 60 for count in range(1, 7))


async def test_a_backend_that_can_execute_says_so(case: Case) -> None:
    await case.backend.check()


async def test_the_signature_is_what_it_takes_and_returns(case: Case) -> None:
    assert case.backend.signature == SIGNATURE


async def test_an_execution_without_an_input_is_a_backend_error(case: Case) -> None:
    with pytest.raises(BackendError):
        await case.backend.execute({"z": rows(1)}, SOON)


async def test_a_failed_execution_harms_no_other(case: Case) -> None:
    results = await asyncio.gather(
        case.backend.execute({"z": rows(1)}, SOON),
        assert_answers(case, rows(4)),
        return_exceptions=True,
    )
    assert isinstance(results[0], Exception)
    assert results[1] is None
    await assert_answers(case, rows(4))


async def test_a_caller_that_leaves_harms_no_other(case: Case) -> None:
    left = asyncio.create_task(_execute(case, rows(5)))
    await asyncio.sleep(0)  # it has begun
    left.cancel()
    await asyncio.gather(left, return_exceptions=True)
    await assert_answers(case, rows(4, 50))


@pytest.mark.parametrize(
    "x",
    [np.zeros((2, 3), np.float32), np.zeros(2, np.float32), np.zeros((2, 2), np.float64)],
    ids=["width", "rank", "dtype"],
)
@pytest.mark.parametrize("case", ["onnx", "isolated"], indirect=True)
@pytest.mark.parametrize("warm", [False, True])
async def test_onnx_refuses_a_tensor_that_does_not_fit(
    case: Case, x: NDArray[Any], warm: bool
) -> None:
    if warm:
        await case.backend.warm_up({"x": rows(1)}, 4)
    with pytest.raises(BackendError, match=r"ONNX Runtime: .*x"):
        await case.backend.execute({"x": x}, SOON)


async def _execute(case: Case, x: NDArray[np.float32]) -> None:
    await case.backend.execute({"x": x}, SOON)
