"""The models of the benchmark and the rows that every contender is asked about."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import yaml
from numpy.typing import NDArray
from onnx import helper, numpy_helper

ModelName: TypeAlias = Literal["gbdt", "mlp"]

FIELDS = tuple(f"f{number:02}" for number in range(32))
MAX_BATCH_ROWS = 32  # above about 50 rows a batch, a row of the GBDT costs more, not less
ROWS = 2_000
GOLDEN_ROWS = 16
SEED = 20131231

_TRAINING_ROWS = 10_000
_TREES = 150
_HIDDEN = 256


@dataclass(frozen=True)
class Workload:
    """A model, and rows with what direct ONNX Runtime says of each.

    `model` has the input `x` float32 `[N, 32]` and the output `probabilities`, whose last column is
    the prediction. `rows` float32 `[ROWS, 32]` have four decimals; `expected` float32 `[ROWS]`.
    """

    name: ModelName
    folder: Path
    """Where everything about this model lies."""
    model: Path
    rows: NDArray[np.float32]
    expected: NDArray[np.float32]

    @property
    def repository(self) -> Path:
        """Where the model is published for `hikyaku serve`."""
        return self.folder / "repository"


def prepare(name: ModelName, work: Path) -> Workload:
    """Build the model, always the same one, ask it directly, and publish it for `hikyaku serve`.

    It lies in `work`/`name`, from where what an earlier run left is removed.
    """
    folder = work / name
    shutil.rmtree(folder, ignore_errors=True)
    artifact = folder / "artifact"
    artifact.mkdir(parents=True)
    model = artifact / "model.onnx"
    model.write_bytes(_built(name, work / "models"))
    rows = varied_rows(ROWS, SEED)
    workload = Workload(name, folder, model.resolve(), rows, ask_directly(model, rows))
    _publish(workload, artifact)
    return workload


def varied_rows(count: int, seed: int) -> NDArray[np.float32]:
    """Normal values with four decimals, `[count, 32]`; no two rows are the same."""
    values = np.random.default_rng(seed).normal(size=(count, len(FIELDS)))
    return values.round(4).astype(np.float32)


def ask_directly(model: Path, rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """The predictions `[N]` of ONNX Runtime, one row at a time, without a server."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    runs = (session.run(["probabilities"], {"x": row[None, :]}) for row in rows)
    return np.array([run[0][0, -1] for run in runs], np.float32)


def _built(name: ModelName, folder: Path) -> bytes:
    """The model file; training takes seconds, so it is kept for as long as this code stays."""
    digest = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
    kept = folder / f"{name}-{digest}.onnx"
    if not kept.exists():
        folder.mkdir(parents=True, exist_ok=True)
        built = kept.with_suffix(".part")
        built.write_bytes(_gbdt() if name == "gbdt" else _mlp())
        built.rename(kept)
    return kept.read_bytes()


def _gbdt() -> bytes:
    from skl2onnx import to_onnx
    from skl2onnx.common.data_types import FloatTensorType
    from sklearn.ensemble import HistGradientBoostingClassifier

    rows = varied_rows(_TRAINING_ROWS, SEED + 1)
    noise = np.random.default_rng(SEED + 2).normal(size=len(rows))
    signal = np.sin(2 * rows[:, :16]).sum(1) + rows[:, 16] * rows[:, 17] - rows[:, 18:].sum(1)
    # No early stopping: 150 trees, whatever the last ones gain.
    trees = HistGradientBoostingClassifier(
        max_iter=_TREES, max_depth=6, max_leaf_nodes=56, early_stopping=False, random_state=SEED
    ).fit(rows, signal + noise > 0)
    with warnings.catch_warnings():
        # skl2onnx 1.20 writes booleans where protobuf 7 will want integers.
        warnings.simplefilter("ignore", DeprecationWarning)
        model = to_onnx(
            trees,
            initial_types=[("x", FloatTensorType([None, len(FIELDS)]))],
            options={id(trees): {"zipmap": False}},
            target_opset={"": 17, "ai.onnx.ml": 3},
        )
    return bytes(model.SerializeToString())


def _mlp() -> bytes:
    """32 → 256 → 256 → 1 with ReLU and a sigmoid. Its weights are random: nobody asks it about the
    world, and what they are does not change what they cost."""
    numbers = np.random.default_rng(SEED + 3)
    widths = (len(FIELDS), _HIDDEN, _HIDDEN, 1)
    nodes, weights, previous = [], [], "x"
    for layer, (width, next_width) in enumerate(pairwise(widths)):
        weight = numbers.normal(size=(width, next_width)) / np.sqrt(width)
        bias = numbers.normal(size=next_width) / 10
        weights.append(numpy_helper.from_array(weight.astype(np.float32), f"w{layer}"))
        weights.append(numpy_helper.from_array(bias.astype(np.float32), f"b{layer}"))
        inputs = [previous, f"w{layer}", f"b{layer}"]
        nodes.append(helper.make_node("Gemm", inputs, [f"sum{layer}"]))
        last = layer == len(widths) - 2
        previous = "probabilities" if last else f"hidden{layer}"
        activation = "Sigmoid" if last else "Relu"
        nodes.append(helper.make_node(activation, [f"sum{layer}"], [previous]))
    graph = helper.make_graph(
        nodes,
        "mlp",
        [helper.make_tensor_value_info("x", 1, ["rows", len(FIELDS)])],
        [helper.make_tensor_value_info("probabilities", 1, ["rows", 1])],
        weights,
    )
    model = helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 17)])
    return bytes(model.SerializeToString())


def _publish(workload: Workload, artifact: Path) -> None:
    column = {"column": 1} if workload.name == "gbdt" else {}
    contract: Mapping[str, Any] = {
        "request_fields": dict.fromkeys(FIELDS, "float"),
        "inputs": [{"tensor": "x", "columns": list(FIELDS)}],
        "outputs": {"probability": {"tensor": "probabilities", **column}},
        "batching": {"max_batch_rows": MAX_BATCH_ROWS},
    }
    golden = {
        "instances": [as_fields(row) for row in workload.rows[:GOLDEN_ROWS]],
        "predictions": [{"probability": float(p)} for p in workload.expected[:GOLDEN_ROWS]],
    }
    training = {
        "golden": golden,
        "metrics": {},
        "data_window": {"start": "none", "end": "none", "rows": _TRAINING_ROWS},
        "hyperparameters": {"seed": SEED},
    }
    model_folder = workload.repository / workload.name
    model_folder.mkdir(parents=True)
    (model_folder / "model.yaml").write_text(yaml.safe_dump(contract))
    (artifact / "training.json").write_text(json.dumps(training))
    subprocess.run(
        [sys.executable, "-m", "app.cli", "publish", workload.name, str(artifact)],
        env=os.environ | {"MODEL_REPOSITORY": str(workload.repository)},
        stdout=subprocess.DEVNULL,
        check=True,
    )


def as_numbers(row: NDArray[np.float32]) -> list[float]:
    """The row's values as people would write them, four decimals."""
    return [round(float(value), 4) for value in row]


def as_fields(row: NDArray[np.float32]) -> dict[str, float]:
    return dict(zip(FIELDS, as_numbers(row), strict=True))
