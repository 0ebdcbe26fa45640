"""The manifest of a published version: what it is made of, and what made it."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from app.contract import faults_in
from app.errors import InvalidInput, InvalidModel
from app.features.encoding import Encoder, StoredMisfit, ValueColumn
from app.features.plan import FeaturePlan, value_type
from app.instances import InstanceDecoder
from app.repository.layout import is_file_name
from app.tensors import Signature, Tensors

MODEL_FILE = "model.onnx"
PLAN_FILE = "plan.json"
MANIFEST_FILE = "manifest.json"
SEAL_FILE = "manifest.sig"

MAX_FILES = 4_096
MAX_PLAN_BYTES = 16 << 20
MAX_VERSION_BYTES = 64 << 30

_CHECKSUM = re.compile(rb'\{\n "checksum": "([0-9a-f]{64})",')


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


Finite: TypeAlias = Annotated[float, Field(allow_inf_nan=False)]
"""JSON has no word for the others."""


class Golden(_Section):
    """Rows whose predictions are known: `instances` as a caller would send them, `features` the
    stored values that they had, `predictions` what the training framework said."""

    instances: Sequence[Mapping[str, Any]]
    features: Mapping[str, Sequence[Any]] = {}
    predictions: Sequence[Mapping[str, Any]]
    tolerance: Annotated[float, Field(gt=0, le=1e-3)] = 1e-5


class DataWindow(_Section):
    """The rows that the model was trained on, by their instant of asking."""

    start: str
    end: str
    rows: int


class File(_Section):
    """The content of one file."""

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    bytes: Annotated[int, Field(ge=0)]


class Lock(_Section):
    """The file that pins the versions of packages."""

    file: str
    sha256: str


class Environment(_Section):
    """Where a process ran, and on which versions."""

    python: str
    implementation: str
    platform: str
    machine: str
    """The architecture: `x86_64`."""
    processor: str
    cpus: Annotated[int, Field(ge=1)]
    """How many the process may run on."""
    variables: Mapping[str, str]
    """Those that decide how many threads compute, where they are set."""
    packages: Mapping[str, str]
    """The version of each distribution."""
    lock: Lock | None = None
    """None where the packages are not those of a lock file."""


class Source(_Section):
    """The checkout that something was made in."""

    commit: str
    """`-dirty` with uncommitted changes; empty outside a checkout."""
    diff_sha256: str = ""
    """Of those changes, as a patch; files that git does not track are not in it."""


class Run(_Section):
    """The process that trained: what it ran, what it read, and where."""

    command: Sequence[str]
    finished_at: str
    source: Source
    code: Mapping[str, File]
    """The files of the fingerprint."""
    data: Mapping[str, File]
    """What was trained on, by path from the model's folder."""
    seeds: Mapping[str, int]
    environment: Environment


class Training(_Section):
    """What a training writes beside its model file, as training.json: everything about the model
    that cannot be read off the file."""

    categories: Mapping[str, Mapping[str, Finite]] = {}
    means: Mapping[str, Finite] = {}
    """Of each stored number, over the training rows that have one: for `use: training_mean`."""
    golden: Golden
    metrics: Mapping[str, Finite]
    data_window: DataWindow
    hyperparameters: Mapping[str, Any]
    run: Run | None = None
    """None where the training does not say."""


class View(_Section):
    """A feature view as the version reads it."""

    join_keys: Sequence[str]
    ttl_s: float | None
    """None: its values never grow too old."""
    features: Mapping[str, str]
    """Feast's name of each one's type."""


class FeatureOrigin(_Section):
    """The stored features behind a version: the gist of its plan.json."""

    service: str
    """Empty: the model reads no stored feature."""
    project: str
    views: Mapping[str, View]


_SIGNATURE = TypeAdapter(Signature)


class Manifest(_Section):
    """Everything that is known about a version. Its own sha256 identifies the version's content."""

    model: str
    version: int
    published_at: str
    published_by: str
    files: Mapping[str, File]
    signature: Mapping[str, Any]
    inputs: Mapping[str, Any]
    """The part of model.yaml that the version was trained for."""
    feature_order: Sequence[str]
    features: FeatureOrigin
    training: Training
    fingerprint: str
    """Digest of what the training read: its code, the feature repository, the input columns."""
    source: Source
    """Of the publication, as is `environment`; those of the training are in `training.run`."""
    environment: Environment

    def to_json(self) -> bytes:
        """As manifest.json holds it."""
        return with_checksum(self.model_dump_json(indent=1).encode() + b"\n")


def with_checksum(document: bytes) -> bytes:
    """A JSON object that begins with a checksum of all that follows it, so that a damaged one is
    not believed."""
    rest = document.removeprefix(b"{")
    checksum = hashlib.sha256(rest).hexdigest()
    return b'{\n "checksum": "' + checksum.encode() + b'",' + rest


