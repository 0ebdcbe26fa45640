"""Publishes a trained model as the next version: staged, checked, synced, renamed into place."""

import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path

from app.contract import Contract, parse_contract
from app.errors import InvalidModel
from app.features.plan import FeaturePlan
from app.repository import files
from app.repository.layout import CONTRACT_FILE, CURRENT_FILE, TRITON_FILE, is_file_name
from app.repository.manifest import (
    MANIFEST_FILE,
    MODEL_FILE,
    PLAN_FILE,
    SEAL_FILE,
    Manifest,
    describe,
    feature_origin,
    parse_manifest,
    read_training,
    signature_of,
)
from app.repository.origin import environment, publisher, source_of, training_code
from app.repository.signing import SigningKey
from app.repository.store import MAX_MANIFEST_BYTES, Shelf, is_url, open_repository
from app.repository.verify import verify_model
from app.tensors import Signature

TRAINING_FILE = "training.json"

_TRITON_VERSIONS = 3

# In a process of its own, so that this one need not have imported it.
_OPENED_WITH = ("onnxruntime", "onnxruntime-gpu")


async def publish(
    model_dir: Path | str,
    artifact: Path,
    plan: FeaturePlan,
    fingerprint: str,
    *,
    isolated: bool = True,
    within_s: float = 60.0,
    keep_current: bool = False,
    signing_key: SigningKey | None = None,
) -> Manifest:
    """Make `artifact` (a folder with model.onnx, training.json and what the model file refers to)
    the next version of a model, a folder or URL of a repository, and the CURRENT one unless
    `keep_current`.

    Nothing of it is visible before it is whole and verified, by `verify_model` with `isolated` and
    `within_s`. Raises `InvalidModel` when the file does not fit the contract, does not say what
    training said on the golden rows, or has another signature than the version before;
    `RepositoryUnavailable` when the repository cannot be read or written now.
    """
    repository, name = _shelf_of(model_dir)
    contract = parse_contract(repository.contract(name), repository.where(name, CONTRACT_FILE))
    training = read_training(artifact / TRAINING_FILE)
    with repository.staging(name) as staging:
        _stage(artifact, staging)
        # The copy, in its place: what the file needs beside it is not there for the server either.
        model = staging / MODEL_FILE
        verified = await verify_model(
            model, contract, plan, training, isolated=isolated, within_s=within_s
        )
        signature = verified.signature
        _check_unchanged(repository, name, signature)
        files.copy_synced(iter((plan.to_json(),)), staging / PLAN_FILE)
        manifest = Manifest(
            model=name,
            version=_free_number(repository, name),
            published_at=datetime.now(UTC).isoformat(timespec="seconds"),
            published_by=publisher(),
            files={path: describe(staging / path) for path in files.regular_files(staging)},
            signature=signature.to_json(),
            inputs=contract.inputs_document(),
            feature_order=[column.source for column in contract.columns()],
            features=feature_origin(plan),
            training=training,
            fingerprint=fingerprint,
            source=source_of(model_dir if isinstance(model_dir, Path) else Path()),
            environment=environment(also=_OPENED_WITH),
        )
        _check_readable(manifest, str(artifact))
        with repository.alone(name):
            config = _triton_config(name, contract)
            return _added(repository, manifest, staging, config, keep_current, signing_key)


def _shelf_of(model: Path | str) -> tuple[Shelf, str]:
    """The repository that a model's folder or URL is in, and the model's name there."""
    if isinstance(model, str) and is_url(model):
        location, _, name = model.rstrip("/").rpartition("/")
        return open_repository(location), name
    return open_repository(str(Path(model).parent)), Path(model).name


def _stage(artifact: Path, staging: Path) -> None:
    """Copy every file of the artifact but training.json, which becomes a part of the manifest."""
    if not (artifact / MODEL_FILE).is_file():
        raise InvalidModel(f"{artifact / MODEL_FILE}: no such file")
    try:
        names = set(files.regular_files(artifact)) - {TRAINING_FILE}
    except OSError as exc:
        raise InvalidModel(f"{exc.filename}: {exc.strerror}") from exc
    for name in names:
        if not is_file_name(name) or name in {PLAN_FILE, MANIFEST_FILE, SEAL_FILE}:
            raise InvalidModel(f"{artifact / name}: a version cannot hold a file of this name")
        files.copy_synced(files.pieces(files.open_regular(artifact, name)), staging / name)


