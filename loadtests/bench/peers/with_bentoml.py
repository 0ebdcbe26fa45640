"""BentoML: a batchable API, adaptive batching up to 32 rows.

    bentoml serve with_bentoml:Model

One worker, no access log, no metrics, no usage tracking.
"""

import bentoml
import numpy as np
from numpy.typing import NDArray
from session import MAX_BATCH_ROWS, Session


@bentoml.service(
    workers=1,
    logging={"access": {"enabled": False}},
    metrics={"enabled": False},
)
class Model:
    def __init__(self) -> None:
        self.session = Session()

    @bentoml.api(batchable=True, max_batch_size=MAX_BATCH_ROWS)
    def predict(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        return self.session.predict(rows.astype(np.float32))
