"""Two versions of one model that say nearly the same: a candidate that differs, fails and says NaN
for known rows.

All arithmetic is of integers divided by a power of two, which float32 holds exactly.
"""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import yaml
from onnx import ModelProto, TensorProto, helper, numpy_helper

from app.features.plan import NO_FEATURES
from app.repository.layout import CONTRACT_FILE, CURRENT_FILE
from app.repository.manifest import MODEL_FILE
from app.repository.publish import TRAINING_FILE, publish

MODEL = "paired"
CHAMPION, CANDIDATE = 1, 2
INPUTS = 1_000
"""Request fields `a` and `b` are whole numbers below it."""
SEGMENTS = {"a": (250, 500, 750), "b": (500,)}
_SCALE = 4_096
_AT_LEAST = 0.25
_GOLDEN = ((0, 0), (1, 0), (0, 1), (998, 998), (123, 456), (512, 512))


def champion(a: int, b: int) -> float:
    return (a + b) / _SCALE


def candidate(a: int, b: int) -> float | None:
    """None where it fails; else its number, which may be NaN."""
    return None if a >= INPUTS - 1 else (a + b + _shift(a)) / _SCALE


def decision(number: float | None) -> bool | None:
    return None if number is None or math.isnan(number) else number >= _AT_LEAST


def segments(a: int, b: int) -> tuple[str, ...]:
    """Of both dimensions."""
    return _segment("a", a), _segment("b", b)


def segment_names() -> tuple[tuple[str, ...], ...]:
    """By dimension, as the service names them."""
    return tuple(
        (*(_segment(name, value) for value in (0, *edges)), f"{name}=other")
        for name, edges in SEGMENTS.items()
    )


def instance(a: int, b: int) -> dict[str, float]:
    """The row as a caller says it."""
    return {"a": float(a), "b": float(b)}


def _segment(name: str, value: int) -> str:
    ends = ["", *map(str, SEGMENTS[name]), ""]
    at = sum(value >= edge for edge in SEGMENTS[name])
    return f"{name}={ends[at]}..{ends[at + 1]}"


def _shift(a: int) -> float:
    if a % 37 == 5:
        return math.nan
    if a % 10 == 1:
        return a % 64
    return -(a % 64) if a % 10 == 2 and a >= 64 else 0


def _model(version: int) -> ModelProto:
    """Input `x` float32 `[N, 2]`, output `p` float32 `[N, 1]`."""
    weights = {
        "ones": np.ones((2, 1), np.float32),
        "scale": np.array([[_SCALE]], np.float32),
        "first": np.array([0], np.int64),
        "shifts": np.array([_shift(a) for a in range(INPUTS - 1)], np.float32),
    }
    nodes = [helper.make_node("MatMul", ["x", "ones"], ["sum"])]
    if version == CANDIDATE:
        nodes += [
            helper.make_node("Gather", ["x", "first"], ["a"], axis=1),
            helper.make_node("Cast", ["a"], ["place"], to=TensorProto.INT64),
            helper.make_node("Gather", ["shifts", "place"], ["shift"]),  # an error for the last `a`
            helper.make_node("Add", ["sum", "shift"], ["shifted"]),
        ]
    nodes.append(helper.make_node("Div", [nodes[-1].output[0], "scale"], ["p"]))
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        MODEL,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 2])],
        [helper.make_tensor_value_info("p", TensorProto.FLOAT, ["N", 1])],
        [numpy_helper.from_array(value, name) for name, value in weights.items() if name in used],
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name=MODEL
    )


def _training(version: int) -> dict[str, object]:
    said = [candidate(*row) if version == CANDIDATE else champion(*row) for row in _GOLDEN]
    return {
        "golden": {
            "instances": [instance(*row) for row in _GOLDEN],
            "predictions": [{"p": number} for number in said],
        },
        "metrics": {},
        "data_window": {"start": "none", "end": "none", "rows": len(_GOLDEN)},
        "hyperparameters": {"version": version},
    }


async def publish_both(repository: Path) -> None:
    """The champion is version 1, which CURRENT names, the candidate 2."""
    folder = repository / MODEL
    folder.mkdir(parents=True)
    contract = {
        "request_fields": {"a": "float", "b": "float"},
        "inputs": [{"tensor": "x", "columns": ["a", "b"]}],
        "outputs": {"p": {"tensor": "p"}},
        "decision": {"output": "p", "at_least": _AT_LEAST},
        "segments": {name: {"edges": list(edges)} for name, edges in SEGMENTS.items()},
        "shadow": {"hold_ms": 10, "pending_rows": 4_096},
    }
    (folder / CONTRACT_FILE).write_text(yaml.safe_dump(contract))
    artifact = repository.with_name(f"{repository.name}-artifact")
    for version in (CHAMPION, CANDIDATE):
        artifact.mkdir()
        (artifact / MODEL_FILE).write_bytes(_model(version).SerializeToString())
        (artifact / TRAINING_FILE).write_text(json.dumps(_training(version)))
        # In this process: the file is our own.
        await publish(folder, artifact, NO_FEATURES, "paired", isolated=False)
        shutil.rmtree(artifact)
    (folder / CURRENT_FILE).write_text(f"{CHAMPION}\n")
