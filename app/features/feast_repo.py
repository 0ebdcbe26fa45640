"""The Feast repository: opened on our Redis, applied, materialized, joined in time."""

import contextlib
import io
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import yaml
from feast import FeatureStore, FileSource, OnDemandFeatureView
from feast.feature_view_projection import FeatureViewProjection
from feast.repo_config import RepoConfig
from feast.repo_operations import apply_total
from numpy.typing import NDArray

from app.errors import ConfigurationError, HikyakuError
from app.features.plan import ValueType, value_type
from app.features.redis_address import (
    ClusterAddress,
    RedisAddress,
    SentinelAddress,
    parse_address,
)
from app.features.redis_writes import ONLINE_STORE_TYPE, ComparingRedisOnlineStore

_BEGINNING = datetime(1970, 1, 1, tzinfo=UTC)
_ROW = "hikyaku_row"
_MATERIALIZED_AT_ONCE = 10_000
# Feast's own connection waits for ever.
_GIVE_UP = ",socket_timeout=10,socket_connect_timeout=5"


def open_store(repo: Path, redis_url: str | None, *, online_only: bool = False) -> FeatureStore:
    """The store of a repository folder; with `redis_url` its online store is that Redis.

    `online_only` leaves the offline store out: what serves need not have its libraries. Raises
    `ConfigurationError` when the folder or the address cannot be used.
    """
    config = _config(repo, redis_url, online_only=online_only)
    return FeatureStore(repo_path=str(repo.resolve()), config=config)


def open_writer(repo: Path, redis_url: str | None) -> FeatureStore:
    """The store of a repository folder for jobs that fill it.

    On Redis no write of its puts an older row over a newer one, whoever else writes, and a Redis
    that stays silent is given up. Raises `ConfigurationError` as `open_store` does.
    """
    config = _config(repo, redis_url, for_writing=True)
    return FeatureStore(repo_path=str(repo.resolve()), config=config)


def apply(repo: Path, redis_url: str | None) -> None:
    """Write the repository's definitions into its registry."""
    config = _config(repo, redis_url)
    with _in_repository(repo), contextlib.redirect_stdout(io.StringIO()):
        apply_total(config, config.repo_path, skip_source_validation=False)


@dataclass(frozen=True, slots=True)
class Materialized:
    """One view that was loaded. `stored_rows` were new or newer than what was there; None: this
    online store does not say."""

    view: str
    stored_rows: int | None
    took_s: float


def materialize(
    store: FeatureStore,
    until: datetime,
    *,
    since: datetime | Literal["last"] | None = None,
    views: Sequence[str] | None = None,
    say: Callable[[str], None] = lambda view: None,
) -> Iterator[Materialized]:
    """Load the latest row of every entity of `[since, until]` into the online store, view by view.

    Rows that have outlived their ttl are loaded too: a reader can then tell an entity that is too
    old from one that never was. `since` None: from the beginning; "last": from where the registry
    says that the view's last load ended. `views` None: all that have online data. `say` is told of
    each view before it is loaded. A stored on-demand view is loaded only when it is named: Feast
    stamps its rows with the instant of the load. Raises `ConfigurationError` before anything is
    loaded for a view that is unknown or has no online data, and `HikyakuError` naming one that
    could not be loaded.
    """
    for view in _to_materialize(store, views):
        begin = _last_end(view) if since == "last" else since or _BEGINNING
        if begin > until:
            raise ConfigurationError(
                f"{view.name}: {begin.isoformat()} is after the end of the load"
            )
        say(view.name)
        started_s = time.monotonic()
        before = stored_rows(store)
        try:
            # Feast draws progress bars of its own.
            with _in_repository(store.repo_path), contextlib.redirect_stdout(io.StringIO()):
                store.materialize(begin, until, feature_views=[view.name])
        except Exception as exc:  # an offline store raises what its engine raises
            raise HikyakuError(f"{view.name}: cannot be loaded: {exc}") from exc
        after = stored_rows(store)
        stored = None if before is None or after is None else after - before
        yield Materialized(view.name, stored, time.monotonic() - started_s)


