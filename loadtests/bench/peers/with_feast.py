"""What people write today: FastAPI, the Feast SDK, a pydantic model in and out, ONNX Runtime.

    python with_feast.py PORT async|def

The feature store of BENCH_FEATURE_REPO, opened once, with the service's definition at hand.
uvicorn with uvloop and httptools, no access log.
"""

import os
import sys
import warnings
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI
from feast import FeatureStore
from pydantic import BaseModel
from session import Session

warnings.simplefilter("ignore")  # Feast's, about its own dependencies


class Entities(BaseModel):
    driver_id: int
    customer_id: int


class Answer(BaseModel):
    probability: float


store = FeatureStore(repo_path=os.environ["BENCH_FEATURE_REPO"])
service = store.get_feature_service("both")
names = [feature.name for view in service.feature_view_projections for feature in view.features]
session = Session()


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    await store.initialize()  # the clients that asynchronous reads use
    yield
    await store.close()


app = FastAPI(lifespan=lifespan)


def answer(features: Mapping[str, Sequence[Any]]) -> Answer:
    row = np.array([[features[name][0] for name in names]], np.float32)
    return Answer(probability=float(session.predict(row)[0]))


def predict(entities: Entities) -> Answer:
    read = store.get_online_features(features=service, entity_rows=[entities.model_dump()])
    return answer(read.to_dict())


async def predict_async(entities: Entities) -> Answer:
    read = await store.get_online_features_async(
        features=service, entity_rows=[entities.model_dump()]
    )
    return answer(read.to_dict())


app.post("/predict")(predict_async if sys.argv[2] == "async" else predict)

uvicorn.run(
    app,
    port=int(sys.argv[1]),
    loop="uvloop",
    http="httptools",
    log_level="warning",
    access_log=False,
)
