"""Publishing opens the model in a process of its own: whatever the file does, it is refused."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app.errors import InvalidModel
from app.features.plan import NO_FEATURES
from app.repository.manifest import MODEL_FILE, Manifest
from app.repository.publish import TRAINING_FILE, publish
from tests.backends.isolated_models import (
    FOR_EVER,
    allocating,
    cpu_ticks,
    looping,
    processes,
    until,
)
from tests.tiny_models import (
    answers,
    contract,
    loaded,
    training,
    write_artifact,
    write_contract,
    write_model,
)


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
    return await publish(model_dir, artifact, NO_FEATURES, "tiny", within_s=6)


def contents(folder: Path) -> list[Path]:
    return list((folder / "models" / "tiny").iterdir())


async def test_a_model_that_does_what_training_said_is_published(tmp_path: Path) -> None:
    manifest = await publish_file(tmp_path, looping(tmp_path / "file"), 2.0)
    assert manifest.version == 1
    assert processes() == []


def test_what_becomes_of_the_process_is_seen_by_who_publishes(tmp_path: Path) -> None:
    model_dir, artifact = tmp_path / "models" / "tiny", tmp_path / "artifact"
    write_contract(model_dir, contract("regression"))
    write_artifact(artifact, "regression", training("regression"))
    finished = subprocess.run(
        [sys.executable, "-m", "app.cli", "publish", "tiny", str(artifact)],
        env=os.environ | {"MODEL_REPOSITORY": str(tmp_path / "models")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (finished.returncode, finished.stdout.strip()) == (0, "published tiny version 1")
    events = [json.loads(line)["event"] for line in finished.stderr.splitlines()]
    assert "a model is tried in an isolated process" in events


async def test_a_model_that_is_isolated_is_loaded_and_answers_as_another(tmp_path: Path) -> None:
    isolated = {"use": "onnx", "isolated": {}}
    await write_model(tmp_path / "models", "tiny", "regression", backend=isolated)
    async with loaded(tmp_path / "models" / "tiny") as model:
        assert len(processes()) == 1
        (prediction,) = await answers(model, {"a": 3.0, "b": 4.0})
    assert prediction == {"value": 11.0, "decision": True}
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
    assert [path.name for path in contents(tmp_path)] == ["model.yaml"]
    assert processes() == []


async def test_a_model_that_crashes_what_executes_it_is_refused(tmp_path: Path) -> None:
    attempt = asyncio.create_task(publish_file(tmp_path, looping(tmp_path / "file"), FOR_EVER))
    await until(lambda: attempt.done() or (bool(processes()) and cpu_ticks(processes()[0]) > 120))
    if not attempt.done():  # on a busy machine its time may be up before: then it is told below
        os.kill(processes()[0], signal.SIGSEGV)  # as ONNX Runtime's own crash would
    with pytest.raises(InvalidModel, match=r"killed by SIGSEGV"):
        await attempt
    assert [path.name for path in contents(tmp_path)] == ["model.yaml"]


async def test_a_model_is_verified_with_the_memory_that_it_is_served_with(tmp_path: Path) -> None:
    isolated = {"use": "onnx", "isolated": {"memory_mb": 256}}
    with pytest.raises(InvalidModel, match="alloc"):
        await publish_file(tmp_path, allocating(tmp_path / "file"), 80e6, backend=isolated)
