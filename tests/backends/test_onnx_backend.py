"""The ONNX Runtime backend: which files it takes, and where it executes."""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from app.backends.onnx_backend import OnnxBackend, open_onnx
from app.contract import OnnxOptions
from app.deadline import Deadline
from app.errors import InvalidModel
from app.tensors import Signature, TensorSpec
from tests.backends.onnx_graphs import loop_of_x_trips
from tests.tiny_models import onnx_model

OPTIONS = OnnxOptions(use="onnx")
SOON = Deadline.after(3_600)


@pytest.fixture
async def backend(tmp_path: Path) -> AsyncIterator[OnnxBackend]:
    """Computes `y` from `x` `[n, 2]` in microseconds."""
    path = tmp_path / "model.onnx"
    path.write_bytes(onnx_model("regression").SerializeToString())
    opened = await open_onnx(OPTIONS, path, ["y"])
    yield opened
    await opened.close()


def identity(path: Path, element: int, shape: list[str | int]) -> Path:
    """A file that returns its input `x` as `y`."""
    values = [helper.make_tensor_value_info(name, element, shape) for name in ("x", "y")]
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])], "identity", values[:1], values[1:]
    )
    model = helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 17)])
    path.write_bytes(model.SerializeToString())
    return path


def broken_files() -> dict[str, bytes]:
    whole = onnx_model("regression").SerializeToString()
    return {
        "empty": b"",
        "truncated": whole[: len(whole) // 2],
        "not ONNX": b"model: tiny\n",
        "unknown operator": whole.replace(b"MatMul", b"MetMul"),
    }


@pytest.mark.parametrize("content", broken_files().values(), ids=broken_files())
async def test_a_broken_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(content)
    with pytest.raises(InvalidModel, match=r"broken\.onnx: "):
        await open_onnx(OPTIONS, path, ["y"])


async def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidModel, match=r"absent\.onnx: "):
        await open_onnx(OPTIONS, tmp_path / "absent.onnx", ["y"])


async def test_an_output_that_the_model_does_not_compute_is_named(tmp_path: Path) -> None:
    path = identity(tmp_path / "model.onnx", TensorProto.FLOAT, ["rows", 1])
    with pytest.raises(InvalidModel, match=r"model\.onnx: has no output \['z'\], it has \['y'\]"):
        await open_onnx(OPTIONS, path, ["y", "z"])


@pytest.mark.parametrize(
    ("element", "shape", "spec"),
    [
        (TensorProto.FLOAT, ["rows", 3], ("float32", (3,))),
        (TensorProto.DOUBLE, ["rows"], ("float64", ())),
        (TensorProto.INT64, ["rows", "columns"], ("int64", (-1,))),
        (TensorProto.STRING, ["rows", 2, 2], ("str", (2, 2))),
        (TensorProto.BOOL, [4, 1], ("bool", (1,))),
    ],
)
async def test_the_signature_is_the_files(
    tmp_path: Path, element: int, shape: list[str | int], spec: tuple[str, tuple[int, ...]]
) -> None:
    backend = await open_onnx(OPTIONS, identity(tmp_path / "model.onnx", element, shape), ["y"])
    assert backend.signature == Signature((TensorSpec("x", *spec),), (TensorSpec("y", *spec),))
    await backend.close()


async def test_a_type_that_cannot_be_served_is_refused(tmp_path: Path) -> None:
    path = identity(tmp_path / "model.onnx", TensorProto.UINT8, ["rows", 1])
    with pytest.raises(InvalidModel, match=r"x: tensors of type tensor\(uint8\)"):
        await open_onnx(OPTIONS, path, ["y"])


async def test_texts_are_executed(tmp_path: Path) -> None:
    backend = await open_onnx(
        OPTIONS, identity(tmp_path / "model.onnx", TensorProto.STRING, ["rows", 1]), ["y"]
    )
    texts = np.array([["東京"], [""]], dtype=object)
    assert (await backend.execute({"x": texts}, SOON))["y"].tolist() == [["東京"], [""]]
    await backend.close()


async def gives_others_a_turn(execution: Awaitable[Any]) -> bool:
    """Whether the event loop ran other callbacks before the execution was done: an execution in
    the loop's own thread leaves it no turn."""
    turns: list[bool] = []
    asyncio.get_running_loop().call_soon(turns.append, True)
    await execution
    return bool(turns)


async def test_an_execution_of_unknown_cost_leaves_the_event_loop_to_others(
    backend: OnnxBackend,
) -> None:
    assert await gives_others_a_turn(backend.execute({"x": np.ones((1, 2), np.float32)}, SOON))


async def test_a_cheap_execution_is_not_worth_a_thread(backend: OnnxBackend) -> None:
    x = np.ones((1, 2), np.float32)
    await backend.warm_up({"x": x}, 64)
    assert not await gives_others_a_turn(backend.execute({"x": x}, SOON))


async def test_many_rows_of_a_cheap_model_leave_the_event_loop_to_others(
    backend: OnnxBackend,
) -> None:
    await backend.warm_up({"x": np.ones((1, 2), np.float32)}, 1)
    assert await gives_others_a_turn(
        backend.execute({"x": np.ones((100_000, 2), np.float32)}, SOON)
    )


@pytest.fixture
async def loops(tmp_path: Path) -> AsyncIterator[OnnxBackend]:
    """Warm, and known as fast: none of the warm-up's loops has a trip."""
    options = OnnxOptions(use="onnx", instances=3)
    opened = await open_onnx(options, loop_of_x_trips(tmp_path / "loops.onnx"), ["y"])
    await opened.warm_up(trips(0), 1)
    yield opened
    await opened.close()


def trips(count: int) -> dict[str, Any]:
    return {"x": np.array([[count]], np.float32)}


async def test_a_model_that_becomes_slow_leaves_the_event_loop_and_may_come_back(
    loops: OnnxBackend,
) -> None:
    async def leaves_it(count: int) -> bool:
        return await gives_others_a_turn(loops.execute(trips(count), SOON))

    assert not await leaves_it(0)
    assert any([await leaves_it(3_000) for _ in range(30)])
    assert await leaves_it(3_000)
    assert not all([await leaves_it(0) for _ in range(300)])
    assert not await leaves_it(0)


async def test_more_than_one_at_once_is_for_executions_outside_the_event_loop(
    loops: OnnxBackend,
) -> None:
    assert loops.concurrency == 1
    for _ in range(30):
        await loops.execute(trips(3_000), SOON)
    assert loops.concurrency == 3


@pytest.mark.parametrize(
    "changed",
    [
        {"threads": 2},
        {"parallel_nodes": 2},
        {"spinning": True, "threads": 2},
        {"memory_arena": False},
        {"memory_pattern": True},
        *({"graph_optimisation": level} for level in ("none", "basic", "extended", "all")),
        {"provider_options": {"cpu": {}}},
    ],
    ids=str,
)
async def test_the_answer_is_the_same_with_every_option(
    tmp_path: Path, changed: dict[str, Any]
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(onnx_model("regression").SerializeToString())
    backend = await open_onnx(OnnxOptions(use="onnx", **changed), path, ["y"])
    x = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
    assert (await backend.execute({"x": x}, SOON))["y"].tolist() == [[5.0], [11.0]]
    await backend.close()
