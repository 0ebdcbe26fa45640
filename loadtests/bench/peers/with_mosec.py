"""mosec: its Rust front, one Python worker, batches of at most 32 that wait 1 ms for company.

    python with_mosec.py --address 127.0.0.1 --port PORT --log-level error

A wait of 0 would be one of 10 ms.
"""

from typing import Any

import numpy as np
from mosec import Server, Worker
from session import MAX_BATCH_ROWS, Session


class Model(Worker):
    def __init__(self) -> None:
        super().__init__()
        self.session = Session()

    def forward(self, data: list[dict[str, Any]]) -> list[dict[str, float]]:
        rows = np.array([request["features"] for request in data], np.float32)
        return [{"probability": float(p)} for p in self.session.predict(rows)]


if __name__ == "__main__":
    server = Server()
    server.append_worker(Model, num=1, max_batch_size=MAX_BATCH_ROWS, max_wait_time=1)
    server.run()
