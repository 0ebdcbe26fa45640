"""A real Redis with the features of every entity, as Feast itself writes them."""

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import redis
import yaml

from app.errors import ConfigurationError
from app.features.redis_address import RedisAddress, parse_address
from app.local.redis_server import own_redis
from loadtests.bench.failure import BenchFailure

_HERE = Path(__file__).parent
_DEFINITIONS = _HERE / "feature_repo" / "definitions.py"
_WRITTEN_BY = (_DEFINITIONS, _HERE / "fill_store.py", _HERE / "rows.py")


@dataclass(frozen=True)
class Store:
    """`repo` is a Feast repository whose online store is the Redis at `url`."""

    repo: Path
    url: str = field(repr=False)

    def cpu_s(self) -> float:
        """Seconds of processor that the Redis has used, user and system."""
        with redis.Redis.from_url(self.url) as client:
            used = client.info("cpu")
        return float(used["used_cpu_user"]) + float(used["used_cpu_sys"])


@contextmanager
def feature_store(work: Path) -> Iterator[Store]:
    """A Redis on the loopback for as long as the context lasts.

    What Feast wrote stays in `work` and is used again until the code that writes it changes. Raises
    `BenchFailure` where there is no Redis or Feast cannot write.
    """
    folder = (work / f"store-{_digest()}").absolute()
    filled = folder / "filled"
    if not filled.exists():
        shutil.rmtree(folder, ignore_errors=True)
    repo = folder / "repo"
    (repo / "data").mkdir(parents=True, exist_ok=True)
    shutil.copy(_DEFINITIONS, repo)
    try:
        with own_redis(folder / "redis") as url:
            (repo / "feature_store.yaml").write_text(_settings(url))
            store = Store(repo, url)
            if not filled.exists():
                _fill(store)
                filled.touch()
            yield store
    except ConfigurationError as exc:
        raise BenchFailure(str(exc)) from exc


def _digest() -> str:
    sources = b"".join(source.read_bytes() for source in _WRITTEN_BY)
    return hashlib.sha256(sources).hexdigest()[:16]


def _settings(url: str) -> str:
    """feature_store.yaml, which peers read as it stands."""
    address = parse_address(url)
    assert isinstance(address, RedisAddress)
    connection = f'{address.host}:{address.port},password="{address.password}"'
    settings = {
        "project": "bench",
        "provider": "local",
        "registry": "data/registry.db",
        "online_store": {"type": "redis", "connection_string": connection},
        "entity_key_serialization_version": 3,
    }
    return yaml.safe_dump(settings)


def _fill(store: Store) -> None:
    command = [sys.executable, "-m", "loadtests.bench.fill_store", str(store.repo), store.url]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        raise BenchFailure(f"Feast did not write the features: {finished.stderr[-2000:]}")
    with redis.Redis.from_url(store.url) as client:
        client.save()
