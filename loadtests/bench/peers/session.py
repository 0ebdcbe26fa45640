"""The benchmark's model in ONNX Runtime with one thread, as every peer uses it."""

import os

import numpy as np
import onnxruntime
from numpy.typing import NDArray

MAX_BATCH_ROWS = int(os.environ["BENCH_MAX_BATCH_ROWS"])


class Session:
    """The model of the environment variable BENCH_MODEL."""

    def __init__(self) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(
            os.environ["BENCH_MODEL"], options, providers=["CPUExecutionProvider"]
        )

    def predict(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """`[N, 32]` → `[N]`."""
        probabilities: NDArray[np.float32] = self._session.run(["probabilities"], {"x": rows})[0]
        return probabilities[:, -1]
