"""Writes rows into every view that a push source feeds, after it has looked at each value."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import numpy as np
import pyarrow as pa
from feast import FeatureStore, FeatureView, PushSource
from feast.feature_view import DUMMY_ENTITY_FIELD, DUMMY_ENTITY_ID, DUMMY_ENTITY_VAL
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from feast.type_map import python_values_to_proto_values
from feast.types import FeastType
from numpy.typing import NDArray

from app.errors import ConfigurationError
from app.features.entity_key import EntityKeyEncoder, KeyType
from app.features.feast_repo import stored_rows
from app.features.redis_writes import ComparingRedisOnlineStore, RedisRow, StoredRow
from app.features.stored_values import ENCODABLE, encode_column
from app.features.typed_columns import Faults, event_times_us, typed_values

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# Of these a key's value has the same form in a file as in the encoder of keys.
_KEY_TYPES: frozenset[KeyType] = frozenset({"String", "Int32", "Int64", "Bytes"})


@dataclass(frozen=True, slots=True)
class _Column:
    """A join key or a feature: its name in Feast and in the rows that are pushed, and its type."""

    name: str
    given_as: str
    feast_type: FeastType

    @property
    def dtype(self) -> str:
        return str(self.feast_type)


@dataclass(frozen=True, slots=True)
class _View:
    definition: FeatureView
    keys: tuple[_Column, ...]
    features: tuple[_Column, ...]
    known_at: str
    """The column of the event time."""


@dataclass(frozen=True, slots=True)
class CheckedRows:
    """Rows whose values are all of their types.

    `values` holds a column for each name and type; `times_us` the event times, microseconds since
    1970, by the column's name.
    """

    rows: int
    values: Mapping[tuple[str, str], Sequence[Any]]
    times_us: Mapping[str, NDArray[np.int64]]

    def part(self, first: int, end: int) -> "CheckedRows":
        """The rows in `[first, end)`."""
        return CheckedRows(
            end - first,
            {at: values[first:end] for at, values in self.values.items()},
            {name: times_us[first:end] for name, times_us in self.times_us.items()},
        )


@dataclass(slots=True)
class Written:
    """What writing rows changed, by view: rows that were stored, and rows that were not newer than
    what was there or than another row of theirs. An online store other than Redis does not say
    what it skips: there every entity's newest row counts as stored."""

    rows: int = 0
    stored: dict[str, int] = field(default_factory=dict)
    not_newer: dict[str, int] = field(default_factory=dict)
    newest_s: dict[str, float] = field(default_factory=dict)
    """Newest event time of the rows, seconds since 1970."""

    def add(self, other: "Written") -> None:
        self.rows += other.rows
        for mine, others in ((self.stored, other.stored), (self.not_newer, other.not_newer)):
            for view, rows in others.items():
                mine[view] = mine.get(view, 0) + rows
        for view, newest_s in other.newest_s.items():
            self.newest_s[view] = max(newest_s, self.newest_s.get(view, newest_s))


