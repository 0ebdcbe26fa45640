"""What executes a batch: the port, its adapters, and which of them model.yaml asks for."""

from pathlib import Path

from app.backends.backend import Backend
from app.backends.echo import EchoBackend
from app.backends.onnx_backend import open_onnx
from app.contract import BackendOptions, EchoOptions
from app.tensors import Signature


async def open_backend(options: BackendOptions, model: Path, signature: Signature) -> Backend:
    """Open the model file with the backend that model.yaml names.

    `signature` names the outputs that are wanted. Raises `InvalidModel` when the backend cannot
    load the file.
    """
    if isinstance(options, EchoOptions):
        return EchoBackend(signature)
    return await open_onnx(options, model, [spec.name for spec in signature.outputs])
