"""Training a version again: what was altered is named, and only an equal outcome passes."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from app.errors import ConfigurationError, HikyakuError
from app.evaluation.reproduce import reproduce
from app.features.plan import NO_FEATURES
from app.repository.manifest import Manifest
from app.repository.publish import publish
from app.repository.vault import VaultedVersion
from tests.tiny_models import contract, write_contract

ROOT = Path(__file__).parent.parent.parent

# A ridge regression of the first rows of a table; the others measure it.
TRAIN = """
import argparse, json
from pathlib import Path
import numpy as np
from onnx import TensorProto, helper, numpy_helper
from app.repository.manifest import parse_manifest
from app.repository.origin import RunRecord

HERE = Path(__file__).parent
parser = argparse.ArgumentParser()
parser.add_argument("--output", type=Path)
parser.add_argument("--like", type=Path)
arguments = parser.parse_args()
hyperparameters, last = {"ridge": 0.5}, 39
if arguments.like:
    like = parse_manifest(arguments.like.read_bytes(), "--like").training
    hyperparameters, last = like.hyperparameters, int(like.data_window.end)
record = RunRecord(HERE, HERE, data=[HERE / "rows.csv"], seeds={})
rows = np.loadtxt(HERE / "rows.csv", delimiter=",")
x, y = rows[:, :2], rows[:, 2]
train, rest = slice(None, last + 1), slice(last + 1, None)
squares = x[train].T @ x[train] + hyperparameters["ridge"] * np.eye(2)
weights = np.linalg.solve(squares, x[train].T @ y[train]).reshape(2, 1)
graph = helper.make_graph(
    [helper.make_node("MatMul", ["x", "weights"], ["y"])],
    "ridge",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 2])],
    [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 1])],
    [numpy_helper.from_array(weights.astype(np.float32), "weights")],
)
model = helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 17)])
arguments.output.mkdir(exist_ok=True)
(arguments.output / "model.onnx").write_bytes(model.SerializeToString())
predicted = (x[rest] @ weights)[:, 0]
(arguments.output / "training.json").write_text(json.dumps({
    "golden": {
        "instances": [{"a": a, "b": b} for a, b in x[rest][:3].tolist()],
        "predictions": [{"value": value} for value in predicted[:3].tolist()],
    },
    "metrics": {"mse": float(np.mean((predicted - y[rest]) ** 2)), "rows": len(y[rest])},
    "data_window": {"start": "0", "end": str(last), "rows": last + 1},
    "hyperparameters": hyperparameters,
    "run": record.finished().model_dump(mode="json"),
}))
print("trained")
"""


@dataclass(frozen=True)
class Trained:
    code: Path
    published: VaultedVersion

    def with_manifest(self, manifest: Manifest) -> VaultedVersion:
        return VaultedVersion(self.published.folder, manifest, "altered")

    def with_training(self, **changes: Any) -> VaultedVersion:
        manifest = self.published.manifest
        training = manifest.training.model_copy(update=changes)
        return self.with_manifest(manifest.model_copy(update={"training": training}))


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("first")
    code = folder / "tiny"
    write_contract(code, contract("regression"))
    (code / "train.py").write_text(TRAIN)
    lines = [f"{row % 7},{row % 5},{2 * (row % 7) - row % 5 + row % 3}" for row in range(60)]
    (code / "rows.csv").write_text("\n".join(lines))
    train = [sys.executable, str(code / "train.py"), "--output", str(folder / "artifact")]
    subprocess.run(train, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    publication = publish(code, folder / "artifact", NO_FEATURES, "tiny", isolated=False)
    return Trained(code, VaultedVersion(code / "1", asyncio.run(publication), "0" * 64))


@pytest.fixture
def trained(first: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trained:
    """With a copy of the code and data, to be changed."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    shutil.copytree(first.code, tmp_path / "tiny")
    return Trained(tmp_path / "tiny", first.published)


def outcome(
    published: VaultedVersion, trained: Trained, tmp_path: Path
) -> tuple[int, dict[str, str], dict[str, Any]]:
    """The exit status, what differs with its detail, and the whole report."""
    report_file = tmp_path / "report.json"
    status = reproduce(published, trained.code, trained.code, report_file)
    report = json.loads(report_file.read_text())
    compared = [*report["before"], *report["after"]]
    differing = {one["what"]: one["detail"] for one in compared if one["outcome"] == "differs"}
    return status, differing, report


def hikyaku(repository: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "app.cli", *arguments],
        env=os.environ | {"MODEL_REPOSITORY": str(repository)},
        capture_output=True,
        text=True,
    )


def test_a_manifest_says_nothing_to_the_process_but_how_many_threads(
    trained: Trained, tmp_path: Path
) -> None:
    """What loads libraries and modules is not its to say."""
    run = trained.published.manifest.training.run
    assert run is not None
    variables = {"OMP_NUM_THREADS": "1", "PYTHONHOME": "/nowhere"}
    environment = run.environment.model_copy(update={"variables": variables})
    published = trained.with_training(run=run.model_copy(update={"environment": environment}))
    assert outcome(published, trained, tmp_path)[0] == 0


