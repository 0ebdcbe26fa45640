"""The `hikyaku` command."""

import argparse
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from app.errors import ConfigurationError, HikyakuError

if TYPE_CHECKING:
    from app.config import Settings
    from app.features.push import PushTarget
    from app.features.push_progress import Progress
    from app.repository.store import Repository
    from app.telemetry.metrics import PushMetrics

# Feast takes seconds to import, training libraries need not be installed where a service runs, and
# the parent of `serve` stays beside its worker: each command imports what it alone needs.


def main() -> None:
    """Run the command of the process's arguments; a fault is one sentence and exit status 1."""
    arguments = _parser().parse_args()
    # A shell that starts us in the background has SIGINT ignored, which Python would inherit.
    for told_to_stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(told_to_stop, signal.default_int_handler)
    try:
        status = arguments.run(arguments)
    except HikyakuError as exc:
        print(f"hikyaku: {exc}", file=sys.stderr)
        status = 1
    except OSError as exc:  # no disk, no permission
        print(f"hikyaku: {exc}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        status = 130
    sys.exit(status)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hikyaku", description="Model serving.")
    commands = parser.add_subparsers(required=True, metavar="command")

    command = commands.add_parser("up", help="prepare what is due on this machine and serve")
    command.set_defaults(run=_with_settings(_up))

    command = commands.add_parser("serve", help="serve the published models")
    command.add_argument(
        "--workers", metavar="N", help="processes that answer (default: HIKYAKU_WORKERS, else 1)"
    )
    command.set_defaults(run=_serve)

    # Not for people, and so without a help: what `serve` starts.
    command = commands.add_parser("worker")
    command.add_argument("assignment")
    command.set_defaults(run=_with_settings(_worker))

    command = commands.add_parser("publish", help="make a trained model the current version")
    command.add_argument("model", help="name of a model of the model repository")
    command.add_argument("artifact", help="folder or URL of model.onnx and training.json")
    command.add_argument(
        "--keep-current", action="store_true", help="publish a candidate: CURRENT stays as it is"
    )
    command.add_argument(
        "--sign-with", type=Path, metavar="KEY", help="sign with this ed25519 private key (PEM)"
    )
    command.set_defaults(run=_with_settings(_publish))

    command = commands.add_parser("verify", help="verify a published version as the server would")
    command.add_argument("model", help="name of a published model")
    command.add_argument("version", type=_positive, nargs="?", help="default: CURRENT")
    command.add_argument(
        "--within-s",
        type=float,
        default=60.0,
        metavar="S",
        help="time to open it, and again to execute it (default 60)",
    )
    command.set_defaults(run=_with_settings(_verify))

    command = commands.add_parser("lineage", help="say where a version came from")
    command.add_argument("model", help="name of a published model")
    command.add_argument("version", type=_positive, nargs="?", help="default: CURRENT")
    command.add_argument("--json", action="store_true", help="print it as JSON")
    command.set_defaults(run=_with_settings(_lineage))

    command = commands.add_parser("reproduce", help="train a version again and compare")
    command.add_argument("model", help="name of a published model")
    command.add_argument("version", type=_positive, nargs="?", help="default: CURRENT")
    command.add_argument(
        "--code", type=Path, metavar="FOLDER", help="where model.yaml and train.py are"
    )
    command.add_argument("--json", type=Path, metavar="FILE", help="also write the outcome there")
    command.set_defaults(run=_with_settings(_reproduce))

    command = commands.add_parser(
        "evaluate", help="hold answers over HTTP against offline predictions"
    )
    command.add_argument("model", help="name of a published model whose model.yaml has `replay`")
    command.add_argument("--start", type=_instant, help="first instant of asking")
    command.add_argument("--end", type=_instant, help="instant of asking to stop before")
    command.add_argument(
        "--every-days", type=int, default=1, metavar="N", help="replay one day in N (default 1)"
    )
    command.add_argument("--min-auc", type=float, help="fail when the AUC is lower")
    command.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    command.set_defaults(run=_with_settings(_evaluate))

    command = commands.add_parser("report", help="draw what candidates would have said")
    command.add_argument("model", help="name of a served model")
    command.add_argument("--candidate", type=_positive, metavar="N", help="only this version")
    source = command.add_mutually_exclusive_group()
    source.add_argument(
        "--url",
        default="http://127.0.0.1:8000",
        help="where the model is served (default http://127.0.0.1:8000)",
    )
    source.add_argument(
        "--json", type=Path, metavar="FILE", help="draw this answer of GET …/comparison instead"
    )
    command.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="the HTML file to write"
    )
    command.set_defaults(run=_report)

    command = commands.add_parser("decisions", help="decide anew what was decided of releases")
    command.add_argument("file", type=Path, help="a decision log: <work dir>/decisions/*.jsonl")
    command.set_defaults(run=_decisions)

    command = commands.add_parser("compare", help="have two versions answer the same rows")
    command.add_argument("model", help="name of a published model")
    command.add_argument("champion", type=_positive, nargs="?", help="version that answers")
    command.add_argument("candidate", type=_positive, nargs="?", help="version beside it")
    rows = command.add_mutually_exclusive_group(required=True)
    rows.add_argument(
        "--from",
        dest="rows",
        type=Path,
        metavar="ROWS",
        help="parquet file: a column for each field of an instance and each stored feature",
    )
    rows.add_argument(
        "--pairs", type=Path, metavar="PAIRS", help="parquet file of what both have said already"
    )
    command.add_argument("--json", type=Path, metavar="FILE", help="also write all of it there")
    command.add_argument("--html", type=Path, metavar="FILE", help="also draw it there")
    command.set_defaults(run=_with_settings(_compare))

    command = commands.add_parser("replay", help="take a running service through recorded time")
    command.add_argument("model", help="name of a published model whose model.yaml has `replay`")
    command.add_argument("--from", type=_instant, required=True, dest="start", metavar="INSTANT")
    command.add_argument("--to", type=_instant, required=True, dest="end", metavar="INSTANT")
    command.add_argument(
        "--speed",
        type=_speed,
        default="max",
        metavar="N",
        help="seconds of the replay clock a second, or `max` (default)",
    )
    command.add_argument(
        "--url", help="a service whose replay clock is not beyond --from (default: one of its own)"
    )
    command.add_argument(
        "--shadow",
        action="append",
        default=[],
        metavar="VERSION",
        help="show this version what the champion answers; may be given several times",
    )
    command.add_argument(
        "--labels",
        action=argparse.BooleanOptionalAction,
        help="send the truth when it is known (default: where model.yaml has `labels`)",
    )
    command.add_argument(
        "--every-days", type=_positive, default=1, metavar="N", help="ask on one day in N"
    )
    command.add_argument("--report", type=Path, metavar="FILE", help="write the figures as JSON")
    command.add_argument(
        "--comparison", type=Path, metavar="FILE", help="write what the service says of candidates"
    )
    command.set_defaults(run=_with_settings(_replay))

    features = commands.add_parser("features", help="fill the online store")
    actions = features.add_subparsers(required=True, metavar="action")
    action = actions.add_parser("apply", help="write the definitions into Feast's registry")
    action.set_defaults(run=_with_settings(_apply))
    action = actions.add_parser("materialize", help="load the latest values into the online store")
    action.add_argument("--until", type=_instant, help="RFC 3339 instant (default: now)")
    action.add_argument(
        "--since",
        type=_instant_or_last,
        help="load rows from this instant on; `last`: from where each view's last load ended "
        "(default: all)",
    )
    action.add_argument("--views", nargs="+", metavar="VIEW", help="only these (default: all)")
    action.add_argument("--apply", action="store_true", help="apply the definitions first")
    action.set_defaults(run=_with_settings(_materialize))
    action = actions.add_parser("push", help="push new values of a push source")
    action.add_argument("source", help="name of the push source")
    rows = action.add_mutually_exclusive_group(required=True)
    rows.add_argument("file", type=Path, nargs="?", help="parquet or CSV file of rows")
    rows.add_argument("--stream", metavar="KEY", help="Redis stream of rows, read until stopped")
    action.add_argument(
        "--batch-rows",
        type=_positive,
        default=10_000,
        metavar="N",
        help="most rows that are written at once (default 10,000)",
    )
    stream = action.add_argument_group("with --stream")
    stream.add_argument("--stream-url", help="the stream's Redis (default: FEATURE_REDIS_URL)")
    stream.add_argument("--group", default="hikyaku", help="consumer group (default hikyaku)")
    stream.add_argument(
        "--claim-after-s",
        type=float,
        default=60.0,
        metavar="S",
        help="take over what another consumer has not acknowledged for so long (default 60)",
    )
    stream.add_argument("--once", action="store_true", help="end when nothing is left")
    stream.add_argument(
        "--metrics-port", type=int, metavar="PORT", help="serve Prometheus metrics on HIKYAKU_HOST"
    )
    action.set_defaults(run=_with_settings(_push))
    return parser


