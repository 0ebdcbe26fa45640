"""What a published version says of recorded requests, on point-in-time features."""

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from feast import FeatureStore
from numpy.typing import NDArray

from app.backends import open_backend
from app.contract import Contract
from app.deadline import Deadline
from app.evaluation.request_log import RequestLog
from app.features.encoding import Encoder
from app.features.feast_repo import point_in_time
from app.features.missing import MissingValues
from app.features.plan import FeaturePlan
from app.features.source import FeatureRows, ValueStatus, all_with_status
from app.instances import InstanceDecoder
from app.outputs import OutputReader
from app.repository.manifest import MODEL_FILE, Manifest, signature_of
from app.tensors import Tensors

_EXECUTION_S = 600


def predict_offline(
    model_dir: Path,
    contract: Contract,
    manifests: Sequence[Manifest],
    plan: FeaturePlan,
    log: RequestLog,
    store: FeatureStore,
) -> Sequence[Sequence[Mapping[str, Any]]]:
    """For each version its prediction of each request, in the log's order. The features are joined
    once: all versions have `plan`."""
    asked_at = log.entities.columns[0]
    features = point_in_time(store, plan.feature_service, log.entities, asked_at)
    body = json.dumps({"instances": log.instances}).encode()
    fields = InstanceDecoder(contract, plan).decode(body, max_instances=len(log)).fields
    rows = _as_rows(plan, features, len(log))
    said = []
    for manifest in manifests:
        filled = MissingValues(contract.features, plan, manifest.training.means).fill(
            rows, fields, 0.0
        )
        encoder = Encoder(contract.inputs, manifest.training.categories)
        columns = dict(zip(plan.references, filled.columns, strict=True))
        inputs = encoder.encode({**fields, **columns}, len(log))
        model = model_dir / str(manifest.version) / MODEL_FILE
        outputs = OutputReader(contract.outputs, contract.decision, signature_of(manifest))
        executed = asyncio.run(_executed(contract, manifest, model, inputs))
        said.append(outputs.read(executed).predictions)
    return said


def _as_rows(plan: FeaturePlan, features: Mapping[str, NDArray[Any]], rows: int) -> FeatureRows:
    """A null is a null: a join does not say why, and remembers no last good value."""
    table = all_with_status(plan, rows, ValueStatus.PRESENT)
    names = zip(plan.references, table.columns, strict=True)
    columns = tuple(features.get(name, nothing) for name, nothing in names)
    for position, column in enumerate(columns):
        table.status[pd.isna(column), position] = ValueStatus.NULL_VALUE
    return replace(table, columns=columns)


async def _executed(
    contract: Contract, manifest: Manifest, model: Path, inputs: Tensors
) -> Tensors:
    backend = await open_backend(contract.backend, model, signature_of(manifest))
    try:
        return await backend.execute(inputs, Deadline.after(_EXECUTION_S))
    finally:
        await backend.close()