def test_the_same_code_and_data_give_the_version_again(trained: Trained, tmp_path: Path) -> None:
    report_file = tmp_path / "report.json"
    finished = hikyaku(tmp_path, "reproduce", "tiny", "1", "--json", str(report_file))
    said = finished.stdout
    assert finished.returncode == 0, said + finished.stderr
    assert said.endswith("reproduced, byte for byte\n")
    assert said.index("what goes in") < said.index("\ntrained") < said.index("what came out")
    report = json.loads(report_file.read_text())
    assert report["reproduced"] is True
    assert {"same"} == {one["outcome"] for one in [*report["before"], *report["after"]]}


def test_a_command_shows_the_lineage_of_the_current_version(
    trained: Trained, tmp_path: Path
) -> None:
    finished = hikyaku(tmp_path, "lineage", "tiny", "--json")
    document = json.loads(finished.stdout)
    assert (document["version"], document["hyperparameters"]) == ("1", {"ridge": 0.5})
    assert list(document["data"]["files"]) == ["rows.csv"]


def test_a_version_that_was_not_published_is_named(trained: Trained, tmp_path: Path) -> None:
    finished = hikyaku(tmp_path, "reproduce", "tiny", "7")
    assert (finished.returncode, finished.stderr) == (1, "hikyaku: tiny has no version 7: [1]\n")


def altered_metric(trained: Trained) -> VaultedVersion:
    metrics = dict(trained.published.manifest.training.metrics)
    return trained.with_training(metrics=metrics | {"mse": metrics["mse"] + 1e-4})


def altered_prediction(trained: Trained) -> VaultedVersion:
    golden = trained.published.manifest.training.golden
    first, *others = golden.predictions
    predictions = [{"value": first["value"] + 1e-3}, *others]
    return trained.with_training(golden=golden.model_copy(update={"predictions": predictions}))


def altered_digest(trained: Trained) -> VaultedVersion:
    run = trained.published.manifest.training.run
    assert run is not None
    data = {"rows.csv": run.data["rows.csv"].model_copy(update={"sha256": "f" * 64})}
    return trained.with_training(run=run.model_copy(update={"data": data}))


ALTERED: list[tuple[Callable[[Trained], VaultedVersion], set[str], str]] = [
    (altered_metric, {"metric mse"}, "the new model.onnx is the published one, byte for byte"),
    (
        altered_prediction,
        {"golden predictions", "golden predictions of the published file"},
        "the published model.onnx does not predict the golden rows so either",
    ),
    (altered_digest, {"data", "data that was read"}, "not reproduced: data, data that was read"),
    (
        lambda trained: trained.with_training(hyperparameters={"ridge": 5.0}),
        {"metric mse", "files of the model", "golden predictions"},
        "the manifest is not that of this model",
    ),
]


@pytest.mark.parametrize(("alter", "named", "conclusion"), ALTERED)
def test_what_was_altered_in_the_manifest_is_named(
    trained: Trained,
    tmp_path: Path,
    alter: Callable[[Trained], VaultedVersion],
    named: set[str],
    conclusion: str,
) -> None:
    status, differing, report = outcome(alter(trained), trained, tmp_path)
    assert (status, set(differing)) == (1, named)
    assert conclusion in " ".join(report["conclusion"])


def test_data_and_code_that_have_changed_are_named_before_the_training(
    trained: Trained, tmp_path: Path
) -> None:
    with (trained.code / "rows.csv").open("a") as rows:
        rows.write("\n1,1,9")
    with (trained.code / "train.py").open("a") as code:
        code.write("# changed\n")
    status, differing, report = outcome(trained.published, trained, tmp_path)
    assert status == 1
    assert differing["data"] == "rows.csv has another content"
    assert differing["code"] == "tiny/train.py has another content"
    assert differing["metric rows"] == "rows was 20, is 21 (+1)"
    assert "golden predictions" not in differing  # the new row is none that it is trained on
    before = {one["what"]: one["outcome"] for one in report["before"]}
    assert (before["data"], before["code"], before["packages"]) == ("differs", "differs", "same")


def test_a_training_that_heeds_no_manifest_is_told_so(trained: Trained, tmp_path: Path) -> None:
    code = (trained.code / "train.py").read_text()
    (trained.code / "train.py").write_text(code.replace("if arguments.like:", "if False:"))
    altered = trained.with_training(hyperparameters={"ridge": 0.25})
    status, differing, _ = outcome(altered, trained, tmp_path)
    assert status == 1
    assert differing["hyperparameters"] == "ridge was 0.25, is 0.5"


def test_a_training_that_fails_is_no_outcome(
    trained: Trained, capfd: pytest.CaptureFixture[str]
) -> None:
    (trained.code / "train.py").write_text("raise SystemExit('no memory')")
    with pytest.raises(HikyakuError, match=r"train\.py failed"):
        reproduce(trained.with_training(run=None), trained.code, trained.code, None)
    said = capfd.readouterr()
    assert "the version does not say how it was trained" in said.out
    assert "no memory" in said.err


def test_a_folder_without_training_code_is_named(trained: Trained, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"train\.py: no such file"):
        reproduce(trained.published, tmp_path, tmp_path, None)
