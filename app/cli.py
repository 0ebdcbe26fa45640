"""The `hikyaku` command."""

import argparse
import asyncio
import signal
import sys
import time
from datetime import datetime
from pathlib import Path

from app.config import Settings, load_settings
from app.contract import load_contract
from app.errors import ConfigurationError, HikyakuError
from app.features.plan import NO_FEATURES
from app.repository.layout import CONTRACT_FILE, model_folders
from app.telemetry.logs import configure_logging

# Feast takes seconds to import and training libraries need not be installed where a service runs:
# each command imports what it alone needs.


def main() -> None:
    """Run the command of the process's arguments; a fault is one sentence and exit status 1."""
    arguments = _parser().parse_args()
    # A shell that starts us in the background has SIGINT ignored, which Python would inherit.
    for told_to_stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(told_to_stop, signal.default_int_handler)
    try:
        settings = load_settings()
        status = arguments.run(arguments, settings)
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
    command.set_defaults(run=_up)

    command = commands.add_parser("serve", help="serve the published models")
    command.set_defaults(run=_serve)

    command = commands.add_parser("publish", help="make a trained model the current version")
    command.add_argument("model", help="name of a folder of the model repository")
    command.add_argument("artifact", type=Path, help="folder with model.onnx and training.json")
    command.set_defaults(run=_publish)

    command = commands.add_parser("evaluate", help="replay recorded requests through HTTP")
    command.add_argument("model", help="name of a published model whose model.yaml has `replay`")
    command.add_argument("--start", type=_instant, help="first instant of asking")
    command.add_argument("--end", type=_instant, help="instant of asking to stop before")
    command.add_argument(
        "--every-days", type=int, default=1, metavar="N", help="replay one day in N (default 1)"
    )
    command.add_argument("--min-auc", type=float, help="fail when the AUC is lower")
    command.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    command.set_defaults(run=_evaluate)

    features = commands.add_parser("features", help="fill the online store")
    actions = features.add_subparsers(required=True, metavar="action")
    action = actions.add_parser("apply", help="write the definitions into Feast's registry")
    action.set_defaults(run=_apply)
    action = actions.add_parser("materialize", help="load the latest values into the online store")
    action.add_argument("--until", type=_instant, required=True, help="RFC 3339 instant")
    action.add_argument("--apply", action="store_true", help="apply the definitions first")
    action.set_defaults(run=_materialize)
    action = actions.add_parser("push", help="push new values of a push source")
    action.add_argument("source", help="name of the push source")
    action.add_argument("file", type=Path, help="parquet or CSV file of rows")
    action.set_defaults(run=_push)
    return parser


def _instant(text: str) -> datetime:
    instant = datetime.fromisoformat(text)
    if instant.tzinfo is None:
        raise argparse.ArgumentTypeError("give the time zone, as in 2013-12-31T18:00:00Z")
    return instant


def _up(arguments: argparse.Namespace, settings: Settings) -> int:
    from app.local.up import up

    return up(settings)


def _serve(arguments: argparse.Namespace, settings: Settings) -> int:
    from app.server import serve

    configure_logging(settings.log_level)
    serve(settings)
    return 0


def _publish(arguments: argparse.Namespace, settings: Settings) -> int:
    from app.repository.publish import fingerprint, publish

    folder = _model_folder(arguments.model, settings)
    plan = NO_FEATURES
    service = load_contract(folder / CONTRACT_FILE).feature_service
    if service is not None:
        from app.features.feast_plan import compile_plan, why_not_from_redis
        from app.features.feast_repo import open_store

        store = open_store(settings.feature_repo, None)
        plan = compile_plan(store, service)
        reason = why_not_from_redis(store, plan)
        if reason:
            print(f"  {service} will be read through the Feast SDK: {reason}")
    digest = fingerprint(folder, settings.feature_repo)
    manifest = asyncio.run(publish(folder, arguments.artifact, plan, digest))
    print(f"  published {manifest.model} version {manifest.version}")
    return 0


def _evaluate(arguments: argparse.Namespace, settings: Settings) -> int:
    from app.evaluation.replay import evaluate

    folder = _model_folder(arguments.model, settings)
    return evaluate(
        folder,
        settings,
        start=arguments.start,
        end=arguments.end,
        every_days=arguments.every_days,
        min_auc=arguments.min_auc,
        report_file=arguments.json,
    )


def _apply(arguments: argparse.Namespace, settings: Settings) -> int:
    from app.features.feast_repo import apply

    apply(settings.feature_repo, settings.feature_redis_url)
    return 0


def _materialize(arguments: argparse.Namespace, settings: Settings) -> int:
    from app.features.feast_repo import apply, materialize, open_store

    if arguments.apply:
        apply(settings.feature_repo, _redis_url(settings))
    store = open_store(settings.feature_repo, _redis_url(settings))
    started_s = time.monotonic()
    for view in materialize(store, arguments.until):
        print(f"  {time.monotonic() - started_s:5.1f} s  {view}", flush=True)
    return 0


def _push(arguments: argparse.Namespace, settings: Settings) -> int:
    import pandas as pd

    from app.features.feast_repo import open_store, push

    read = pd.read_csv if arguments.file.suffix == ".csv" else pd.read_parquet
    try:
        rows = read(arguments.file)
    except ValueError as exc:
        raise ConfigurationError(f"{arguments.file}: cannot be read: {exc}") from exc
    push(open_store(settings.feature_repo, _redis_url(settings)), arguments.source, rows)
    print(f"pushed {len(rows)} rows to {arguments.source}")
    return 0


def _model_folder(name: str, settings: Settings) -> Path:
    folders = model_folders(settings.model_repository)
    if name not in folders:
        raise ConfigurationError(
            f"no model {name!r} in {settings.model_repository}: {sorted(folders)}"
        )
    return folders[name]


def _redis_url(settings: Settings) -> str | None:
    """The Redis of the settings, else the one that `hikyaku up` has started beside us."""
    from app.local.up import WORK_FOLDER

    started = WORK_FOLDER / "feature-redis-url"
    if settings.feature_redis_url is None and started.exists():
        return started.read_text()
    return settings.feature_redis_url


if __name__ == "__main__":
    main()
