"""Publishing: what a version holds, and that a refused one leaves no trace."""

import asyncio
import hashlib
import json
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import onnx
import pytest

from app.errors import HikyakuError, InvalidModel
from app.features.plan import NO_FEATURES, FeaturePlan, PlannedFeature, Transformation
from app.repository.artifact import local_artifact
from app.repository.manifest import read_manifest, read_training
from app.repository.publish import publish
from app.repository.store import open_repository
from app.repository.vault import Vault
from tests.tiny_models import (
    DRIVERS,
    Kind,
    answers,
    binary,
    contract,
    loaded,
    multiclass,
    onnx_model,
    regression,
    stored,
    training,
    write_artifact,
    write_contract,
    write_model,
)

EXAMPLES: Mapping[Kind, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "binary": ({"a": 3.0, "b": 1.5}, {"probability": binary(3.0, 1.5), "decision": True}),
    "regression": ({"a": 3.0, "b": 1.5}, {"value": regression(3.0, 1.5), "decision": False}),
    "multiclass": ({"a": 3.0, "b": 1.5}, {"class": multiclass(3.0, 1.5), "decision": "left"}),
    "stored": (
        {"driver_id": 2, "city": "kyoto", "distance": 0.5},
        {"score": stored(None, 3, 2.0, 0.5), "decision": True},
    ),
}


