"""Loads a published version: verified against manifest and contract, warm, golden rows right."""

from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

from app.backends import open_backend
from app.backends.backend import Backend
from app.backends.execution_times import ExecutionTimes
from app.batching.batcher import DynamicBatcher
from app.batching.policy import BatchPolicy, Greedy, Hold
from app.clock import FeatureClock
from app.contract import Batching, Contract, load_contract
from app.deadline import DeadlineSweep
from app.errors import InvalidModel
from app.features.encoding import Encoder
from app.features.missing import MissingValues
from app.features.plan import FeaturePlan, plan_from_json
from app.features.source import MAX_AHEAD_S, FeatureSource, ValueStatus
from app.features.static_source import StaticSource
from app.instances import InstanceDecoder
from app.outputs import OutputReader
from app.repository.checks import check_columns, run_golden
from app.repository.layout import CONTRACT_FILE, current_version
from app.repository.manifest import (
    MANIFEST_FILE,
    MODEL_FILE,
    PLAN_FILE,
    Manifest,
    describe,
    golden_tensors,
    read_manifest,
    signature_of,
)
from app.served_model import ServedModel, VersionId
from app.telemetry.batches import BatchRecorder
from app.telemetry.metrics import Metrics
from app.telemetry.recorder import PredictionRecorder


async def load_current(
    model_dir: Path,
    open_source: Callable[[FeaturePlan], FeatureSource],
    sweep: DeadlineSweep,
    metrics: Metrics,
    clock: FeatureClock,
    drain_s: float,
    workers: int,
    stack: AsyncExitStack,
) -> ServedModel:
    """The version that CURRENT names, ready to answer in one of so many workers; what it holds is
    released by `stack`.

    Raises `InvalidModel` when any of it is not what its manifest and model.yaml say,
    `ConfigurationError` when it cannot be served like this.
    """
    contract = load_contract(model_dir / CONTRACT_FILE)
    version = current_version(model_dir)
    if version is None:
        raise InvalidModel(f"{model_dir}: nothing is published yet; `hikyaku publish` does it")
    version_dir = model_dir / str(version)
    manifest, digest = read_manifest(version_dir)
    plan = _verified_plan(version_dir, manifest, contract)
    check_columns(contract, plan, manifest.training)

    recorder = BatchRecorder(metrics, model_dir.name)
    model = version_dir / MODEL_FILE
    backend = await open_backend(
        contract.backend, model, signature_of(manifest), recorder.happened, workers
    )
    stack.push_async_callback(backend.close)
    if backend.signature != signature_of(manifest):
        raise InvalidModel(f"{version_dir}: the model's signature is not the manifest's")
    decoder = InstanceDecoder(contract, plan)
    encoder = Encoder(contract.inputs, manifest.training.categories)
    outputs = OutputReader(contract.outputs, contract.decision, backend.signature)
    # Golden rows show what the model does with a null, whatever the contract puts in its place.
    golden = golden_tensors(manifest.training.golden, decoder, plan, encoder)
    times = await backend.warm_up(golden, contract.batching.max_batch_rows)
    await run_golden(backend, outputs, golden, manifest.training.golden, what=str(version_dir))

    batcher = _batcher(backend, contract.batching, sweep, times, recorder, drain_s)
    await stack.enter_async_context(batcher)
    return ServedModel(
        VersionId(model_dir.name, version, digest),
        contract,
        decoder,
        open_source(plan) if plan.views else StaticSource(plan),
        MissingValues(contract.features, plan, manifest.training.means),
        encoder,
        encoder.for_rows(decoder.required, plan.references),
        batcher,
        outputs,
        PredictionRecorder(
            metrics,
            model_dir.name,
            outputs=list(contract.outputs),
            views=[view.name for view in plan.views],
            view_of_feature=[i for i, view in enumerate(plan.views) for _ in view.features],
            statuses=[status.name for status in ValueStatus],
            now_s=clock.now_s,
            max_ahead_s=MAX_AHEAD_S,
        ),
        manifest.training.golden.instances[0],
    )


def _batcher(
    backend: Backend,
    batching: Batching,
    sweep: DeadlineSweep,
    times: ExecutionTimes,
    recorder: BatchRecorder,
    drain_s: float,
) -> DynamicBatcher:
    batch_rows = times.best_rows(batching.max_batch_rows)
    return DynamicBatcher(
        backend,
        _policy(batching, batch_rows),
        sweep,
        times,
        recorder,
        max_batch_rows=batch_rows,
        max_queue_rows=batching.max_queue_rows,
        isolation_share=batching.isolation_share,
        drain_s=drain_s,
    )


def _policy(batching: Batching, batch_rows: int) -> BatchPolicy:
    if not batching.hold_ms:
        return Greedy(batch_rows)
    preferred = [rows for rows in batching.preferred_rows if rows <= batch_rows]
    return Hold(batching.hold_ms / 1000, batch_rows, preferred)


def _verified_plan(version_dir: Path, manifest: Manifest, contract: Contract) -> FeaturePlan:
    """Every file is the one that was published, and for this contract; the plan among them."""
    if (manifest.model, manifest.version) != (version_dir.parent.name, int(version_dir.name)):
        raise InvalidModel(
            f"{version_dir / MANIFEST_FILE}: describes version {manifest.version} of "
            f"{manifest.model!r}; a version is published, not copied"
        )
    if not {MODEL_FILE, PLAN_FILE} <= manifest.files.keys():
        raise InvalidModel(
            f"{version_dir / MANIFEST_FILE}: does not list {MODEL_FILE} and {PLAN_FILE}"
        )
    for name, expected in manifest.files.items():
        path = version_dir / name
        if not path.is_file():
            raise InvalidModel(f"{path}: missing")
        if describe(path) != expected:
            raise InvalidModel(f"{path}: is not the file that was published (sha256 or size)")
    if contract.inputs_document() != manifest.inputs:
        raise InvalidModel(
            f"{version_dir.parent / CONTRACT_FILE}: the inputs have changed since version "
            f"{manifest.version} was trained; train and publish again"
        )
    try:
        return plan_from_json((version_dir / PLAN_FILE).read_bytes())
    except ValueError as exc:
        raise InvalidModel(f"{version_dir / PLAN_FILE}: {exc}") from exc
