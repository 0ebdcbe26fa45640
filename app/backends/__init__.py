"""What executes a batch: the port, its adapters, and which of them model.yaml asks for."""

from contextlib import AsyncExitStack
from pathlib import Path

from app.backends.backend import Backend, Tell, tell_nobody
from app.backends.echo import EchoBackend
from app.backends.failover import FailoverBackend
from app.backends.isolated import open_isolated
from app.backends.triton import open_triton
from app.contract import BackendOptions, OnnxOptions, TritonOptions
from app.errors import ConfigurationError, InvalidModel
from app.tensors import Signature


async def open_backend(
    options: BackendOptions,
    model: Path,
    signature: Signature,
    tell: Tell = tell_nobody,
    workers: int = 1,
) -> Backend:
    """Open the model file with the backend that model.yaml names, as one of so many workers.

    `signature` names the outputs that are wanted, `tell` is told what happens to it. Raises
    `InvalidModel` when the backend cannot load the file, `ConfigurationError` when what it needs is
    not installed, or not meant for several workers.
    """
    if isinstance(options, TritonOptions):
        return await _open_triton(options, model, signature, tell, workers)
    if isinstance(options, OnnxOptions):
        return await _open_onnx(options, model, signature, tell, workers)
    if options.isolated is not None:
        return await open_isolated(options, options.isolated, model, signature, tell, workers)
    return EchoBackend(signature)


async def _open_onnx(
    options: OnnxOptions, model: Path, signature: Signature, tell: Tell, workers: int
) -> Backend:
    if options.isolated is not None:
        return await open_isolated(options, options.isolated, model, signature, tell, workers)
    # Here, because a process that executes elsewhere needs no ONNX Runtime.
    try:
        from app.backends.onnx_backend import open_onnx
    except ModuleNotFoundError as exc:
        if exc.name != "onnxruntime":
            raise
        raise ConfigurationError(
            "onnxruntime is not installed: install hikyaku with the extra `cpu`, or `gpu` for CUDA"
        ) from exc
    outputs = [spec.name for spec in signature.outputs]
    return await open_onnx(options, model, outputs, tell, workers)


async def _open_triton(
    options: TritonOptions, model: Path, signature: Signature, tell: Tell, workers: int
) -> Backend:
    if options.failover is None:
        return await open_triton(options, model, signature, tell)
    async with AsyncExitStack() as opened:
        local = await _open_onnx(options.failover, model, signature, tell, workers)
        opened.push_async_callback(local.close)
        triton = await open_triton(options, model, local.signature, tell)
        opened.push_async_callback(triton.close)
        if triton.signature != local.signature:
            raise InvalidModel(f"{model}: Triton's model has another signature than this file")
        opened.pop_all()
        return FailoverBackend(triton, local, tell)
