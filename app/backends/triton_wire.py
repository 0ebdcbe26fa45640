"""What is said to a Triton server, whichever protocol carries it, and what its answers mean."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from app.backends.backend import BackendDied
from app.errors import (
    BackendError,
    DeadlineExceeded,
    InvalidModel,
    ModelNotReady,
    Overloaded,
    RequestError,
)
from app.tensors import Signature, Tensor, Tensors, TensorSpec

_DTYPES = {
    "BOOL": "bool",
    "INT8": "int8",
    "INT16": "int16",
    "INT32": "int32",
    "INT64": "int64",
    "UINT8": "uint8",
    "UINT16": "uint16",
    "UINT32": "uint32",
    "UINT64": "uint64",
    "FP16": "float16",
    "FP32": "float32",
    "FP64": "float64",
    "BYTES": "str",
}
_NOT_READY = ("not at ready state", "unknown model", "is not found", "has no available versions")
_RETRY_AFTER_S = 0.1
_QUEUED_AT_MOST_S = 3_600.0


class Unreachable(ModelNotReady):
    """No connection, or it was lost before the answer."""


class InputRefused(BackendError):
    """Triton did not take the tensors: this says nothing about its health."""


@dataclass(frozen=True, slots=True)
class ModelOnTriton:
    """A model of Triton's repository, and the outputs that are wanted of it."""

    name: str
    version: int
    outputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """Tensors by name, and the version that computed them."""

    outputs: Tensors
    version: str


@dataclass(frozen=True, slots=True)
class Description:
    """What Triton says of a model: its tensors without the batch axis, and its largest batch."""

    signature: Signature
    max_batch_rows: int

    def fitted_to(self, wanted: Signature) -> Signature:
        """The signature with the inputs in the order that is wanted, and its outputs of the batch
        axis alone as such: Triton says `[1]` of them."""
        order = [spec.name for spec in wanted.inputs]
        flat = {spec.name for spec in wanted.outputs if not spec.shape}
        return Signature(
            tuple(
                sorted(
                    self.signature.inputs,
                    key=lambda spec: order.index(spec.name) if spec.name in order else len(order),
                )
            ),
            tuple(
                replace(spec, shape=()) if spec.name in flat and spec.shape == (1,) else spec
                for spec in self.signature.outputs
            ),
        )


class Wire(Protocol):
    """One connection, or a few, to one Triton, for one model. What it raises is a `RequestError`.

    Cancelling abandons the request on the wire, which may crash the Tritons before 25.06 (server
    issues 7368 and 8034): who waits no longer lets it go on.
    """

    async def infer(self, inputs: Tensors, queue_timeout_s: float) -> Answer:
        """Triton drops the request once it has waited `queue_timeout_s` in its queue, where the
        model's queue policy lets requests say so."""
        ...

    async def ready(self) -> bool:
        """Whether this version of the model is."""
        ...

    async def describe(self) -> Description:
        """Raises `InvalidModel` when it cannot be served from here."""
        ...

    async def close(self) -> None: ...


def error_of(status: str | None, message: str) -> RequestError:
    """The meaning of an error of tritonclient: `status` is gRPC's or HTTP's, None its own."""
    status = (status or "").removeprefix("StatusCode.")
    if any(words in message for words in _NOT_READY):
        return ModelNotReady(f"Triton: {message}")
    if "maximum queue size" in message:
        return Overloaded(f"Triton: {message}", retry_after_s=_RETRY_AFTER_S)
    if status == "DEADLINE_EXCEEDED" or "timeout expired" in message:
        return DeadlineExceeded(f"Triton: {message}")
    if status in {"UNAVAILABLE", "CANCELLED", "502", "503", "504"}:
        return Unreachable(f"Triton: {message}")
    if "Stub process" in message:  # the Python backend's process, which held the model
        return BackendDied(f"Triton: {message}")
    if status in {"", "INVALID_ARGUMENT", "OUT_OF_RANGE", "RESOURCE_EXHAUSTED", "400", "413"}:
        return InputRefused(f"Triton: {message}")
    return BackendError(f"Triton: {message}")


def described(
    model: ModelOnTriton, metadata: Mapping[str, Any], config: Mapping[str, Any]
) -> Description:
    """From the two documents of Triton's own. Outputs are the wanted ones, in the wanted order."""
    what = f"Triton's model {model.name!r}"
    max_batch_rows = int(config.get("max_batch_size", 0))
    if max_batch_rows == 0:
        raise InvalidModel(f"{what}: its configuration has no max_batch_size, it takes no batches")
    outputs = {document["name"]: document for document in metadata.get("outputs", ())}
    missing = [name for name in model.outputs if name not in outputs]
    if missing:
        raise InvalidModel(f"{what}: has no output {missing}, it has {sorted(outputs)}")
    return Description(
        Signature(
            tuple(_spec(what, document) for document in metadata.get("inputs", ())),
            tuple(_spec(what, outputs[name]) for name in model.outputs),
        ),
        max_batch_rows,
    )


def queue_timeout_us(timeout_s: float) -> int:
    """As Triton takes it; 0 would mean that there is none."""
    return max(1, int(min(timeout_s, _QUEUED_AT_MOST_S) * 1e6))


def to_wire(tensor: Tensor) -> Tensor:
    """As tritonclient takes it: text in arrays of objects."""
    return tensor.astype(np.object_) if tensor.dtype.kind == "U" else tensor


def from_wire(outputs: Sequence[str], result: Any) -> Tensors:
    """The tensors of an `InferResult`, read-only; text decoded."""
    tensors: dict[str, Tensor] = {}
    for name in outputs:
        try:
            tensor = result.as_numpy(name)
        except ValueError as exc:  # of numpy: fewer or more bytes than its shape says
            raise BackendError(f"Triton: output {name!r} is not whole: {exc}") from exc
        if tensor is None:
            raise BackendError(f"Triton: no output {name!r} in its answer")
        tensors[name] = _text(tensor) if tensor.dtype == np.object_ else tensor
    return tensors


def _text(tensor: Tensor) -> Tensor:
    try:
        texts = [value.decode() for value in tensor.reshape(-1)]
    except UnicodeDecodeError as exc:
        raise BackendError(f"Triton: an output holds text that is not UTF-8: {exc}") from exc
    return np.array(texts, dtype=np.object_).reshape(tensor.shape)


def _spec(what: str, document: Mapping[str, Any]) -> TensorSpec:
    dtype = _DTYPES.get(document["datatype"])
    if dtype is None:
        raise InvalidModel(
            f"{what}: {document['name']}: tensors of type {document['datatype']} cannot be served"
        )
    shape = tuple(int(size) for size in document["shape"])
    return TensorSpec(document["name"], dtype, shape[1:])
