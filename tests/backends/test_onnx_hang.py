"""Executions that do not end: real graphs, given up while they are under way."""

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from app.backends.onnx_backend import OnnxBackend, open_onnx
from app.contract import OnnxOptions
from app.deadline import Deadline
from app.errors import ModelNotReady
from app.tensors import Tensors
from tests.backends.onnx_graphs import loop_without_end, one_long_node

OPTIONS = OnnxOptions(use="onnx")
SOON = Deadline.after(3_600)
ONE = {"x": np.ones((1, 1), np.float32)}
ZERO = {"x": np.zeros((1, 1), np.float32)}


@pytest.fixture
async def endless(tmp_path: Path) -> AsyncIterator[OnnxBackend]:
    """Ends for `ZERO`, not for `ONE`."""
    backend = await open_onnx(OPTIONS, loop_without_end(tmp_path / "endless.onnx"), ["y"])
    yield backend
    await backend.close()


@pytest.fixture
async def long(tmp_path: Path) -> AsyncIterator[OnnxBackend]:
    backend = await open_onnx(OPTIONS, one_long_node(tmp_path / "long.onnx"), ["y"])
    yield backend
    await backend.close()


async def given_up(backend: OnnxBackend, inputs: Tensors) -> None:
    """An execution that is cancelled after it had time to begin."""
    execution = asyncio.ensure_future(backend.execute(inputs, SOON))
    done, _ = await asyncio.wait({execution}, timeout=0.1)
    assert not done
    execution.cancel()
    await asyncio.wait({execution})


async def until_ready(backend: OnnxBackend) -> None:
    async with asyncio.timeout(120):
        while True:
            try:
                return await backend.check()
            except ModelNotReady:
                await asyncio.sleep(0.02)


async def test_after_a_hang_the_next_execution_is_answered(endless: OnnxBackend) -> None:
    await given_up(endless, ONE)
    assert (await endless.execute(ZERO, SOON))["y"].tolist() == [[0.0]]


async def test_a_loop_without_end_is_ended(endless: OnnxBackend) -> None:
    for _ in range(6):  # more than may be left behind
        await given_up(endless, ONE)
        await until_ready(endless)
    assert (await endless.execute(ZERO, SOON))["y"].tolist() == [[0.0]]


async def test_a_hang_takes_one_instance_only(tmp_path: Path) -> None:
    options = OnnxOptions(use="onnx", instances=2)
    backend = await open_onnx(options, loop_without_end(tmp_path / "endless.onnx"), ["y"])
    hung = asyncio.ensure_future(backend.execute(ONE, SOON))
    for _ in range(10):
        assert (await backend.execute(ZERO, SOON))["y"].tolist() == [[0.0]]
    assert not hung.done()
    hung.cancel()
    await asyncio.wait({hung})
    await backend.close()


async def test_the_next_execution_does_not_wait_for_one_that_cannot_be_interrupted(
    long: OnnxBackend,
) -> None:
    await given_up(long, {"x": np.ones((3, 1), np.float32)})
    outputs = await long.execute({"x": np.full((1, 1), 5.0, np.float32)}, SOON)
    np.testing.assert_allclose(outputs["y"][0, :3], 5.0, rtol=1e-3)


async def test_it_is_not_ready_while_too_many_executions_do_not_end(long: OnnxBackend) -> None:
    started_s = time.perf_counter()
    await long.execute(ONE, SOON)
    two_seconds = 1 + int(2 / (time.perf_counter() - started_s))
    some = {"x": np.ones((two_seconds, 1), np.float32)}

    async def give_up_until_it_is_not_ready() -> None:
        for already in range(12):
            await given_up(long, some)
            if already >= 3:
                await asyncio.sleep(0.6)  # they might have returned soon
            await long.check()

    with pytest.raises(ModelNotReady, match=r"^\d executions in ONNX Runtime were given up"):
        await give_up_until_it_is_not_ready()
    with pytest.raises(ModelNotReady):
        await long.execute(some, SOON)
    await until_ready(long)
    assert len((await long.execute(ONE, SOON))["y"]) == 1


def test_the_process_ends_while_an_execution_does_not(tmp_path: Path) -> None:
    path = one_long_node(tmp_path / "long.onnx")
    script = f"""
import asyncio, numpy as np
from pathlib import Path
from app.backends.onnx_backend import open_onnx
from app.contract import OnnxOptions
from app.deadline import Deadline

async def main():
    backend = await open_onnx(OnnxOptions(use="onnx"), Path({str(path)!r}), ["y"])
    rows = {{"x": np.ones((1000, 1), np.float32)}}
    execution = asyncio.ensure_future(backend.execute(rows, Deadline.after(300)))
    await asyncio.wait({{execution}}, timeout=0.2)
    execution.cancel()
    await asyncio.wait({{execution}})
    await backend.close()

asyncio.run(main())
"""
    # A thousand rows take minutes.
    ended = subprocess.run([sys.executable, "-c", script], timeout=60, check=False)
    assert ended.returncode == 0