def _instant(text: str) -> datetime:
    instant = datetime.fromisoformat(text)
    if instant.tzinfo is None:
        raise argparse.ArgumentTypeError("give the time zone, as in 2013-12-31T18:00:00Z")
    return instant


def _instant_or_last(text: str) -> datetime | Literal["last"]:
    return "last" if text == "last" else _instant(text)


def _speed(text: str) -> float:
    speed = float("inf") if text == "max" else float(text)
    if not speed > 0:
        raise argparse.ArgumentTypeError("must be above 0, or `max`")
    return speed


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


def _with_settings(
    run: "Callable[[argparse.Namespace, Settings], int]",
) -> Callable[[argparse.Namespace], int]:
    def with_settings(arguments: argparse.Namespace) -> int:
        from app.config import load_settings

        return run(arguments, load_settings())

    return with_settings


def _up(arguments: argparse.Namespace, settings: "Settings") -> int:
    from app.local.up import up

    return up(settings)


def _serve(arguments: argparse.Namespace) -> int:
    from app.supervisor import supervise

    if arguments.workers is not None:
        os.environ["HIKYAKU_WORKERS"] = arguments.workers
    # Where the working directory is not on our path it must not come onto the worker's.
    path = () if os.getcwd() in sys.path else ("-P",)
    return supervise([sys.executable, *path, "-m", "app.cli", "worker"])


