"""Replays recorded time to a running service, and says how good its answers were."""

import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.config import Settings
from app.contract import Contract, load_contract
from app.errors import ConfigurationError
from app.evaluation.driver import Replayed, drive
from app.evaluation.own_service import own_service
from app.evaluation.pushes import Pushes
from app.evaluation.request_log import (
    RequestLog,
    as_datetime,
    as_microseconds,
    read_log,
    replay_section,
)
from app.evaluation.scores import score
from app.evaluation.service_client import Answer, ServiceClient
from app.features.feast_repo import open_writer
from app.features.plan import plan_from_json
from app.local.redis_server import own_redis
from app.repository.layout import CONTRACT_FILE
from app.repository.manifest import PLAN_FILE
from app.repository.store import open_repository

_SETTLED_S = 3.0
"""Workers write what they have counted once a second."""


@dataclass(frozen=True)
class Period:
    """What is replayed: the requests of `[start, end)`, of one day in `every_days`, and what became
    known until `end`, where the clock stands afterwards. `speed` is seconds of it a second."""

    start: datetime
    end: datetime
    every_days: int
    speed: float


def replay(
    model_dir: Path,
    settings: Settings,
    period: Period,
    *,
    address: str | None,
    redis_url: str | None,
    candidates: Sequence[str],
    with_labels: bool | None,
    report_file: Path | None,
    comparison_file: Path | None,
) -> int:
    """Replay a period to the service at `address`, whose features are in `redis_url`, and print
    what came of it; without `address` to a service and a Redis of our own.

    `candidates` are shadowed before it begins. `with_labels` None: where model.yaml says when they
    are known and what they are for. What the service then says of its candidates is written to
    `comparison_file`. Returns 0. Raises `HikyakuError`.
    """
    contract = load_contract(model_dir / CONTRACT_FILE)
    labels = _sends_labels(model_dir, contract, with_labels)
    version = open_repository(settings.model_repository).current(model_dir.name)
    if version is None:
        raise ConfigurationError(f"{model_dir}: nothing is published yet")
    plan = plan_from_json((model_dir / str(version) / PLAN_FILE).read_bytes())
    log = read_log(
        model_dir, contract, plan, period.start, period.end, every_days=period.every_days
    )
    print(f"{len(log):,} requests from {as_datetime(log.asked_us[0])}", flush=True)

    start_us, until_us = as_microseconds(period.start), as_microseconds(period.end)
    with _service(address, redis_url, period.start) as (at, features):
        print(f"• {at}", flush=True)
        writer = open_writer(settings.feature_repo, features)
        pushes = Pushes(writer, plan.feature_service, until_us)
        token = None if address is None else _token(settings)
        timeout_ms = contract.limits.max_timeout_ms
        with ServiceClient(at, model_dir.name, token=token, timeout_ms=timeout_ms) as client:
            for candidate in candidates:
                client.shadow(candidate)
            replayed = drive(
                log,
                pushes,
                client,
                start_us=start_us,
                until_us=until_us,
                speed=period.speed,
                with_labels=labels,
            )
            if comparison_file is not None:
                comparison_file.write_text(json.dumps(settled_comparison(client), indent=1) + "\n")
    report = report_of(model_dir.name, contract, period, log, replayed)
    if report_file is not None:
        report_file.write_text(json.dumps(report, indent=1) + "\n")
    print(_as_text(report), flush=True)
    return 0


def settled_comparison(client: ServiceClient) -> Mapping[str, Any]:
    """What the service says of its candidates, once nothing is added to it any more."""
    before: Mapping[str, Any] = {}
    while before != (said := client.comparison()):
        before = said
        time.sleep(_SETTLED_S)
    return before


