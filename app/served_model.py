"""A model version that is verified, warm and ready to answer."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from app.backends.backend import Backend
from app.batching.batcher import DynamicBatcher
from app.contract import Contract
from app.deadline import Deadline
from app.errors import BackendError, FeaturesUnavailable, InvalidInput
from app.features.encoding import Encoder, RowEncoder, StoredMisfit, ValueColumn
from app.features.missing import FilledRows, MissingValues
from app.features.source import (
    FeatureRows,
    FeatureSource,
    ValueStatus,
    all_with_status,
)
from app.instances import InstanceDecoder, Instances
from app.outputs import OutputReader
from app.telemetry.recorder import PredictionRecorder
from app.tensors import Tensors


@dataclass(frozen=True, slots=True)
class VersionId:
    """Which version of which model; `sha256` is the digest of its manifest."""

    model: str
    version: int
    sha256: str
    as_json: bytes = field(init=False, repr=False, compare=False)
    """How every answer names it: two members of a JSON object."""

    def __post_init__(self) -> None:
        names = {"model_name": self.model, "model_version": str(self.version)}
        object.__setattr__(self, "as_json", msgspec.json.encode(names)[1:-1])


class Uses:
    """Counts the requests that a version has begun and not ended: while there are any, nothing that
    it is made of may be closed."""

    __slots__ = ("_all_over", "_over", "begun")

    def __init__(self) -> None:
        self.begun = 0
        """All that ever were."""
        self._over = 0
        self._all_over: asyncio.Event | None = None

    def end(self) -> None:
        """One of them has ended."""
        self._over += 1
        if self._all_over is not None and self._over == self.begun:
            self._all_over.set()

    async def ended(self) -> None:
        """Wait until all have; nobody may begin another one meanwhile."""
        if self._over < self.begun:
            self._all_over = asyncio.Event()
            await self._all_over.wait()


@dataclass(frozen=True, slots=True)
class OpenVersion:
    """A version whose instances can be made its inputs, and its outputs be read; one attribute a
    step."""

    id: VersionId
    contract: Contract
    decoder: InstanceDecoder
    source: FeatureSource
    missing: MissingValues
    encoder: Encoder
    row_encoder: RowEncoder | None
    """Encodes the values of instances and their features; None where only `encoder` can."""
    outputs: OutputReader
    example: Mapping[str, Any]
    """One instance as a caller would send it: the first golden row."""

    async def fetch(self, instances: Instances, deadline: Deadline) -> FeatureRows:
        """Stored features of the instances, within their share of the deadline.

        A store that does not answer in time is UNAVAILABLE values, or `FeaturesUnavailable` where
        the contract says `refuse`.
        """
        plan = self.source.plan
        fields = instances.fields
        entities = {key: fields[key] for key in (*plan.join_keys, *plan.request_fields)}
        share = deadline.share(self.contract.features.time_share)
        try:
            rows = await self.source.fetch(entities, instances.count, share)
        except FeaturesUnavailable:
            if self.contract.features.when_unavailable == "refuse":
                raise
            rows = all_with_status(plan, instances.count, ValueStatus.UNAVAILABLE)
        else:
            self.missing.remember(rows, entities)
        _override(rows, instances)
        return rows

    def encode(
        self, instances: Instances, rows: FeatureRows, now_s: float
    ) -> tuple[FilledRows, Tensors]:
        """The features as the model gets them at this feature time, and as its input tensors.

        A stored value that its tensor cannot hold becomes UNAVAILABLE in `rows`. Raises
        `InvalidInput` for one that the caller gave, `FeaturesUnavailable` for a value that is
        missing and that the contract refuses to go without, `BackendError` where nothing fits.
        """
        while True:
            filled = self.missing.fill(rows, instances.fields, now_s)
            if self.row_encoder is not None:
                inputs = self.row_encoder.encode(instances.rows, filled.columns)
                if inputs is not None:
                    return filled, inputs
            columns: dict[str, ValueColumn] = dict(instances.fields)
            columns.update(zip(self.source.plan.references, filled.columns, strict=True))
            try:
                return filled, self.encoder.encode(columns, instances.count)
            except StoredMisfit as exc:
                _give_up_misfits(rows, instances, exc)

    def encode_fields(self, instances: Instances) -> Tensors:
        """The input tensors of a model that reads no stored feature. Raises `InvalidInput`."""
        if self.row_encoder is not None:
            inputs = self.row_encoder.encode(instances.rows)
            if inputs is not None:
                return inputs
        return self.encoder.encode(instances.fields, instances.count)


@dataclass(frozen=True, slots=True)
class ServedModel(OpenVersion):
    """What answers for one version."""

    batcher: DynamicBatcher
    recorder: PredictionRecorder
    uses: Uses = field(default_factory=Uses)


@dataclass(frozen=True, slots=True)
class Candidate(OpenVersion):
    """What executes a version that answers nobody."""

    backend: Backend


def _override(rows: FeatureRows, instances: Instances) -> None:
    """Values that the caller gave itself replace the stored ones of this request's own arrays."""
    for name, values in instances.overrides.items():
        position = rows.plan.references.index(name)
        for row, value in enumerate(values):
            if value is msgspec.UNSET:
                continue
            present = value is not None
            rows.status[row, position] = ValueStatus.PRESENT if present else ValueStatus.NULL_VALUE
            rows.columns[position][row] = value


def _give_up_misfits(rows: FeatureRows, instances: Instances, misfit: StoredMisfit) -> None:
    position = rows.plan.references.index(misfit.source)
    given = instances.overrides.get(misfit.source)
    for row in misfit.rows:
        if given is not None and given[row] is not msgspec.UNSET:
            field = f"instances[{row}].{misfit.source}"
            raise InvalidInput(f"{field}: {misfit}", field=field)
        if rows.status[row, position] == int(ValueStatus.UNAVAILABLE):
            raise BackendError(str(misfit))  # not even what stands for it fits
        rows.status[row, position] = int(ValueStatus.UNAVAILABLE)
        rows.columns[position][row] = None  # NaN among numbers