def _worker(arguments: argparse.Namespace, settings: "Settings") -> int:
    from app.supervisor import Assignment
    from app.telemetry.logs import configure_logging
    from app.worker import Parent

    parent = Parent(Assignment.from_json(arguments.assignment))
    number = parent.place + 1 if settings.workers > 1 else None
    configure_logging(settings.log_level, worker=number)
    # It takes over a second to import: a parent that ends or asks meanwhile finds us already.
    from app.server import serve

    serve(settings, parent)
    return 0


def _publish(arguments: argparse.Namespace, settings: "Settings") -> int:
    import asyncio

    from app.contract import parse_contract
    from app.features.plan import NO_FEATURES
    from app.repository.artifact import local_artifact
    from app.repository.layout import CONTRACT_FILE
    from app.repository.publish import fingerprint, publish
    from app.repository.signing import SigningKey
    from app.repository.store import is_url, open_repository
    from app.telemetry.logs import configure_logging

    configure_logging(settings.log_level)
    repository = open_repository(settings.model_repository)
    name = _known_model(arguments.model, settings)
    contract = parse_contract(repository.contract(name), repository.where(name, CONTRACT_FILE))
    key = None if arguments.sign_with is None else SigningKey(arguments.sign_with)
    model = repository.where(name)
    code = None if is_url(model) else Path(model)
    plan = NO_FEATURES
    if contract.feature_service is not None:
        from app.features.feast_plan import compile_plan, why_not_from_redis
        from app.features.feast_repo import open_store

        store = open_store(settings.feature_repo, None)
        plan = compile_plan(store, contract.feature_service)
        reason = why_not_from_redis(store, plan)
        if reason:
            print(f"  {contract.feature_service} will be read through the Feast SDK: {reason}")
    digest = fingerprint(contract, code, settings.feature_repo)
    with local_artifact(arguments.artifact) as artifact:
        publication = publish(
            code or model,
            artifact,
            plan,
            digest,
            keep_current=arguments.keep_current,
            signing_key=key,
        )
        manifest = asyncio.run(publication)
    print(f"  published {manifest.model} version {manifest.version}")
    return 0


