"""Speaks gRPC with a Triton server."""

from collections.abc import Iterator
from contextlib import contextmanager

from tritonclient.grpc import InferInput, InferRequestedOutput
from tritonclient.grpc.aio import InferenceServerClient
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from app.backends.triton_wire import (
    Answer,
    Description,
    ModelOnTriton,
    described,
    error_of,
    from_wire,
    queue_timeout_us,
    to_wire,
)
from app.tensors import Tensor, Tensors

_CHANNEL = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # Channels of one process would share connections and their back-off.
    ("grpc.use_local_subchannel_pool", 1),
    # Whether to send again is decided by who knows the deadline and the budget.
    ("grpc.enable_retries", 0),
    # The defaults, 1 to 120 s, would keep a Triton that is back waiting for us.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 250),
    # What we sent is acknowledged within 2 s or the connection is dead. Pings only while a call is
    # under way, and no more than two: Triton closes a connection that pings too often.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 2_000),
    ("grpc.keepalive_permit_without_calls", 0),
    ("grpc.http2.max_pings_without_data", 2),
]


class GrpcWire:
    """One channel to one Triton."""

    def __init__(self, endpoint: str, model: ModelOnTriton) -> None:
        self._model = model
        self._version = str(model.version)
        self._outputs = [InferRequestedOutput(name) for name in model.outputs]
        self._client = InferenceServerClient(endpoint, channel_args=_CHANNEL)

    async def infer(self, inputs: Tensors, queue_timeout_s: float) -> Answer:
        with _errors():
            result = await self._client.infer(
                self._model.name,
                [_input(name, tensor) for name, tensor in inputs.items()],
                model_version=self._version,
                outputs=self._outputs,
                timeout=queue_timeout_us(queue_timeout_s),
            )
        version = result.get_response().model_version
        return Answer(from_wire(self._model.outputs, result), version)

    async def ready(self) -> bool:
        with _errors():
            return bool(await self._client.is_model_ready(self._model.name, self._version))

    async def describe(self) -> Description:
        with _errors():
            metadata = await self._client.get_model_metadata(
                self._model.name, self._version, as_json=True
            )
            config = await self._client.get_model_config(
                self._model.name, self._version, as_json=True
            )
        return described(self._model, metadata, config["config"])

    async def close(self) -> None:
        await self._client.close()


@contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except InferenceServerException as exc:
        raise error_of(exc.status(), exc.message()) from exc


def _input(name: str, tensor: Tensor) -> InferInput:
    array = to_wire(tensor)
    made = InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    made.set_data_from_numpy(array)
    return made