class PushTarget:
    """The views that one push source feeds. The registry is read once, at the beginning.

    Raises `ConfigurationError` for a source that is unknown or feeds no view with online data.
    """

    def __init__(self, store: FeatureStore, push_source: str) -> None:
        self.push_source = push_source
        self._store = store
        self._views = [_view(definition) for definition in _fed_by(store, push_source)]

    @property
    def views(self) -> tuple[str, ...]:
        return tuple(view.definition.name for view in self._views)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that rows must have, as they are named there."""
        needed = (
            name
            for view in self._views
            for name in (
                *(column.given_as for column in view.keys if column.name != DUMMY_ENTITY_ID),
                view.known_at,
                *(column.given_as for column in view.features),
            )
        )
        return tuple(dict.fromkeys(needed))

    def fault_of_columns(self, given: Collection[str]) -> str | None:
        """What is wrong with rows of these columns; None: nothing."""
        needed = self.columns
        for name in needed:
            if name not in given:
                return f"column {name!r} is missing; {self.push_source} takes {', '.join(needed)}"
        may_come = {view.definition.batch_source.created_timestamp_column for view in self._views}
        for name in given:
            if name not in needed and name not in may_come:
                return f"unknown column {name!r}; {self.push_source} takes {', '.join(needed)}"
        return None

    def check(
        self, columns: Mapping[str, pa.Array], *, from_text: bool
    ) -> tuple[CheckedRows, Faults]:
        """Look at every value of rows whose columns are in order.

        Returns those that can be written and, by place, the first fault of each that cannot.
        """
        faults: Faults = {}
        times_us = {}
        for name in dict.fromkeys(view.known_at for view in self._views):
            times_us[name], found = event_times_us(columns[name])
            _note(faults, name, found)
        values: dict[tuple[str, str], Sequence[Any]] = {}
        rows = len(next(iter(times_us.values())))
        for view in self._views:
            for column in (*view.keys, *view.features):
                at = column.name, column.dtype
                if at in values:
                    continue
                if column.name == DUMMY_ENTITY_ID:
                    values[at] = [DUMMY_ENTITY_VAL] * rows
                    continue
                typed, found = typed_values(
                    columns[column.given_as], column.dtype, from_text=from_text
                )
                if column.dtype not in ENCODABLE:
                    typed = _by_feast(typed, column, found)
                if column in view.keys:
                    found = {i: "is null" for i, value in enumerate(typed) if value is None} | found
                values[at] = typed
                _note(faults, column.given_as, found)
        checked = CheckedRows(rows, values, times_us)
        return (_without(checked, faults) if faults else checked), faults

    def write(self, checked: CheckedRows) -> Written:
        """Write each entity's newest row to every view, unless what is stored is as new.

        Writing rows again changes nothing. Raises what the online store raises (`RedisError`):
        some of the rows are stored then.
        """
        written = Written(checked.rows)
        if not checked.rows:
            return written
        for view in self._views:
            name = view.definition.name
            newest = _newest_rows(view, checked)
            before = stored_rows(self._store)
            self._write_view(view, checked, newest)
            after = stored_rows(self._store)
            stored = len(newest) if before is None or after is None else after - before
            written.stored[name] = stored
            written.not_newer[name] = checked.rows - stored
            written.newest_s[name] = float(checked.times_us[view.known_at].max()) / 1e6
        return written

    def _write_view(self, view: _View, checked: CheckedRows, newest: Sequence[int]) -> None:
        """The rows at these places, one an entity: in Redis's own form where that is at hand, which
        takes a third of the time of Feast's."""
        config, provider = self._store.config, self._store.provider
        encoder = _key_encoder(view, self._store)
        if encoder is None:
            rows = _feast_rows(view, checked, newest)
            provider.online_write_batch(config, view.definition, rows, progress=None)
        else:
            redis_rows = _redis_rows(view, checked, newest, encoder)
            provider.online_store.write_rows(config, view.definition, redis_rows)


def _fed_by(store: FeatureStore, push_source: str) -> list[FeatureView]:
    views = [*store.list_feature_views(), *store.list_stream_feature_views()]
    sources: dict[str, list[FeatureView]] = {}
    for view in views:
        if isinstance(view.stream_source, PushSource):
            sources.setdefault(view.stream_source.name, []).append(view)
    if push_source not in sources:
        raise ConfigurationError(
            f"no push source {push_source!r} feeds a view of the registry: {sorted(sources)}"
        )
    online = [view for view in sources[push_source] if view.online and view.enabled]
    if not online:
        names = ", ".join(view.name for view in sources[push_source])
        raise ConfigurationError(f"{push_source}: {names} has no online data")
    return sorted(online, key=lambda view: str(view.name))


def _view(definition: FeatureView) -> _View:
    source = definition.batch_source
    given_as = {name: column for column, name in (source.field_mapping or {}).items()}
    # A view without entities has one row, under the key that materialize and readers use.
    entities = definition.entity_columns or [DUMMY_ENTITY_FIELD]
    keys = tuple(_column(field, given_as) for field in entities)
    features = tuple(_column(field, given_as) for field in definition.features)
    return _View(definition, keys, features, source.timestamp_field)


def _column(definition: Any, given_as: Mapping[str, str]) -> _Column:
    name = definition.name
    return _Column(name, given_as.get(name, name), definition.dtype)


