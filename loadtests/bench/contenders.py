"""Who takes part, how each is started and asked, and where its answer holds what was asked for."""

import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from loadtests.bench.failure import BenchFailure
from loadtests.bench.rows import FIELDS, REFERENCES, as_numbers
from loadtests.bench.workload import MAX_BATCH_ROWS, Kind, Workload
from loadtests.triton_environment import Unusable, triton_environment

_PEERS = Path(__file__).parent / "peers"


Command: TypeAlias = Callable[[Path, int, Workload], list[str]]


@dataclass(frozen=True)
class Contender:
    """A server of the benchmark's model.

    `command(python, port, workload)` starts it on the loopback with the Python of its environment,
    made from the lock file `lock`, or the service's own where that is None. It is asked by POST to
    `path` with `body(workload, row)`. Its answer holds the prediction, `prediction(answer)`, or
    else the 32 features, `features(answer)`; a floor's holds neither.
    """

    name: str
    title: str
    kinds: Sequence[Kind]
    command: Command
    path: Callable[[Workload], str]
    body: Callable[[Workload, int], Any]
    lock: str | None = None
    prediction: Callable[[Any], float] | None = None
    features: Callable[[Any], Sequence[float]] | None = None


def _of_file(name: str, *arguments: str) -> Command:
    return lambda python, port, workload: [
        str(python),
        str(_PEERS / f"{name}.py"),
        str(port),
        *arguments,
    ]


def _hikyaku(python: Path, port: int, workload: Workload) -> list[str]:
    return [str(python), "-m", "app.cli", "serve"]


def _asgi_door(python: Path, port: int, workload: Workload) -> list[str]:
    return [str(python), "-m", "loadtests.bench.peers.asgi_door", str(port)]


def _feast_serve(python: Path, port: int, workload: Workload) -> list[str]:
    assert workload.store is not None
    feast = [str(python.with_name("feast")), "--chdir", str(workload.store.repo), "serve"]
    # It would replace its worker, and lose what that was asked, after every 1,000 requests.
    settings = ["--no-access-log", "--workers", "1", "--max-requests", "0"]
    return [*feast, "--host", "127.0.0.1", "--port", str(port), *settings]


def _bentoml(python: Path, port: int, workload: Workload) -> list[str]:
    bentoml = str(python.with_name("bentoml"))
    where = ["--working-dir", str(_PEERS), "--host", "127.0.0.1", "--port", str(port)]
    return [bentoml, "serve", "with_bentoml:Model", *where]


def _mlserver(python: Path, port: int, workload: Workload) -> list[str]:
    return [str(python), str(_PEERS / "with_mlserver.py"), str(port), str(free_port())]


def _mosec(python: Path, port: int, workload: Workload) -> list[str]:
    where = ["--address", "127.0.0.1", "--port", str(port)]
    return [str(python), str(_PEERS / "with_mosec.py"), *where, "--log-level", "error"]


def _pytriton(python: Path, port: int, workload: Workload) -> list[str]:
    try:
        found = triton_environment(python.parent.parent)
    except Unusable as exc:
        raise BenchFailure(str(exc)) from exc
    variables = [f"{name}={value}" for name, value in found.variables().items()]
    ports = [str(port), str(free_port()), str(free_port())]
    return ["env", *variables, str(python), str(_PEERS / "with_pytriton.py"), *ports]


def _numbers(workload: Workload, row: int) -> Any:
    return {"features": as_numbers(workload.rows[row])}


def _tensor(workload: Workload, row: int) -> Any:
    """The form of the Open Inference Protocol."""
    data = as_numbers(workload.rows[row])
    return {"inputs": [{"name": "x", "shape": [1, len(data)], "datatype": "FP32", "data": data}]}


def _instances(workload: Workload, row: int) -> Any:
    return {"instances": [workload.instances[row]]}


def _instance(workload: Workload, row: int) -> Any:
    return workload.instances[row]


def _references(workload: Workload, row: int) -> Any:
    entities = {key: [value] for key, value in workload.instances[row].items()}
    return {"features": REFERENCES, "entities": entities}


def _feature_values(answer: Any) -> Sequence[float]:
    names = answer["metadata"]["feature_names"]
    values = dict(zip(names, (result["values"][0] for result in answer["results"]), strict=True))
    return [values[name] for name in FIELDS]


def _probability(answer: Any) -> float:
    probability: float = answer["probability"]
    return probability


def _first_probability(answer: Any) -> float:
    probability: float = answer["predictions"][0]["probability"]
    return probability


def _predict_path(workload: Workload) -> str:
    return f"/v1/models/{workload.name}:predict"


