"""Loading: only what was published, for the contract that it was trained for, may answer."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app.errors import InvalidModel
from app.repository.layout import CURRENT_FILE
from app.repository.manifest import with_checksum
from tests.tiny_models import answers, contract, loaded, write_contract, write_model


@pytest.fixture
async def model_dir(tmp_path: Path) -> Path:
    """A binary model with one published version."""
    await write_model(tmp_path / "models", "tiny", "binary")
    return tmp_path / "models" / "tiny"


async def assert_refused(model_dir: Path, message: str) -> None:
    with pytest.raises(InvalidModel, match=message):
        async with loaded(model_dir):
            pass


def edit_manifest(model_dir: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = model_dir / "1" / "manifest.json"
    document = json.loads(path.read_bytes())
    del document["checksum"]
    change(document)
    path.write_bytes(with_checksum(json.dumps(document).encode()))


@pytest.mark.parametrize("name", ["model.onnx", "plan.json"])
async def test_a_file_with_one_flipped_bit_is_refused(model_dir: Path, name: str) -> None:
    path = model_dir / "1" / name
    written = bytearray(path.read_bytes())
    written[len(written) // 2] ^= 1
    path.write_bytes(written)
    await assert_refused(model_dir, f"{name}: is not the file that was published")


@pytest.mark.parametrize("name", ["model.onnx", "plan.json"])
async def test_a_truncated_file_is_refused(model_dir: Path, name: str) -> None:
    path = model_dir / "1" / name
    path.write_bytes(path.read_bytes()[:-1])
    await assert_refused(model_dir, f"{name}: is not the file that was published")


@pytest.mark.parametrize("name", ["model.onnx", "plan.json", "manifest.json"])
async def test_a_missing_file_is_refused(model_dir: Path, name: str) -> None:
    (model_dir / "1" / name).unlink()
    await assert_refused(model_dir, name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["files"]["model.onnx"].update(sha256="0" * 64), "model.onnx: is not the file"),
        (lambda m: m["files"]["model.onnx"].update(bytes=1), "model.onnx: is not the file"),
        (lambda m: m["files"].clear(), "model.onnx"),
        (lambda m: m["signature"]["inputs"][0].update(shape=[3]), "inputs.x"),
        (lambda m: m["signature"]["outputs"][0].update(name="y"), "'y'"),
        (lambda m: m["training"]["golden"]["predictions"][2].update(probability=0.9), "row 2"),
        (lambda m: m.update(version="two"), "manifest.json: version"),
        (lambda m: m.update(verison=1), "manifest.json: verison"),
        (lambda m: m.pop("training"), "manifest.json: training"),
        (lambda m: m.update(version=2), "manifest.json"),
        (lambda m: m.update(model="giant"), "manifest.json"),
    ],
    ids=[
        "digest",
        "size",
        "no files",
        "input shape",
        "output name",
        "golden prediction",
        "version of another type",
        "unknown key",
        "missing key",
        "another version's",
        "another model's",
    ],
)
async def test_an_edited_manifest_is_refused(
    model_dir: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    edit_manifest(model_dir, change)
    await assert_refused(model_dir, message)


async def test_a_manifest_that_is_not_json_is_refused(model_dir: Path) -> None:
    (model_dir / "1" / "manifest.json").write_text("{")
    await assert_refused(model_dir, "manifest.json")


@pytest.mark.parametrize(
    "changes",
    [
        {"inputs": [{"tensor": "x", "columns": ["b", "a"]}]},
        {"request_fields": {"a": "float", "b": "float", "c": "float"}},
        {"request_fields": {"a": "int", "b": "float"}},
        {"feature_service": "drivers"},
    ],
    ids=["order of columns", "another field", "type of a field", "feature service"],
)
async def test_a_contract_with_other_inputs_than_were_trained_for_is_refused(
    model_dir: Path, changes: dict[str, Any]
) -> None:
    write_contract(model_dir, contract("binary", **changes))
    await assert_refused(model_dir, r"model\.yaml: the inputs have changed since version 1")


async def test_a_changed_threshold_needs_no_new_version(model_dir: Path) -> None:
    decision = {"output": "probability", "at_least": 0.9}
    write_contract(model_dir, contract("binary", decision=decision))
    async with loaded(model_dir) as model:
        predictions = await answers(model, {"a": 1.0, "b": 0.0}, {"a": 5.0, "b": 0.0})
    assert [prediction["decision"] for prediction in predictions] == [False, True]


async def test_an_output_that_the_model_does_not_have_is_refused(model_dir: Path) -> None:
    outputs = {"probability": {"tensor": "probabilities", "column": 2}}
    write_contract(model_dir, contract("binary", outputs=outputs))
    await assert_refused(model_dir, r"outputs\.probability: no column 2")


async def test_current_naming_a_version_that_is_not_there_is_refused(model_dir: Path) -> None:
    (model_dir / CURRENT_FILE).write_text("9\n")
    await assert_refused(model_dir, r"9/manifest\.json")


async def test_current_decides_which_version_answers_not_the_highest_number(
    model_dir: Path,
) -> None:
    await write_model(model_dir.parent, "tiny", "binary")
    (model_dir / CURRENT_FILE).write_text("1\n")
    async with loaded(model_dir) as model:
        assert (model.id.model, model.id.version) == ("tiny", 1)


async def test_the_identity_of_a_version_is_the_digest_of_its_manifest(model_dir: Path) -> None:
    async with loaded(model_dir) as model:
        first = model.id.sha256
    await write_model(model_dir.parent, "tiny", "binary", fingerprint="another")
    async with loaded(model_dir) as model:
        assert model.id.sha256 != first


async def test_the_example_is_an_instance_that_the_model_answers(model_dir: Path) -> None:
    async with loaded(model_dir) as model:
        assert len(await answers(model, model.example)) == 1


def test_a_model_without_stored_features_needs_no_feast(tmp_path: Path) -> None:
    program = f"""
import asyncio, sys
from pathlib import Path
from tests.tiny_models import answers, loaded, write_model

async def main():
    await write_model(Path({str(tmp_path)!r}), "tiny", "binary")
    async with loaded(Path({str(tmp_path)!r}) / "tiny") as model:
        await answers(model, {{"a": 1.0, "b": 0.0}})

asyncio.run(main())
assert "feast" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)