def _verify(arguments: argparse.Namespace, settings: "Settings") -> int:
    import asyncio
    import tempfile

    from app.contract import parse_contract
    from app.repository.layout import CONTRACT_FILE
    from app.repository.signing import TrustedKeys
    from app.repository.store import open_repository
    from app.repository.vault import Vault
    from app.repository.verify import verify_version
    from app.telemetry.logs import configure_logging

    configure_logging(settings.log_level)
    repository = open_repository(settings.model_repository)
    name, number = arguments.model, _known_version(arguments, settings)
    contract = parse_contract(repository.contract(name), repository.where(name, CONTRACT_FILE))
    trusted = None if settings.trusted_keys is None else TrustedKeys(settings.trusted_keys)
    # A vault of its own, where nothing is remembered: it is verified now.
    with tempfile.TemporaryDirectory(prefix="hikyaku-") as vault:
        version = Vault(Path(vault), repository, trusted).take(name, number)
        found = asyncio.run(verify_version(version, contract, within_s=arguments.within_s))
    print(f"  {name} version {number} may be loaded")
    print(f"  memory: {found.memory_bytes / 1e6:,.1f} MB to open it and execute every batch")
    for rows, seconds in sorted(found.execution_s.items()):
        print(f"  {rows:>6,} rows: {seconds * 1e3:,.2f} ms")
    return 0


def _lineage(arguments: argparse.Namespace, settings: "Settings") -> int:
    import hashlib
    import json

    from app.repository.lineage import as_text, lineage
    from app.repository.manifest import MANIFEST_FILE, parse_manifest
    from app.repository.store import open_repository

    repository = open_repository(settings.model_repository)
    name, version = arguments.model, _known_version(arguments, settings)
    content = repository.manifest(name, version)
    manifest = parse_manifest(content, repository.where(name, version, MANIFEST_FILE))
    sha256 = hashlib.sha256(content).hexdigest()
    if arguments.json:
        print(json.dumps(lineage(manifest, sha256), indent=1))
    else:
        print(as_text(manifest, sha256))
    return 0


def _reproduce(arguments: argparse.Namespace, settings: "Settings") -> int:
    import tempfile

    from app.evaluation.reproduce import reproduce
    from app.repository.signing import TrustedKeys
    from app.repository.store import is_url, open_repository
    from app.repository.vault import Vault

    repository = open_repository(settings.model_repository)
    trusted = None if settings.trusted_keys is None else TrustedKeys(settings.trusted_keys)
    version = _known_version(arguments, settings)
    folder = repository.where(arguments.model)
    if arguments.code is None and is_url(folder):
        raise ConfigurationError(f"{folder}: holds no training code: name its folder with --code")
    with tempfile.TemporaryDirectory(prefix="hikyaku-") as vault:
        published = Vault(Path(vault), repository, trusted).take(arguments.model, version)
        return reproduce(
            published, arguments.code or Path(folder), settings.feature_repo, arguments.json
        )


