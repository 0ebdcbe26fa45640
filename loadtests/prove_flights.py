"""Holds what a service says of a candidate, and of who was right, against the same offline.

    python -m loadtests.prove_flights

The flights of October to December are replayed to a service with two workers: the champion, trained
through August, answers; the candidate, trained through September, is shown every flight; whether it
was late is told when it has landed. Afterwards both versions predict the same flights offline, on
point-in-time features. Exit status 1 unless the counts of the comparison and the AUC of both
versions are the same, and the means within 1e-9. `--to`: asks about no flight from then on.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score

from app.config import Settings, load_settings
from app.contract import Contract, load_contract
from app.errors import HikyakuError
from app.evaluation.driver import Replayed, drive, progress
from app.evaluation.offline import predict_offline
from app.evaluation.own_service import own_service
from app.evaluation.pushes import Pushes
from app.evaluation.replay import settled_comparison
from app.evaluation.request_log import RequestLog, as_microseconds, read_log
from app.evaluation.service_client import ServiceClient
from app.features.feast_repo import open_store, open_writer
from app.features.plan import FeaturePlan, plan_from_json
from app.local.redis_server import own_redis
from app.repository.layout import CONTRACT_FILE
from app.repository.manifest import PLAN_FILE, read_manifest
from loadtests.flight_versions import MODEL, champion_and_candidate

FROM, TO = "2013-10-01T00:00:00-04:00", "2014-01-01T00:00:00-05:00"
AFTERWARDS = timedelta(days=2)
"""Until when the last flights have landed and their horizons have passed."""
TOLERANCE = 1e-9
_ARRIVED_HOURS = 8


@dataclass(frozen=True)
class Check:
    """A number of the service and what it must be, to within `tolerance`; or below which it must
    be."""

    what: str
    service: float
    offline: float
    tolerance: float = 0.0
    below: bool = False

    @property
    def holds(self) -> bool:
        if self.below:
            return self.service < self.offline
        return abs(self.service - self.offline) <= self.tolerance

    def __str__(self) -> str:
        verdict = "ok" if self.holds else "WRONG"
        return f"  {verdict:5}  {self.what:60} {self.service:<22.12g} {self.offline:.12g}"


@dataclass(frozen=True)
class Subject:
    """What is replayed, and to which versions."""

    folder: Path
    contract: Contract
    plan: FeaturePlan
    log: RequestLog
    champion: int
    candidate: int
    start: datetime
    end: datetime


def main() -> int:
    arguments = _arguments()
    settings = load_settings()
    subject = _subject(settings, arguments)
    print(f"• {len(subject.log):,} flights, {subject.start:%Y-%m-%d} to {subject.end:%Y-%m-%d}")
    bias = ArrivalBias(subject.log)
    replayed, document = _served(subject, settings, arguments, bias)
    print("• the same flights offline, on point-in-time features", flush=True)
    offline = _offline(subject, settings)

    checks = [
        *_answers(subject, replayed, offline),
        *_comparison(subject, document["candidates"][0]["comparison"], offline),
        *_labels(subject, replayed),
        *_quality(subject, document["quality"], offline),
        _as_labels_arrive(document["quality"]["versions"][0]["as_labels_arrive"]),
    ]
    print(f"{'service':>75}                {'offline'}")
    print("\n".join(map(str, checks)))
    print(bias, flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    wrong = [check.what for check in checks if not check.holds]
    if wrong:
        print(f"not the same: {', '.join(wrong)}")
    return 1 if wrong or not bias.is_as_expected else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--from", type=datetime.fromisoformat, dest="start", default=FROM)
    parser.add_argument("--to", type=datetime.fromisoformat, dest="end", default=TO)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--report", type=Path, metavar="FILE", help="default: report.html in HIKYAKU_WORK_DIR"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the comparison there")
    return parser.parse_args()


def _subject(settings: Settings, arguments: argparse.Namespace) -> Subject:
    champion, candidate = champion_and_candidate(settings)
    folder = Path(settings.model_repository, MODEL)
    contract = load_contract(folder / CONTRACT_FILE)
    plan = plan_from_json((folder / str(champion) / PLAN_FILE).read_bytes())
    log = read_log(folder, contract, plan, arguments.start, arguments.end)
    return Subject(folder, contract, plan, log, champion, candidate, arguments.start, arguments.end)


def _served(
    subject: Subject, settings: Settings, arguments: argparse.Namespace, bias: "ArrivalBias"
) -> tuple[Replayed, Mapping[str, Any]]:
    """What the service answered, and what it says of the candidate when all has been counted."""
    start_us, end_us = as_microseconds(subject.start), as_microseconds(subject.end + AFTERWARDS)
    say = progress()

    def watch(at_us: int, replayed: Replayed) -> None:
        say(at_us, replayed)
        bias.look(at_us)

    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hikyaku-")))
        redis_url = stack.enter_context(own_redis(work))
        workers = {"HIKYAKU_WORKERS": str(arguments.workers)}
        address = stack.enter_context(own_service(redis_url, redis_url, subject.start, workers))
        print(f"• {address}", flush=True)
        writer = open_writer(settings.feature_repo, redis_url)
        pushes = Pushes(writer, subject.plan.feature_service, end_us)
        client = stack.enter_context(
            ServiceClient(
                address, MODEL, token=None, timeout_ms=subject.contract.limits.max_timeout_ms
            )
        )
        client.shadow(str(subject.candidate))
        replayed = drive(
            subject.log,
            pushes,
            client,
            start_us=start_us,
            until_us=end_us,
            with_labels=True,
            watch=watch,
        )
        requests, per_s = len(subject.log), len(subject.log) / replayed.took_s
        print(f"• {requests:,} flights in {replayed.took_s:.0f} s, {per_s:.0f} a second")
        document = settled_comparison(client)
        _write_report(address, arguments.report or settings.work_dir / "report.html")
        return replayed, document


def _write_report(address: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    command = ["report", MODEL, "--url", address, "--output", str(path)]
    subprocess.run([sys.executable, "-m", "app.cli", *command], check=True)
    print(f"• {path}", flush=True)


def _offline(subject: Subject, settings: Settings) -> Sequence[Sequence[Mapping[str, Any]]]:
    """What the champion and the candidate say of each flight."""
    versions = (subject.champion, subject.candidate)
    manifests = [read_manifest(subject.folder / str(version))[0] for version in versions]
    store = open_store(settings.feature_repo, None)
    return predict_offline(
        subject.folder, subject.contract, manifests, subject.plan, subject.log, store
    )


def _answers(
    subject: Subject, replayed: Replayed, offline: Sequence[Sequence[Mapping[str, Any]]]
) -> Iterator[Check]:
    served = _scores(subject, [answer.prediction for answer in replayed.answers])
    yield Check("flights", len(replayed.answers), len(subject.log))
    yield Check("largest skew", float(np.abs(served - _scores(subject, offline[0])).max()), 0, 1e-9)


def _comparison(
    subject: Subject, told: Mapping[str, Any], offline: Sequence[Sequence[Mapping[str, Any]]]
) -> Iterator[Check]:
    champion, candidate = (_scores(subject, version) for version in offline)
    decisions = [[row["decision"] for row in version] for version in offline]
    flips = sum(ours != theirs for ours, theirs in zip(*decisions, strict=True))
    difference = candidate - champion
    yield Check("rows compared", told["compared"], len(subject.log))
    yield Check("rows dropped", sum(told["dropped"].values()), 0)
    yield Check("rows failed", told["failed"]["rows"], 0)
    yield Check("decisions that flip", told["flips"]["rows"], flips)
    means = {
        "mean difference": (told["difference"]["mean"], difference.mean()),
        "mean absolute difference": (
            told["difference"]["mean_absolute"]["mean"],
            np.abs(difference).mean(),
        ),
        "mean score of the champion": (told["champion"]["mean"], champion.mean()),
        "mean score of the candidate": (told["candidate"]["mean"], candidate.mean()),
    }
    for what, (service, expected) in means.items():
        yield Check(what, service, float(expected), TOLERANCE)


def _labels(subject: Subject, replayed: Replayed) -> Iterator[Check]:
    told = replayed.statuses()
    yield Check("labels accepted", told.get("accepted", 0), int((subject.log.known_us >= 0).sum()))
    yield Check("labels of any other outcome", sum(told.values()) - told.get("accepted", 0), 0)


def _quality(
    subject: Subject, told: Mapping[str, Any], offline: Sequence[Sequence[Mapping[str, Any]]]
) -> Iterator[Check]:
    """On all flights: every horizon has passed by the end."""
    champion, [pair] = told["versions"][0], told["pairs"]
    landed = np.array([truth is not None for truth in subject.log.truth])
    late = subject.log.truth[landed].astype(bool)
    yield Check("flights whose horizon has passed", champion["due"], len(subject.log))
    yield Check("of them with a label", champion["labelled"], int(landed.sum()))
    yield Check("of them that never get one", champion["void"], int((~landed).sum()))
    yield Check("of them that both versions judged", pair["shown"], len(subject.log))
    yield Check("late", champion["label_rate"]["value"], float(late.mean()), TOLERANCE)
    versions = {
        "champion": (champion, offline[0]),
        "champion, beside the candidate": (pair["champion"], offline[0]),
        "candidate": (pair["candidate"], offline[1]),
    }
    for name, (figures, predictions) in versions.items():
        scores = _scores(subject, predictions)[landed]
        auc, losses = figures["auc"]["value"], figures["losses"]
        yield Check(f"AUC of the {name}", auc, _area(scores, late))
        by_sklearn = {
            "AUC": (auc, roc_auc_score(late, scores)),
            "log loss": (losses["log_loss"]["value"], log_loss(late, scores)),
            "Brier": (losses["brier"]["value"], brier_score_loss(late, scores)),
        }
        for what, (service, expected) in by_sklearn.items():
            yield Check(f"{what} of the {name}, scikit-learn", service, float(expected), TOLERANCE)


def _as_labels_arrive(told: Mapping[str, Any]) -> Check:
    """What the service itself says of not waiting: late flights land late."""
    [window] = [each for each in told["window"] if each["window_s"] == _ARRIVED_HOURS * 3600]
    return Check(
        f"late, by the labels there within {_ARRIVED_HOURS} hours",
        window["label_rate"],
        told["at_horizon"]["label_rate"],
        below=True,
    )


def _area(scores: NDArray[np.float64], truth: NDArray[np.bool_]) -> float:
    """Under the ROC curve, exact but for one division: how many pairs of a true and a false row are
    in order, those of equal scores by half."""
    true, false = scores[truth], np.sort(scores[~truth])
    twice = sum(int(np.searchsorted(false, true, side=side).sum()) for side in ("left", "right"))
    return twice / (2 * len(true) * len(false))


def _scores(subject: Subject, predictions: Sequence[Mapping[str, Any]]) -> NDArray[np.float64]:
    return np.array([row[subject.contract.score] for row in predictions], dtype=np.float64)


class ArrivalBias:
    """What would have been thought of the flights that left within hours, of those labels alone
    that had arrived: looked at every hour."""

    def __init__(self, log: RequestLog) -> None:
        self._log = log
        self._next_us = int(log.asked_us[0])
        self._has_truth = np.array([truth is not None for truth in log.truth])
        self._late = np.array([bool(truth) for truth in log.truth])
        self.arrived = self.arrived_late = self.all = self.all_late = 0

    def look(self, now_us: int) -> None:
        if now_us < self._next_us:
            return
        self._next_us = now_us + _HOUR_US
        log = self._log
        asked = (log.asked_us > now_us - _ARRIVED_HOURS * _HOUR_US) & (log.asked_us <= now_us)
        recent = asked & self._has_truth
        arrived = recent & (log.known_us <= now_us)
        self.arrived += int(arrived.sum())
        self.arrived_late += int((arrived & self._late).sum())
        self.all += int(recent.sum())
        self.all_late += int((recent & self._late).sum())

    @property
    def shares(self) -> tuple[float, float]:
        """Late among the labels that had arrived, and in truth."""
        return self.arrived_late / max(self.arrived, 1), self.all_late / max(self.all, 1)

    @property
    def is_as_expected(self) -> bool:
        """Late flights land late."""
        arrived, truth = self.shares
        return arrived < truth

    def __str__(self) -> str:
        arrived, truth = self.shares
        return (
            f"of the flights asked about in the last {_ARRIVED_HOURS} hours, looked at every hour: "
            f"{arrived:.1%} late among the labels that had arrived, {truth:.1%} in truth"
        )


_HOUR_US = 3_600_000_000


if __name__ == "__main__":
    try:
        sys.exit(main())
    except HikyakuError as exc:
        sys.exit(str(exc))
