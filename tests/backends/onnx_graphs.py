"""ONNX files that need much of time or memory where a value says so. All take `x` `[n, 1]`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
from onnx import GraphProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

Shape: TypeAlias = Sequence[str | int]
_ROWS: Shape = ["n", 1]


def loop_without_end(path: Path) -> Path:
    """`y = x`, at once where no `x` is positive, else never: ONNX Runtime can end it between two
    nodes of the loop's body."""
    go = helper.make_node("Greater", ["largest", "zero"], ["go"])
    return _written(path, [go, _loop("", "go")], constants={"zero": np.array(0, np.float32)})


def loop_of_x_trips(path: Path) -> Path:
    """`y = x`, after as many trips of a loop, a microsecond or two each."""
    trips = helper.make_node("Cast", ["largest"], ["trips"], to=TensorProto.INT64)
    return _written(path, [trips, _loop("trips", "")])


def one_long_node(path: Path) -> Path:
    """`y` `[n, 20001]`: a single node that takes some 0.4 s a row and cannot be interrupted."""
    width = 20_000
    nodes = [
        helper.make_node("Expand", ["x", "shape"], ["wide"]),
        helper.make_node("Unsqueeze", ["wide", "one"], ["deep"]),
        helper.make_node("AveragePool", ["deep"], ["means"], kernel_shape=[width]),
        helper.make_node("Squeeze", ["means", "one"], ["y"]),
    ]
    constants = {"shape": np.array([1, 2 * width]), "one": np.array([1])}
    return _written(path, nodes, ["n", width + 1], constants)


def x_floats(path: Path) -> Path:
    """`y`: as many zeros as the largest `x` says, which may be more than any memory holds."""
    nodes = [
        helper.make_node("Cast", ["largest"], ["count"], to=TensorProto.INT64),
        helper.make_node("Unsqueeze", ["count", "first"], ["shape"]),
        helper.make_node("ConstantOfShape", ["shape"], ["y"]),
    ]
    return _written(path, nodes, ["count"], {"first": np.array([0])})


def _loop(trips: str, condition: str) -> NodeProto:
    body: GraphProto = helper.make_graph(
        [
            helper.make_node("Identity", ["go_on"], ["still"]),
            helper.make_node("Identity", ["before"], ["after"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("trip", TensorProto.INT64, []),
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            _floats("before", _ROWS),
        ],
        [helper.make_tensor_value_info("still", TensorProto.BOOL, []), _floats("after", _ROWS)],
    )
    return helper.make_node("Loop", [trips, condition, "x"], ["y"], body=body)


def _written(
    path: Path,
    nodes: list[NodeProto],
    y: Shape = _ROWS,
    constants: dict[str, np.ndarray] | None = None,
) -> Path:
    """`nodes` may also read `largest`, a scalar of `x`."""
    largest = helper.make_node("ReduceMax", ["x"], ["largest"], keepdims=0)
    graph = helper.make_graph(
        [largest, *nodes],
        "graph",
        [_floats("x", _ROWS)],
        [_floats("y", y)],
        [numpy_helper.from_array(value, name) for name, value in (constants or {}).items()],
    )
    model = helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 17)])
    path.write_bytes(model.SerializeToString())
    return path


def _floats(name: str, shape: Shape) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
