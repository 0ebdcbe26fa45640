"""Replays recorded requests: pushes what became known, asks over HTTP, holds the answers against
offline predictions on point-in-time features."""

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pandas as pd
from feast import FeatureStore
from numpy.typing import NDArray

from app.backends import open_backend
from app.config import Settings
from app.contract import Contract, Replay, load_contract
from app.deadline import Deadline
from app.errors import ConfigurationError, HikyakuError
from app.evaluation.scores import BinaryScores, score
from app.features.encoding import Encoder
from app.features.feast_repo import open_store, point_in_time, pushed_histories, write
from app.features.missing import MissingValues
from app.features.plan import FeaturePlan, plan_from_json
from app.features.source import FeatureRows, ValueStatus, all_with_status
from app.instances import InstanceDecoder
from app.listener import bind
from app.local.processes import child
from app.local.redis_server import own_redis
from app.outputs import OutputReader
from app.repository.layout import CONTRACT_FILE
from app.repository.manifest import MODEL_FILE, PLAN_FILE, Manifest, read_manifest, signature_of
from app.repository.store import open_repository
from app.tensors import Tensors

MAX_SKEW = 1e-6
_READY_TIMEOUT_S = 120
_SAY_EVERY_S = 10
_EXECUTION_S = 600


class Pushes:
    """Everything that was ever pushed to the views of a service, in order of becoming known."""

    def __init__(self, store: FeatureStore, plan: FeaturePlan) -> None:
        self._store = store
        self._views: list[tuple[str, str, list[str], pd.DataFrame]] = []
        self._known_until: pd.Timestamp | None = None
        for view, keys, known_at, path in pushed_histories(store, plan.feature_service):
            history = pd.read_parquet(path).sort_values(known_at, ignore_index=True)
            self._views.append((view, known_at, keys, history))

    def push_until(self, until: pd.Timestamp) -> None:
        """Write what became known since the last call; of each entity the newest value only, as an
        online store keeps no other."""
        for view, known_at, keys, history in self._views:
            first = 0
            if self._known_until is not None:
                first = int(history[known_at].searchsorted(self._known_until, side="right"))
            last = int(history[known_at].searchsorted(until, side="right"))
            if last > first:
                write(
                    self._store, view, history.iloc[first:last].drop_duplicates(keys, keep="last")
                )
        self._known_until = until


def evaluate(
    model_dir: Path,
    settings: Settings,
    *,
    start: datetime | None,
    end: datetime | None,
    every_days: int,
    min_auc: float | None,
    report_file: Path | None,
) -> int:
    """Replay the requests in `[start, end)` and print how good and how consistent the answers were.

    Starts a Redis and a server of its own. Returns 1 when an answer differs from its offline
    prediction by more than `MAX_SKEW`, or when the AUC is below `min_auc`; else 0.
    """
    contract = load_contract(model_dir / CONTRACT_FILE)
    replay = contract.replay
    if replay is None:
        raise ConfigurationError(f"{model_dir / CONTRACT_FILE}: has no `replay` section")
    version = open_repository(settings.model_repository).current(model_dir.name)
    if version is None:
        raise ConfigurationError(f"{model_dir}: nothing is published yet")
    manifest, _ = read_manifest(model_dir / str(version))
    requests = _requests(model_dir, replay, start, end, every_days)
    print(f"{len(requests):,} requests from {requests[replay.asked_at].min()}", flush=True)

    plan = plan_from_json((model_dir / str(version) / PLAN_FILE).read_bytes())
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hikyaku-")))
        redis_url = stack.enter_context(own_redis(folder))
        store = open_store(settings.feature_repo, redis_url)
        answers = _replayed(model_dir.name, contract, replay, plan, requests, store, redis_url)
    offline = _offline(model_dir, contract, manifest, plan, requests, store, replay.asked_at)
    truth = requests[replay.label].to_numpy()
    return _report(contract, manifest, truth, answers, offline, min_auc, report_file)


def _requests(
    model_dir: Path,
    replay: Replay,
    start: datetime | None,
    end: datetime | None,
    every_days: int,
) -> pd.DataFrame:
    """The labelled requests of the chosen days, by instant of asking."""
    path = (model_dir / replay.requests).resolve()
    if not path.is_file():
        raise ConfigurationError(f"{path}: no such request log; `make run` builds it")
    log = pd.read_parquet(path)
    at = log[replay.asked_at]
    wanted = log[replay.label].notna()
    if start is not None:
        wanted &= at >= pd.Timestamp(start)
    if end is not None:
        wanted &= at < pd.Timestamp(end)
    days = (at - at[wanted].min()).dt.days
    chosen: pd.DataFrame = log[wanted & (days % every_days == 0)]
    if chosen.empty:
        raise ConfigurationError(f"{path}: no labelled request in that time")
    return chosen.sort_values(replay.asked_at, kind="stable", ignore_index=True)


