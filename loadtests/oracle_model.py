"""Versions of one model, each of which answers every row with numbers that nobody else would say.

All arithmetic is of integers below 2^24, which float32 holds exactly: an answer is right or it is
not, whatever batch its row was in.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import msgspec
import numpy as np
import yaml
from onnx import ModelProto, TensorProto, helper, numpy_helper

from app.features.plan import NO_FEATURES
from app.repository.layout import CONTRACT_FILE
from app.repository.manifest import MODEL_FILE
from app.repository.publish import TRAINING_FILE, publish

Size: TypeAlias = Literal["small", "large"]
"""A `large` version holds a table of 100 MB, of which every row needs one number."""

Row: TypeAlias = tuple[int, int]
"""The request fields `a` and `b` of an instance, each below `INPUTS`."""

MODEL = "oracle"
INPUTS = 1_000
MOST_VERSIONS = 999
_STEP = 16_384
"""More than inputs and table add to it: `sum` divided by it says the version."""
_TABLE = 25_000_000
_TABLE_STRIDE = 25
_TABLE_PERIOD = 977
_GOLDEN: Sequence[Row] = ((0, 0), (1, 0), (0, 1), (999, 999), (123, 456))


@dataclass(frozen=True)
class Oracle:
    """What one version says."""

    version: int
    size: Size = "small"

    def answer(self, row: Row) -> tuple[int, int]:
        """`sum` and `check` of the row."""
        a, b = row
        (a_sum, b_sum), (a_check, b_check) = self._factors()
        first, second = self._constants()
        if self.size == "large":
            first += (a * INPUTS + b) * _TABLE_STRIDE % _TABLE_PERIOD
        return a_sum * a + b_sum * b + first, a_check * a + b_check * b + second

    def model(self) -> ModelProto:
        """Input `x` float32 `[N, 2]`, outputs `sum` and `check` float32 `[N, 1]`."""
        weights = {
            f"{name}_{what}": np.array([values], np.float32).reshape(shape)
            for what, shape, both in (
                ("factors", (2, 1), self._factors()),
                ("constant", (1, 1), self._constants()),
            )
            for name, values in zip(("sum", "check"), both, strict=True)
        }
        nodes = []
        for name in ("sum", "check"):
            nodes.append(helper.make_node("MatMul", ["x", f"{name}_factors"], [f"{name}_of_x"]))
            made = f"{name}_plain" if (name, self.size) == ("sum", "large") else name
            nodes.append(helper.make_node("Add", [f"{name}_of_x", f"{name}_constant"], [made]))
        if self.size == "large":
            weights["places"] = np.array([[INPUTS], [1]], np.float32)
            weights["stride"] = np.array([[_TABLE_STRIDE]], np.int64)
            weights["table"] = (np.arange(_TABLE) % _TABLE_PERIOD).astype(np.float32)
            nodes += [
                helper.make_node("MatMul", ["x", "places"], ["place"]),
                # From here on in int64: an index may be above 2^24.
                helper.make_node("Cast", ["place"], ["whole_place"], to=TensorProto.INT64),
                helper.make_node("Mul", ["whole_place", "stride"], ["index"]),
                helper.make_node("Gather", ["table", "index"], ["from_table"]),
                helper.make_node("Add", ["sum_plain", "from_table"], ["sum"]),
            ]
        graph = helper.make_graph(
            nodes,
            f"oracle-{self.version}",
            [helper.make_tensor_value_info("x", 1, ["rows", 2])],
            [helper.make_tensor_value_info(name, 1, ["rows", 1]) for name in ("sum", "check")],
            [numpy_helper.from_array(value, name) for name, value in weights.items()],
        )
        return helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 17)])

    def training(self) -> dict[str, Any]:
        """The content of the training.json, golden rows by the oracle."""
        said = [self.answer(row) for row in _GOLDEN]
        return {
            "golden": {
                "instances": [instance(row) for row in _GOLDEN],
                "predictions": [{"sum": float(one), "check": float(two)} for one, two in said],
            },
            "metrics": {},
            "data_window": {"start": "none", "end": "none", "rows": len(_GOLDEN)},
            "hyperparameters": {"version": self.version},
        }

    def _factors(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Of `a` and `b`, for each output; at most 7."""
        v = self.version
        return (1 + v % 7, 1 + v % 5), (1 + v % 3, 1 + v % 7)

    def _constants(self) -> tuple[int, int]:
        return self.version * _STEP, (MOST_VERSIONS + 1 - self.version) * _STEP


def instance(row: Row) -> dict[str, float]:
    """The row as a caller says it."""
    return {"a": float(row[0]), "b": float(row[1])}


class _Prediction(msgspec.Struct):
    sum: float
    check: float


class _Answer(msgspec.Struct):
    predictions: list[_Prediction]
    model_version: str


_answers = msgspec.json.Decoder(_Answer)


def judge(body: bytes, rows: Sequence[Row], size: Size) -> tuple[int, str]:
    """The version that an answer names, and what is wrong with it: nothing, `mixed` where a value
    is another version's, or `wrong`."""
    answer = _answers.decode(body)
    version = int(answer.model_version)
    oracle = Oracle(version, size)
    if len(answer.predictions) != len(rows):
        return version, "wrong"
    for row, said in zip(rows, answer.predictions, strict=True):
        if (said.sum, said.check) != oracle.answer(row):
            return version, _fault(said, row, size)
    return version, ""


def _fault(said: _Prediction, row: Row, size: Size) -> str:
    other = int(said.sum) // _STEP
    is_from_another = 1 <= other <= MOST_VERSIONS and said.sum == Oracle(other, size).answer(row)[0]
    return "mixed" if is_from_another else "wrong"


def write_contract(repository: Path, more: Mapping[str, Any] | None = None) -> Path:
    """The folder of the model, with its model.yaml, which says `more`, too."""
    folder = repository / MODEL
    folder.mkdir(parents=True, exist_ok=True)
    contract = {
        "request_fields": {"a": "float", "b": "float"},
        "inputs": [{"tensor": "x", "columns": ["a", "b"]}],
        "outputs": {name: {"tensor": name} for name in ("sum", "check")},
    }
    (folder / CONTRACT_FILE).write_text(yaml.safe_dump(contract | dict(more or {})))
    return folder


async def publish_next(
    repository: Path, version: int, size: Size = "small", model: ModelProto | None = None
) -> None:
    """Publish the model's next version, which must be this one; CURRENT names it from now on.
    `model`: this file in place of the oracle's, of whom it keeps the golden rows."""
    folder = repository / MODEL
    artifact = repository.with_name(f"{repository.name}-artifact")
    oracle = Oracle(version, size)
    artifact.mkdir(exist_ok=True)
    (artifact / MODEL_FILE).write_bytes((model or oracle.model()).SerializeToString())
    (artifact / TRAINING_FILE).write_text(json.dumps(oracle.training()))
    # In this process: the file is our own.
    manifest = await publish(folder, artifact, NO_FEATURES, "oracle", isolated=False)
    if manifest.version != version:
        raise ValueError(f"published as {manifest.version}, to be {version}")
    shutil.rmtree(artifact)
