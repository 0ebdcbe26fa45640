"""Models small enough to compute by hand, published into a throw-away repository."""

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import yaml
from numpy.typing import NDArray
from onnx import (
    ModelProto,
    NodeProto,
    TensorProto,
    ValueInfoProto,
    helper,
    numpy_helper,
)

from app.clock import WallClock
from app.contract import load_contract
from app.deadline import Deadline, DeadlineSweep
from app.features.plan import NO_FEATURES, FeaturePlan, PlannedFeature, PlannedView
from app.features.source import FeatureSource
from app.features.static_source import StaticSource
from app.outputs import Prediction
from app.repository.layout import CONTRACT_FILE
from app.repository.load import VersionOpener
from app.repository.manifest import MODEL_FILE, Manifest
from app.repository.publish import TRAINING_FILE, publish
from app.repository.store import open_repository
from app.repository.vault import Vault
from app.repository.verify import verify_version
from app.served_model import ServedModel
from app.telemetry.metrics import Metrics

Kind: TypeAlias = Literal["binary", "faulty", "deadly", "regression", "multiclass", "stored"]
"""What a tiny model computes. All but the last take the request fields `a` and `b`:

binary      probability = 1 / (1 + exp(b - a)); decision: probability >= 0.5, that is a >= b
faulty      as binary, but no finite number where a > 100, and no answer where a > 200
deadly      as binary, but where a > 300 its process dies
regression  value = a + 2 b; decision: value >= 10
multiclass  class = softmax of (a, b, 0) as left, right, neither; decision: the largest one
stored      score = rating + 10 trips + 100 demand + 1000 distance, a null counting as -1;
            decision: score >= 0. `distance` is its request field, the rest is stored (see DRIVERS)
"""

LABELS = ("left", "right", "neither")

DRIVERS = FeaturePlan(
    project="tiny",
    feature_service="drivers",
    join_keys={"driver_id": "int", "city": "string"},
    views=(
        PlannedView(
            "driver",
            ("driver_id",),
            3600.0,
            (PlannedFeature("rating", "Float32"), PlannedFeature("trips", "Int64")),
        ),
        PlannedView("city", ("city",), None, (PlannedFeature("demand", "Float32"),)),
    ),
)
"""The plan of kind `stored`: a driver's values grow too old after an hour, a city's never."""

DRIVER_VALUES: Mapping[str, Mapping[tuple[str | int | None, ...], Mapping[str, Any]]] = {
    "driver": {
        (1,): {"rating": 4.0, "trips": 7},
        (2,): {"rating": None, "trips": 3},
    },
    "city": {("kyoto",): {"demand": 2.0}},
}
"""Stored values for `StaticSource(DRIVERS, DRIVER_VALUES)`. Driver 1 in kyoto at distance 5 scores
4 + 70 + 200 + 5000 = 5274; driver 2 there at distance 0: -1 + 30 + 200 = 229; driver 3 in a city
that is not stored, at distance 0: -1 - 10 - 100 = -111."""

_GOLDEN_FIELDS: Sequence[Mapping[str, float]] = (
    {"a": 2.0, "b": 1.0},
    {"a": 0.0, "b": 0.0},
    {"a": -1.0, "b": 3.0},
)
_GOLDEN_DRIVERS: Sequence[Mapping[str, Any]] = (
    {"driver_id": 1, "city": "kyoto", "distance": 5.0},
    {"driver_id": 2, "city": "kyoto", "distance": 0.0},
    {"driver_id": None, "city": "", "distance": 1.0},
)
_GOLDEN_STORED: Mapping[str, Sequence[float | None]] = {
    "driver:rating": [4.0, None, None],
    "driver:trips": [7, 3, None],
    "city:demand": [2.0, 2.0, None],
}


def binary(a: float, b: float) -> float:
    """The probability."""
    return float(1 / (1 + np.exp(b - a)))


def regression(a: float, b: float) -> float:
    """The value."""
    return a + 2 * b


def multiclass(a: float, b: float) -> dict[str, float]:
    """The probability of each label."""
    powers: NDArray[np.float64] = np.exp([a, b, 0.0])
    return dict(zip(LABELS, (powers / powers.sum()).tolist(), strict=True))


def stored(
    rating: float | None, trips: float | None, demand: float | None, distance: float
) -> float:
    """The score."""
    known = [-1 if value is None else value for value in (rating, trips, demand)]
    return known[0] + 10 * known[1] + 100 * known[2] + 1000 * distance


