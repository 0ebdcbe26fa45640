"""`hikyaku up`: features, models, a Redis and the server on one machine, doing only what is due."""

import fcntl
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import redis

from app.api.operators import operators_of
from app.config import Settings
from app.contract import load_contract
from app.errors import ConfigurationError, HikyakuError, InvalidModel
from app.features.plan import plan_from_json
from app.features.registry_watch import registry_file
from app.listener import bind
from app.local.processes import child
from app.local.redis_server import own_redis
from app.repository.layout import CONTRACT_FILE
from app.repository.manifest import MANIFEST_FILE, PLAN_FILE, parse_manifest, read_manifest
from app.repository.publish import fingerprint
from app.repository.store import Repository, is_url, open_repository

# Written beside the features, so that an emptied or exchanged Redis is filled again.
_MARKER = "hikyaku:materialized"
_READY_TIMEOUT_S = 120
# Not through a proxy of the environment: it is this machine that we ask.
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


_HIKYAKU = (sys.executable, "-m", "app.cli")


def up(settings: Settings) -> int:
    """Prepare what is not up to date, serve until Ctrl-C, stop what was started.

    Raises `HikyakuError` with a sentence for the operator. Returns the server's exit status.
    """
    with ExitStack() as stack:
        stack.enter_context(_alone_in(settings.work_dir))
        with bind(settings.host, settings.port) as probe:  # better told now than after training
            port = probe.getsockname()[1]
        operators_of(settings)
        clock = settings.replay_clock
        until = clock.isoformat() if clock else _end_of_history(settings.feature_repo)
        own_url = ""
        if settings.feature_redis_url is None or settings.state_redis_url is None:
            own_url = stack.enter_context(own_redis(settings.work_dir / "redis"))
            print(f"• a Redis of our own on {own_url.rpartition('@')[2]}", flush=True)
        redis_url = settings.feature_redis_url or own_url
        environment = os.environ | {
            "FEATURE_REDIS_URL": redis_url,
            "STATE_REDIS_URL": settings.state_redis_url or own_url,
            "HIKYAKU_REPLAY_CLOCK": until,
            "HIKYAKU_PORT": str(port),
        }
        _prepare_features(settings.feature_repo, redis_url, until, environment)
        if not is_url(settings.model_repository):  # elsewhere there is no training code
            repository = open_repository(settings.model_repository)
            for name in repository.models():
                _prepare_model(name, repository, settings.feature_repo, environment)
        stack.enter_context(_known_to_other_commands(settings.work_dir, redis_url))
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        return _serve(settings, f"http://{host}:{port}", environment)


def _end_of_history(feature_repo: Path) -> str:
    """The last instant of the history (RFC 3339): the replay clock stands there."""
    path = feature_repo / "data" / "history.json"
    try:
        return str(json.loads(path.read_text())["end"])
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise ConfigurationError(f"{path}: no history of features; `make run` builds it") from exc


def _prepare_features(
    feature_repo: Path, redis_url: str, until: str, environment: Mapping[str, str]
) -> None:
    """Apply and materialize, unless this Redis already holds just that."""
    due = _digest(feature_repo, until)
    try:
        client = redis.Redis.from_url(redis_url, socket_timeout=5, socket_connect_timeout=5)
    except ValueError as exc:
        raise ConfigurationError(f"FEATURE_REDIS_URL: {exc}") from exc
    with client:
        try:
            registry = registry_file(feature_repo)
            applied = registry is None or registry.is_file()
            if applied and client.get(_MARKER) == due.encode():
                print("• features are up to date", flush=True)
                return
            with _told("features: apply the definitions, load the latest values into Redis"):
                _hikyaku(
                    *("features", "materialize", "--apply", "--until", until),
                    environment=environment,
                )
            client.set(_MARKER, due)
        except redis.RedisError as exc:
            raise ConfigurationError(f"FEATURE_REDIS_URL: cannot be used: {exc}") from exc