def _replayed(
    name: str,
    contract: Contract,
    replay: Replay,
    plan: FeaturePlan,
    requests: pd.DataFrame,
    store: FeatureStore,
    redis_url: str,
) -> Sequence[Mapping[str, Any]]:
    """The prediction of each request, in order, over HTTP; one call an instant of asking."""
    asked_at = requests[replay.asked_at]
    pushes = Pushes(store, plan)
    instances = _instances(requests, InstanceDecoder(contract, plan))
    answers: list[Mapping[str, Any]] = []
    started_s = said_s = time.monotonic()
    with (
        _server(redis_url, asked_at.iloc[0]) as address,
        httpx.Client(timeout=60, trust_env=False) as client,
    ):
        for at in asked_at.unique():
            rows = np.flatnonzero(asked_at == at)
            pushes.push_until(at)
            _ask(client, "PUT", f"{address}/v1/replay-clock", {"now": at.isoformat()})
            body = {"instances": [instances[int(row)] for row in rows]}
            answer = _ask(client, "POST", f"{address}/v1/models/{name}:predict", body)
            answers += answer["predictions"]
            if time.monotonic() - said_s > _SAY_EVERY_S:
                said_s = time.monotonic()
                done = len(answers) / len(requests)
                print(f"  {done:4.0%} {at}  {said_s - started_s:.0f} s", flush=True)
    return answers


def _instances(requests: pd.DataFrame, decoder: InstanceDecoder) -> Sequence[Mapping[Any, Any]]:
    """Each request's instance as an application would send it."""
    missing = [name for name in decoder.required if name not in requests.columns]
    if missing:
        raise ConfigurationError(f"the request log has no column {', '.join(missing)}")
    columns = requests[list(decoder.required)]
    records: Sequence[Mapping[Any, Any]] = (
        columns.astype(object).where(columns.notna(), None).to_dict("records")
    )
    return records


@contextmanager
def _server(redis_url: str, clock: pd.Timestamp) -> Iterator[str]:
    """A server of our own on that Redis; yields its address once it is ready."""
    listener = bind("127.0.0.1", 0)
    port = listener.getsockname()[1]
    listener.close()
    # Importing Feast has switched on prometheus_client's multiprocess mode for our children.
    inherited = {
        name: v for name, v in os.environ.items() if not name.startswith("PROMETHEUS_MULTI")
    }
    with tempfile.TemporaryDirectory() as work:
        environment = inherited | {
            "FEATURE_REDIS_URL": redis_url,
            "STATE_REDIS_URL": "",  # it is none of the replicas, nor of this machine's workers
            "HIKYAKU_WORK_DIR": work,
            "HIKYAKU_HOST": "127.0.0.1",
            "HIKYAKU_PORT": str(port),
            "HIKYAKU_OPERATOR_TOKEN": "",  # we move its clock
            "HIKYAKU_OPERATOR_TOKEN_FILE": "",
            "HIKYAKU_REPLAY_CLOCK": clock.isoformat(),
            "HIKYAKU_LOG_LEVEL": "WARNING",
            "HIKYAKU_REGISTRY_CHECK_S": "0",
        }
        with child([sys.executable, "-m", "app.cli", "serve"], environment) as process:
            _wait_until_ready(process, f"http://127.0.0.1:{port}")
            yield f"http://127.0.0.1:{port}"


def _wait_until_ready(process: "subprocess.Popen[bytes]", address: str) -> None:
    until_s = time.monotonic() + _READY_TIMEOUT_S
    while process.poll() is None and time.monotonic() < until_s:
        try:
            if httpx.get(f"{address}/v2/health/ready", timeout=5, trust_env=False).is_success:
                return
        except httpx.TransportError:
            pass  # not listening yet
        time.sleep(0.1)
    raise HikyakuError("the server did not become ready; what it said is above")


def _ask(client: httpx.Client, method: str, url: str, body: Mapping[str, Any]) -> Any:
    response = client.request(method, url, json=body)
    if response.status_code != 200:
        raise HikyakuError(f"{url}: {response.status_code}: {response.text[:500]}")
    return response.json()


