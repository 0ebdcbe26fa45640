"""Publishing opens the model in a process of its own: whatever the file does, it is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app.errors import InvalidModel
from app.features.plan import NO_FEATURES
from app.repository.manifest import MODEL_FILE, Manifest
from app.repository.publish import TRAINING_FILE, publish
from tests.backends.isolated_models import FOR_EVER, allocating, looping, processes
from tests.tiny_models import contract, training, write_contract


async def publish_file(folder: Path, model: Path, largest: float, **changes: Any) -> Manifest:
    """Publish a file that answers `x` with itself, by golden rows up to `largest`."""
    model_dir, artifact = folder / "models" / "tiny", folder / "artifact"
    document = contract("regression", **changes) | {
        "request_fields": {"a": "float"},
        "inputs": [{"tensor": "x", "columns": ["a"]}],
    }
    values = (1.0, largest)
    golden = {
        "instances": [{"a": value} for value in values],
        "predictions": [{"value": value} for value in values],
    }
    write_contract(model_dir, document)
    artifact.mkdir()
    (artifact / TRAINING_FILE).write_text(json.dumps(training("regression", golden=golden)))
    shutil.copyfile(model, artifact / MODEL_FILE)
    return await publish(model_dir, artifact, NO_FEATURES, "tiny", within_s=10)


async def test_a_model_that_does_what_training_said_is_published(tmp_path: Path) -> None:
    manifest = await publish_file(tmp_path, looping(tmp_path / "file"), 2.0)
    assert manifest.version == 1
    assert processes() == []


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (looping, r"model\.onnx: golden rows: the deadline passed"),
        (allocating, r"model\.onnx: golden rows: .*alloc"),
    ],
)
async def test_a_model_that_would_harm_a_server_is_refused(
    tmp_path: Path, write: Callable[[Path], Path], reason: str
) -> None:
    with pytest.raises(InvalidModel, match=reason):
        await publish_file(tmp_path, write(tmp_path / "file"), FOR_EVER)
    assert [path.name for path in (tmp_path / "models" / "tiny").iterdir()] == ["model.yaml"]
    assert processes() == []


async def test_a_model_is_verified_with_the_memory_that_it_is_served_with(tmp_path: Path) -> None:
    isolated = {"use": "onnx", "isolated": {"memory_mb": 256}}
    with pytest.raises(InvalidModel, match="alloc"):
        await publish_file(tmp_path, allocating(tmp_path / "file"), 80e6, backend=isolated)