def _prepare_model(
    name: str, repository: Repository, feature_repo: Path, environment: Mapping[str, str]
) -> None:
    """Train and publish, unless CURRENT was trained from just what is there now."""
    folder = Path(repository.where(name))
    if not (folder / "train.py").is_file():
        return
    version = repository.current(name)
    if version is not None and _is_trained_from(folder, version, feature_repo):
        print(f"• {name}: version {version} is up to date", flush=True)
        return
    with _told(f"{name}: train and publish"), tempfile.TemporaryDirectory() as artifact:
        _python(str(folder / "train.py"), "--output", artifact, environment=environment)
        _hikyaku("publish", name, artifact, environment=environment)


def _is_trained_from(folder: Path, version: int, feature_repo: Path) -> bool:
    """Whether the version is readable and was trained from just what is there now."""
    try:
        manifest, _ = read_manifest(folder / str(version))
        plan_from_json((folder / str(version) / PLAN_FILE).read_bytes())
    except (InvalidModel, OSError, ValueError):
        return False  # of another release of this software: train anew
    contract = load_contract(folder / CONTRACT_FILE)
    return manifest.fingerprint == fingerprint(contract, folder, feature_repo)


def _serve(settings: Settings, address: str, environment: Mapping[str, str]) -> int:
    """Run the server until it ends or we are told to stop; print how to ask it."""
    print("• starting the server …", flush=True)
    started_s = time.monotonic()
    with child([*_HIKYAKU, "serve"], environment) as process:
        try:
            if _wait_until_ready(process, address):
                print(f"  ready after {time.monotonic() - started_s:.1f} s\n", flush=True)
                print(_request_to_paste(settings, address), flush=True)
            return process.wait()
        except KeyboardInterrupt:
            print("\n• stopping", flush=True)
            return 0


def _wait_until_ready(process: "subprocess.Popen[bytes]", address: str) -> bool:
    until_s = time.monotonic() + _READY_TIMEOUT_S
    while process.poll() is None:
        try:
            with _DIRECT.open(f"{address}/v2/health/ready", timeout=2):
                return True
        except (urllib.error.URLError, TimeoutError, ConnectionError) as exc:
            if time.monotonic() > until_s:
                raise ConfigurationError(
                    f"the server was not ready within {_READY_TIMEOUT_S} s: {exc}"
                ) from exc
        time.sleep(0.1)
    return False


def _request_to_paste(settings: Settings, address: str) -> str:
    """One curl a model, with a real instance: the first golden row of its version."""
    requests = []
    repository = open_repository(settings.model_repository)
    for name in repository.models():
        version = repository.current(name)
        if version is None:
            continue
        what = repository.where(name, version, MANIFEST_FILE)
        manifest = parse_manifest(repository.manifest(name, version), what)
        body = json.dumps({"instances": [manifest.training.golden.instances[0]]})
        requests.append(
            f"curl -s {address}/v1/models/{name}:predict \\\n"
            f"  -H 'Content-Type: application/json' \\\n  -d '{body}'\n"
        )
    return "\n".join([*requests, f"Serving on {address} (documentation: /docs). Ctrl-C stops it."])


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Two of us in one folder would overwrite each other's Redis."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise ConfigurationError("another `hikyaku up` runs in this folder") from exc
        yield


@contextmanager
def _known_to_other_commands(folder: Path, redis_url: str) -> Iterator[None]:
    """While we run, `hikyaku features push` in another terminal finds our Redis in this file."""
    path = folder / "feature-redis-url"
    path.touch(mode=0o600)
    path.write_text(redis_url)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


@contextmanager
def _told(text: str) -> Iterator[None]:
    """Say what is being done and how long it took."""
    print(f"• {text}", flush=True)
    started_s = time.monotonic()
    yield
    print(f"  took {time.monotonic() - started_s:.1f} s", flush=True)


def _hikyaku(*arguments: str, environment: Mapping[str, str]) -> None:
    _python(*_HIKYAKU[1:], *arguments, environment=environment)


def _python(*arguments: str, environment: Mapping[str, str]) -> None:
    """Run a step in a process of its own: what it imported and allocated is gone after it."""
    with child([sys.executable, *arguments], environment) as process:
        if process.wait() != 0:
            raise HikyakuError(f"`{' '.join(arguments)}` failed; what it said is above")


def _digest(feature_repo: Path, until: str) -> str:
    """Of the definitions and of the instant up to which values are loaded."""
    digest = hashlib.sha256(until.encode())
    for path in [*sorted(feature_repo.glob("*.py")), feature_repo / "feature_store.yaml"]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
