"""Publishes a trained model as the next version: staged, checked, synced, renamed into place."""

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import uuid
from datetime import UTC, datetime
from itertools import cycle
from pathlib import Path

from app.backends import open_backend
from app.backends.backend import Backend
from app.contract import (
    BackendOptions,
    Contract,
    EchoOptions,
    Isolation,
    OnnxOptions,
    TritonOptions,
    load_contract,
)
from app.errors import InvalidModel
from app.features import encoding
from app.features.encoding import Encoder
from app.features.plan import FeaturePlan
from app.instances import InstanceDecoder
from app.outputs import OutputReader
from app.repository.checks import check_columns, check_inputs, declared_inputs, run_golden
from app.repository.layout import CONTRACT_FILE, CURRENT_FILE, versions
from app.repository.manifest import (
    MANIFEST_FILE,
    MODEL_FILE,
    PLAN_FILE,
    Manifest,
    Training,
    describe,
    golden_tensors,
    read_training,
)
from app.tensors import Signature, TensorSpec

TRAINING_FILE = "training.json"

_VERIFYING_MB = 1_024
_MEMORY_OF_A_FILE = 4  # weights are read, converted and packed: up to this many times the file
_TRITON_VERSIONS = 3

_TRAINED_WITH = ("feast", "numpy", "onnx", "onnxruntime", "pandas", "scikit-learn", "skl2onnx")


async def publish(
    model_dir: Path,
    artifact: Path,
    plan: FeaturePlan,
    fingerprint: str,
    *,
    isolated: bool = True,
    within_s: float = 60.0,
) -> Manifest:
    """Make `artifact` (a folder with model.onnx and training.json) the CURRENT version.

    Nothing of it is visible before it is whole and checked. The model file is opened in a process
    of its own, which may crash, and gets `within_s` to open it and as long again for the golden
    rows; without `isolated` it is opened in this one, for files whose author is the caller. Raises
    `InvalidModel` when the file does not fit the contract or does not say what training said on
    the golden rows.
    """
    contract = load_contract(model_dir / CONTRACT_FILE)
    training = read_training(artifact / TRAINING_FILE)
    check_columns(contract, plan, training)
    if not (artifact / MODEL_FILE).is_file():
        raise InvalidModel(f"{artifact / MODEL_FILE}: no such file")
    staging = model_dir / f".staging-{uuid.uuid4().hex}"
    staging.mkdir()
    try:
        shutil.copyfile(artifact / MODEL_FILE, staging / MODEL_FILE)
        # The copy, in its place: what the file needs beside it is not there for the server either.
        model = staging / MODEL_FILE
        options = _executed_here(contract.backend)
        if isolated:
            options = _verifying(options, model, within_s)
        signature = await _checked_signature(contract, options, plan, training, model, within_s)
        version = max(versions(model_dir), default=0) + 1
        (staging / PLAN_FILE).write_bytes(plan.to_json())
        manifest = Manifest(
            model=model_dir.name,
            version=version,
            published_at=datetime.now(UTC).isoformat(timespec="seconds"),
            files={name: describe(staging / name) for name in (MODEL_FILE, PLAN_FILE)},
            signature=signature.to_json(),
            inputs=contract.inputs_document(),
            feature_order=[column.source for column in contract.columns()],
            training=training,
            fingerprint=fingerprint,
            source_commit=_source_commit(model_dir),
            environment=_environment(),
        )
        (staging / MANIFEST_FILE).write_bytes(manifest.to_json())
        for path in staging.iterdir():
            _sync(path)
        _sync(staging)
        staging.rename(model_dir / str(version))
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    _write_atomically(model_dir / "config.pbtxt", _triton_config(model_dir.name, contract))
    _write_atomically(model_dir / CURRENT_FILE, f"{version}\n")
    return manifest


def fingerprint(model_dir: Path, feature_repo: Path) -> str:
    """Digest of what a training reads: its code, the feature repository's, the input columns."""
    digest = hashlib.sha256()
    contract = load_contract(model_dir / CONTRACT_FILE)
    digest.update(json.dumps(contract.inputs_document(), sort_keys=True).encode())
    sources = [*model_dir.glob("*.py"), Path(encoding.__file__)]
    if contract.feature_service is not None:
        sources += [*feature_repo.glob("*.py"), feature_repo / "feature_store.yaml"]
    for path in sorted(sources):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _verifying(
    options: EchoOptions | OnnxOptions, model: Path, within_s: float
) -> EchoOptions | OnnxOptions:
    """The same backend, isolated, with the memory that it will serve with or that such a file may
    need."""
    if options.isolated is not None:
        memory_mb = options.isolated.memory_mb
    else:
        memory_mb = _VERIFYING_MB + _MEMORY_OF_A_FILE * (model.stat().st_size >> 20)
    return options.model_copy(update={"isolated": Isolation(memory_mb=memory_mb, start_s=within_s)})


async def _checked_signature(
    contract: Contract,
    options: BackendOptions,
    plan: FeaturePlan,
    training: Training,
    model: Path,
    within_s: float,
) -> Signature:
    """Run the golden rows through the model file; its signature when they come out right."""
    needed = sorted({output.tensor for output in contract.outputs.values()})
    inputs = declared_inputs(contract)
    # A model file says itself what its outputs are; an echo answers each with an input.
    outputs = (
        TensorSpec(name, spec.dtype, spec.shape)
        for name, spec in zip(needed, cycle(inputs), strict=False)
    )
    declared = Signature(inputs, tuple(outputs))
    backend: Backend = await open_backend(options, model, declared)
    try:
        check_inputs(contract, backend.signature)
        reader = OutputReader(contract.outputs, contract.decision, backend.signature)
        encoder = Encoder(contract.inputs, training.categories)
        rows = golden_tensors(training.golden, InstanceDecoder(contract, plan), plan, encoder)
        await run_golden(backend, reader, rows, training.golden, what=MODEL_FILE, within_s=within_s)
        return backend.signature
    finally:
        await backend.close()


def _executed_here(options: BackendOptions) -> EchoOptions | OnnxOptions:
    """No Triton has a version that is being published: its file is checked by ONNX Runtime."""
    if isinstance(options, TritonOptions):
        return options.failover or OnnxOptions(use="onnx")
    return options


def _triton_config(name: str, contract: Contract) -> str:
    """Inputs and outputs are left out: Triton completes them from the ONNX file. The version in
    charge stays loaded beside a newer one, and a request may say how long it may be queued."""
    return (
        f'name: "{name}"\nbackend: "onnxruntime"\n'
        f"max_batch_size: {contract.batching.max_batch_rows}\n"
        f"version_policy {{ latest {{ num_versions: {_TRITON_VERSIONS} }} }}\n"
        "dynamic_batching { default_queue_policy { allow_timeout_override: true } }\n"
    )


def _source_commit(folder: Path) -> str:
    """The checkout's commit, `-dirty` with uncommitted changes; empty outside a checkout."""
    try:
        described = subprocess.run(
            [
                "git",
                "-C",
                str(folder),
                "describe",
                "--always",
                "--dirty",
                "--abbrev=40",
                "--exclude=*",
            ],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return described.stdout.strip()


def _environment() -> dict[str, str]:
    installed = {"python": platform.python_version()}
    for name in _TRAINED_WITH:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def _write_atomically(path: Path, content: str) -> None:
    staged = path.with_name(f".staging-{uuid.uuid4().hex}")
    staged.write_text(content)
    _sync(staged)
    staged.rename(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