def _to_materialize(store: FeatureStore, views: Sequence[str] | None) -> list[Any]:
    known = {view.name: view for view in [*store.list_feature_views(), *_stream_views(store)]}
    online = {name: view for name, view in known.items() if view.online and view.enabled}
    if views is None:
        if not online:
            raise ConfigurationError("no feature view in the registry has online data; apply it?")
        return list(online.values())
    for view in store.list_on_demand_feature_views():
        known[view.name] = view
        if view.write_to_online_store and view.enabled:
            online[view.name] = view
    for name in views:
        if name not in known:
            raise ConfigurationError(f"no feature view {name!r} in the registry: {sorted(known)}")
        if name not in online:
            raise ConfigurationError(
                f"feature view {name!r} has no online data; those that have: {sorted(online)}"
            )
    return [online[name] for name in views]


def _stream_views(store: FeatureStore) -> list[Any]:
    return list(store.list_stream_feature_views())


def _last_end(view: Any) -> datetime:
    """Where the view's last load ended, in the registry's words."""
    end: datetime | None = getattr(view, "most_recent_end_time", None)  # an on-demand one has none
    if end is None:
        return _BEGINNING
    return end if end.tzinfo is not None else end.replace(tzinfo=UTC)


def stored_rows(store: FeatureStore) -> int | None:
    """Rows that this store's writes have changed so far; None: this online store does not say."""
    online_store = store.provider.online_store
    if isinstance(online_store, ComparingRedisOnlineStore):
        return online_store.stored_rows
    return None


def write(store: FeatureStore, view: str, rows: pd.DataFrame) -> None:
    """Write rows of one view online; an entity's older rows are not written."""
    store.write_to_online_store(view, rows)


def pushed_histories(store: FeatureStore, service: str) -> Iterator[tuple[str, str, Path]]:
    """For each push source that feeds a view which a service reads: its name, the column of the
    instant at which a row became known, and the parquet file of everything that was ever pushed."""
    read = dict.fromkeys(
        source.name
        for projection in store.get_feature_service(service).feature_view_projections
        for source in _stored(store, projection)
    )
    views = {
        view.stream_source.name: view
        for view in map(store.get_feature_view, read)
        if view.stream_source is not None
    }
    for push_source, view in views.items():
        history = view.batch_source
        if isinstance(history, FileSource):
            yield push_source, history.timestamp_field, store.repo_path / history.path


def offline_files(store: FeatureStore, service: str) -> list[Path]:
    """The files that a point-in-time join of a service reads; of other offline stores none."""
    read = dict.fromkeys(
        source.name
        for projection in store.get_feature_service(service).feature_view_projections
        for source in _stored(store, projection)
    )
    sources = [store.get_feature_view(name).batch_source for name in read]
    return [store.repo_path / each.path for each in sources if isinstance(each, FileSource)]


def _stored(
    store: FeatureStore, projection: FeatureViewProjection
) -> Iterable[FeatureViewProjection]:
    """The stored views behind a view of a service: what an on-demand view reads, else itself."""
    view = store.registry.get_any_feature_view(projection.name, store.project)
    if isinstance(view, OnDemandFeatureView):
        return list(view.source_feature_view_projections.values())
    return [projection]


def point_in_time(
    store: FeatureStore,
    service: str,
    entities: pd.DataFrame,
    at: str,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, NDArray[Any]]:
    """Features of a service as they were known at each row's instant in column `at`.

    `entities` holds the join keys, and the fields that on-demand views take. Returns a column per
    `view:feature` reference, in the order of the rows: float64 with NaN for null, or objects.
    Joined a month at a time, because the join's memory grows with its rows; `say` is told of each.
    Raises `RuntimeError` when the join loses or invents rows (feast #6787).
    """
    definition = store.get_feature_service(service)
    asked = entities.reset_index(drop=True).rename(columns={at: "event_timestamp"})
    asked[_ROW] = np.arange(len(asked))
    months = asked["event_timestamp"].dt.strftime("%Y-%m")
    joined = []
    with _in_repository(store.repo_path):
        for month, part in asked.groupby(months):
            say(f"{month}: {len(part):,} rows")
            job = store.get_historical_features(part, definition, full_feature_names=True)
            joined.append(job.to_df())
    table = pd.concat(joined).sort_values(_ROW)
    if not np.array_equal(table[_ROW].to_numpy(), asked[_ROW].to_numpy()):
        raise RuntimeError(f"the join returned {len(table)} rows for {len(asked)}")
    return {
        f"{projection.name_to_use()}:{feature.name}": _column(
            table[f"{projection.name_to_use()}__{feature.name}"], value_type(str(feature.dtype))
        )
        for projection in definition.feature_view_projections
        for feature in projection.features
    }