def parse_manifest(content: bytes, what: str) -> Manifest:
    """The content of a manifest.json. Raises `InvalidModel` naming `what` and what is wrong."""
    head = _CHECKSUM.match(content)
    if head is None:
        raise InvalidModel(f"{what}: does not begin as one that `hikyaku publish` has written")
    rest = content[head.end() :]
    if hashlib.sha256(rest).hexdigest().encode() != head[1]:
        raise InvalidModel(f"{what}: is damaged: its checksum is not that of its content")
    try:
        manifest = Manifest.model_validate_json(b"{" + rest)
    except ValidationError as exc:
        raise InvalidModel(f"{what}: {faults_in(exc)}") from exc
    check_files(manifest.files, what)
    return manifest


def check_files(files: Mapping[str, File], what: str) -> None:
    """Raises `InvalidModel` for a file that must not be one of a version, and where one lacks."""
    lacking = {MODEL_FILE, PLAN_FILE} - files.keys()
    if lacking:
        raise InvalidModel(f"{what}: lists no {' and no '.join(sorted(lacking))}")
    if len(files) > MAX_FILES:
        raise InvalidModel(f"{what}: lists {len(files):,} files, more than {MAX_FILES:,}")
    for name in files:
        if not is_file_name(name) or name in {MANIFEST_FILE, SEAL_FILE}:
            raise InvalidModel(f"{what}: {name[:200]!r} cannot be the name of a version's file")
        if not files.keys().isdisjoint(map(str, PurePosixPath(name).parents)):
            raise InvalidModel(f"{what}: {name[:200]!r} is below another file")
    if files[PLAN_FILE].bytes > MAX_PLAN_BYTES:  # it is read in the server
        raise InvalidModel(f"{what}: {PLAN_FILE} is larger than {MAX_PLAN_BYTES:,} bytes")
    size = sum(file.bytes for file in files.values())
    if size > MAX_VERSION_BYTES:
        raise InvalidModel(f"{what}: {size:,} bytes of files, more than {MAX_VERSION_BYTES:,}")


def read_manifest(version_dir: Path) -> tuple[Manifest, str]:
    """The manifest and its sha256. Raises `InvalidModel` naming the file and what is wrong."""
    path = version_dir / MANIFEST_FILE
    content = _read(path)
    return parse_manifest(content, str(path)), hashlib.sha256(content).hexdigest()


def feature_origin(plan: FeaturePlan) -> FeatureOrigin:
    """What a manifest says of a plan."""
    return FeatureOrigin(
        service=plan.feature_service,
        project=plan.project,
        views={
            view.name: View(
                join_keys=view.join_keys,
                ttl_s=view.ttl_s,
                features={feature.name: feature.dtype for feature in view.features},
            )
            for view in plan.views
        },
    )


def read_training(path: Path) -> Training:
    """A training.json, as a manifest will hold it: a NaN among the hyperparameters is null there.

    Raises `InvalidModel` naming the file and what is wrong.
    """
    try:
        said = Training.model_validate_json(_read(path))
        return Training.model_validate_json(said.model_dump_json())
    except ValidationError as exc:
        raise InvalidModel(f"{path}: {faults_in(exc)}") from exc


def golden_tensors(
    golden: Golden, decoder: InstanceDecoder, plan: FeaturePlan, encoder: Encoder
) -> Tensors:
    """The golden rows as the model's inputs, by the very path that a request takes."""
    body = json.dumps({"instances": list(golden.instances)}).encode()
    try:
        instances = decoder.decode(body, max_instances=len(golden.instances))
    except InvalidInput as exc:
        raise InvalidModel(f"golden rows: {exc}") from exc
    columns: dict[str, ValueColumn] = dict(instances.fields)
    for view in plan.views:
        for feature in view.features:
            reference = f"{view.name}:{feature.name}"
            if reference not in encoder.sources:
                continue  # it is there for on-demand views, which training does not show
            if len(golden.features.get(reference, ())) != instances.count:
                raise InvalidModel(
                    f"golden rows: not {instances.count} values of {reference}, one a row"
                )
            columns[reference] = _column(golden.features[reference], feature.dtype)
    try:
        return encoder.encode(columns, instances.count)
    except StoredMisfit as exc:
        raise InvalidModel(f"golden rows: {exc}") from exc


def describe(path: Path) -> File:
    """Digest and size of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return File(sha256=digest.hexdigest(), bytes=file.tell())


def signature_of(manifest: Manifest) -> Signature:
    """Raises `InvalidModel` where what the manifest says of it is none."""
    try:
        return _SIGNATURE.validate_python(manifest.signature)
    except ValidationError as exc:
        raise InvalidModel(f"{MANIFEST_FILE}: signature.{faults_in(exc)}") from exc


def _column(values: Sequence[Any], dtype: str) -> NDArray[Any]:
    if value_type(dtype) == "number":
        return np.array([np.nan if value is None else value for value in values], dtype=np.float64)
    return np.array(values, dtype=object)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as exc:
        raise InvalidModel(f"{path}: {exc.strerror}") from exc
