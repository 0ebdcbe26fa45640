"""Verifying: what a version must say before it may be loaded, and what is remembered of it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper

from app.contract import Contract
from app.errors import InvalidModel, RepositoryUnavailable
from app.features.plan import NO_FEATURES
from app.repository.manifest import MODEL_FILE, Training, read_manifest
from app.repository.vault import VaultedVersion
from app.repository.verify import Verified, verify_model, verify_version
from tests.backends.isolated_models import processes
from tests.tiny_models import (
    contract,
    training,
    write_artifact,
    write_contract,
    write_model,
)


def sums(path: Path, *nodes: NodeProto) -> Path:
    """Writes a file in which these nodes make `y` of `x`, each `[rows, 1]`; `share` is a small
    number that they may use."""
    graph = helper.make_graph(
        list(nodes),
        "sums",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 1])],
        [numpy_helper.from_array(np.array([[1e-3]], np.float32), "share")],
    )
    model = helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 17)])
    path.write_bytes(model.SerializeToString())
    return path


async def verified(model: Path, *values: float, predicted: Any = None, **changes: Any) -> Verified:
    """Verify a file that answers `x` with about itself, in this process."""
    document = contract("regression", **changes) | {
        "request_fields": {"a": "float"},
        "inputs": [{"tensor": "x", "columns": ["a"]}],
    }
    golden = {
        "instances": [{"a": value} for value in values],
        "predictions": predicted or [{"value": value} for value in values],
        "tolerance": 1e-3,
    }
    trained = Training.model_validate(training("regression", golden=golden))
    return await verify_model(
        model,
        Contract.model_validate(document),
        NO_FEATURES,
        trained,
        isolated=False,
        within_s=10,
    )


@pytest.fixture
async def version(tmp_path: Path) -> VaultedVersion:
    """A published version of the binary model, as the vault would hold it."""
    await write_model(tmp_path / "models", "tiny", "binary")
    folder = tmp_path / "models" / "tiny" / "1"
    return VaultedVersion(folder, *read_manifest(folder))


BINARY = Contract.model_validate(contract("binary"))


async def test_what_is_found_is_signature_memory_and_time_for_every_size_of_batch(
    tmp_path: Path,
) -> None:
    artifact = write_artifact(tmp_path, "binary", training("binary"))
    trained = Training.model_validate(training("binary"))
    found = await verify_model(artifact / MODEL_FILE, BINARY, NO_FEATURES, trained)
    assert [spec.name for spec in found.signature.outputs] == ["probabilities"]
    assert sorted(found.execution_s) == [1, 2, 4, 8, 16, 32, 64]
    assert 0 < found.memory_bytes < 100 << 20
    assert processes() == []


async def test_a_row_that_is_predicted_otherwise_beside_others_is_refused(tmp_path: Path) -> None:
    """`y` = `x` and a thousandth of the mean of the batch, which is 0 in the golden one."""
    model = sums(
        tmp_path / MODEL_FILE,
        helper.make_node("ReduceMean", ["x"], ["mean"], axes=[0], keepdims=1),
        helper.make_node("Mul", ["mean", "share"], ["more"]),
        helper.make_node("Add", ["x", "more"], ["y"]),
    )
    with pytest.raises(InvalidModel, match=r"golden row 0: value is -3\.0.* in a batch of .*\[0\]"):
        await verified(model, -3.0, 0.0, 3.0)


async def test_golden_rows_are_executed_no_more_at_once_than_the_contract_allows(
    tmp_path: Path,
) -> None:
    """A file for one row at a time cannot do more."""
    model = sums(tmp_path / MODEL_FILE, helper.make_node("Identity", ["x"], ["y"]))
    proto = onnx.load(model)
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(proto, model)
    found = await verified(model, 1.0, 2.0, 3.0, batching={"max_batch_rows": 1})
    assert list(found.execution_s) == [1]


async def test_what_was_found_is_not_looked_for_again(version: VaultedVersion) -> None:
    first = await verify_version(version, BINARY, within_s=10)
    # Were it verified again, this would be seen.
    (version.folder / MODEL_FILE).write_bytes(b"")
    assert await verify_version(version, BINARY, within_s=10) == first


async def test_a_version_that_cannot_be_remembered_may_be_loaded(version: VaultedVersion) -> None:
    """As on a full disk."""
    version.folder.with_name("1.verified.json.staging").mkdir()
    assert await verify_version(version, BINARY, within_s=10, isolated=False)


async def test_a_folder_that_cannot_be_written_is_not_the_fault_of_the_version(
    version: VaultedVersion,
) -> None:
    version.folder.with_name("1.verifying.lock").mkdir()
    with pytest.raises(RepositoryUnavailable, match=r"1\.verifying\.lock: Is a directory"):
        await verify_version(version, BINARY, within_s=10, isolated=False)


async def test_what_was_refused_is_tried_again(version: VaultedVersion) -> None:
    model = version.folder / MODEL_FILE
    content = model.read_bytes()
    model.write_bytes(b"")
    with pytest.raises(InvalidModel, match="is not the file that was published"):
        await verify_version(version, BINARY, within_s=10, isolated=False)
    model.write_bytes(content)
    assert await verify_version(version, BINARY, within_s=10, isolated=False)


async def test_another_contract_is_verified_anew(version: VaultedVersion) -> None:
    await verify_version(version, BINARY, within_s=10, isolated=False)
    other = Contract.model_validate(contract("binary", batching={"max_batch_rows": 4}))
    found = await verify_version(version, other, within_s=10, isolated=False)
    assert sorted(found.execution_s) == [1, 2, 4]


async def test_what_is_remembered_but_cannot_be_read_is_verified_anew(
    version: VaultedVersion,
) -> None:
    await verify_version(version, BINARY, within_s=10, isolated=False)
    (remembered,) = version.folder.parent.glob("*.verified.json")
    remembered.write_text(json.dumps({"key": 1}))
    assert await verify_version(version, BINARY, within_s=10, isolated=False)


def hikyaku_verify(repository: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "app.cli", "verify", *arguments],
        env=os.environ | {"MODEL_REPOSITORY": str(repository), "HIKYAKU_LOG_LEVEL": "ERROR"},
        capture_output=True,
        text=True,
        check=False,
    )


async def test_the_command_says_what_was_found(tmp_path: Path) -> None:
    await write_model(tmp_path / "models", "tiny", "binary", batching={"max_batch_rows": 2})
    said = hikyaku_verify(tmp_path / "models", "tiny")
    assert (said.returncode, said.stderr) == (0, "")
    first, memory, *sizes = said.stdout.splitlines()
    assert first == "  tiny version 1 may be loaded"
    assert re.fullmatch(r"  memory: [\d.]+ MB to open it and execute every batch", memory)
    assert [line.split()[0] for line in sizes] == ["1", "2"]


async def test_the_command_says_why_a_version_is_refused(tmp_path: Path) -> None:
    await write_model(tmp_path / "models", "tiny", "binary")
    other = contract("binary", outputs={"probability": {"tensor": "probabilities", "column": 0}})
    write_contract(tmp_path / "models" / "tiny", other)
    said = hikyaku_verify(tmp_path / "models", "tiny", "1")
    assert (said.returncode, said.stdout) == (1, "")
    assert "golden row 0: probability is" in said.stderr
    assert len(said.stderr.splitlines()) == 1
