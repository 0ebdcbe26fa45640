"""Holds the answers of a service against offline predictions on point-in-time features."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.config import Settings
from app.contract import Contract, load_contract
from app.errors import ConfigurationError
from app.evaluation.driver import drive
from app.evaluation.offline import predict_offline
from app.evaluation.own_service import own_service
from app.evaluation.pushes import Pushes
from app.evaluation.request_log import RequestLog, as_datetime, read_log
from app.evaluation.scores import BinaryScores, score
from app.evaluation.service_client import ServiceClient
from app.features.feast_repo import open_store, open_writer
from app.features.plan import FeaturePlan, plan_from_json
from app.local.redis_server import own_redis
from app.repository.layout import CONTRACT_FILE
from app.repository.manifest import PLAN_FILE, Manifest, read_manifest
from app.repository.store import open_repository

MAX_SKEW = 1e-6


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
    version = open_repository(settings.model_repository).current(model_dir.name)
    if version is None:
        raise ConfigurationError(f"{model_dir}: nothing is published yet")
    manifest, _ = read_manifest(model_dir / str(version))
    plan = plan_from_json((model_dir / str(version) / PLAN_FILE).read_bytes())
    log = read_log(
        model_dir, contract, plan, start, end, every_days=every_days, with_truth_only=True
    )
    print(f"{len(log):,} requests from {as_datetime(log.asked_us[0])}", flush=True)

    answers = _answers(model_dir.name, contract, plan, log, settings.feature_repo)
    print("  the same requests offline, on point-in-time features", flush=True)
    store = open_store(settings.feature_repo, None)
    (offline,) = predict_offline(model_dir, contract, [manifest], plan, log, store)
    return _report(
        contract,
        manifest,
        log.known_truth(np.arange(len(log))),
        answers,
        offline,
        min_auc,
        report_file,
    )


def _answers(
    name: str, contract: Contract, plan: FeaturePlan, log: RequestLog, feature_repo: Path
) -> Sequence[Mapping[str, Any]]:
    """The prediction of each request, in order, by a service and a Redis of our own."""
    start_us, until_us = int(log.asked_us[0]), int(log.asked_us[-1])
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hikyaku-")))
        redis_url = stack.enter_context(own_redis(folder))
        # None of the replicas, nor of this machine's workers: it has no state to share.
        clock = as_datetime(start_us)
        address = stack.enter_context(own_service(redis_url, "", clock))
        pushes = Pushes(open_writer(feature_repo, redis_url), plan.feature_service, until_us)
        timeout_ms = contract.limits.max_timeout_ms
        with ServiceClient(address, name, token=None, timeout_ms=timeout_ms) as client:
            done = drive(log, pushes, client, start_us=start_us, until_us=until_us)
    return [answer.prediction for answer in done.answers]


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
    scores = score(served, truth)
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
