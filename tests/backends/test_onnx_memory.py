"""What an execution that needs too much memory does to the next ones."""

import asyncio
import logging
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from app.backends.onnx_backend import OnnxBackend, open_onnx
from app.contract import OnnxOptions
from app.deadline import Deadline
from app.errors import BackendError, ModelNotReady
from app.tensors import Tensors
from tests.backends.onnx_graphs import x_floats

SOON = Deadline.after(3_600)


def floats(count: float) -> Tensors:
    return {"x": np.array([[count]], np.float32)}


TOO_MANY = floats(1e15)


@pytest.fixture(params=[False, True], ids=["in a thread", "in the event loop"])
async def backend(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[OnnxBackend]:
    """Its output has as many numbers as `x` says. Of a provider that is not the CPU, although the
    CPU computes every node of it: it is in each build of ONNX Runtime."""
    options = OnnxOptions(use="onnx", providers=("AzureExecutionProvider",))
    opened = await open_onnx(options, x_floats(tmp_path / "model.onnx"), ["y"])
    if request.param:
        await opened.warm_up(floats(3), 1)
    yield opened
    await opened.close()


async def fails(backend: OnnxBackend) -> None:
    with pytest.raises(BackendError, match="Failed to allocate memory"):
        await backend.execute(TOO_MANY, SOON)


async def test_too_little_memory_is_a_backend_error_and_harms_no_other(
    backend: OnnxBackend,
) -> None:
    await fails(backend)
    assert (await backend.execute(floats(3), SOON))["y"].tolist() == [0.0] * 3


async def test_out_of_memory_twice_in_a_row_loads_the_model_anew_but_once_a_minute(
    backend: OnnxBackend, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    await fails(backend)
    assert not caplog.records
    for _ in range(6):
        await fails(backend)
        assert (await backend.execute(floats(3), SOON))["y"].tolist() == [0.0] * 3
        await fails(backend)
    assert [record.message for record in caplog.records] == [
        "out of memory again: the model is loaded anew"
    ]
    await backend.check()


async def test_a_model_that_cannot_be_loaded_again_makes_it_not_ready(
    backend: OnnxBackend, tmp_path: Path
) -> None:
    (tmp_path / "model.onnx").unlink()
    await fails(backend)
    with pytest.raises(ModelNotReady, match="loading it again failed"):
        await backend.execute(TOO_MANY, SOON)
    with pytest.raises(ModelNotReady):
        await backend.execute(floats(3), SOON)
    with pytest.raises(ModelNotReady):
        await backend.check()


async def test_a_model_that_could_not_be_loaded_again_is_once_it_can_though_nobody_calls(
    backend: OnnxBackend, tmp_path: Path
) -> None:
    """Who is not ready gets no calls."""
    (tmp_path / "model.onnx").rename(tmp_path / "aside")
    await fails(backend)
    with pytest.raises(ModelNotReady, match="loading it again failed"):
        await backend.execute(TOO_MANY, SOON)
    (tmp_path / "aside").rename(tmp_path / "model.onnx")
    async with asyncio.timeout(60):
        while True:
            try:
                await backend.check()
            except ModelNotReady:
                await asyncio.sleep(0.05)
            else:
                break
    assert (await backend.execute(floats(3), SOON))["y"].tolist() == [0.0] * 3


async def test_on_the_cpu_nothing_is_loaded_anew(tmp_path: Path) -> None:
    model = x_floats(tmp_path / "model.onnx")
    backend = await open_onnx(OnnxOptions(use="onnx", providers=("cpu",)), model, ["y"])
    model.unlink()
    for _ in range(3):
        await fails(backend)
    await backend.check()
    assert (await backend.execute(floats(3), SOON))["y"].tolist() == [0.0] * 3
    await backend.close()
