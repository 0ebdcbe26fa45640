"""The structure that DESIGN promises: imports point down, a foreign library has its few files."""

import ast
from pathlib import Path

import pytest

APP = Path(__file__).parent.parent / "app"

# Each room may import from those that stand before it; `core` is the path of a prediction.
LAYERS = [
    {"errors", "heartbeat", "priority", "request_ids", "tasks"},
    {"deadline", "breaker", "clock", "listener", "tensors", "telemetry"},
    {"contract", "supervisor"},
    {"features", "backends"},
    {"instances", "outputs", "comparison"},
    {"evidence", "events", "routing_key"},
    {"batching"},
    {"served_model"},
    {"release"},
    {"predictor"},
    {"labels"},
    {"repository"},
    {"canary", "config", "shadow"},
    {"reload"},
    {"rollout"},
    {"runtime"},
    {"api"},
    {"main", "worker"},
    {"server"},
    {"local"},
    {"evaluation"},
    {"cli"},
]
RANK = {room: rank for rank, rooms in enumerate(LAYERS) for room in rooms}

# The files that may import a library, beyond which its objects and errors do not go.
OWNERS = {
    "feast": {
        "features/feast_repo.py",
        "features/feast_plan.py",
        "features/feast_source.py",
        "features/feast_values.py",
        "features/on_demand.py",
        "features/push.py",
        "features/redis_writes.py",
        "features/registry_check.py",
        "evaluation/offline.py",
        "evaluation/pushes.py",
    },
    "onnxruntime": {"backends/onnx_session.py", "backends/onnx_operators.py"},
    "onnx": {"backends/onnx_inspection.py"},
    "tritonclient": {"backends/triton_grpc.py", "backends/triton_http.py"},
    "aiohttp": {"backends/triton_http.py"},
    "fastapi_offline": {"api/service.py"},
    "fastapi": {
        "api/service.py",
        "api/openapi.py",
        "api/release.py",
        "api/rollout.py",
        "api/comparison.py",
        "api/lineage.py",
        "api/feedback.py",
        "api/gateway.py",
    },
    "uvicorn": {"server.py", "api/http_cold.py", "api/http_protocol.py"},
    "httptools": {"api/http_head.py", "api/http_messages.py"},
    "hiredis": {
        "features/redis_connection.py",
        "features/redis_source.py",
        "features/redis_features.py",
        "features/redis_cluster.py",
        "release/redis_line.py",
    },
    "redis": {
        "local/up.py",
        "features/redis_py.py",
        "features/redis_sentinel.py",
        "features/redis_cluster.py",
        "features/redis_writes.py",
        "features/row_file.py",
        "features/row_stream.py",
    },
    "prometheus_client": {
        "telemetry/instruments.py",
        "telemetry/histogram.py",
        "telemetry/metrics.py",
        "telemetry/processes.py",
    },
    "jinja2": {"evaluation/page.py"},
    "pandas": {
        "features/feast_repo.py",
        "evaluation/offline.py",
        "evaluation/request_log.py",
    },
    "sklearn": {"evaluation/scores.py"},
    "httpx": {"evaluation/own_service.py", "events/delivery.py"},
    "pyarrow": {
        "evaluation/compare.py",
        "features/on_demand.py",
        "features/push.py",
        "features/row_file.py",
        "features/typed_columns.py",
        "evaluation/pushes.py",
    },
    "fsspec": {"repository/url_store.py"},
    "cryptography": {"repository/signing.py"},
    "yaml": {"contract.py", "features/feast_repo.py", "features/registry_watch.py"},
}

FILES = sorted(APP.rglob("*.py"))


def imports(path: Path, *, top_level: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level else list(ast.walk(tree))
    found = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return found | {
        node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module
    }


def room(path: Path) -> str:
    return path.relative_to(APP).parts[0].removesuffix(".py")


# What takes long to import and is used by few: imported by a file only when it opens a model.
ON_DEMAND = {
    "app.backends.triton_grpc",
    "app.backends.triton_http",
    "app.repository.url_store",
    "app.events.webhooks",
    "cryptography.exceptions",
    "cryptography.hazmat.primitives.asymmetric.ed25519",
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(APP)))
def test_imports_point_down(path: Path) -> None:
    if path == APP / "__init__.py":
        return
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "app" or len(parts) == 1 or parts[1] == room(path):
            continue
        assert RANK[parts[1]] < RANK[room(path)], f"{path.name} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(APP)))
def test_a_foreign_library_stays_in_its_files(path: Path) -> None:
    for name in imports(path):
        owners = OWNERS.get(name.split(".")[0])
        assert owners is None or str(path.relative_to(APP)) in owners, f"{path} imports {name}"


def test_a_command_line_does_not_load_feast_to_start() -> None:
    slow = {"feast", "pandas", "sklearn", "onnxruntime"}
    assert not slow & {name.split(".")[0] for name in imports(APP / "cli.py", top_level=True)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(APP)))
def test_what_few_use_is_imported_on_demand(path: Path) -> None:
    assert not ON_DEMAND & imports(path, top_level=True)
