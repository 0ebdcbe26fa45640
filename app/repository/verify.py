"""Verifies a version before it is loaded: in an isolated child, inspected, executed, measured."""

import asyncio
import fcntl
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Protocol

from pydantic import TypeAdapter, ValidationError

from app.backends import open_backend
from app.backends.execution_times import warm_up_batches
from app.backends.isolated_model import Opening
from app.backends.isolated_trial import open_trial
from app.backends.isolated_wire import Inspection
from app.contract import (
    BackendOptions,
    Contract,
    EchoOptions,
    Isolation,
    OnnxOptions,
    TritonOptions,
)
from app.deadline import Deadline
from app.errors import BackendError, DeadlineExceeded, InvalidModel, RepositoryUnavailable
from app.features.encoding import Encoder
from app.features.plan import FeaturePlan, plan_from_json
from app.instances import InstanceDecoder
from app.outputs import OutputReader
from app.repository.checks import (
    Executes,
    check_batch_invariance,
    check_inputs,
    check_manifest,
    check_plan,
    check_signature,
    declared_inputs,
    run_golden,
)
from app.repository.files import is_no_regular_file, open_regular
from app.repository.manifest import (
    MODEL_FILE,
    PLAN_FILE,
    File,
    Training,
    golden_tensors,
    signature_of,
)
from app.repository.vault import VaultedVersion
from app.tensors import Signature, Tensors, TensorSpec

log = logging.getLogger(__name__)

_MEMORY_MB = 1_024
_MEMORY_OF_A_FILE = 4  # weights are read, converted and packed: up to this many times the file
_NICE = 10  # the server goes first, but a busy one must not keep a version from being verified
_MEASURED = 5
_MEMORY_SUFFIX = ".verified.json"
_LOCK_SUFFIX = ".verifying.lock"
_LOCK_EVERY_S = 0.05
_RUNTIMES = ("onnxruntime", "onnxruntime-gpu")


@dataclass(frozen=True, slots=True)
class Verified:
    """What was found of a version that may be loaded.

    `memory_bytes` is the most that opening it and executing every size of batch took, 0 where that
    was not measured; `execution_s` the seconds of an execution by its rows.
    """

    signature: Signature
    memory_bytes: int
    execution_s: Mapping[int, float]


@dataclass(frozen=True, slots=True)
class _Remembered:
    key: str
    verified: Verified


_REMEMBERED = TypeAdapter(_Remembered)


async def verify_model(
    model: Path,
    contract: Contract,
    plan: FeaturePlan,
    training: Training,
    *,
    expected: Signature | None = None,
    within_s: float = 60.0,
    isolated: bool = True,
) -> Verified:
    """Verify a model file and what lies beside it. Cancelling ends it at once.

    The file is inspected and opened in a process of its own, which may crash, and gets `within_s`
    for that and as long again for all executions; without `isolated` it is opened in this one, not
    inspected, and its memory not measured: for files whose author is the caller.

    Raises `InvalidModel`, with a reason to act on, unless it may be loaded as what model.yaml says
    and, where a signature is `expected`, with that one.
    """
    subject = _Subject(model, contract, plan, training, expected, None)
    return await _verify(subject, within_s, isolated)


async def verify_version(
    version: VaultedVersion,
    contract: Contract,
    *,
    within_s: float = 60.0,
    isolated: bool = True,
) -> Verified:
    """Verify a version in the vault against its manifest and model.yaml, as `verify_model` does.

    That it succeeded is remembered beside its folder, for this contract and these libraries: the
    other workers of the machine and later starts read it. Of those that ask at once one verifies,
    and the others wait for it; what was refused is tried again by the next. Raises
    `RepositoryUnavailable` too, where its folder cannot be written.
    """
    key = await asyncio.to_thread(_key, version, contract, isolated)
    memory = version.folder.with_name(f"{version.folder.name}{_MEMORY_SUFFIX}")
    async with _locked(version.folder.with_name(f"{version.folder.name}{_LOCK_SUFFIX}")):
        known = await asyncio.to_thread(_recalled, memory, key)
        if known is not None:
            return known
        manifest = version.manifest
        plan = await asyncio.to_thread(_checked_files, version, contract)
        model = version.folder / MODEL_FILE
        expected = signature_of(manifest)
        files = tuple(manifest.files)
        subject = _Subject(model, contract, plan, manifest.training, expected, files)
        verified = await _verify(subject, within_s, isolated)
        try:
            await asyncio.to_thread(_remember, memory, key, verified)
        except OSError as exc:  # a full disk must not keep a good version from serving
            log.warning("what was verified cannot be remembered", extra={"reason": str(exc)})
        return verified