def onnx_model(kind: Kind) -> ModelProto:
    """Input `x` float32 `[N, 2]` (stored: `[N, 4]`), output `probabilities` `[N, 2]` for binary and
    `[N, 3]` for multiclass, `y` `[N, 1]` for the others. The faulty one is binary, says NaN where
    `a` is above 100, and fails where it is above 200; the deadly one is binary, too."""
    nodes: list[NodeProto]
    whole: dict[str, list[list[int]]] = {}
    match kind:
        case "binary":
            weights = {"difference": [[1.0], [-1.0]], "one": [[1.0]]}
            nodes = [
                helper.make_node("MatMul", ["x", "difference"], ["logit"]),
                helper.make_node("Sigmoid", ["logit"], ["yes"]),
                helper.make_node("Sub", ["one", "yes"], ["no"]),
                helper.make_node("Concat", ["no", "yes"], ["probabilities"], axis=1),
            ]
        case "faulty":
            weights = {"difference": [[1.0], [-1.0]], "one": [[1.0]], "zero": [0.0]}
            weights |= {"first": [[1.0], [0.0]], "most": [[100.0]], "fails": [[200.0]]}
            nodes = [
                helper.make_node("MatMul", ["x", "difference"], ["logit"]),
                helper.make_node("Sigmoid", ["logit"], ["likely"]),
                helper.make_node("MatMul", ["x", "first"], ["a"]),
                # An index that is not there fails the execution.
                helper.make_node("Greater", ["a", "fails"], ["is_far"]),
                helper.make_node("Cast", ["is_far"], ["place"], to=TensorProto.INT64),
                helper.make_node("Gather", ["zero", "place"], ["found"]),
                helper.make_node("Sub", ["most", "a"], ["left"]),
                helper.make_node("Sqrt", ["left"], ["root"]),
                helper.make_node("Mul", ["root", "found"], ["nothing"]),
                helper.make_node("Add", ["likely", "nothing"], ["yes"]),
                helper.make_node("Sub", ["one", "yes"], ["no"]),
                helper.make_node("Concat", ["no", "yes"], ["probabilities"], axis=1),
            ]
        case "deadly":
            weights = {"difference": [[1.0], [-1.0]], "one": [[1.0]], "nought": [[0.0]]}
            weights |= {"first": [[1.0], [0.0]], "kills": [[300.0]]}
            whole = {"least": [[-(2**63)]], "unit": [[1]], "two": [[2]]}
            nodes = [
                helper.make_node("MatMul", ["x", "difference"], ["logit"]),
                helper.make_node("Sigmoid", ["logit"], ["likely"]),
                helper.make_node("MatMul", ["x", "first"], ["a"]),
                helper.make_node("Greater", ["a", "kills"], ["is_far"]),
                helper.make_node("Cast", ["is_far"], ["far"], to=TensorProto.INT64),
                helper.make_node("Mul", ["far", "two"], ["twice"]),
                helper.make_node("Sub", ["unit", "twice"], ["divisor"]),
                # The least int64 by -1 is SIGFPE in ONNX Runtime 1.31.
                helper.make_node("Div", ["least", "divisor"], ["divided"]),
                helper.make_node("Cast", ["divided"], ["quotient"], to=TensorProto.FLOAT),
                helper.make_node("Mul", ["quotient", "nought"], ["nothing"]),
                helper.make_node("Add", ["likely", "nothing"], ["yes"]),
                helper.make_node("Sub", ["one", "yes"], ["no"]),
                helper.make_node("Concat", ["no", "yes"], ["probabilities"], axis=1),
            ]
        case "regression":
            weights = {"weights": [[1.0], [2.0]]}
            nodes = [helper.make_node("MatMul", ["x", "weights"], ["y"])]
        case "multiclass":
            weights = {"weights": [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]}
            nodes = [
                helper.make_node("MatMul", ["x", "weights"], ["logits"]),
                helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
            ]
        case "stored":
            weights = {"weights": [[1.0], [10.0], [100.0], [1000.0]], "null": [[-1.0]]}
            nodes = [
                helper.make_node("IsNaN", ["x"], ["unknown"]),
                helper.make_node("Where", ["unknown", "null", "x"], ["known"]),
                helper.make_node("MatMul", ["known", "weights"], ["y"]),
            ]
    output = {
        "binary": ("probabilities", 2),
        "faulty": ("probabilities", 2),
        "deadly": ("probabilities", 2),
        "multiclass": ("probabilities", 3),
    }
    graph = helper.make_graph(
        nodes,
        kind,
        [_floats("x", 4 if kind == "stored" else 2)],
        [_floats(*output.get(kind, ("y", 1)))],
        [
            *(
                numpy_helper.from_array(np.array(value, np.float32), name)
                for name, value in weights.items()
            ),
            *(
                numpy_helper.from_array(np.array(value, np.int64), name)
                for name, value in whole.items()
            ),
        ],
    )
    return helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 17)])


def contract(kind: Kind, **changes: Any) -> dict[str, Any]:
    """The content of the model.yaml; `changes` replace its top-level sections."""
    document: dict[str, Any] = {
        "request_fields": {"a": "float", "b": "float"},
        "inputs": [{"tensor": "x", "columns": ["a", "b"]}],
    }
    match kind:
        case "binary" | "faulty" | "deadly":
            document["outputs"] = {"probability": {"tensor": "probabilities", "column": 1}}
            document["decision"] = {"output": "probability", "at_least": 0.5}
        case "regression":
            document["outputs"] = {"value": {"tensor": "y"}}
            document["decision"] = {"output": "value", "at_least": 10.0}
        case "multiclass":
            document["outputs"] = {"class": {"tensor": "probabilities", "labels": list(LABELS)}}
            document["decision"] = {"output": "class"}
        case "stored":
            document = {
                "feature_service": DRIVERS.feature_service,
                "request_fields": {"distance": "float"},
                "inputs": [{"tensor": "x", "columns": [*DRIVERS.references, "distance"]}],
                "outputs": {"score": {"tensor": "y"}},
                "decision": {"output": "score", "at_least": 0.0},
            }
    return document | changes