def _evaluate(arguments: argparse.Namespace, settings: "Settings") -> int:
    from app.evaluation.evaluate import evaluate

    return evaluate(
        _model_folder(arguments.model, settings),
        settings,
        start=arguments.start,
        end=arguments.end,
        every_days=arguments.every_days,
        min_auc=arguments.min_auc,
        report_file=arguments.json,
    )


def _report(arguments: argparse.Namespace) -> int:
    from app.evaluation.report import report

    report(arguments.model, arguments.candidate, arguments.url, arguments.json, arguments.output)
    print(f"  wrote {arguments.output}")
    return 0


def _decisions(arguments: argparse.Namespace) -> int:
    from app.clock import as_rfc3339
    from app.rollout.decision_log import decided_anew, decisions

    count, other = 0, 0
    for decision in decisions(arguments.file):
        count += 1
        anew = decided_anew(decision)
        verdict = decision.verdict
        # The last digits of E are those of a machine's arithmetic.
        is_same = (anew.action, anew.reasons) == (verdict.action, verdict.reasons)
        other += not is_same
        mark = "•" if is_same else "✗"
        print(f"{mark} {as_rfc3339(decision.at_s)} {decision.model} {decision.version}: ", end="")
        print(f"{decision.did or verdict.action}: {verdict.reasons[0]}")
        if not is_same:
            print(f"  decided anew: {anew.action}: {anew.reasons[0]}")
    print(f"{count:,} decisions, {other:,} of them another one when decided anew")
    return 1 if other else 0


def _compare(arguments: argparse.Namespace, settings: "Settings") -> int:
    from app.evaluation.compare import Files, compare, compare_pairs
    from app.repository.signing import TrustedKeys
    from app.repository.store import open_repository

    repository = open_repository(settings.model_repository)
    name = _known_model(arguments.model, settings)
    files = Files(arguments.json, arguments.html)
    if arguments.pairs is not None:
        return compare_pairs(repository, name, arguments.pairs, files)
    if arguments.candidate is None:
        raise ConfigurationError("name the versions of champion and candidate")
    versions = (arguments.champion, arguments.candidate)
    for version in versions:
        _require_version(repository, name, version)
    trusted = None if settings.trusted_keys is None else TrustedKeys(settings.trusted_keys)
    return compare(repository, trusted, name, versions, arguments.rows, files)


def _replay(arguments: argparse.Namespace, settings: "Settings") -> int:
    from app.evaluation.replay import Period, replay

    if arguments.end <= arguments.start:
        raise ConfigurationError("--to: not after --from")
    return replay(
        _model_folder(arguments.model, settings),
        settings,
        Period(arguments.start, arguments.end, arguments.every_days, arguments.speed),
        address=arguments.url,
        redis_url=_redis_url(settings),
        candidates=arguments.shadow,
        with_labels=arguments.labels,
        report_file=arguments.report,
        comparison_file=arguments.comparison,
    )


def _apply(arguments: argparse.Namespace, settings: "Settings") -> int:
    from app.features.feast_repo import apply

    apply(settings.feature_repo, settings.feature_redis_url)
    return 0


def _materialize(arguments: argparse.Namespace, settings: "Settings") -> int:
    from app.features.feast_repo import apply, materialize, open_writer

    if arguments.apply:
        apply(settings.feature_repo, _redis_url(settings))
    loads = materialize(
        open_writer(settings.feature_repo, _redis_url(settings)),
        arguments.until or datetime.now(UTC),
        since=arguments.since,
        views=arguments.views,
        say=lambda view: print(f"  {view} …", flush=True),
    )
    for load in loads:
        rows = "" if load.stored_rows is None else f"{load.stored_rows:,} rows stored, "
        print(f"  {load.view}: {rows}{load.took_s:.1f} s", flush=True)
    return 0


