"""What people write first: FastAPI, a pydantic model in and out, one run of the model a request.

    python with_fastapi.py PORT async|def

uvicorn with uvloop and httptools, no access log.
"""

import sys

import numpy as np
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from session import Session


class Row(BaseModel):
    features: list[float]


class Answer(BaseModel):
    probability: float


app = FastAPI()
session = Session()


def predict(row: Row) -> Answer:
    probabilities = session.predict(np.array([row.features], np.float32))
    return Answer(probability=float(probabilities[0]))


async def predict_async(row: Row) -> Answer:
    return predict(row)


app.post("/predict")(predict_async if sys.argv[2] == "async" else predict)

uvicorn.run(
    app,
    port=int(sys.argv[1]),
    loop="uvloop",
    http="httptools",
    log_level="warning",
    access_log=False,
)
