"""What every contender is asked: a model, and rows given as numbers or as entities."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import yaml
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from loadtests.bench.failure import BenchFailure
from loadtests.bench.rows import (
    FIELDS,
    REFERENCES,
    ROWS,
    SEED,
    as_fields,
    entities_of,
    varied_rows,
)
from loadtests.bench.store import Store, feature_store

Kind: TypeAlias = Literal["entity", "tensor"]
ModelName: TypeAlias = Literal["gbdt", "mlp"]

MAX_BATCH_ROWS = 32  # above about 50 rows a batch, a row of the GBDT costs more, not less
GOLDEN_ROWS = 16

_TRAINING_ROWS = 10_000
_TREES = 150
_HIDDEN = 256
_APP = Path("app")
# What makes a published version: when it changes, the model is published again.
_PUBLISHED_BY = ("contract.py", "instances.py", "outputs.py", "features", "repository", "cli.py")


@dataclass(frozen=True)
class Workload:
    """A model, and rows with what direct ONNX Runtime says of each.

    `model` has the input `x` float32 `[N, 32]` and the output `probabilities`, whose last column is
    the prediction. `rows` float32 `[R, 32]` have four decimals; `expected` float32 `[R]`;
    `instances` are what the caller of a prediction says of each row.
    """

    kind: Kind
    name: str
    """Of the model, as it is published."""
    folder: Path
    """Where everything about this workload lies."""
    model: Path
    rows: NDArray[np.float32]
    expected: NDArray[np.float32]
    instances: Sequence[Mapping[str, Any]]
    store: Store | None = None
    """Where the features of the entities are, when rows are given as entities."""

    @property
    def repository(self) -> Path:
        """Where the model is published for `hikyaku serve`."""
        return self.folder / "repository"


@contextmanager
def tensor_workload(name: ModelName, work: Path) -> Iterator[Workload]:
    """All features in the request. The model is built, always the same one, asked directly, and
    published; all of it lies in `work`."""
    rows = varied_rows(ROWS, SEED)
    folder, model, expected = _asked(name, work / f"tensor-{name}", work, rows)
    yield _published(
        Workload("tensor", name, folder, model, rows, expected, [as_fields(row) for row in rows])
    )


@contextmanager
def entity_workload(name: ModelName, work: Path) -> Iterator[Workload]:
    """Two entities in the request, their features in a Redis that runs until the context is
    left. Otherwise as `tensor_workload`."""
    rows = varied_rows(ROWS, SEED)
    with feature_store(work) as store:
        folder, model, expected = _asked(name, work / f"entity-{name}", work, rows)
        instances = [entities_of(row) for row in range(ROWS)]
        yield _published(Workload("entity", name, folder, model, rows, expected, instances, store))


WORKLOADS = {"entity": entity_workload, "tensor": tensor_workload}


def _asked(
    name: ModelName, folder: Path, work: Path, rows: NDArray[np.float32]
) -> tuple[Path, Path, NDArray[np.float32]]:
    """The folder of a workload, its model file, and what the model says of the rows."""
    artifact = folder / "artifact"
    artifact.mkdir(parents=True, exist_ok=True)
    model = artifact / "model.onnx"
    model.write_bytes(_built(name, work / "models"))
    return folder, model.resolve(), ask_directly(model, rows)


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


def _published(workload: Workload) -> Workload:
    """The same, its model published for `hikyaku serve` as it would be today."""
    digest = workload.folder / "published"
    code = _digest_of_publishing(workload)
    if not digest.exists() or digest.read_text() != code:
        shutil.rmtree(workload.repository, ignore_errors=True)
        digest.unlink(missing_ok=True)
        _publish(workload)
        digest.write_text(code)
    return workload


def _digest_of_publishing(workload: Workload) -> str:
    sources = [Path(__file__), workload.model]
    for name in _PUBLISHED_BY:
        path = _APP / name
        sources += sorted(path.rglob("*.py")) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for source in sources:
        digest.update(source.read_bytes())
    return digest.hexdigest()


def _publish(workload: Workload) -> None:
    model_folder = workload.repository / workload.name
    model_folder.mkdir(parents=True)
    (model_folder / "model.yaml").write_text(yaml.safe_dump(_contract(workload)))
    artifact = workload.model.parent
    (artifact / "training.json").write_text(json.dumps(_training(workload)))
    environment = os.environ | {"MODEL_REPOSITORY": str(workload.repository)}
    if workload.store is not None:
        environment["HIKYAKU_FEATURE_REPO"] = str(workload.store.repo)
    finished = subprocess.run(
        [sys.executable, "-m", "app.cli", "publish", workload.name, str(artifact)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if finished.returncode != 0:
        raise BenchFailure(f"the model was not published: {finished.stderr[-2000:]}")


def _contract(workload: Workload) -> Mapping[str, Any]:
    column = {"column": 1} if workload.name == "gbdt" else {}
    contract = {
        "outputs": {"probability": {"tensor": "probabilities", **column}},
        "batching": {"max_batch_rows": MAX_BATCH_ROWS},
    }
    if workload.kind == "entity":
        inputs = [{"tensor": "x", "columns": list(REFERENCES)}]
        return contract | {"feature_service": "both", "inputs": inputs}
    inputs = [{"tensor": "x", "columns": list(FIELDS)}]
    return contract | {"request_fields": dict.fromkeys(FIELDS, "float"), "inputs": inputs}


def _training(workload: Workload) -> Mapping[str, Any]:
    golden: dict[str, Any] = {
        "instances": workload.instances[:GOLDEN_ROWS],
        "predictions": [{"probability": float(p)} for p in workload.expected[:GOLDEN_ROWS]],
    }
    if workload.kind == "entity":
        columns = workload.rows[:GOLDEN_ROWS].T.tolist()
        golden["features"] = dict(zip(REFERENCES, columns, strict=True))
    return {
        "golden": golden,
        "metrics": {},
        "data_window": {"start": "none", "end": "none", "rows": _TRAINING_ROWS},
        "hyperparameters": {"seed": SEED},
    }