def _column(series: "pd.Series[Any]", kind: ValueType) -> NDArray[Any]:
    if kind == "number":
        return series.to_numpy(dtype=np.float64, na_value=np.nan)
    return series.astype(object).where(series.notna(), None).to_numpy()


def _config(
    repo: Path, redis_url: str | None, *, online_only: bool = False, for_writing: bool = False
) -> RepoConfig:
    path = repo / "feature_store.yaml"
    if not path.is_file():
        raise ConfigurationError(f"{path}: no such file; HIKYAKU_FEATURE_REPO names its folder")
    try:
        document = yaml.safe_load(os.path.expandvars(path.read_text()))
        if online_only:
            document.pop("offline_store", None)
        if for_writing:
            _prepare_for_writing(document)
        config = RepoConfig(**document)
    except (yaml.YAMLError, AttributeError, TypeError, ValueError) as exc:
        raise ConfigurationError(f"{path}: {exc}") from exc
    config.repo_path = repo.resolve()
    if redis_url is None:
        return config
    store = config.online_store
    if store.type not in {"redis", ONLINE_STORE_TYPE}:
        raise ConfigurationError(
            f"FEATURE_REDIS_URL is set, but {path} has an online store of type {store.type!r}"
        )
    address = parse_address(redis_url)
    store.connection_string = connection_string(redis_url)
    store.redis_type = "redis"
    if isinstance(address, ClusterAddress):
        store.redis_type = "redis_cluster"
    if isinstance(address, SentinelAddress):
        store.redis_type, store.sentinel_master = "redis_sentinel", address.name
    if for_writing:
        store.connection_string += _GIVE_UP
    return config


def _prepare_for_writing(document: dict[str, Any]) -> None:
    """Of a repository's settings as they were read."""
    online_store = document.get("online_store")
    if isinstance(online_store, dict) and online_store.get("type") == "redis":
        online_store["type"] = ONLINE_STORE_TYPE
    # Without a size Feast writes a view as one batch, and of a table in parts only the first one.
    document.setdefault("materialization", {}).setdefault(
        "online_write_batch_size", _MATERIALIZED_AT_ONCE
    )


def connection_string(redis_url: str) -> str:
    """Feast's form of a Redis address: `redis://:secret@host:6379/2` →
    `host:6379,password="secret",db=2`. Raises `ConfigurationError` for what it cannot say."""
    address = parse_address(redis_url)
    hosts: tuple[RedisAddress, ...]
    options: dict[str, Any] = {}
    match address:
        case RedisAddress():
            hosts, spoken_to = (address,), address
        case ClusterAddress():
            hosts, spoken_to = address.nodes, address.nodes[0]
        case SentinelAddress():
            hosts, spoken_to = address.sentinels, address.master
            options["sentinel_kwargs"] = _options(hosts[0])
    if any(":" in host.host for host in hosts):
        raise ConfigurationError("FEATURE_REDIS_URL: Feast takes no IPv6 address")
    options |= _options(spoken_to)
    # Feast decodes each value as JSON where it can: an unquoted password of digits is a number.
    pairs = [f"{name}={json.dumps(value)}" for name, value in options.items() if value]
    if any("," in pair for pair in pairs):
        raise ConfigurationError(
            "FEATURE_REDIS_URL: Feast can take no comma in a path, user or password, and no "
            "password of sentinels together with TLS"
        )
    return ",".join([*(f"{host.host}:{host.port}" for host in hosts), *pairs])


def _options(address: RedisAddress) -> dict[str, str | int | bool]:
    """What redis-py is told besides the host and port; empty or false: what it assumes."""
    given = {
        "unix_socket_path": address.unix_path,
        "username": address.username,
        "password": address.password,
        "db": address.db,
        "ssl": address.tls is not None,
    }
    return {name: value for name, value in given.items() if value}


@contextlib.contextmanager
def _in_repository(repo: Path) -> Iterator[None]:
    """Feast imports a repository's modules by name, finds its files by relative paths (the duckdb
    store looks nowhere else), and stays there after an apply."""
    before = Path.cwd()
    folder = str(repo.resolve())
    sys.path.insert(0, folder)
    os.chdir(folder)
    try:
        with warnings.catch_warnings():
            # Feast switches them on for every process; ibis 12 has one for each join on duckdb 2.
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        sys.path.remove(folder)
        os.chdir(before)
