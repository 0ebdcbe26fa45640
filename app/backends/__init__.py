"""What executes a batch: the port, its adapters, and which of them model.yaml asks for."""

from pathlib import Path

from app.backends.backend import Backend
from app.backends.echo import EchoBackend
from app.backends.isolated import open_isolated
from app.contract import BackendOptions, EchoOptions
from app.errors import ConfigurationError
from app.tensors import Signature


async def open_backend(options: BackendOptions, model: Path, signature: Signature) -> Backend:
    """Open the model file with the backend that model.yaml names.

    `signature` names the outputs that are wanted. Raises `InvalidModel` when the backend cannot
    load the file, `ConfigurationError` when what it needs is not installed.
    """
    if options.isolated is not None:
        return await open_isolated(options, options.isolated, model, signature)
    if isinstance(options, EchoOptions):
        return EchoBackend(signature)
    # Here, because a process that executes elsewhere needs no ONNX Runtime.
    try:
        from app.backends.onnx_backend import open_onnx
    except ModuleNotFoundError as exc:
        if exc.name != "onnxruntime":
            raise
        raise ConfigurationError(
            "onnxruntime is not installed: install hikyaku with the extra `cpu`, or `gpu` for CUDA"
        ) from exc
    return await open_onnx(options, model, [spec.name for spec in signature.outputs])
