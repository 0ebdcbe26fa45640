"""Who takes part, how each is started and asked, and where its answer holds the prediction."""

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loadtests.bench.workload import MAX_BATCH_ROWS, Workload, as_fields

_PEERS = Path(__file__).parent / "peers"


@dataclass(frozen=True)
class Contender:
    """A server of the benchmark's model.

    `command(python, port)` starts it on the loopback with the Python of its environment; `lock` is
    the lock file of that environment, None for the service's own. It is asked by POST to `path`
    with `body(row)`; `prediction(answer)` is None where the answer holds none.
    """

    name: str
    title: str
    lock: str | None
    command: Callable[[Path, int], list[str]]
    path: Callable[[Workload], str]
    body: Callable[[NDArray[np.float32]], Any]
    prediction: Callable[[Any], float] | None


def _of_file(name: str) -> Callable[[Path, int], list[str]]:
    return lambda python, port: [str(python), str(_PEERS / f"{name}.py"), str(port)]


def _hikyaku(python: Path, port: int) -> list[str]:
    return [str(python), "-m", "app.cli", "serve"]


def _instances(row: NDArray[np.float32]) -> Any:
    return {"instances": [as_fields(row)]}


ECHO = Contender(
    name="echo",
    title="bare uvicorn ASGI echo",
    lock=None,
    command=_of_file("echo"),
    path=lambda workload: "/",
    body=_instances,  # what ours has to read
    prediction=None,
)

OURS = Contender(
    name="ours",
    title="Hikyaku",
    lock=None,
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
    )
}


def environment(workload: Workload, port: int) -> dict[str, str]:
    """What every contender finds in its environment: its model, one thread, and nothing of what
    happens to be set here for a Hikyaku of ours."""
    ours = ("HIKYAKU_", "FEATURE_REDIS_URL", "STATE_REDIS_URL", "BENCH")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return kept | {
        "BENCH_MODEL": str(workload.model),
        "BENCH_MAX_BATCH_ROWS": str(MAX_BATCH_ROWS),
        "OMP_NUM_THREADS": "1",
        "MODEL_REPOSITORY": str(workload.repository.resolve()),
        "HIKYAKU_PORT": str(port),
        "HIKYAKU_LOG_LEVEL": "WARNING",
    }


def python_of(contender: Contender) -> Path:
    """The interpreter that runs it."""
    return Path(sys.executable)
