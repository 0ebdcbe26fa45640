"""What executes a batch: the port, its adapters, and the table of their names in model.yaml."""

from collections.abc import Callable, Mapping
from pathlib import Path

from app.backends.backend import Backend
from app.backends.echo import EchoBackend
from app.backends.onnx_backend import open_onnx
from app.errors import InvalidModel
from app.tensors import Signature

_OPENERS: Mapping[str, Callable[[Path, Signature], Backend]] = {
    "onnx": lambda model, signature: open_onnx(model, [spec.name for spec in signature.outputs]),
    "echo": lambda model, signature: EchoBackend(signature),
}


def open_backend(name: str, model: Path, signature: Signature) -> Backend:
    """Open the model file with the backend that model.yaml names.

    Raises `InvalidModel` when there is no such backend, or when it cannot load the file.
    """
    if name not in _OPENERS:
        raise InvalidModel(f"backend: {name!r} is not one of {sorted(_OPENERS)}")
    return _OPENERS[name](model, signature)
