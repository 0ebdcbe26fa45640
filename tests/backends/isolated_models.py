"""Models that do to their process what a model must not do, and a look at that process."""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from app.backends import open_backend
from app.backends.backend import Backend
from app.contract import Isolation, OnnxOptions
from app.deadline import Deadline
from app.tensors import Signature, Tensors, TensorSpec

SIGNATURE = Signature((TensorSpec("x", "float32", (1,)),), (TensorSpec("y", "float32", (1,)),))
SOON = Deadline.after(3_600)
FOR_EVER = 1e12
"""As the value of a row: more turns of a loop than any test waits for, or more numbers than fit."""


def looping(path: Path) -> Path:
    """Writes a file with `y` = `x`, after as many turns of a loop as the largest value of `x`."""
    turn = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["go_on"]),
            helper.make_node("Neg", ["value"], ["turned"]),
        ],
        "turn",
        [
            helper.make_tensor_value_info("turn", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("value", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("turned", TensorProto.FLOAT, None),
        ],
    )
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["largest"], keepdims=0),
        helper.make_node("Cast", ["largest"], ["turns"], to=TensorProto.INT64),
        helper.make_node("Loop", ["turns", "", "x"], ["looped"], body=turn),
        helper.make_node("Abs", ["looped"], ["y"]),
    ]
    return _written(path, nodes)


def allocating(path: Path) -> Path:
    """Writes a file with `y` = `x`, for which it makes as many zeros as the largest value of `x`,
    four bytes each."""
    zero = numpy_helper.from_array(np.zeros(1, np.float32))
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["largest"], keepdims=0),
        helper.make_node("Cast", ["largest"], ["whole"], to=TensorProto.INT64),
        helper.make_node("Reshape", ["whole", "one"], ["count"]),
        helper.make_node("ConstantOfShape", ["count"], ["zeros"], value=zero),
        helper.make_node("ReduceSum", ["zeros"], ["nothing"], keepdims=0),
        helper.make_node("Add", ["x", "nothing"], ["y"]),
    ]
    return _written(path, nodes)


async def opened(model: Path, **isolation: float) -> Backend:
    options = OnnxOptions(use="onnx", isolated=Isolation.model_validate(isolation))
    return await open_backend(options, model, SIGNATURE)


def rows(*values: float) -> Tensors:
    x: NDArray[np.float32] = np.array(values, np.float32).reshape(-1, 1)
    return {"x": x}


async def answer(backend: Backend, *values: float) -> list[float]:
    """`y` of these rows, which is `x` for every model here."""
    outputs = await backend.execute(rows(*values), SOON)
    return [float(value) for value in outputs["y"].ravel()]


def processes(parent: int | None = None) -> list[int]:
    """The isolated processes of a process, ours by default: their numbers, the oldest first."""
    parent = os.getpid() if parent is None else parent
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [
        int(pid) for pid in children if b"isolated" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]


def cpu_ticks(pid: int) -> int:
    """CPU time that it has used, in hundredths of a second."""
    return sum(map(int, Path(f"/proc/{pid}/stat").read_text().split()[13:15]))


async def until(true: Callable[[], bool]) -> None:
    """What a process does is seen only by looking. Raises `TimeoutError` after two minutes."""
    async with asyncio.timeout(120):
        while not true():  # noqa: ASYNC110  (no event can be set by what another process does)
            await asyncio.sleep(0.005)


def _written(path: Path, nodes: list[NodeProto]) -> Path:
    one = numpy_helper.from_array(np.array([1], np.int64), "one")
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 1])],
        [one],
    )
    model = helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 17)])
    path.write_bytes(model.SerializeToString())
    return path