def read_plan(version: VaultedVersion, contract: Contract) -> FeaturePlan:
    """The plan of a version, blocking. Raises `InvalidModel` where manifest, plan and model.yaml do
    not go together."""
    manifest = version.manifest
    check_manifest(contract, manifest)
    try:
        plan = plan_from_json((version.folder / PLAN_FILE).read_bytes())
    except (OSError, ValueError) as exc:
        raise InvalidModel(f"{version.folder / PLAN_FILE}: {exc}") from exc
    check_plan(contract, plan, manifest.training)
    return plan


def _checked_files(version: VaultedVersion, contract: Contract) -> FeaturePlan:
    """The plan, after every file was found to be the one that the manifest lists."""
    for name, listed in version.manifest.files.items():
        _check_file(version.folder, name, listed)
    return read_plan(version, contract)


def _check_file(folder: Path, name: str, listed: File) -> None:
    path = folder / name
    try:
        with open_regular(folder, name) as file:
            same = os.fstat(file.fileno()).st_size == listed.bytes
            same = same and hashlib.file_digest(file, "sha256").hexdigest() == listed.sha256
    except OSError as exc:
        reason = "is a link, or no file" if is_no_regular_file(exc) else exc.strerror
        raise InvalidModel(f"{path}: {reason}") from exc
    if not same:
        raise InvalidModel(f"{path}: is not the file that was published (sha256 or size)")


def _key(version: VaultedVersion, contract: Contract, isolated: bool) -> str:
    """A digest of all that decides whether the version may be loaded here."""
    installed = {name: _installed(name) for name in ("hikyaku", "onnx", *_RUNTIMES)}
    found = (version.sha256, contract.model_dump_json(by_alias=True), isolated, installed)
    machine = (platform.python_version(), platform.machine())
    return hashlib.sha256(json.dumps([found, machine]).encode()).hexdigest()


def _installed(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


@asynccontextmanager
async def _locked(path: Path) -> AsyncIterator[None]:
    """Alone on this machine in having it. The kernel releases it when the process ends. Raises
    `RepositoryUnavailable` where there can be none."""
    try:
        handle = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600)
    except OSError as exc:
        raise RepositoryUnavailable(f"{path}: {exc.strerror}") from exc
    try:
        # Neither here nor in a thread could a call that waits for the lock be cancelled.
        while not _lock(handle):  # noqa: ASYNC110  (no event is set by another process)
            await asyncio.sleep(_LOCK_EVERY_S)
        yield
    finally:
        os.close(handle)


def _lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _recalled(path: Path, key: str) -> Verified | None:
    """What was found under that key; None where nothing is, or nothing that can be read."""
    try:
        remembered = _REMEMBERED.validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None
    return remembered.verified if remembered.key == key else None