def _offline(
    model_dir: Path,
    contract: Contract,
    manifest: Manifest,
    plan: FeaturePlan,
    requests: pd.DataFrame,
    store: FeatureStore,
    asked_at: str,
) -> Sequence[Mapping[str, Any]]:
    """What the model says of the same requests on features joined as they were known then."""
    print("  the same requests offline, on point-in-time features", flush=True)
    entities = requests[[asked_at, *plan.join_keys, *plan.request_fields]]
    features = point_in_time(store, plan.feature_service, entities, asked_at)
    decoder = InstanceDecoder(contract, plan)
    body = json.dumps({"instances": _instances(requests, decoder)}).encode()
    fields = decoder.decode(body, max_instances=len(requests)).fields
    missing = MissingValues(contract.features, plan, manifest.training.means)
    filled = missing.fill(_as_rows(plan, features, len(requests)), fields, 0.0)
    encoder = Encoder(contract.inputs, manifest.training.categories)
    columns = dict(zip(plan.references, filled.columns, strict=True))
    inputs = encoder.encode({**fields, **columns}, len(requests))
    outputs = OutputReader(contract.outputs, contract.decision, signature_of(manifest))
    model = model_dir / str(manifest.version) / MODEL_FILE
    return outputs.read(asyncio.run(_executed(contract, manifest, model, inputs))).predictions


def _as_rows(plan: FeaturePlan, features: Mapping[str, NDArray[Any]], rows: int) -> FeatureRows:
    """A null is a null: a join does not say why, and remembers no last good value."""
    table = all_with_status(plan, rows, ValueStatus.PRESENT)
    names = zip(plan.references, table.columns, strict=True)
    columns = tuple(features.get(name, nothing) for name, nothing in names)
    for position, column in enumerate(columns):
        table.status[pd.isna(column), position] = ValueStatus.NULL_VALUE
    return replace(table, columns=columns)


async def _executed(
    contract: Contract, manifest: Manifest, model: Path, inputs: Tensors
) -> Tensors:
    backend = await open_backend(contract.backend, model, signature_of(manifest))
    try:
        return await backend.execute(inputs, Deadline.after(_EXECUTION_S))
    finally:
        await backend.close()


def _report(
    contract: Contract,
    manifest: Manifest,
    truth: NDArray[Any],
    answers: Sequence[Mapping[str, Any]],
    offline: Sequence[Mapping[str, Any]],
    min_auc: float | None,
    report_file: Path | None,
) -> int:
    output = contract.decision.output if contract.decision else next(iter(contract.outputs))
    served = np.array([answer[output] for answer in answers], dtype=np.float64)
    expected = np.array([answer[output] for answer in offline], dtype=np.float64)
    skew = np.abs(served - expected)
    scores = score(served, truth.astype(bool) if set(truth) <= {True, False} else truth)
    report = {
        "model": manifest.model,
        "version": manifest.version,
        "output": output,
        "scores": scores.to_json(),
        "at_training": manifest.training.metrics,
        "skew": {
            "rows": len(skew),
            "largest_difference": float(skew.max()),
            "rows_over_tolerance": int((skew > MAX_SKEW).sum()),
            "tolerance": MAX_SKEW,
        },
    }
    if report_file is not None:
        report_file.write_text(json.dumps(report, indent=1) + "\n")
    print(_as_text(report, scores), flush=True)
    if isinstance(scores, BinaryScores) and min_auc is not None and not scores.auc >= min_auc:
        print(f"the AUC is below {min_auc}", flush=True)
        return 1
    return 1 if (skew > MAX_SKEW).any() else 0


def _as_text(report: Mapping[str, Any], scores: Any) -> str:
    lines = [f"{report['model']} version {report['version']}, by HTTP:"]
    figures = {n: v for n, v in report["scores"].items() if n != "calibration"}
    lines += [f"  {name:26} {value:.6g}" for name, value in figures.items()]
    if isinstance(scores, BinaryScores):
        lines.append("  calibration (rows, said, came true):")
        lines += [
            f"    {part.rows:7,}  {part.mean_probability:.3f}  {part.true_share:.3f}"
            for part in scores.calibration
        ]
    lines.append("at training, on held-out rows:")
    lines += [f"  {name:26} {value:.6g}" for name, value in report["at_training"].items()]
    skew = report["skew"]
    lines.append(
        f"skew between HTTP and offline: largest difference {skew['largest_difference']:.3g} over "
        f"{skew['rows']:,} rows; {skew['rows_over_tolerance']} over {skew['tolerance']:g}"
    )
    return "\n".join(lines)
