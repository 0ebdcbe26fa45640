"""A version that is not what model.yaml serves is refused before traffic, with a reason."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from onnx import ModelProto, TensorProto

from app.contract import Contract
from app.errors import InvalidModel
from app.features.plan import FeaturePlan, plan_from_json
from app.repository.manifest import (
    MANIFEST_FILE,
    MODEL_FILE,
    PLAN_FILE,
    Manifest,
    describe,
    read_manifest,
)
from app.repository.vault import VaultedVersion
from app.repository.verify import verify_version
from tests.tiny_models import Kind, contract, write_model


@dataclass
class Version:
    """A published version of a tiny model; a variant changes one part of it."""

    contract: dict[str, Any]
    manifest: dict[str, Any]
    plan: FeaturePlan
    model: ModelProto

    @property
    def x(self) -> dict[str, Any]:
        inputs: list[dict[str, Any]] = self.manifest["signature"]["inputs"]
        return inputs[0]

    @property
    def y(self) -> dict[str, Any]:
        outputs: list[dict[str, Any]] = self.manifest["signature"]["outputs"]
        return outputs[0]

    def rename(self, old: str, new: str) -> None:
        """A tensor of the model file."""
        graph = self.model.graph
        for value in (*graph.input, *graph.output):
            value.name = new if value.name == old else value.name
        for node in graph.node:
            node.input[:] = [new if name == old else name for name in node.input]
            node.output[:] = [new if name == old else name for name in node.output]

    def drop_view(self, name: str) -> None:
        kept = tuple(view for view in self.plan.views if view.name != name)
        self.plan = replace(self.plan, views=kept)

    def retype(self, name: str, dtype: str) -> None:
        """A feature of the plan."""
        views = tuple(
            replace(
                view,
                features=tuple(
                    replace(each, dtype=dtype if each.name == name else each.dtype)
                    for each in view.features
                ),
            )
            for view in self.plan.views
        )
        self.plan = replace(self.plan, views=views)


@dataclass(frozen=True)
class Variant:
    name: str
    change: Callable[[Version], object]
    reason: str
    kind: Kind = "binary"


def _input(document: dict[str, Any]) -> dict[str, Any]:
    inputs: list[dict[str, Any]] = document["inputs"]
    return inputs[0]


def _output(**changes: Any) -> Callable[[Version], object]:
    return lambda v: v.contract.update(
        outputs={"probability": {"tensor": "probabilities", "column": 1} | changes}
    )


def _columns(*columns: Any) -> Callable[[Version], object]:
    return lambda v: _input(v.contract).update(columns=list(columns))


def _without_labels(v: Version) -> None:
    v.contract.pop("decision")
    v.contract["outputs"]["class"].pop("labels")


CHANGED = "the inputs have changed since version 1 was trained"

VARIANTS = [
    # model.yaml has moved on.
    Variant("columns in another order", _columns("b", "a"), CHANGED),
    Variant("one column less", _columns("a"), r"columns was 2, is 1 long"),
    Variant("one column more", _columns("a", "b", "a"), r"columns was 2, is 3 long"),
    Variant("another source", _columns("a", "c"), r"columns\[1\]\.from was 'b', is 'c'"),
    Variant(
        "another transform",
        _columns("a", {"from": "b", "as": "category"}),
        r"columns\[1\]\.as was 'number', is 'category'",
    ),
    Variant(
        "another type of the input",
        lambda v: _input(v.contract).update(dtype="float64"),
        r"inputs\[0\]\.dtype was 'float32', is 'float64'",
    ),
    Variant(
        "another name of the input",
        lambda v: _input(v.contract).update(tensor="z"),
        r"inputs\[0\]\.tensor was 'x', is 'z'",
    ),
    Variant(
        "a second input",
        lambda v: v.contract["inputs"].append({"tensor": "z", "columns": ["a"]}),
        r"inputs was 1, is 2 long",
    ),
    Variant(
        "a field of another type",
        lambda v: v.contract["request_fields"].update(b="int"),
        r"request_fields\.b was 'float', is 'int'",
    ),
    Variant(
        "a field more",
        lambda v: v.contract["request_fields"].update(c="float"),
        r"request_fields\.c is new",
    ),
    Variant(
        "a field less",
        lambda v: v.contract["request_fields"].pop("b"),
        r"request_fields\.b is gone",
    ),
    Variant(
        "a feature service",
        lambda v: v.contract.update(feature_service="drivers"),
        r"feature_service was None, is 'drivers'",
    ),
    Variant(
        "another feature service",
        lambda v: v.contract.update(feature_service="riders"),
        r"feature_service was 'drivers', is 'riders'",
        "stored",
    ),
    Variant("another output", _output(tensor="scores"), r"no output 'scores', it has \['prob"),
    Variant("a column beyond the output", _output(column=2), "no column 2 in 2 numbers"),
    Variant("no column of two", _output(column=None), "2 numbers a row need `column` or `labels`"),
    Variant(
        "labels for another number of classes",
        lambda v: v.contract["outputs"]["class"].update(labels=["left", "right"]),
        "2 labels for 3 numbers",
        "multiclass",
    ),
    Variant("labels that are gone", _without_labels, "3 numbers a row need", "multiclass"),
    Variant(
        "other labels",
        lambda v: v.contract["outputs"]["class"].update(labels=["a", "b", "c"]),
        "golden row 0: class is",
        "multiclass",
    ),
    Variant(
        "another name of a prediction",
        lambda v: (
            v.contract.pop("decision"),
            v.contract.update(outputs={"odds": {"tensor": "probabilities", "column": 1}}),
        ),
        r"training said \['probability'\], the contract's outputs are \['odds'\]",
    ),
    Variant("the other class", _output(column=0), "golden row 0: probability is .*training said"),
    Variant(
        "a policy for a feature that is not there",
        lambda v: v.contract.update(features={"missing": {"driver:age": {"use": "refuse"}}}),
        "'driver:age' is not in 'drivers'",
        "stored",
    ),
    Variant(
        "a text for a number",
        lambda v: v.contract.update(
            features={"missing": {"driver:trips": {"use": "constant", "value": "no"}}}
        ),
        "'driver:trips' is a number, its `value` a text",
        "stored",
    ),
    # The manifest says something else than the rest of the version.
    Variant("the name of its input", lambda v: v.x.update(name="z"), "the model's input 'z'"),
    Variant("the type of its input", lambda v: v.x.update(dtype="float64"), r"takes float64\[2\]"),
    Variant("the shape of its input", lambda v: v.x.update(shape=[3]), r"takes float32\[3\]"),
    Variant("the rank of its input", lambda v: v.x.update(shape=[1, 2]), r"takes float32\[1, 2\]"),
    Variant("the width of its output", lambda v: v.y.update(shape=[3]), "signature is not the man"),
    Variant("the type of its output", lambda v: v.y.update(dtype="float64"), "is not the manifest"),
    Variant("no output", lambda v: v.manifest["signature"].update(outputs=[]), "has no output"),
    Variant("no signature", lambda v: v.manifest.update(signature={}), r"signature\.inputs"),
    Variant("a shape of words", lambda v: v.x.update(shape=["two"]), r"shape\.0: .*integer"),
    Variant(
        "the order of its features",
        lambda v: v.manifest.update(feature_order=["b", "a"]),
        "feature_order is not that of its inputs",
    ),
    Variant(
        "no categories",
        lambda v: (
            _input(v.manifest["inputs"])["columns"].__setitem__(0, {"from": "s", "as": "category"}),
            v.manifest["inputs"]["request_fields"].update(s="string"),
            _columns({"from": "s", "as": "category"}, "b")(v),
            v.contract["request_fields"].update(s="string"),
            v.manifest.update(feature_order=["s", "b"]),
        ),
        "training gave no categories for 's'",
    ),
    Variant(
        "no golden rows",
        lambda v: v.manifest["training"]["golden"].update(instances=[], predictions=[]),
        "golden rows: 0, not 1 to",
    ),
    Variant(
        "golden rows of another request",
        lambda v: v.manifest["training"]["golden"].update(instances=[{"a": 1.0}] * 3),
        r"golden rows: .*b",
    ),
    # The plan.
    Variant(
        "the plan of another service",
        lambda v: setattr(v, "plan", replace(v.plan, feature_service="riders")),
        "model.yaml says 'drivers', the plan is that of 'riders'",
        "stored",
    ),
    Variant(
        "a view less",
        lambda v: v.drop_view("city"),
        "'city:demand' is neither a stored feature nor a field",
        "stored",
    ),
    Variant(
        "a feature of another type",
        lambda v: v.retype("rating", "String"),
        "'driver:rating' is string, not for number",
        "stored",
    ),
    # The model file.
    Variant(
        "a renamed input", lambda v: v.rename("x", "z"), r"the file has the inputs 'z' float32"
    ),
    Variant("a renamed output", lambda v: v.rename("probabilities", "p"), "has no output"),
    Variant(
        "a wider input",
        lambda v: setattr(v.model.graph.input[0].type.tensor_type.shape.dim[1], "dim_value", 4),
        "cannot load it|signature is not",
    ),
    Variant(
        "an input of doubles",
        lambda v: setattr(v.model.graph.input[0].type.tensor_type, "elem_type", TensorProto.DOUBLE),
        "cannot load it",
    ),
]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda each: each.name)
async def test_an_incompatible_version_is_refused_with_a_reason(
    tmp_path: Path, variant: Variant
) -> None:
    await write_model(tmp_path / "models", "tiny", variant.kind)
    folder = tmp_path / "models" / "tiny" / "1"
    manifest, _ = read_manifest(folder)
    version = Version(
        contract(variant.kind),
        json.loads(manifest.model_dump_json(by_alias=True)),
        plan_from_json((folder / PLAN_FILE).read_bytes()),
        ModelProto.FromString((folder / MODEL_FILE).read_bytes()),
    )
    variant.change(version)
    (folder / PLAN_FILE).write_bytes(version.plan.to_json())
    (folder / MODEL_FILE).write_bytes(version.model.SerializeToString())
    files = {name: describe(folder / name) for name in (MODEL_FILE, PLAN_FILE)}
    changed = Manifest.model_validate(version.manifest).model_copy(update={"files": files})
    (folder / MANIFEST_FILE).write_bytes(changed.to_json())
    vaulted = VaultedVersion(folder, *read_manifest(folder))
    with pytest.raises(InvalidModel, match=variant.reason):
        await verify_version(vaulted, Contract.model_validate(version.contract), isolated=False)
