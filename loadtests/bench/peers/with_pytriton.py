"""Triton with its Python backend, by way of nvidia-pytriton: batches of at most 32 within 1 ms.

    python with_pytriton.py PORT GRPC_PORT METRICS_PORT

The model runs in this process, Triton is a child of it.
"""

import sys

import numpy as np
from numpy.typing import NDArray
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig
from session import MAX_BATCH_ROWS, Session

session = Session()


@batch
def predict(x: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    return {"probability": session.predict(x)[:, None]}


http_port, grpc_port, metrics_port = map(int, sys.argv[1:])
config = TritonConfig(
    http_address="127.0.0.1",
    http_port=http_port,
    grpc_address="127.0.0.1",
    grpc_port=grpc_port,
    metrics_port=metrics_port,
    exit_timeout_secs=3,
)
with Triton(config=config) as triton:
    triton.bind(
        model_name="model",
        infer_func=predict,
        inputs=[Tensor(name="x", dtype=np.float32, shape=(32,))],
        outputs=[Tensor(name="probability", dtype=np.float32, shape=(1,))],
        config=ModelConfig(
            max_batch_size=MAX_BATCH_ROWS,
            batcher=DynamicBatcher(max_queue_delay_microseconds=1000),
        ),
    )
    triton.serve()