def training(kind: Kind, **changes: Any) -> dict[str, Any]:
    """The content of the training.json, golden rows computed without ONNX; `changes` replace its
    top-level sections."""
    golden: dict[str, Any] = {"instances": _GOLDEN_FIELDS}
    means = {"driver:rating": 4.0, "driver:trips": 5.0, "city:demand": 2.0}
    match kind:
        case "binary" | "faulty" | "deadly":
            golden["predictions"] = [{"probability": binary(**row)} for row in _GOLDEN_FIELDS]
        case "regression":
            golden["predictions"] = [{"value": regression(**row)} for row in _GOLDEN_FIELDS]
        case "multiclass":
            golden["predictions"] = [{"class": multiclass(**row)} for row in _GOLDEN_FIELDS]
        case "stored":
            distances = [row["distance"] for row in _GOLDEN_DRIVERS]
            rows = zip(*_GOLDEN_STORED.values(), distances, strict=True)
            golden = {
                "instances": _GOLDEN_DRIVERS,
                "features": _GOLDEN_STORED,
                "predictions": [{"score": stored(*row)} for row in rows],
            }
    return {
        "means": means if kind == "stored" else {},
        "golden": golden,
        "metrics": {"auc": 1.0},
        "data_window": {"start": "2013-01-01", "end": "2013-09-01", "rows": 3},
        "hyperparameters": {"kind": kind},
    } | changes


def write_contract(model_dir: Path, document: Mapping[str, Any]) -> None:
    """Write `document` as the model.yaml of the folder, which is made if need be."""
    model_dir.mkdir(parents=True, exist_ok=True)
    (model_dir / CONTRACT_FILE).write_text(yaml.safe_dump(dict(document)))


def write_artifact(folder: Path, kind: Kind, training_document: Mapping[str, Any]) -> Path:
    """What a training leaves behind: model.onnx and training.json in `folder`, which is made if
    need be and returned."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MODEL_FILE).write_bytes(onnx_model(kind).SerializeToString())
    (folder / TRAINING_FILE).write_text(json.dumps(training_document))
    return folder


async def write_model(
    repository: Path,
    name: str,
    kind: Kind,
    *,
    plan: FeaturePlan | None = None,
    fingerprint: str = "tiny",
    **contract_changes: Any,
) -> Manifest:
    """Publish the next version of a tiny model as `repository/name`.

    `plan` defaults to the kind's own: DRIVERS for `stored`, none for the others. The artifact is
    left beside the repository. Without an event loop: `asyncio.run(write_model(…))`.
    """
    if plan is None:
        plan = DRIVERS if kind == "stored" else NO_FEATURES
    model_dir = repository / name
    write_contract(model_dir, contract(kind, **contract_changes))
    artifact = repository.with_name(f"{repository.name}-artifacts") / name
    write_artifact(artifact, kind, training(kind))
    # In this process, because a model of ours needs no other one and most tests publish.
    return await publish(model_dir, artifact, plan, fingerprint, isolated=False)


@asynccontextmanager
async def loaded(
    model_dir: Path, source: FeatureSource | None = None
) -> AsyncIterator[ServedModel]:
    """The CURRENT version of a tiny model, its stored values from `source`, else DRIVER_VALUES."""
    repository = open_repository(str(model_dir.parent))
    async with AsyncExitStack() as stack:
        opener = VersionOpener(
            lambda plan: source or StaticSource(plan, DRIVER_VALUES),
            await stack.enter_async_context(DeadlineSweep()),
            Metrics(),
            WallClock(),
            drain_s=1.0,
            workers=1,
        )
        vault = Vault(model_dir.parent.with_name("vault"), repository)
        current = repository.current(model_dir.name)
        assert current is not None
        version = vault.take(model_dir.name, current)
        contract = load_contract(model_dir / CONTRACT_FILE)
        await verify_version(version, contract, isolated=False)
        yield await opener.open(version, contract, stack)


async def answers(model: ServedModel, *instances: Mapping[str, Any]) -> list[Prediction]:
    """What the version answers to these instances, by the path of a request."""
    decoded = model.decoder.decode(json.dumps({"instances": instances}).encode())
    deadline = Deadline.after(10)
    if model.source.plan.views:
        rows = await model.fetch(decoded, deadline)
        _, inputs = model.encode(decoded, rows, 0.0)
    else:
        inputs = model.encode_fields(decoded)
    execution = await model.batcher.submit(inputs, deadline)
    return model.outputs.read(execution.outputs).predictions


def _floats(name: str, width: int) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", width])