def _remember(path: Path, key: str, verified: Verified) -> None:
    """Whole or not at all, also when the machine stops meanwhile."""
    staged = path.with_name(f"{path.name}.staging")
    with open(staged, "wb") as file:
        file.write(_REMEMBERED.dump_json(_Remembered(key, verified)))
        file.flush()
        os.fsync(file.fileno())
    staged.rename(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@dataclass(frozen=True, slots=True)
class _Subject:
    """`files` are those that may hold data of the model; None: all of its folder."""

    model: Path
    contract: Contract
    plan: FeaturePlan
    training: Training
    expected: Signature | None
    files: tuple[str, ...] | None


class _Opened(Executes, Protocol):
    @property
    def signature(self) -> Signature: ...


async def _verify(subject: _Subject, within_s: float, isolated: bool) -> Verified:
    contract, training = subject.contract, subject.training
    check_plan(contract, subject.plan, training)
    # Thousands of golden rows take longer to decode than the event loop may be held.
    rows = await asyncio.to_thread(_golden_rows, subject)
    declared = _declared(contract)
    options = _executed_here(contract.backend)
    if not isolated:
        backend = await open_backend(_in_this_process(options), subject.model, declared)
        try:
            seconds = await _executed(subject, backend, rows, within_s)
            return Verified(backend.signature, 0, seconds)
        finally:
            await backend.close()
    opening = await asyncio.to_thread(_opening, subject, options, declared, within_s)
    async with open_trial(opening, within_s) as trial:
        seconds = await _executed(subject, trial, rows, within_s)
        return Verified(trial.signature, trial.memory_bytes(), seconds)


def _golden_rows(subject: _Subject) -> Tensors:
    contract, plan, training = subject.contract, subject.plan, subject.training
    encoder = Encoder(contract.inputs, training.categories)
    return golden_tensors(training.golden, InstanceDecoder(contract, plan), plan, encoder)


async def _executed(
    subject: _Subject, opened: _Opened, rows: Tensors, within_s: float
) -> dict[int, float]:
    """Seconds of an execution by its rows. Raises `InvalidModel` unless every execution says what
    it should."""
    contract, golden, what = subject.contract, subject.training.golden, str(subject.model)
    if subject.expected is not None:
        check_signature(opened.signature, subject.expected)
    check_inputs(contract, opened.signature)
    reader = OutputReader(contract.outputs, contract.decision, opened.signature)
    deadline = Deadline.after(within_s)
    # As many at once as will be when it serves: more may need more memory than it will ever get.
    most_rows = contract.batching.max_batch_rows
    predictions = await run_golden(
        opened, reader, rows, golden, most_rows=most_rows, what=what, within_s=within_s
    )
    await check_batch_invariance(
        opened,
        reader,
        rows,
        predictions,
        golden.tolerance,
        deadline,
        most_rows=most_rows,
        what=what,
    )
    return await _measured(opened, rows, most_rows, deadline, what)


async def _measured(
    opened: Executes, example: Tensors, max_rows: int, deadline: Deadline, what: str
) -> dict[int, float]:
    """The least of a few executions of each size, after one that is discarded."""
    measured: dict[int, float] = {}
    for rows, batch in warm_up_batches(example, max_rows):
        seconds = []
        for _ in range(1 + _MEASURED):
            started_s = time.perf_counter()
            try:
                await opened.execute(batch, deadline)
            except (BackendError, DeadlineExceeded) as exc:
                raise InvalidModel(f"{what}: a batch of {rows} rows: {exc}") from exc
            seconds.append(time.perf_counter() - started_s)
            if seconds[-1] > deadline.remaining_s() / _MEASURED:
                break  # a slow model is measured once, rather than refused for the measuring
        measured[rows] = min(seconds[1:] or seconds)
    return measured


def _declared(contract: Contract) -> Signature:
    """What the backend is to open. A model file says itself what its outputs are; an echo answers
    each with an input."""
    needed = sorted({output.tensor for output in contract.outputs.values()})
    inputs = declared_inputs(contract)
    outputs = (
        TensorSpec(name, spec.dtype, spec.shape)
        for name, spec in zip(needed, cycle(inputs), strict=False)
    )
    return Signature(inputs, tuple(outputs))


def _executed_here(options: BackendOptions) -> EchoOptions | OnnxOptions:
    """No Triton has a version that is being verified: its file is checked by ONNX Runtime."""
    if isinstance(options, TritonOptions):
        return options.failover or OnnxOptions(use="onnx")
    return options


def _in_this_process(options: EchoOptions | OnnxOptions) -> EchoOptions | OnnxOptions:
    return options.model_copy(update={"isolated": None})


def _opening(
    subject: _Subject, options: EchoOptions | OnnxOptions, declared: Signature, within_s: float
) -> Opening:
    """The same backend with the memory that it will serve with, or that such files may need."""
    if options.isolated is not None:
        memory_mb = options.isolated.memory_mb
    else:
        memory_mb = _MEMORY_MB + _MEMORY_OF_A_FILE * (_file_bytes(subject.model.parent) >> 20)
    isolation = Isolation(memory_mb=memory_mb, start_s=within_s, nice=_NICE)
    inspection = Inspection(subject.files) if isinstance(options, OnnxOptions) else None
    return Opening(options, isolation, subject.model, declared, 1, inspection)


def _file_bytes(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*"))