def content(folder: Path) -> Mapping[str, bytes | None]:
    """Everything below a folder: path → bytes, None for a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def current_version(model_dir: Path) -> int | None:
    return open_repository(str(model_dir.parent)).current(model_dir.name)


def versions(model_dir: Path) -> list[int]:
    return list(open_repository(str(model_dir.parent)).versions(model_dir.name))


@pytest.mark.parametrize("kind", EXAMPLES)
async def test_a_published_model_answers_what_its_training_computes(
    tmp_path: Path, kind: Kind
) -> None:
    await write_model(tmp_path / "models", "tiny", kind)
    instance, expected = EXAMPLES[kind]
    async with loaded(tmp_path / "models" / "tiny") as model:
        (prediction,) = await answers(model, instance)
    decision = prediction.pop("decision")
    assert decision == expected["decision"]
    for name, value in prediction.items():
        assert value == pytest.approx(expected[name], abs=1e-6)


async def test_versions_are_numbered_from_one_and_current_names_the_newest(tmp_path: Path) -> None:
    model_dir = tmp_path / "models" / "tiny"
    numbers = [(await write_model(tmp_path / "models", "tiny", "binary")).version for _ in range(2)]
    assert numbers == [1, 2]
    assert versions(model_dir) == [1, 2]
    assert current_version(model_dir) == 2


async def test_a_number_is_not_used_again_after_the_versions_before_it_were_deleted(
    tmp_path: Path,
) -> None:
    model_dir = tmp_path / "models" / "tiny"
    for _ in range(2):
        await write_model(tmp_path / "models", "tiny", "binary")
    shutil.rmtree(model_dir / "1")
    assert (await write_model(tmp_path / "models", "tiny", "binary")).version == 3


async def test_publishing_again_leaves_the_older_version_as_it_was(tmp_path: Path) -> None:
    await write_model(tmp_path / "models", "tiny", "binary")
    before = content(tmp_path / "models" / "tiny" / "1")
    await write_model(tmp_path / "models", "tiny", "binary")
    assert content(tmp_path / "models" / "tiny" / "1") == before


async def test_two_publishes_at_once_get_a_number_each(tmp_path: Path) -> None:
    manifests = await asyncio.gather(
        *(write_model(tmp_path / "models", "tiny", "binary") for _ in range(2))
    )
    assert {manifest.version for manifest in manifests} == {1, 2}
    assert current_version(tmp_path / "models" / "tiny") == 2


async def test_a_version_holds_the_model_the_plan_and_the_manifest_and_nothing_else(
    tmp_path: Path,
) -> None:
    await write_model(tmp_path / "models", "tiny", "stored")
    assert sorted(content(tmp_path / "models" / "tiny")) == [
        "1",
        "1/manifest.json",
        "1/model.onnx",
        "1/plan.json",
        "CURRENT",
        "config.pbtxt",
        "model.yaml",
    ]


async def test_the_manifest_says_what_the_version_is_made_of(tmp_path: Path) -> None:
    manifest = await write_model(tmp_path / "models", "tiny", "stored", fingerprint="f00d")
    version_dir = tmp_path / "models" / "tiny" / "1"
    assert (manifest.model, manifest.version, manifest.fingerprint) == ("tiny", 1, "f00d")
    for name in ("model.onnx", "plan.json"):
        written = (version_dir / name).read_bytes()
        assert manifest.files[name].sha256 == hashlib.sha256(written).hexdigest()
        assert manifest.files[name].bytes == len(written)
    assert (version_dir / "plan.json").read_bytes() == DRIVERS.to_json()
    assert list(manifest.feature_order) == [*DRIVERS.references, "distance"]
    assert manifest.signature == {
        "inputs": [{"name": "x", "dtype": "float32", "shape": [4]}],
        "outputs": [{"name": "y", "dtype": "float32", "shape": [1]}],
    }
    assert manifest.training.metrics == {"auc": 1.0}
    assert {"numpy", "onnxruntime", "pydantic"} <= set(manifest.environment.packages)
    assert json.loads((version_dir / "manifest.json").read_bytes())["version"] == 1


async def test_triton_is_told_the_batch_limit_and_completes_the_rest(tmp_path: Path) -> None:
    await write_model(tmp_path / "models", "tiny", "binary", batching={"max_batch_rows": 7})
    assert (tmp_path / "models" / "tiny" / "config.pbtxt").read_text().splitlines() == [
        'name: "tiny"',
        'backend: "onnxruntime"',
        "max_batch_size: 7",
        "version_policy { latest { num_versions: 3 } }",
        "dynamic_batching { default_queue_policy { allow_timeout_override: true } }",
    ]


async def test_a_model_for_a_triton_that_is_not_there_can_be_published(tmp_path: Path) -> None:
    backend = {"use": "triton", "endpoints": ["127.0.0.1:1"]}
    manifest = await write_model(tmp_path / "models", "tiny", "binary", backend=backend)
    assert manifest.signature["outputs"] == [
        {"name": "probabilities", "dtype": "float32", "shape": [2]}
    ]


async def test_a_contract_that_takes_one_instance_a_request_can_be_published_and_loaded(
    tmp_path: Path,
) -> None:
    """The limit is for callers: the golden rows are more than one."""
    await write_model(tmp_path / "models", "tiny", "binary", limits={"max_instances": 1})
    async with loaded(tmp_path / "models" / "tiny") as model:
        assert len(await answers(model, {"a": 0.0, "b": 0.0})) == 1


async def test_golden_labels_may_come_in_any_order(tmp_path: Path) -> None:
    document = training("multiclass")
    for prediction in document["golden"]["predictions"]:
        prediction["class"] = dict(reversed(prediction["class"].items()))
    write_contract(tmp_path / "models" / "tiny", contract("multiclass"))
    artifact = write_artifact(tmp_path / "artifact", "multiclass", document)
    manifest = await publish(tmp_path / "models" / "tiny", artifact, NO_FEATURES, "tiny")
    assert manifest.version == 1


class Attempt:
    """A publish about to be made; a fault changes one part of it."""

    def __init__(self, model_dir: Path, artifact: Path, kind: Kind) -> None:
        self.model_dir = model_dir
        self.artifact = artifact
        self.kind = kind
        self.contract = contract(kind)
        self.training = training(kind)
        self.plan: FeaturePlan = DRIVERS if kind == "stored" else NO_FEATURES

    async def publish(self) -> None:
        await publish(self.model_dir, self.artifact, self.plan, "tiny", isolated=False)


def _golden(attempt: Attempt) -> dict[str, Any]:
    golden: dict[str, Any] = attempt.training["golden"]
    return golden


def _wrong_golden_row(attempt: Attempt) -> None:
    _golden(attempt)["predictions"][1] = {"probability": 0.51}


def _golden_row_of_an_unknown_output(attempt: Attempt) -> None:
    _golden(attempt)["predictions"][0] = {"odds": 1.0}


def _golden_row_without_a_label(attempt: Attempt) -> None:
    expected = _golden(attempt)["predictions"][0]["class"]
    del expected["neither"]


def _golden_row_with_two_labels_exchanged(attempt: Attempt) -> None:
    expected = _golden(attempt)["predictions"][0]["class"]
    numbers = list(expected.values())
    expected.clear()
    expected.update(zip(("right", "left", "neither"), numbers, strict=True))


def _fewer_predictions_than_rows(attempt: Attempt) -> None:
    _golden(attempt)["predictions"].pop()


def _no_golden_rows(attempt: Attempt) -> None:
    attempt.training["golden"] = {"instances": [], "predictions": []}


def _golden_row_that_no_caller_could_send(attempt: Attempt) -> None:
    _golden(attempt)["instances"] = [{"a": 2.0}, {"a": 0.0, "b": 0.0}, {"a": -1.0, "b": 3.0}]


def _golden_rows_without_a_stored_value(attempt: Attempt) -> None:
    features = dict(_golden(attempt)["features"])
    del features["city:demand"]
    _golden(attempt)["features"] = features


def _golden_rows_with_too_few_stored_values(attempt: Attempt) -> None:
    _golden(attempt)["features"] = _golden(attempt)["features"] | {"city:demand": [2.0]}


def _input_too_narrow(attempt: Attempt) -> None:
    attempt.contract["inputs"] = [{"tensor": "x", "columns": ["a"]}]


def _input_of_another_type(attempt: Attempt) -> None:
    attempt.contract["inputs"] = [{"tensor": "x", "dtype": "float64", "columns": ["a", "b"]}]


def _input_of_another_name(attempt: Attempt) -> None:
    attempt.contract["inputs"] = [{"tensor": "z", "columns": ["a", "b"]}]


def _one_input_too_many(attempt: Attempt) -> None:
    attempt.contract["inputs"].append({"tensor": "z", "columns": ["a"]})


def _unknown_output_tensor(attempt: Attempt) -> None:
    attempt.contract["outputs"] = {"probability": {"tensor": "logits", "column": 1}}


def _output_column_out_of_range(attempt: Attempt) -> None:
    attempt.contract["outputs"] = {"probability": {"tensor": "probabilities", "column": 2}}


def _unknown_column(attempt: Attempt) -> None:
    attempt.contract["inputs"] = [{"tensor": "x", "columns": ["a", "c"]}]


def _column_outside_the_plan(attempt: Attempt) -> None:
    attempt.plan = NO_FEATURES


def _category_without_numbers(attempt: Attempt) -> None:
    attempt.contract["request_fields"] = {"a": "float", "b": "string"}
    attempt.contract["inputs"] = [
        {"tensor": "x", "columns": ["a", {"from": "b", "as": "category"}]}
    ]


def _missing_value_of_an_unknown_feature(attempt: Attempt) -> None:
    attempt.contract["features"] = {"missing": {"city:supply": {"use": "null"}}}


def _constant_of_another_type(attempt: Attempt) -> None:
    policy = {"use": "constant", "value": "none"}
    attempt.contract["features"] = {"missing": {"driver:rating": policy}}


def _text_with_a_number_for_its_constant(attempt: Attempt) -> None:
    driver = replace(attempt.plan.views[0], features=(PlannedFeature("plate", "String"),))
    attempt.plan = replace(attempt.plan, views=(driver, attempt.plan.views[1]))
    attempt.contract["inputs"] = [{"tensor": "x", "columns": ["distance"]}]
    policy = {"use": "last_good", "max_age_s": 60, "value": 0}
    attempt.contract["features"] = {"missing": {"driver:plate": policy}}


def _mean_that_training_did_not_give(attempt: Attempt) -> None:
    attempt.training["means"] = {"driver:trips": 5.0}
    attempt.contract["features"] = {"missing": {"driver:rating": {"use": "training_mean"}}}


def _last_good_value_of_a_view_made_on_demand(attempt: Attempt) -> None:
    made = Transformation("python", ("driver:trips",), (), "", "")
    city = replace(attempt.plan.views[1], transformation=made)
    attempt.plan = replace(attempt.plan, views=(attempt.plan.views[0], city))
    policy = {"use": "last_good", "max_age_s": 60}
    attempt.contract["features"] = {"missing": {"city:demand": policy}}


def _integer_input(attempt: Attempt, policy: Mapping[str, Any]) -> None:
    columns = ["driver:trips"]
    attempt.contract["inputs"] = [{"tensor": "x", "dtype": "int64", "columns": columns}]
    attempt.contract["features"] = {"missing": {"driver:trips": policy}}


def _integer_that_may_be_missing_after_all(attempt: Attempt) -> None:
    _integer_input(attempt, {"use": "last_good", "max_age_s": 60, "value": 1})


def _integer_with_a_mean_for_a_null(attempt: Attempt) -> None:
    attempt.training["means"] = {"driver:trips": 5.5}
    _integer_input(attempt, {"use": "training_mean"})


def _integer_with_a_constant_that_is_none(attempt: Attempt) -> None:
    _integer_input(attempt, {"use": "constant", "value": 0.5})


def _unknown_backend(attempt: Attempt) -> None:
    attempt.contract["backend"] = "abacus"


def _training_without_metrics(attempt: Attempt) -> None:
    del attempt.training["metrics"]


def _metric_that_is_no_number(attempt: Attempt) -> None:
    attempt.training["metrics"] = {"auc": float("nan")}


def _category_of_an_infinite_number(attempt: Attempt) -> None:
    attempt.training["categories"] = {"a": {"x": float("inf")}}


def _more_categories_than_a_manifest_may_hold(attempt: Attempt) -> None:
    long = "x" * 1_000_000
    attempt.training["categories"] = {"a": {f"{number}{long}": number for number in range(17)}}


FAULTS: list[tuple[Kind, Callable[[Attempt], None], str]] = [
    ("binary", _wrong_golden_row, r"golden row 1: probability is 0\.5, training said 0\.51"),
    ("binary", _golden_row_of_an_unknown_output, "golden row 0: training said .*odds"),
    ("multiclass", _golden_row_without_a_label, "golden row 0: class"),
    ("multiclass", _golden_row_with_two_labels_exchanged, "golden row 0: class"),
    ("binary", _fewer_predictions_than_rows, "golden"),
    ("binary", _no_golden_rows, "golden"),
    ("binary", _golden_row_that_no_caller_could_send, r"golden.*instances\[0\]\.b"),
    ("stored", _golden_rows_without_a_stored_value, "city:demand"),
    ("stored", _golden_rows_with_too_few_stored_values, "city:demand"),
    ("binary", _input_too_narrow, r"inputs\.x: declared float32\[1\].*takes float32\[2\]"),
    ("binary", _input_of_another_type, r"inputs\.x: declared float64\[2\].*takes float32\[2\]"),
    ("binary", _input_of_another_name, "nothing is declared for the model's input 'x'"),
    ("binary", _one_input_too_many, "no input 'z'"),
    ("binary", _unknown_output_tensor, "logits"),
    ("binary", _output_column_out_of_range, r"outputs\.probability: no column 2"),
    ("binary", _unknown_column, "inputs: 'c' is neither"),
    ("stored", _column_outside_the_plan, "inputs: 'driver:rating' is neither"),
    ("binary", _category_without_numbers, "no categories for 'b'"),
    ("stored", _missing_value_of_an_unknown_feature, r"features\.missing: 'city:supply'"),
    ("stored", _constant_of_another_type, "'driver:rating' is a number, its `value` a text"),
    ("stored", _text_with_a_number_for_its_constant, "'driver:plate' is a text, its `value` a num"),
    ("stored", _mean_that_training_did_not_give, "training gave no mean of 'driver:rating'"),
    ("stored", _last_good_value_of_a_view_made_on_demand, "'city:demand' is made on demand"),
    ("stored", _integer_that_may_be_missing_after_all, "'driver:trips' may be missing"),
    ("stored", _integer_with_a_mean_for_a_null, "'driver:trips' may be missing"),
    ("stored", _integer_with_a_constant_that_is_none, "'driver:trips' .* an int64 would cut"),
    ("binary", _unknown_backend, "abacus"),
    ("binary", _training_without_metrics, r"training\.json: metrics"),
    ("binary", _metric_that_is_no_number, r"training\.json: metrics\.auc: .* finite number"),
    ("binary", _category_of_an_infinite_number, r"categories\.a\.x: .* finite number"),
    ("binary", _more_categories_than_a_manifest_may_hold, "its manifest would have .* more than"),
]


@pytest.mark.parametrize(
    ("kind", "fault", "message"), FAULTS, ids=[fault.__name__[1:] for _, fault, _ in FAULTS]
)
async def test_a_refused_version_is_named_and_leaves_no_trace(
    tmp_path: Path, kind: Kind, fault: Callable[[Attempt], None], message: str
) -> None:
    attempt = Attempt(tmp_path / "models" / "tiny", tmp_path / "artifact", kind)
    fault(attempt)
    write_contract(attempt.model_dir, attempt.contract)
    write_artifact(attempt.artifact, kind, attempt.training)
    before = content(attempt.model_dir)
    with pytest.raises(InvalidModel, match=message):
        await attempt.publish()
    assert content(attempt.model_dir) == before


@pytest.mark.parametrize("missing", ["model.onnx", "training.json"])
async def test_an_artifact_that_is_not_whole_is_refused_by_the_name_of_what_it_lacks(
    tmp_path: Path, missing: str
) -> None:
    attempt = Attempt(tmp_path / "models" / "tiny", tmp_path / "artifact", "binary")
    write_contract(attempt.model_dir, attempt.contract)
    write_artifact(attempt.artifact, "binary", attempt.training)
    (attempt.artifact / missing).unlink()
    with pytest.raises(InvalidModel, match=missing):
        await attempt.publish()
    assert sorted(content(attempt.model_dir)) == ["model.yaml"]


async def test_a_refused_version_leaves_the_one_before_it_current(tmp_path: Path) -> None:
    await write_model(tmp_path / "models", "tiny", "binary")
    before = content(tmp_path / "models" / "tiny")
    attempt = Attempt(tmp_path / "models" / "tiny", tmp_path / "artifact", "binary")
    _wrong_golden_row(attempt)
    write_artifact(attempt.artifact, "binary", attempt.training)
    with pytest.raises(HikyakuError):
        await attempt.publish()
    assert content(tmp_path / "models" / "tiny") == before


async def test_the_files_that_a_model_refers_to_are_part_of_the_version(tmp_path: Path) -> None:
    model_dir = tmp_path / "models" / "tiny"
    write_contract(model_dir, contract("regression"))
    artifact = write_artifact(tmp_path / "artifact", "regression", training("regression"))
    model = onnx_model("regression")
    for tensor in model.graph.initializer:
        onnx.external_data_helper.set_external_data(tensor, "weights/all.bin")
    (artifact / "weights").mkdir()
    onnx.save_model(model, artifact / "model.onnx")
    manifest = await publish(model_dir, artifact, NO_FEATURES, "tiny", isolated=False)
    assert sorted(manifest.files) == ["model.onnx", "plan.json", "weights/all.bin"]
    assert (model_dir / "1" / "weights" / "all.bin").stat().st_size == 8
    repository = open_repository(str(tmp_path / "models"))
    copy = Vault(tmp_path / "vault", repository).take("tiny", 1)
    assert (copy.folder / "weights" / "all.bin").stat().st_size == 8


@pytest.mark.parametrize("name", ["plan.json", "manifest.json", ".hidden", "två", "a b/c"])
async def test_an_artifact_with_a_file_that_no_version_can_hold_is_refused(
    tmp_path: Path, name: str
) -> None:
    attempt = Attempt(tmp_path / "models" / "tiny", tmp_path / "artifact", "binary")
    write_contract(attempt.model_dir, attempt.contract)
    write_artifact(attempt.artifact, "binary", attempt.training)
    (attempt.artifact / name).parent.mkdir(exist_ok=True)
    (attempt.artifact / name).touch()
    with pytest.raises(InvalidModel, match=f"{name}: a version cannot hold"):
        await attempt.publish()
    assert sorted(content(attempt.model_dir)) == ["model.yaml"]


async def test_an_artifact_with_a_link_is_refused(tmp_path: Path) -> None:
    attempt = Attempt(tmp_path / "models" / "tiny", tmp_path / "artifact", "binary")
    write_contract(attempt.model_dir, attempt.contract)
    write_artifact(attempt.artifact, "binary", attempt.training)
    (attempt.artifact / "weights").symlink_to("/etc/hostname")
    with pytest.raises(InvalidModel, match="weights: neither a regular file nor a folder"):
        await attempt.publish()


async def test_a_hyperparameter_that_is_no_number_can_be_published(tmp_path: Path) -> None:
    """Gradient boosting says `missing: NaN` of itself."""
    attempt = Attempt(tmp_path / "models" / "tiny", tmp_path / "artifact", "binary")
    attempt.training["hyperparameters"] = {"missing": float("nan")}
    write_contract(attempt.model_dir, attempt.contract)
    write_artifact(attempt.artifact, "binary", attempt.training)
    await attempt.publish()
    published, _ = read_manifest(attempt.model_dir / "1")
    assert published.training == read_training(attempt.artifact / "training.json")


async def test_a_reason_is_one_short_line_whatever_it_quotes(tmp_path: Path) -> None:
    attempt = Attempt(tmp_path / "models" / "tiny", tmp_path / "artifact", "binary")
    _golden(attempt)["predictions"][0] = {"probability": "\x1b[2J\n" * 100_000}
    write_contract(attempt.model_dir, attempt.contract)
    write_artifact(attempt.artifact, "binary", attempt.training)
    with pytest.raises(InvalidModel, match=r"probability is .* training said") as why:
        await attempt.publish()
    assert str(why.value).isprintable()
    assert len(str(why.value)) < 10_000


async def test_a_candidate_does_not_become_current(tmp_path: Path) -> None:
    await write_model(tmp_path / "models", "tiny", "binary")
    artifact = tmp_path / "models-artifacts" / "tiny"
    model_dir = tmp_path / "models" / "tiny"
    candidate = await publish(
        model_dir, artifact, NO_FEATURES, "tiny", isolated=False, keep_current=True
    )
    assert (candidate.version, current_version(model_dir)) == (2, 1)


@pytest.mark.parametrize(("kind", "changed"), [("multiclass", "outputs"), ("stored", "inputs")])
async def test_a_changed_signature_needs_a_new_name(
    tmp_path: Path, kind: Kind, changed: str
) -> None:
    await write_model(tmp_path / "models", "tiny", "regression")
    before = content(tmp_path / "models" / "tiny" / "1")
    message = rf"{changed} .* version 1 of tiny: a changed signature is a new model name"
    with pytest.raises(InvalidModel, match=message):
        await write_model(tmp_path / "models", "tiny", kind)
    assert content(tmp_path / "models" / "tiny" / "1") == before
    assert versions(tmp_path / "models" / "tiny") == [1]


async def test_the_signature_is_held_against_the_newest_version_that_can_be_read(
    tmp_path: Path,
) -> None:
    for _ in range(2):
        await write_model(tmp_path / "models", "tiny", "binary")
    (tmp_path / "models" / "tiny" / "2" / "manifest.json").write_text("{}")
    with pytest.raises(InvalidModel, match="version 1 of tiny"):
        await write_model(tmp_path / "models", "tiny", "regression")


async def test_the_number_that_current_names_is_not_used_again(tmp_path: Path) -> None:
    for _ in range(2):
        await write_model(tmp_path / "models", "tiny", "binary")
    shutil.rmtree(tmp_path / "models" / "tiny" / "2")
    assert (await write_model(tmp_path / "models", "tiny", "binary")).version == 3


def test_an_artifact_at_a_url_is_copied(tmp_path: Path) -> None:
    url = f"memory://{uuid.uuid4().hex}/artifact"
    files, root = fsspec.core.url_to_fs(url)
    for name in ("model.onnx", "training.json", "weights/all.bin"):
        files.pipe_file(f"{root}/{name}", name.encode())
    with local_artifact(url) as folder:
        assert content(folder) == {
            "model.onnx": b"model.onnx",
            "training.json": b"training.json",
            "weights": None,
            "weights/all.bin": b"weights/all.bin",
        }
    assert not folder.exists()


def test_an_artifact_that_is_not_at_its_url_is_named() -> None:
    with pytest.raises(InvalidModel, match="nothing is there"), local_artifact("memory://none/x"):
        pass
