"""MLServer: a custom runtime behind its V2 REST API, adaptive batching up to 32 rows within 1 ms.

    python with_mlserver.py PORT GRPC_PORT

In one process (no parallel workers), no access log, no metrics, no compression.
"""

import asyncio
import sys

import numpy as np
from mlserver import MLModel, MLServer, ModelSettings, Settings
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse
from session import MAX_BATCH_ROWS, Session


class Model(MLModel):
    async def load(self) -> bool:
        self.session = Session()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        rows = NumpyCodec.decode_input(payload.inputs[0]).astype(np.float32, copy=False)
        predictions = self.session.predict(rows)[:, None]
        output = NumpyCodec.encode_output("probability", predictions)
        return InferenceResponse(model_name=self.name, outputs=[output])


async def main() -> None:
    settings = Settings(
        debug=False,
        host="127.0.0.1",
        http_port=int(sys.argv[1]),
        grpc_port=int(sys.argv[2]),
        metrics_endpoint=None,
        parallel_workers=0,
        gzip_enabled=False,
    )
    model = ModelSettings(
        name="model",
        implementation=Model,
        max_batch_size=MAX_BATCH_ROWS,
        max_batch_time=0.001,
    )
    await MLServer(settings).start([model])


asyncio.run(main())
