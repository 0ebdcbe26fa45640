"""Feast's Redis online store, with writes that never put an older row over a newer one."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, TypeAlias

from feast import FeatureView
from feast.infra.online_stores.helpers import _mmh3, _redis_key, compute_versioned_name
from feast.infra.online_stores.redis import RedisOnlineStore, RedisOnlineStoreConfig
from feast.repo_config import RepoConfig
from google.protobuf.message import DecodeError
from google.protobuf.timestamp_pb2 import Timestamp
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

_StoreType: TypeAlias = Literal["app.features.redis_writes.ComparingRedisOnlineStore"]
ONLINE_STORE_TYPE: _StoreType = "app.features.redis_writes.ComparingRedisOnlineStore"
"""What Feast loads the store by, in the place of `redis`."""

StoredRow: TypeAlias = tuple[Any, Mapping[str, Any], datetime, datetime | None]
"""Feast's form of a row: entity key, a value a feature, event time, time of creation."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# Redis executes a transaction in one go: 256 rows keep its other clients waiting for about 2 ms.
_ROWS_AT_ONCE = 256


class ComparingRedisOnlineStoreConfig(RedisOnlineStoreConfig):  # type: ignore[misc]  # untyped base
    """Feast finds it by the name of the store."""

    type: _StoreType = ONLINE_STORE_TYPE


@dataclass(frozen=True, slots=True)
class RedisRow:
    """The newest row of an entity, as Redis keeps it: its key, its event time in microseconds since
    1970, and the serialized value of each feature, by the feature's name."""

    key: bytes
    time_us: int
    values: Mapping[str, bytes]


class ComparingRedisOnlineStore(RedisOnlineStore):  # type: ignore[misc]  # Feast ships no types
    """Feast reads the stored event times first and writes afterwards: what another writer stores in
    between is overwritten, newer or not. Here both are one transaction, undone and tried again when
    a key has changed.

    A Redis Cluster has no transactions over several keys: there it writes as Feast does.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stored_rows = 0
        """Rows that were new or newer than what was there."""

    def online_write_batch(
        self,
        config: RepoConfig,
        table: FeatureView,
        data: Sequence[StoredRow],
        progress: Callable[[int], Any] | None,
    ) -> None:
        """Store each entity's newest row unless what is stored is as new.

        Raises `RedisError`: some of the rows are stored then, and all may be written again.
        """
        if not self.compares(config):
            super().online_write_batch(config, table, data, progress)
            self.stored_rows += len(data)
            return
        self.write_rows(config, table, _newest_rows(config, data))
        if progress is not None:
            progress(len(data))

    def compares(self, config: RepoConfig) -> bool:
        return bool(config.online_store.redis_type != "redis_cluster")

    def write_rows(self, config: RepoConfig, view: FeatureView, rows: Sequence[RedisRow]) -> None:
        """The same for rows, one an entity, that have Redis's form already."""
        versioning = config.registry.enable_online_feature_view_versioning
        name = str(compute_versioned_name(view, versioning))
        fields = {feature.name: _mmh3(f"{name}:{feature.name}") for feature in view.features}
        options = config.online_store
        client = self._get_client(options)
        client.set_retry(Retry(NoBackoff(), 0))  # whoever asked for the write knows when to retry
        with _connection(client.connection_pool) as connection:
            table = _Table(connection, f"_ts:{name}".encode(), fields, options.key_ttl_seconds)
            for first in range(0, len(rows), _ROWS_AT_ONCE):
                self.stored_rows += table.store(rows[first : first + _ROWS_AT_ONCE])


def _newest_rows(config: RepoConfig, data: Sequence[StoredRow]) -> list[RedisRow]:
    """One row an entity; of rows of one instant the first, as Feast has it."""
    newest: dict[bytes, tuple[int, Mapping[str, Any]]] = {}
    version = config.entity_key_serialization_version
    for entity, values, known_at, _ in data:
        key = _redis_key(config.project, entity, entity_key_serialization_version=version)
        time_us = _microseconds(known_at)
        if key not in newest or time_us > newest[key][0]:
            newest[key] = time_us, values
    return [
        RedisRow(key, time_us, {name: value.SerializeToString() for name, value in values.items()})
        for key, (time_us, values) in newest.items()
    ]


def _microseconds(instant: datetime) -> int:
    """Since 1970; a naive instant is one of UTC, as everywhere in Feast."""
    since = (instant if instant.tzinfo else instant.replace(tzinfo=UTC)) - _EPOCH
    return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds


@contextmanager
def _connection(pool: Any) -> Iterator[Any]:
    """A connection of the pool; one on which something went wrong is closed, so that no watch and
    no unread reply is left on it."""
    connection = pool.get_connection()
    try:
        yield connection
    except BaseException:
        connection.disconnect()
        raise
    finally:
        pool.release(connection)


@dataclass(frozen=True, slots=True)
class _Table:
    """A view's rows in Redis, through one connection: `fields` maps each feature to its hash field,
    `stamp_field` is that of the event time."""

    connection: Any
    stamp_field: bytes
    fields: Mapping[str, bytes]
    ttl_s: int | None

    def store(self, rows: Sequence[RedisRow]) -> int:
        """Store those rows that are newer than what Redis has; returns how many there were."""
        watch = ("WATCH", *(row.key for row in rows))
        stamps = _ask(
            self.connection, [watch, *(("HGET", row.key, self.stamp_field) for row in rows)]
        )[1:]
        due = [row for row, at in zip(rows, stamps, strict=True) if row.time_us > _stamp_us(at)]
        if not due:
            _ask(self.connection, [("UNWATCH",)])
            return 0
        outcome = _ask(self.connection, [("MULTI",), *self._commands(due), ("EXEC",)])[-1]
        if outcome is not None:
            for result in outcome:
                if isinstance(result, RedisError):
                    raise result
            return len(due)
        # Another writer was at one of the keys. Fewer keys are in fewer writers' way.
        half = (len(due) + 1) // 2
        return sum(self.store(part) for part in (due[:half], due[half:]) if part)

    def _commands(self, rows: Sequence[RedisRow]) -> Iterator[tuple[Any, ...]]:
        for row in rows:
            words = [b"HSET", row.key, self.stamp_field, _stamp(row.time_us)]
            for feature, value in row.values.items():
                words += (self.fields[feature], value)
            yield tuple(words)
            if self.ttl_s:
                yield "EXPIRE", row.key, self.ttl_s


def _stamp(time_us: int) -> bytes:
    seconds, micros = divmod(time_us, 1_000_000)
    return bytes(Timestamp(seconds=seconds, nanos=1000 * micros).SerializeToString())


def _stamp_us(stored: bytes | None) -> float:
    """The stored event time; before all others where there is none that can be read."""
    if stored is None:
        return float("-inf")
    try:
        stamp = Timestamp.FromString(stored)
    except DecodeError:
        return float("-inf")
    return float(stamp.seconds * 1_000_000 + stamp.nanos / 1000)


def _ask(connection: Any, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
    """The replies to commands that leave together. Raises `RedisError` for one that failed."""
    connection.send_packed_command(connection.pack_commands(commands))
    return [connection.read_response() for _ in commands]
