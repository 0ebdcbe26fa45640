"""Versions of one model for releases: some as good as the champion, and a dozen that are not.

What the good ones say is exact in float32. The faults spare the golden rows, which is all that a
verification can look at.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import yaml
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.helper import make_node

from app.features.plan import NO_FEATURES
from app.repository.layout import CONTRACT_FILE
from app.repository.manifest import MODEL_FILE
from app.repository.publish import TRAINING_FILE, publish

MODEL = "released"
INPUTS = 1_000
"""Request fields `a` and `b` are whole numbers below it."""

Row: TypeAlias = tuple[int, int]
Good: TypeAlias = Literal["champion", "retrained", "laborious"]
"""`retrained` says what the champion does, and 1/65,536 more. `laborious` says it after many turns
of a loop, and so does whatever is compared with it."""
Fault: TypeAlias = Literal[
    "crash",
    "hang",
    "twice as slow",
    "1 % NaN",
    "swapped classes",
    "bias",
    "leak",
    "wrong dtype",
    "1 % errors",
    "wrong segment",
    "slow in large batches",
    "not deterministic",
]
FAULTS: tuple[Fault, ...] = get_args(Fault)
Other: TypeAlias = Literal["20 % errors"]
"""For plans with wide margins."""
Kind: TypeAlias = Good | Fault | Other

LARGE_ROWS = 48
"""Of a request that makes a batch large."""
SEGMENT_FROM = 900
"""From this `b` on the segment begins that is wrong."""
_SCALE = 2_048
_AT_LEAST = 0.5
_MORE = 1 / 65_536
_BIAS = 41 / _SCALE
_SEGMENT_BIAS = 205 / _SCALE
_NOISE = 0.1
_LARGE_FROM = 32
_GOLDEN: Sequence[Row] = ((0, 0), (2, 0), (0, 2), (998, 998), (123, 456), (512, 512))
_PLACE = 5  # among so many rows; no golden row has it
_EVERY: dict[str, int] = {
    "crash": 256,
    "hang": 64,
    "1 % NaN": 100,
    "1 % errors": 100,
    "20 % errors": 6,
    "leak": 64,
    "not deterministic": 2,
    "slow in large batches": 2,
}
"""One in so many rows is bad."""
_FOR_EVER = 1 << 50
_FLOATS = 150_000
"""That the leaking one takes, for each unit of `a`, up to 600 MB."""


@dataclass(frozen=True)
class Turns:
    """Of a loop, that a version takes for an execution."""

    laborious: int = 0
    large: int = 0
    """With a large batch."""


def said(kind: Kind, row: Row) -> float:
    """By the good ones; a faulty one is held against the champion."""
    return (row[0] + row[1]) / _SCALE + (_MORE if kind == "retrained" else 0)


def instance(row: Row) -> dict[str, float]:
    """The row as a caller says it."""
    return {"a": float(row[0]), "b": float(row[1])}


def model(kind: Kind, turns: Turns) -> ModelProto:
    """Input `x` float32 `[N, 2]`, output `p` float32 `[N, 1]`."""
    every = _EVERY.get(kind, 1 << 40)
    numbers: dict[str, Any] = {
        "ones": np.ones((2, 1), np.float32),
        "scale": np.array([[_SCALE]], np.float32),
        "more": np.array([[_MORE]], np.float32),
        "place_factors": np.array([[INPUTS], [1]], np.float32),
        "a_factors": np.array([[1], [0]], np.float32),
        "b_factors": np.array([[0], [1]], np.float32),
        "every": np.array([every], np.int64),
        "bad_place": np.array([_PLACE % every], np.int64),
        "for_ever": np.array([_FOR_EVER], np.int64),
        "laborious": np.array([turns.laborious], np.int64),
        "large_turns": np.array([turns.large], np.int64),
        "large_from": np.array([_LARGE_FROM], np.int64),
        "floats": np.array([_FLOATS], np.int64),
        "least": np.array([np.iinfo(np.int64).min], np.int64),
        "one": np.array([1], np.int64),
        "two": np.array([2], np.int64),
        "nought": np.array([0], np.float32),
        "shape_of_one": np.array([1], np.int64),
        "nan": np.array([[np.nan]], np.float32),
        "whole": np.array([[1]], np.float32),
        "bias": np.array([[_BIAS]], np.float32),
        "segment_from": np.array([[SEGMENT_FROM]], np.float32),
        "segment_bias": np.array([[_SEGMENT_BIAS]], np.float32),
        "table": np.zeros(1, np.float32),
        "first": np.array([0], np.int64),
    }
    nodes = [
        make_node("MatMul", ["x", "ones"], ["sum"]),
        make_node("Div", ["sum", "scale"], ["right"]),
        make_node("MatMul", ["x", "place_factors"], ["place_as_float"]),
        make_node("Cast", ["place_as_float"], ["place"], to=TensorProto.INT64),
        make_node("Mod", ["place", "every"], ["place_among"]),
        make_node("Equal", ["place_among", "bad_place"], ["is_bad"]),
        make_node("Cast", ["is_bad"], ["bad_rows"], to=TensorProto.INT64),
        make_node("ReduceMax", ["bad_rows"], ["largest"], keepdims=0),
        make_node("Reshape", ["largest", "shape_of_one"], ["bad"]),  # 1, or 0 of no row
        *_FAULTY.get(kind, _right)(),
    ]
    element = TensorProto.DOUBLE if kind == "wrong dtype" else TensorProto.FLOAT
    needed = _needed(nodes, "p")
    used = {name for node in needed for name in node.input}
    graph = helper.make_graph(
        needed,
        MODEL,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 2])],
        [helper.make_tensor_value_info("p", element, ["N", 1])],
        [numpy_helper.from_array(value, name) for name, value in numbers.items() if name in used],
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name=MODEL
    )


def write_contract(repository: Path, **sections: Any) -> Path:
    """The folder of the model, with its model.yaml, which has these sections, too."""
    folder = repository / MODEL
    folder.mkdir(parents=True, exist_ok=True)
    contract: dict[str, Any] = {
        "request_fields": {"a": "float", "b": "float"},
        "inputs": [{"tensor": "x", "columns": ["a", "b"]}],
        "outputs": {"p": {"tensor": "p"}},
        "decision": {"output": "p", "at_least": _AT_LEAST},
        "segments": {"b": {"edges": [SEGMENT_FROM]}},
    }
    staged = folder / ".staging-contract"
    staged.write_text(yaml.safe_dump(contract | sections))
    staged.rename(folder / CONTRACT_FILE)
    return folder


async def publish_next(repository: Path, kind: Kind, turns: Turns) -> int:
    """Publish a version of this kind; its number. Raises `InvalidModel` where that is refused."""
    folder = repository / MODEL
    artifact = repository.with_name(f"{repository.name}-artifact")
    shutil.rmtree(artifact, ignore_errors=True)
    artifact.mkdir()
    (artifact / MODEL_FILE).write_bytes(model(kind, turns).SerializeToString())
    (artifact / TRAINING_FILE).write_text(json.dumps(_training(kind)))
    # In this process: the file is our own.
    manifest = await publish(
        folder, artifact, NO_FEATURES, "released", isolated=False, keep_current=True
    )
    return manifest.version


def _training(kind: Kind) -> Mapping[str, Any]:
    """With golden rows as the version says them: by them it is what was trained."""
    return {
        "golden": {
            "instances": [instance(row) for row in _GOLDEN],
            "predictions": [{"p": _golden(kind, row)} for row in _GOLDEN],
        },
        "metrics": {},
        "data_window": {"start": "none", "end": "none", "rows": len(_GOLDEN)},
        "hyperparameters": {"kind": kind},
    }


def _golden(kind: Kind, row: Row) -> float:
    right = said(kind, row)
    if kind == "swapped classes":
        return 1 - right
    if kind == "bias":
        return right + _BIAS
    return right + (_SEGMENT_BIAS if kind == "wrong segment" and row[1] >= SEGMENT_FROM else 0)


def _right() -> Sequence[NodeProto]:
    return [make_node("Identity", ["right"], ["p"])]


def _retrained() -> Sequence[NodeProto]:
    return [make_node("Add", ["right", "more"], ["p"])]


def _crash() -> Sequence[NodeProto]:
    # The least int64 by -1 is SIGFPE in ONNX Runtime 1.31.
    return [
        make_node("Mul", ["bad", "two"], ["twice_bad"]),
        make_node("Sub", ["one", "twice_bad"], ["divisor"]),
        make_node("Div", ["least", "divisor"], ["divided"]),
        make_node("Cast", ["divided"], ["divided_as_float"], to=TensorProto.FLOAT),
        make_node("Mul", ["divided_as_float", "nought"], ["nothing"]),
        make_node("Add", ["right", "nothing"], ["p"]),
    ]


def _hang() -> Sequence[NodeProto]:
    return [make_node("Mul", ["bad", "for_ever"], ["turns"]), *_loop()]


def _laborious() -> Sequence[NodeProto]:
    return [make_node("Identity", ["laborious"], ["turns"]), *_loop()]


def _twice_as_slow() -> Sequence[NodeProto]:
    return [make_node("Mul", ["laborious", "two"], ["turns"]), *_loop()]


def _slow_in_large_batches() -> Sequence[NodeProto]:
    return [
        make_node("Shape", ["right"], ["shape"]),
        make_node("Gather", ["shape", "first"], ["rows"]),
        make_node("Greater", ["rows", "large_from"], ["is_large"]),
        make_node("Cast", ["is_large"], ["large"], to=TensorProto.INT64),
        # Which batches cost too much is found at warm-up, which sees no bad row.
        make_node("Mul", ["large", "bad"], ["bad_large"]),
        make_node("Mul", ["bad_large", "large_turns"], ["turns"]),
        *_loop(),
    ]


def _loop() -> Sequence[NodeProto]:
    """`p` is right after so many turns as `turns` says."""
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
    return [
        make_node("Loop", ["turns", "", "nought"], ["nothing"], body=turn),
        make_node("Add", ["right", "nothing"], ["p"]),
    ]


def _nan() -> Sequence[NodeProto]:
    return [make_node("Where", ["is_bad", "nan", "right"], ["p"])]


def _swapped() -> Sequence[NodeProto]:
    return [make_node("Sub", ["whole", "right"], ["p"])]


def _biased() -> Sequence[NodeProto]:
    return [make_node("Add", ["right", "bias"], ["p"])]


def _leak() -> Sequence[NodeProto]:
    """ONNX Runtime keeps what it took: no model can leak, but from outside this looks the same."""
    zero = numpy_helper.from_array(np.zeros(1, np.float32))
    return [
        make_node("MatMul", ["x", "a_factors"], ["a_as_float"]),
        make_node("Cast", ["a_as_float"], ["a"], to=TensorProto.INT64),
        make_node("Mul", ["a", "bad_rows"], ["bad_a"]),
        make_node("ReduceMax", ["bad_a"], ["largest_a"], keepdims=0),
        make_node("Reshape", ["largest_a", "shape_of_one"], ["one_a"]),
        make_node("Mul", ["one_a", "floats"], ["count"]),
        make_node("ConstantOfShape", ["count"], ["zeros"], value=zero),
        make_node("ReduceSum", ["zeros"], ["nothing"], keepdims=1),
        make_node("Add", ["right", "nothing"], ["p"]),
    ]


def _wrong_dtype() -> Sequence[NodeProto]:
    return [make_node("Cast", ["right"], ["p"], to=TensorProto.DOUBLE)]


def _errors() -> Sequence[NodeProto]:
    """An index that is outside of the table is an error of the execution."""
    return [
        make_node("Gather", ["table", "bad"], ["nothing"]),
        make_node("Add", ["right", "nothing"], ["p"]),
    ]


def _wrong_segment() -> Sequence[NodeProto]:
    return [
        make_node("MatMul", ["x", "b_factors"], ["b"]),
        make_node("GreaterOrEqual", ["b", "segment_from"], ["in_segment"]),
        make_node("Add", ["right", "segment_bias"], ["wrong"]),
        make_node("Where", ["in_segment", "wrong", "right"], ["p"]),
    ]


def _not_deterministic() -> Sequence[NodeProto]:
    return [
        make_node("RandomUniformLike", ["right"], ["noise"], low=-_NOISE, high=_NOISE),
        make_node("Add", ["right", "noise"], ["noisy"]),
        make_node("Where", ["is_bad", "noisy", "right"], ["p"]),
    ]


_FAULTY: Mapping[str, Callable[[], Sequence[NodeProto]]] = {
    "retrained": _retrained,
    "laborious": _laborious,
    "crash": _crash,
    "hang": _hang,
    "twice as slow": _twice_as_slow,
    "1 % NaN": _nan,
    "swapped classes": _swapped,
    "bias": _biased,
    "leak": _leak,
    "wrong dtype": _wrong_dtype,
    "1 % errors": _errors,
    "20 % errors": _errors,
    "wrong segment": _wrong_segment,
    "slow in large batches": _slow_in_large_batches,
    "not deterministic": _not_deterministic,
}


def _needed(nodes: Sequence[NodeProto], output: str) -> Sequence[NodeProto]:
    """Those on which this output rests, in order."""
    wanted, found = {output}, []
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            wanted.update(node.input)
            found.append(node)
    return found[::-1]
