"""What executes a batch: the port, its adapters, and which of them model.yaml asks for."""

from contextlib import AsyncExitStack
from pathlib import Path

from app.backends.backend import Backend
from app.backends.echo import EchoBackend
from app.backends.failover import FailoverBackend
from app.backends.onnx_backend import open_onnx
from app.backends.triton import open_triton
from app.contract import BackendOptions, EchoOptions, TritonOptions
from app.errors import InvalidModel
from app.tensors import Signature


async def open_backend(options: BackendOptions, model: Path, signature: Signature) -> Backend:
    """Open the model file with the backend that model.yaml names.

    `signature` names the outputs that are wanted. Raises `InvalidModel` when the backend cannot
    load the file.
    """
    if isinstance(options, EchoOptions):
        return EchoBackend(signature)
    if isinstance(options, TritonOptions):
        return await _open_triton(options, model, signature)
    return await open_onnx(options, model, [spec.name for spec in signature.outputs])


async def _open_triton(options: TritonOptions, model: Path, signature: Signature) -> Backend:
    if options.failover is None:
        return await open_triton(options, model, signature)
    async with AsyncExitStack() as opened:
        outputs = [spec.name for spec in signature.outputs]
        local = await open_onnx(options.failover, model, outputs)
        opened.push_async_callback(local.close)
        triton = await open_triton(options, model, local.signature)
        opened.push_async_callback(triton.close)
        if triton.signature != local.signature:
            raise InvalidModel(f"{model}: Triton's model has another signature than this file")
        opened.pop_all()
        return FailoverBackend(triton, local)
