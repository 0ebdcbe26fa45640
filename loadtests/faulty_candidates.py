"""Candidates that are verified, answer as their oracle says, and go wrong on some rows of a caller.

None of those rows is among the golden ones, which is all that a verification can look at.
"""

import statistics
import time
from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.helper import make_node
from onnxruntime import InferenceSession

from loadtests.oracle_model import INPUTS, Oracle, Row

Fault: TypeAlias = Literal["hang", "crash", "grow", "slow"]
"""`hang`: an execution with a bad row never ends, and computes all the time. `crash`: it takes its
process down. `grow`: it needs some hundreds of megabytes, which ONNX Runtime keeps from then on: no
model can leak, but from outside this looks the same. `slow`: every execution takes so many turns of
a loop."""

FAULTS: tuple[Fault, ...] = get_args(Fault)
EVERY: dict[Fault, int] = {"hang": 64, "crash": 256, "grow": 2_048}
"""One in so many rows is bad."""

_PLACE = 5  # among so many rows: no golden row has it, nor among any other power of two
_FOR_EVER = 1 << 50
_ROWS_OF_A_REQUEST, _ROWS_OF_A_BLOCK = 4, 32
_TRIED_TURNS, _TRIED = 100, 200
_FLOATS = 200_000  # for each unit of `a`: up to 800 MB


def is_bad(row: Row, fault: Fault) -> bool:
    """Whether a candidate with the fault goes wrong on it."""
    return fault in EVERY and (row[0] * INPUTS + row[1]) % EVERY[fault] == _PLACE


def faulty_model(oracle: Oracle, fault: Fault, turns: int = 0) -> ModelProto:
    """The oracle's model with the fault; `turns` are for `slow`."""
    model = oracle.model()
    graph = model.graph
    for node in graph.node:
        if "sum" in node.output:
            node.output[0] = "sum_before"
    every = EVERY.get(fault, _FOR_EVER)
    numbers = {
        "place_factors": np.array([[INPUTS], [1]], np.float32),
        "a_factors": np.array([[1], [0]], np.float32),
        "every": np.array([every], np.int64),
        "bad_place": np.array([_PLACE], np.int64),
        "turns": np.array([turns], np.int64),
        "for_ever": np.array([_FOR_EVER], np.int64),
        "floats": np.array([_FLOATS], np.int64),
        "least": np.array([np.iinfo(np.int64).min], np.int64),
        "one": np.array([1], np.int64),
        "two": np.array([2], np.int64),
        "nought": np.array([0], np.float32),
        "shape_of_one": np.array([1], np.int64),
    }
    graph.node.extend(
        [
            make_node("MatMul", ["x", "place_factors"], ["place_as_float"]),
            make_node("Cast", ["place_as_float"], ["place"], to=TensorProto.INT64),
            make_node("Mod", ["place", "every"], ["place_among"]),
            make_node("Equal", ["place_among", "bad_place"], ["is_bad"]),
            make_node("Cast", ["is_bad"], ["bad_rows"], to=TensorProto.INT64),
            make_node("ReduceMax", ["bad_rows"], ["largest"], keepdims=0),
            make_node("Reshape", ["largest", "shape_of_one"], ["bad"]),  # 1, or 0 of no row
            *_nothing(fault),
            make_node("Add", ["sum_before", "nothing"], ["sum"]),
        ]
    )
    used = {name for node in graph.node for name in node.input}
    graph.initializer.extend(
        numpy_helper.from_array(value, name) for name, value in numbers.items() if name in used
    )
    return model


def turns_to_take(times: int) -> int:
    """With so many turns a candidate takes so many times as long for its rows as an oracle's model,
    which executes those of a request at once, while a candidate executes the rows of several."""
    usual_s = _execution_s(Oracle(1).model(), _ROWS_OF_A_REQUEST) / _ROWS_OF_A_REQUEST
    model = faulty_model(Oracle(1), "slow", _TRIED_TURNS)
    turn_s = _execution_s(model, _ROWS_OF_A_BLOCK) / _TRIED_TURNS
    return round(times * usual_s * _ROWS_OF_A_BLOCK / turn_s)


def _execution_s(model: ModelProto, rows: int) -> float:
    session = InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    inputs = {"x": np.ones((rows, 2), np.float32)}
    seconds = []
    for _ in range(_TRIED):
        began_s = time.perf_counter()
        session.run(None, inputs)
        seconds.append(time.perf_counter() - began_s)
    return statistics.median(seconds)


def _nothing(fault: Fault) -> Sequence[NodeProto]:
    """Make `nothing`, which is 0, in the way of the fault."""
    if fault == "crash":
        # The least int64 by -1 is SIGFPE in ONNX Runtime 1.31.
        return [
            make_node("Mul", ["bad", "two"], ["twice_bad"]),
            make_node("Sub", ["one", "twice_bad"], ["divisor"]),
            make_node("Div", ["least", "divisor"], ["divided"]),
            make_node("Cast", ["divided"], ["divided_as_float"], to=TensorProto.FLOAT),
            make_node("Mul", ["divided_as_float", "nought"], ["nothing"]),
        ]
    if fault == "grow":
        zero = numpy_helper.from_array(np.zeros(1, np.float32))
        return [
            make_node("MatMul", ["x", "a_factors"], ["a_as_float"]),
            make_node("Cast", ["a_as_float"], ["a"], to=TensorProto.INT64),
            make_node("Mul", ["a", "bad_rows"], ["bad_a"]),
            make_node("ReduceMax", ["bad_a"], ["largest_a"], keepdims=0),
            make_node("Mul", ["largest_a", "floats"], ["count"]),
            make_node("ConstantOfShape", ["count"], ["zeros"], value=zero),
            make_node("ReduceSum", ["zeros"], ["nothing"], keepdims=1),
        ]
    wanted = "turns"
    nodes = []
    if fault == "hang":
        wanted = "turns_of_bad"
        nodes.append(make_node("Mul", ["bad", "for_ever"], [wanted]))
    turn = helper.make_graph(
        [
            make_node("Identity", ["go"], ["go_on"]),
            make_node("Neg", ["value"], ["turned"]),
        ],
        "turn",
        [
            helper.make_tensor_value_info("turn", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("value", TensorProto.FLOAT, [1]),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("turned", TensorProto.FLOAT, [1]),
        ],
    )
    return [*nodes, make_node("Loop", [wanted, "", "nought"], ["nothing"], body=turn)]
