"""Who takes part, how each is started and asked, and where its answer holds the prediction."""

import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loadtests.bench.workload import MAX_BATCH_ROWS, Workload, as_fields, as_numbers

_PEERS = Path(__file__).parent / "peers"


@dataclass(frozen=True)
class Contender:
    """A server of the benchmark's model.

    `command(python, port)` starts it on the loopback with the Python of its environment, which is
    `peer`'s, or the service's own where that is None. It is asked by POST to `path`
    with `body(row)`; `prediction(answer)` is None where the answer holds none.
    """

    name: str
    title: str
    peer: str | None
    command: Callable[[Path, int], list[str]]
    path: Callable[[Workload], str]
    body: Callable[[NDArray[np.float32]], Any]
    prediction: Callable[[Any], float] | None


def _of_file(name: str, *arguments: str) -> Callable[[Path, int], list[str]]:
    return lambda python, port: [str(python), str(_PEERS / f"{name}.py"), str(port), *arguments]


def _hikyaku(python: Path, port: int) -> list[str]:
    return [str(python), "-m", "app.cli", "serve"]


def _bentoml(python: Path, port: int) -> list[str]:
    bentoml = str(python.with_name("bentoml"))
    where = ["--working-dir", str(_PEERS), "--host", "127.0.0.1", "--port", str(port)]
    return [bentoml, "serve", "with_bentoml:Model", *where]


def _mlserver(python: Path, port: int) -> list[str]:
    return [str(python), str(_PEERS / "with_mlserver.py"), str(port), str(free_port())]


def _features(row: NDArray[np.float32]) -> Any:
    return {"features": as_numbers(row)}


def _tensor(row: NDArray[np.float32]) -> Any:
    """The form of the Open Inference Protocol."""
    data = as_numbers(row)
    return {"inputs": [{"name": "x", "shape": [1, len(data)], "datatype": "FP32", "data": data}]}


def _instances(row: NDArray[np.float32]) -> Any:
    return {"instances": [as_fields(row)]}


ECHO = Contender(
    name="echo",
    title="bare uvicorn ASGI echo",
    peer=None,
    command=_of_file("echo"),
    path=lambda workload: "/",
    body=_instances,  # what ours has to read
    prediction=None,
)

OURS = Contender(
    name="ours",
    title="Hikyaku",
    peer=None,
    command=_hikyaku,
    path=lambda workload: f"/v1/models/{workload.name}:predict",
    body=_instances,
    prediction=lambda answer: answer["predictions"][0]["probability"],
)

CONTENDERS: Mapping[str, Contender] = {
    contender.name: contender
    for contender in (
        ECHO,
        OURS,
        Contender(
            name="fastapi",
            title="naive FastAPI, async def",
            peer=None,
            command=_of_file("with_fastapi", "async"),
            path=lambda workload: "/predict",
            body=_features,
            prediction=lambda answer: answer["probability"],
        ),
        Contender(
            name="fastapi-def",
            title="naive FastAPI, def",
            peer=None,
            command=_of_file("with_fastapi", "def"),
            path=lambda workload: "/predict",
            body=_features,
            prediction=lambda answer: answer["probability"],
        ),
        Contender(
            name="mlserver",
            title="MLServer",
            peer="mlserver",
            command=_mlserver,
            path=lambda workload: "/v2/models/model/infer",
            body=_tensor,
            prediction=lambda answer: answer["outputs"][0]["data"][0],
        ),
        Contender(
            name="litserve",
            title="LitServe",
            peer="litserve",
            command=_of_file("with_litserve"),
            path=lambda workload: "/predict",
            body=_features,
            prediction=lambda answer: answer["probability"],
        ),
        Contender(
            name="bentoml",
            title="BentoML",
            peer="bentoml",
            command=_bentoml,
            path=lambda workload: "/predict",
            body=lambda row: {"rows": [as_numbers(row)]},
            prediction=lambda answer: answer[0],
        ),
    )
}


def free_port() -> int:
    """A port of the loopback that nobody has at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def environment(workload: Workload, port: int) -> dict[str, str]:
    """What every contender finds in its environment: its model, one thread, and nothing of what
    happens to be set here for a Hikyaku of ours."""
    ours = ("HIKYAKU_", "FEATURE_REDIS_URL", "STATE_REDIS_URL", "BENCH")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return kept | {
        "BENCH_MODEL": str(workload.model),
        "BENCH_MAX_BATCH_ROWS": str(MAX_BATCH_ROWS),
        "OMP_NUM_THREADS": "1",
        "BENTOML_DO_NOT_TRACK": "True",
        "MODEL_REPOSITORY": str(workload.repository.resolve()),
        "HIKYAKU_PORT": str(port),
        "HIKYAKU_LOG_LEVEL": "WARNING",
    }
