"""Manifests and training.json: what is written is read again, and a fault is named."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.contract import Contract
from app.errors import InvalidModel
from app.features.encoding import Encoder
from app.instances import InstanceDecoder
from app.repository.manifest import (
    Golden,
    describe,
    golden_tensors,
    read_manifest,
    read_training,
    signature_of,
)
from app.tensors import Signature, TensorSpec
from tests.tiny_models import DRIVERS, contract, training, write_model


async def test_what_was_published_is_what_is_read(tmp_path: Path) -> None:
    published = await write_model(tmp_path / "models", "tiny", "stored")
    path = tmp_path / "models" / "tiny" / "1" / "manifest.json"
    manifest, digest = read_manifest(path.parent)
    assert manifest.to_json() == published.to_json() == path.read_bytes()
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()


async def test_the_signature_names_the_tensors_that_the_contract_reads(tmp_path: Path) -> None:
    manifest = await write_model(tmp_path / "models", "tiny", "multiclass")
    assert signature_of(manifest) == Signature(
        (TensorSpec("x", "float32", (2,)),), (TensorSpec("probabilities", "float32", (3,)),)
    )


def test_a_manifest_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidModel, match=r"manifest\.json: No such file"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": {"auc": "high"}}, r"training\.json: metrics\.auc"),
        ({"data_window": {"start": "2013-01-01", "rows": 1}}, r"data_window\.end"),
        ({"optimizer": "adam"}, r"training\.json: optimizer"),
        ({"categories": {"carrier": {"UA": "first"}}}, r"categories\.carrier\.UA"),
    ],
)
def test_every_fault_of_a_training_is_named(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = tmp_path / "training.json"
    path.write_text(json.dumps(training("binary", **changes)))
    with pytest.raises(InvalidModel, match=message):
        read_training(path)


def test_a_training_that_is_not_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "training.json"
    path.write_text("auc: 0.75")
    with pytest.raises(InvalidModel, match=r"training\.json: document"):
        read_training(path)


def test_a_file_is_described_by_its_digest_and_size(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    described = describe(path)
    assert described.sha256 == hashlib.sha256(b"abc").hexdigest()
    assert described.bytes == 3


def test_golden_rows_are_encoded_by_the_path_of_a_request() -> None:
    model_contract = Contract.model_validate(contract("stored"))
    golden = Golden.model_validate(training("stored")["golden"])
    tensors = golden_tensors(
        golden,
        InstanceDecoder(model_contract, DRIVERS),
        DRIVERS,
        Encoder(model_contract.inputs, {}),
    )
    np.testing.assert_array_equal(
        tensors["x"],
        np.float32([[4, 7, 2, 5], [np.nan, 3, 2, 0], [np.nan, np.nan, np.nan, 1]]),
    )