def _note(faults: Faults, column: str, found: Faults) -> None:
    for place, reason in found.items():
        faults.setdefault(place, f"column {column!r}: {reason}")


def _without(checked: CheckedRows, faults: Faults) -> CheckedRows:
    kept = [row for row in range(checked.rows) if row not in faults]
    return CheckedRows(
        len(kept),
        {at: [values[row] for row in kept] for at, values in checked.values.items()},
        {name: times_us[kept] for name, times_us in checked.times_us.items()},
    )


def _by_feast(values: Sequence[Any], column: _Column, faults: Faults) -> list[Any]:
    """Values of a type that only Feast knows, as it stores them; adds those that it refuses."""
    stored: list[Any] = []
    kind = column.feast_type.to_value_type()
    for place, value in enumerate(values):
        try:
            stored += [None] if value is None else python_values_to_proto_values([value], kind)
        except (
            Exception
        ) as exc:  # Feast raises whatever the conversion of the type happens to raise
            stored.append(None)
            faults[place] = f"is no {column.dtype}: {exc}"
    return stored


def _newest_rows(view: _View, checked: CheckedRows) -> list[int]:
    """The place of each entity's newest row; of rows of one instant the first."""
    times_us = checked.times_us[view.known_at].tolist()
    keys = [checked.values[column.name, column.dtype] for column in view.keys]
    newest: dict[tuple[Any, ...], int] = {}
    for row, key in enumerate(zip(*keys, strict=True)):
        known = newest.get(key)
        if known is None or times_us[row] > times_us[known]:
            newest[key] = row
    return list(newest.values())


def _key_encoder(view: _View, store: FeatureStore) -> EntityKeyEncoder | None:
    """None: the online store is not a Redis that we write ourselves, or has keys of a rare type."""
    online_store = store.provider.online_store
    if not isinstance(online_store, ComparingRedisOnlineStore):
        return None
    types = {column.name: column.dtype for column in view.keys}
    if not online_store.compares(store.config) or not set(types.values()) <= _KEY_TYPES:
        return None
    return EntityKeyEncoder(
        cast(Mapping[str, KeyType], types),
        store.project,
        store.config.entity_key_serialization_version,
    )


def _redis_rows(
    view: _View, checked: CheckedRows, rows: Sequence[int], encoder: EntityKeyEncoder
) -> list[RedisRow]:
    types = {column.name: column.dtype for column in view.keys}
    keys = [checked.values[name, types[name]] for name in encoder.join_keys]
    times_us = checked.times_us[view.known_at]
    names = [column.name for column in view.features]
    features = zip(*(_serialized(checked, column, rows) for column in view.features), strict=True)
    return [
        RedisRow(
            encoder.encode([key[row] for key in keys]),
            int(times_us[row]),
            dict(zip(names, values, strict=True)),
        )
        for row, values in zip(rows, features, strict=True)
    ]


def _serialized(checked: CheckedRows, column: _Column, rows: Sequence[int]) -> list[bytes]:
    values = checked.values[column.name, column.dtype]
    if column.dtype in ENCODABLE:
        return encode_column(column.dtype, [values[row] for row in rows])
    return [b"" if values[row] is None else values[row].SerializeToString() for row in rows]


def _feast_rows(view: _View, checked: CheckedRows, rows: Sequence[int]) -> list[StoredRow]:
    times_us = checked.times_us[view.known_at]
    join_keys = [column.name for column in view.keys]
    entities = zip(*(_protos(checked, column, rows) for column in view.keys), strict=True)
    names = [column.name for column in view.features]
    features = zip(*(_protos(checked, column, rows) for column in view.features), strict=True)
    return [
        (
            EntityKey(join_keys=join_keys, entity_values=entity),
            dict(zip(names, values, strict=True)),
            _EPOCH + timedelta(microseconds=int(times_us[row])),
            None,
        )
        for row, entity, values in zip(rows, entities, features, strict=True)
    ]


def _protos(checked: CheckedRows, column: _Column, rows: Sequence[int]) -> list[Value]:
    if column.dtype in ENCODABLE:
        return [Value.FromString(stored) for stored in _serialized(checked, column, rows)]
    values = checked.values[column.name, column.dtype]
    return [Value() if values[row] is None else values[row] for row in rows]