def _floor(name: str, title: str, file: str) -> Contender:
    """It reads what ours has to read."""
    kinds: Sequence[Kind] = ("entity", "tensor")
    return Contender(name, title, kinds, _of_file(file), lambda workload: "/", _instances)


def _ours(name: str, title: str, command: Command) -> Contender:
    kinds: Sequence[Kind] = ("entity", "tensor")
    return Contender(
        name, title, kinds, command, _predict_path, _instances, prediction=_first_probability
    )


def _fastapi(name: str, title: str, kind: Kind, file: str, how: str) -> Contender:
    body = _numbers if kind == "tensor" else _instance
    return Contender(
        name,
        title,
        (kind,),
        _of_file(file, how),
        lambda workload: "/predict",
        body,
        prediction=_probability,
    )


CONTENDERS: Mapping[str, Contender] = {
    contender.name: contender
    for contender in (
        _floor("echo", "bare uvicorn ASGI echo", "echo"),
        _floor("protocol-echo", "asyncio protocol echo, httptools", "protocol_echo"),
        _ours("ours", "Hikyaku, fast lane", _hikyaku),
        _ours("ours-asgi", "Hikyaku, ASGI door", _asgi_door),
        _fastapi("feast-async", "FastAPI, Feast SDK async", "entity", "with_feast", "async"),
        _fastapi("feast-def", "FastAPI, Feast SDK, def", "entity", "with_feast", "def"),
        Contender(
            name="feast-serve",
            title="feast serve (features only)",
            kinds=("entity",),
            command=_feast_serve,
            path=lambda workload: "/get-online-features",
            body=_references,
            features=_feature_values,
        ),
        _fastapi("fastapi", "naive FastAPI, async def", "tensor", "with_fastapi", "async"),
        _fastapi("fastapi-def", "naive FastAPI, def", "tensor", "with_fastapi", "def"),
        Contender(
            name="mlserver",
            title="MLServer",
            kinds=("tensor",),
            lock="bench-mlserver",
            command=_mlserver,
            path=lambda workload: "/v2/models/model/infer",
            body=_tensor,
            prediction=lambda answer: answer["outputs"][0]["data"][0],
        ),
        Contender(
            name="litserve",
            title="LitServe",
            kinds=("tensor",),
            lock="bench-litserve",
            command=_of_file("with_litserve"),
            path=lambda workload: "/predict",
            body=_numbers,
            prediction=_probability,
        ),
        Contender(
            name="bentoml",
            title="BentoML",
            kinds=("tensor",),
            lock="bench-bentoml",
            command=_bentoml,
            path=lambda workload: "/predict",
            body=lambda workload, row: {"rows": [as_numbers(workload.rows[row])]},
            prediction=lambda answer: answer[0],
        ),
        Contender(
            name="mosec",
            title="mosec",
            kinds=("tensor",),
            lock="bench-mosec",
            command=_mosec,
            path=lambda workload: "/inference",
            body=_numbers,
            prediction=_probability,
        ),
        Contender(
            name="triton",
            title="Triton's Python backend, pytriton",
            kinds=("tensor",),
            lock="triton-server",
            command=_pytriton,
            path=lambda workload: "/v2/models/model/infer",
            body=_tensor,
            prediction=lambda answer: answer["outputs"][0]["data"][0],
        ),
        Contender(
            name="ray",
            title="Ray Serve",
            kinds=("tensor",),
            lock="bench-ray",
            command=_of_file("with_ray"),
            path=lambda workload: "/predict",
            body=_numbers,
            prediction=_probability,
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
    """What every contender finds in its environment: its model, one thread, the feature store, and
    nothing of what happens to be set here for a Hikyaku of ours."""
    ours = ("HIKYAKU_", "FEATURE_REDIS_URL", "STATE_REDIS_URL", "BENCH")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    store = {}
    if workload.store is not None:
        store = {
            "BENCH_FEATURE_REPO": str(workload.store.repo),
            "HIKYAKU_FEATURE_REPO": str(workload.store.repo),
            "FEATURE_REDIS_URL": workload.store.url,
        }
    return (
        kept
        | store
        | {
            "BENCH_MODEL": str(workload.model),
            "BENCH_MAX_BATCH_ROWS": str(MAX_BATCH_ROWS),
            "OMP_NUM_THREADS": "1",
            "BENTOML_DO_NOT_TRACK": "True",
            "RAY_USAGE_STATS_ENABLED": "0",
            "MODEL_REPOSITORY": str(workload.repository.resolve()),
            "HIKYAKU_PORT": str(port),
            "HIKYAKU_LOG_LEVEL": "WARNING",
        }
    )
