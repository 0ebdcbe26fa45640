"""Speaks HTTP with a Triton server."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from aiohttp import ClientError
from tritonclient.http import InferInput, InferRequestedOutput
from tritonclient.http.aio import InferenceServerClient
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from app.backends.triton_wire import (
    Answer,
    Description,
    ModelOnTriton,
    Unreachable,
    described,
    error_of,
    from_wire,
    queue_timeout_us,
    to_wire,
)
from app.tensors import Tensor, Tensors

_PROBES = 4
_SILENT_S = 2.0
# Who waits knows when to give up; the default of 60 s would cut off a model that takes longer.
_NEVER_S = 86_400.0


class HttpWire:
    """Up to `connections` connections to one Triton, and some for asking how it is."""

    def __init__(self, endpoint: str, model: ModelOnTriton, connections: int) -> None:
        self._model = model
        self._version = str(model.version)
        self._outputs = [InferRequestedOutput(name) for name in model.outputs]
        self._client = InferenceServerClient(
            endpoint, conn_limit=connections, conn_timeout=_NEVER_S
        )
        # Apart: an execution that is sent again shall not meet a connection that was only kept for
        # questions, and may be closed as well.
        self._asking = InferenceServerClient(endpoint, conn_limit=_PROBES, conn_timeout=_NEVER_S)

    async def infer(self, inputs: Tensors, queue_timeout_s: float) -> Answer:
        tensors = [_input(name, tensor) for name, tensor in inputs.items()]
        with _errors():
            result = await self._client.infer(
                self._model.name,
                tensors,
                model_version=self._version,
                outputs=self._outputs,
                timeout=queue_timeout_us(queue_timeout_s),
            )
        version = str(result.get_response().get("model_version"))
        return Answer(from_wire(self._model.outputs, result), version)

    async def ready(self) -> bool:
        # Nothing else ends the wait on a connection whose other end is gone without a word.
        with _errors():
            async with asyncio.timeout(_SILENT_S):
                return bool(await self._asking.is_model_ready(self._model.name, self._version))

    async def describe(self) -> Description:
        with _errors():
            metadata = await self._asking.get_model_metadata(self._model.name, self._version)
            config = await self._asking.get_model_config(self._model.name, self._version)
        return described(self._model, metadata, config)

    async def close(self) -> None:
        await self._client.close()
        await self._asking.close()


@contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except InferenceServerException as exc:
        raise error_of(exc.status(), exc.message()) from exc
    except (ClientError, OSError) as exc:
        raise Unreachable(f"Triton: {type(exc).__name__}: {exc}") from exc


def _input(name: str, tensor: Tensor) -> InferInput:
    array = to_wire(tensor)
    made = InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    made.set_data_from_numpy(array)
    return made
