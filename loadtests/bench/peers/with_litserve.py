"""LitServe: batches of at most 32 requests that wait 1 ms for company.

    python with_litserve.py PORT

One API server and one worker, its fast queue (ZeroMQ) between them, no access log, nothing tracked.
A wait of 0 would let the idle worker spin.
"""

import sys
from typing import Any

import litserve
import numpy as np
from numpy.typing import NDArray
from session import MAX_BATCH_ROWS, Session


class Model(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.session = Session()

    def decode_request(self, request: dict[str, Any]) -> NDArray[np.float32]:
        return np.array(request["features"], np.float32)

    def batch(self, rows: list[NDArray[np.float32]]) -> NDArray[np.float32]:
        return np.stack(rows)

    def predict(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        return self.session.predict(rows)

    def unbatch(self, predictions: NDArray[np.float32]) -> list[np.float32]:
        return list(predictions)

    def encode_response(self, prediction: np.float32) -> dict[str, float]:
        return {"probability": float(prediction)}


if __name__ == "__main__":
    api = Model(max_batch_size=MAX_BATCH_ROWS, batch_timeout=0.001)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, fast_queue=True)
    server.run(
        host="127.0.0.1",
        port=int(sys.argv[1]),
        num_api_servers=1,
        log_level="warning",
        generate_client_file=False,
        access_log=False,
    )