def _check_unchanged(repository: Shelf, name: str, signature: Signature) -> None:
    """Callers and Triton rely on a model's tensors: they are those of the version before."""
    for version in reversed(repository.versions(name)):
        try:
            what = repository.where(name, version, MANIFEST_FILE)
            before = signature_of(parse_manifest(repository.manifest(name, version), what))
        except InvalidModel:
            continue  # of another release of this software, or damaged: nobody can load it
        changes = [
            f"{kind} {', '.join(sorted(changed))}"
            for kind, now, then in (
                ("inputs", signature.inputs, before.inputs),
                ("outputs", signature.outputs, before.outputs),
            )
            if (changed := {spec.name for spec in set(now) ^ set(then)})
        ]
        if changes:
            raise InvalidModel(
                f"{MODEL_FILE}: {' and '.join(changes)} differ from version {version} of {name}: "
                "a changed signature is a new model name"
            )
        return


def _check_readable(manifest: Manifest, what: str) -> None:
    """Nobody could load a version with a manifest that its readers refuse."""
    content = manifest.to_json()
    if len(content) > MAX_MANIFEST_BYTES:
        raise InvalidModel(
            f"{what}: its manifest would have {len(content):,} bytes, more than "
            f"{MAX_MANIFEST_BYTES:,}: fewer golden rows, categories or hyperparameters make it "
            "smaller"
        )
    parse_manifest(content, what)


def _added(
    repository: Shelf,
    manifest: Manifest,
    staging: Path,
    config: str,
    keep_current: bool,
    signing_key: SigningKey | None,
) -> Manifest:
    """Give the staged version the next number that nobody else has taken, and name it."""
    # Before the version, which a Triton that polls may load at once.
    repository.put(manifest.model, TRITON_FILE, config.encode())
    while True:
        content = manifest.to_json()
        for name in (MANIFEST_FILE, SEAL_FILE):
            (staging / name).unlink(missing_ok=True)
        files.copy_synced(iter((content,)), staging / MANIFEST_FILE)
        if signing_key is not None:
            files.copy_synced(iter((signing_key.sign(content),)), staging / SEAL_FILE)
        if repository.add(manifest.model, manifest.version, staging):
            break
        number = max(_free_number(repository, manifest.model), manifest.version + 1)
        manifest = manifest.model_copy(update={"version": number})
    if not keep_current and manifest.version > _current(repository, manifest.model):
        repository.put(manifest.model, CURRENT_FILE, f"{manifest.version}\n".encode())
    return manifest


def _free_number(repository: Shelf, name: str) -> int:
    """Above every version that is there, and above one that CURRENT still names."""
    return max(repository.highest(name), _current(repository, name)) + 1


def _current(repository: Shelf, name: str) -> int:
    """0 where CURRENT names nothing. Above ours when another publisher has overtaken us."""
    try:
        return repository.current(name) or 0
    except InvalidModel:
        return 0


def fingerprint(contract: Contract, code: Path | None, feature_repo: Path) -> str:
    """Digest of what a training reads: its code, the feature repository's, the input columns."""
    digest = hashlib.sha256()
    digest.update(json.dumps(contract.inputs_document(), sort_keys=True).encode())
    for name, path in training_code(contract, code, feature_repo).items():
        digest.update(name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _triton_config(name: str, contract: Contract) -> str:
    """Inputs and outputs are left out: Triton completes them from the ONNX file. The version in
    charge stays loaded beside a newer one, and a request may say how long it may be queued."""
    return (
        f'name: "{name}"\nbackend: "onnxruntime"\n'
        f"max_batch_size: {contract.batching.max_batch_rows}\n"
        f"version_policy {{ latest {{ num_versions: {_TRITON_VERSIONS} }} }}\n"
        "dynamic_batching { default_queue_policy { allow_timeout_override: true } }\n"
    )
