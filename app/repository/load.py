"""Opens a verified version in this process: warm, its golden rows right, ready to answer."""

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, fields
from typing import Any

from app.backends import open_backend
from app.backends.backend import Backend, Tell
from app.backends.execution_times import ExecutionTimes
from app.batching.batcher import DynamicBatcher
from app.batching.policy import BatchPolicy, Greedy, Hold
from app.clock import FeatureClock
from app.contract import BackendOptions, Batching, Contract, TritonOptions
from app.deadline import DeadlineSweep
from app.features.encoding import Encoder
from app.features.missing import MissingValues
from app.features.plan import FeaturePlan
from app.features.source import MAX_AHEAD_S, FeatureSource, ValueStatus
from app.features.static_source import StaticSource
from app.instances import InstanceDecoder
from app.labels.horizon import check_labels
from app.outputs import OutputReader
from app.repository.checks import check_signature, run_golden
from app.repository.manifest import MODEL_FILE, Manifest, golden_tensors, signature_of
from app.repository.vault import VaultedVersion
from app.repository.verify import read_plan
from app.served_model import Candidate, OpenVersion, ServedModel, VersionId
from app.telemetry.batches import BatchRecorder
from app.telemetry.black_box import Executing
from app.telemetry.metrics import Metrics
from app.telemetry.recorder import PredictionRecorder


@dataclass(frozen=True, slots=True)
class VersionOpener:
    """Opens versions of any model in this process, which is one of so many workers."""

    open_source: Callable[[FeaturePlan], FeatureSource]
    sweep: DeadlineSweep
    metrics: Metrics
    clock: FeatureClock
    drain_s: float
    workers: int

    async def open(
        self, version: VaultedVersion, contract: Contract, stack: AsyncExitStack
    ) -> ServedModel:
        """The version, ready to answer by this contract; what it holds is released by `stack`.

        Raises `InvalidModel` when any of it is not what its manifest and the contract say,
        `ConfigurationError` when it cannot be served like this.
        """
        name = version.manifest.model
        executing = self._executing(version, contract.backend)
        recorder = BatchRecorder(self.metrics, name, executing)
        parts, backend, times = await self._opened(version, contract, recorder.happened, stack)
        batcher = self._batcher(backend, contract.batching, times, recorder)
        await stack.enter_async_context(batcher)
        predictions = self._recorder(name, contract, parts.source.plan)
        stack.callback(predictions.close)
        return ServedModel(**_parts(parts), batcher=batcher, recorder=predictions)

    async def open_candidate(
        self, version: VaultedVersion, contract: Contract, tell: Tell, stack: AsyncExitStack
    ) -> Candidate:
        """The version, ready to be executed in a process of its own by the contract's `shadow`,
        unless a Triton executes it; `tell` is told what happens to that. Raises as `open` does."""
        if not isinstance(contract.backend, TritonOptions):
            isolated = {"isolated": contract.shadow.isolation}
            backend_options = contract.backend.model_copy(update=isolated)
            contract = contract.model_copy(update={"backend": backend_options})
        parts, backend, _ = await self._opened(version, contract, tell, stack)
        return Candidate(**_parts(parts), backend=backend)

    async def _opened(
        self, version: VaultedVersion, contract: Contract, tell: Tell, stack: AsyncExitStack
    ) -> tuple[OpenVersion, Backend, ExecutionTimes]:
        """What is the same whoever executes it: open, warm, its golden rows right."""
        manifest = version.manifest
        plan = await asyncio.to_thread(read_plan, version, contract)
        backend = await open_backend(
            _of_version(contract.backend, manifest),
            version.folder / MODEL_FILE,
            signature_of(manifest),
            tell,
            self.workers,
        )
        stack.push_async_callback(backend.close)
        check_signature(backend.signature, signature_of(manifest))
        decoder = InstanceDecoder(contract, plan)
        check_labels(contract, decoder.required)
        encoder = Encoder(contract.inputs, manifest.training.categories)
        outputs = OutputReader(contract.outputs, contract.decision, backend.signature)
        # Golden rows show what the model does with a null, whatever the contract puts in its place.
        golden = await asyncio.to_thread(
            golden_tensors, manifest.training.golden, decoder, plan, encoder
        )
        most_rows = contract.batching.max_batch_rows
        times = await backend.warm_up(golden, most_rows)
        await run_golden(
            backend,
            outputs,
            golden,
            manifest.training.golden,
            most_rows=most_rows,
            what=_named(manifest),
        )
        parts = OpenVersion(
            VersionId(manifest.model, manifest.version, version.sha256),
            contract,
            decoder,
            self.open_source(plan) if plan.views else StaticSource(plan),
            MissingValues(contract.features, plan, manifest.training.means),
            encoder,
            encoder.for_rows(decoder.required, plan.references),
            outputs,
            manifest.training.golden.instances[0],
        )
        return parts, backend, times

    def _executing(self, version: VaultedVersion, options: BackendOptions) -> Executing:
        if isinstance(options, TritonOptions) or options.isolated is not None:
            return Executing.elsewhere()
        manifest = version.manifest
        return self.metrics.black_box.executing(manifest.model, manifest.version, version.sha256)

    def _batcher(
        self,
        backend: Backend,
        batching: Batching,
        times: ExecutionTimes,
        recorder: BatchRecorder,
    ) -> DynamicBatcher:
        batch_rows = times.best_rows(batching.max_batch_rows)
        return DynamicBatcher(
            backend,
            _policy(batching, batch_rows),
            self.sweep,
            times,
            recorder,
            max_batch_rows=batch_rows,
            max_queue_rows=batching.max_queue_rows,
            isolation_share=batching.isolation_share,
            drain_s=self.drain_s,
        )

    def _recorder(self, name: str, contract: Contract, plan: FeaturePlan) -> PredictionRecorder:
        return PredictionRecorder(
            self.metrics,
            name,
            outputs=list(contract.outputs),
            views=[view.name for view in plan.views],
            view_of_feature=[i for i, view in enumerate(plan.views) for _ in view.features],
            statuses=[status.name for status in ValueStatus],
            now_s=self.clock.now_s,
            max_ahead_s=MAX_AHEAD_S,
        )


def _parts(version: OpenVersion) -> dict[str, Any]:
    """By name, for a kind of open version that has more of them."""
    return {part.name: getattr(version, part.name) for part in fields(OpenVersion)}


def _named(manifest: Manifest) -> str:
    return f"{manifest.model} version {manifest.version}"


def _of_version(options: BackendOptions, manifest: Manifest) -> BackendOptions:
    """A Triton has the version under its own name and number, unless model.yaml names others."""
    if not isinstance(options, TritonOptions):
        return options
    return options.model_copy(
        update={
            "model": options.model or manifest.model,
            "version": options.version or manifest.version,
        }
    )


def _policy(batching: Batching, batch_rows: int) -> BatchPolicy:
    if not batching.hold_ms:
        return Greedy(batch_rows)
    preferred = [rows for rows in batching.preferred_rows if rows <= batch_rows]
    return Hold(batching.hold_ms / 1000, batch_rows, preferred)
