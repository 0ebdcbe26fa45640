"""Ray Serve: one replica, @serve.batch of at most 32 requests that wait 1 ms for company.

    python with_ray.py PORT

One local node without a dashboard, no access log, and Ray's own switch for throughput, which it
reads when it is imported.
"""

import os
import sys
import threading

os.environ["RAY_SERVE_THROUGHPUT_OPTIMIZED"] = "1"

import numpy as np
import ray
from ray import serve
from session import MAX_BATCH_ROWS, Session
from starlette.requests import Request


@serve.deployment(num_replicas=1, max_ongoing_requests=4 * MAX_BATCH_ROWS)
class Model:
    def __init__(self) -> None:
        self.session = Session()

    @serve.batch(max_batch_size=MAX_BATCH_ROWS, batch_wait_timeout_s=0.001)
    async def predict(self, rows: list[list[float]]) -> list[float]:
        return self.session.predict(np.array(rows, np.float32)).tolist()

    async def __call__(self, request: Request) -> dict[str, float]:
        return {"probability": await self.predict((await request.json())["features"])}


if __name__ == "__main__":
    ray.init(include_dashboard=False, num_cpus=2)
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
    serve.run(Model.bind(), route_prefix="/predict", logging_config={"enable_access_log": False})
    threading.Event().wait()