def _push(arguments: argparse.Namespace, settings: "Settings") -> int:
    from app.features.feast_repo import open_writer
    from app.features.push import PushTarget
    from app.features.push_progress import Progress
    from app.features.row_file import push_file
    from app.telemetry.metrics import PushMetrics

    target = PushTarget(open_writer(settings.feature_repo, _redis_url(settings)), arguments.source)
    progress = Progress(_say)
    if arguments.stream is None:
        push_file(target, arguments.file, batch_rows=arguments.batch_rows, progress=progress)
    else:
        _push_stream(arguments, settings, target, progress, PushMetrics())
    print("\n".join(progress.totals(arguments.source)), flush=True)
    return 0


def _push_stream(
    arguments: argparse.Namespace,
    settings: "Settings",
    target: "PushTarget",
    progress: "Progress",
    metrics: "PushMetrics",
) -> None:
    """Until Ctrl-C or SIGTERM, which let the batch under way finish; the second one does not."""
    from app.features.row_stream import StreamPosition, StreamPush, stream_client

    setting = "FEATURE_REDIS_URL" if arguments.stream_url is None else "--stream-url"
    url = arguments.stream_url or _redis_url(settings)
    if url is None:
        raise ConfigurationError("--stream needs FEATURE_REDIS_URL or --stream-url")
    position = StreamPosition(
        arguments.stream,
        arguments.group,
        f"{socket.gethostname()}-{os.getpid()}",
        arguments.claim_after_s,
    )
    stop = threading.Event()

    def stop_after_the_batch(number: int, frame: object) -> None:
        stop.set()
        for told_to_stop in (signal.SIGINT, signal.SIGTERM):
            signal.signal(told_to_stop, signal.default_int_handler)

    with ExitStack() as stack:
        client = stack.enter_context(stream_client(url, setting))
        if arguments.metrics_port is not None:
            port = stack.enter_context(metrics.served(settings.host, arguments.metrics_port))
            _say(f"metrics on http://{settings.host}:{port}/metrics")
        for told_to_stop in (signal.SIGINT, signal.SIGTERM):
            signal.signal(told_to_stop, stop_after_the_batch)
        consumer = StreamPush(
            client,
            position,
            target,
            metrics,
            batch_rows=arguments.batch_rows,
            progress=progress,
            say=_say,
        )
        consumer.run(stop, once=arguments.once)
    if consumer.refused_entries:
        _say(f"{consumer.refused_entries:,} entries were refused: see {position.refused}")


def _say(line: str) -> None:
    print(f"  {line}", flush=True)


def _known_model(name: str, settings: "Settings") -> str:
    from app.repository.store import open_repository

    models = open_repository(settings.model_repository).models()
    if name not in models:
        raise ConfigurationError(
            f"no model {name!r} in {settings.model_repository}: {list(models)}"
        )
    return name


def _known_version(arguments: argparse.Namespace, settings: "Settings") -> int:
    """The version that is asked for, else the one that CURRENT names."""
    from app.repository.store import open_repository

    name = _known_model(arguments.model, settings)
    repository = open_repository(settings.model_repository)
    if arguments.version is None:
        current = repository.current(name)
        if current is None:
            raise ConfigurationError(f"{repository.where(name)}: nothing is published yet")
        return current
    version: int = arguments.version
    _require_version(repository, name, version)
    return version


def _require_version(repository: "Repository", name: str, version: int) -> None:
    numbers = repository.versions(name)
    if version not in numbers:
        raise ConfigurationError(f"{name} has no version {version}: {list(numbers)}")


def _model_folder(name: str, settings: "Settings") -> Path:
    from app.repository.store import is_url

    if is_url(settings.model_repository):
        raise ConfigurationError("MODEL_REPOSITORY: must be a folder here, not a URL")
    return Path(settings.model_repository, _known_model(name, settings))


def _redis_url(settings: "Settings") -> str | None:
    """The Redis of the settings, else the one that `hikyaku up` has started beside us."""
    started = settings.work_dir / "feature-redis-url"
    if settings.feature_redis_url is None and started.exists():
        return started.read_text()
    return settings.feature_redis_url


if __name__ == "__main__":
    main()