def report_of(
    model: str, contract: Contract, period: Period, log: RequestLog, replayed: Replayed
) -> Mapping[str, Any]:
    """What came of a replay.

    `quality` holds each version that answered, computed from its answers and the log's truths:
    `at_horizon` for the requests whose horizon has passed by the end and whose truth was known
    before it, `as_they_arrived` for all whose truth is known by the end. Null: no truth is known,
    or the predictions are not numbers.
    """
    answers = replayed.answers
    end_us = as_microseconds(period.end)
    horizon_us = np.full(len(log), end_us) if log.horizon_us is None else log.horizon_us
    has_truth = np.array([truth is not None for truth in log.truth]) & (log.known_us >= 0)
    chosen = {
        "at_horizon": has_truth & (horizon_us <= end_us) & (log.known_us < horizon_us),
        "as_they_arrived": has_truth & (log.known_us <= end_us),
    }
    versions = np.array([answer.version for answer in answers])
    return {
        "model": model,
        "from": period.start.isoformat(),
        "to": period.end.isoformat(),
        "every_days": period.every_days,
        "took_s": replayed.took_s,
        "requests": len(log),
        "retried": replayed.retried,
        "degraded": sum(answer.degraded for answer in answers),
        "answered_by": dict(Counter(versions.tolist())),
        "labels": replayed.statuses(),
        "labels_not_sent": replayed.told.count(None),
        "horizons_passed": int((horizon_us <= end_us).sum()),
        "quality": {
            version: {
                when: _scores(contract.score, answers, log, rows & (versions == version))
                for when, rows in chosen.items()
            }
            for version in sorted(set(versions.tolist()))
        },
    }


def _sends_labels(model_dir: Path, contract: Contract, wanted: bool | None) -> bool:
    section = replay_section(model_dir, contract)
    possible = section.label_known_at is not None and contract.labels is not None
    if wanted and not possible:
        raise ConfigurationError(
            f"{model_dir / CONTRACT_FILE}: to send labels it needs `labels` and "
            "`replay.label_known_at`"
        )
    return possible if wanted is None else wanted


@contextmanager
def _service(
    address: str | None, redis_url: str | None, clock: datetime
) -> Iterator[tuple[str, str | None]]:
    """The address of the service and that of its features."""
    if address is not None:
        yield address, redis_url
        return
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hikyaku-")))
        own_url = stack.enter_context(own_redis(folder))
        yield stack.enter_context(own_service(own_url, own_url, clock)), own_url


def _token(settings: Settings) -> str | None:
    """The first of the operators' tokens that our environment names."""
    given = "" if settings.operator_token is None else settings.operator_token.get_secret_value()
    lines = given.split()
    return lines[0].rpartition(":")[2] if lines else None


def _scores(
    output: str, answers: Sequence[Answer], log: RequestLog, rows: NDArray[np.bool_]
) -> Mapping[str, Any] | None:
    places = np.flatnonzero(rows)
    said = [answers[place].prediction[output] for place in places.tolist()]
    if not said or not all(isinstance(value, float | None) for value in said):
        return None
    predicted = np.array(said, dtype=np.float64)  # what was answered with null is no figure
    there = np.isfinite(predicted)
    return score(predicted[there], log.known_truth(places[there])).to_json()


def _as_text(report: Mapping[str, Any]) -> str:
    answered = ", ".join(f"{n:,} by version {v}" for v, n in report["answered_by"].items())
    lines = [
        f"{report['requests']:,} requests in {report['took_s']:.0f} s: {answered}; "
        f"{report['degraded']:,} degraded, {report['retried']:,} asked again"
    ]
    if report["labels"]:
        labels = ", ".join(f"{n:,} {status}" for status, n in report["labels"].items())
        lines.append(f"labels: {labels}; {report['labels_not_sent']:,} not known by the end")
    for version, figures in report["quality"].items():
        for when, scores in figures.items():
            if scores is not None:
                shown = {n: v for n, v in scores.items() if n != "calibration"}
                told = ", ".join(f"{name} {value:.6g}" for name, value in shown.items())
                lines.append(f"version {version}, {when.replace('_', ' ')}: {told}")
    return "\n".join(lines)
