"""Proves that what is read straight from Redis is what Feast's SDK would answer.

Random feature repositories are applied and written through Feast itself into one real Redis, one
project each. Rows of each are then read by `FeatureStore.get_online_features` and by `RedisSource`
with `OnDemandSource`: every value must be the same. A part of the rows is read by `FeastSource`
too, which must give the same table, statuses and all.

    python -m loadtests.prove_feast_parity [--repositories 320] [--rows 52000] [--seed 1]

What differs on purpose (docs/feast.md) is left out here and tested on its own.
"""

import argparse
import asyncio
import random
import struct
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of Feast about its own dependencies
    from feast import (
        Entity,
        FeatureService,
        FeatureStore,
        FeatureView,
        Field,
        FileSource,
        OnDemandFeatureView,
        RequestSource,
        ValueType,
    )
    from feast.feature_view import DUMMY_ENTITY_ID, DUMMY_ENTITY_VAL
    from feast.protos.feast.types.EntityKey_pb2 import EntityKey
    from feast.repo_config import RepoConfig
    from feast.type_map import python_values_to_proto_values
    from feast.types import (
        Array,
        Bool,
        Bytes,
        Float32,
        Float64,
        Int32,
        Int64,
        Set,
        String,
        UnixTimestamp,
    )

from app.clock import WallClock
from app.deadline import Deadline
from app.features.feast_plan import compile_plan
from app.features.feast_repo import connection_string
from app.features.feast_source import FeastSource
from app.features.on_demand import OnDemandSource
from app.features.plan import FeaturePlan
from app.features.redis_address import parse_address
from app.features.redis_features import RedisFeatures
from app.features.redis_source import RedisSource
from app.features.source import FeatureRows, FeatureSource
from app.features.static_source import StaticSource
from app.features.values import DECODABLE
from app.local.redis_server import own_redis

_SCALARS = (Bool, Bytes, Float32, Float64, Int32, Int64, String, UnixTimestamp)
_DTYPES = {str(dtype): dtype for dtype in (*_SCALARS, *map(Array, _SCALARS), *map(Set, _SCALARS))}
_FEATURE_DTYPES = sorted(_DTYPES.keys() & DECODABLE)
_KEY_TYPES = {
    "Int32": ValueType.INT32,
    "Int64": ValueType.INT64,
    "String": ValueType.STRING,
    "Bytes": ValueType.BYTES,
    "UnixTimestamp": ValueType.UNIX_TIMESTAMP,
}
_REQUEST_TYPES = ("Bool", "Float64", "Int64", "String", "UnixTimestamp")
_MADE_TYPES = {"Bool": Bool, "Float64": Float64, "Int64": Int64, "String": String}
_ENTITIES = 12
_SINGLE_ROWS = 25
_COMPARED_ROWS = 12


@dataclass
class Covered:
    """What the random repositories had in them, and what was read."""

    repositories: int = 0
    rows: int = 0
    values: int = 0
    nulls: int = 0
    dtypes: Counter[str] = field(default_factory=Counter)
    constructs: Counter[str] = field(default_factory=Counter)
    differences: list[str] = field(default_factory=list)


@dataclass
class Repository:
    """One random repository, applied and written."""

    store: FeatureStore
    service: FeatureService
    keys: dict[str, str]
    """The join keys of a request, renamed ones last: the SDK lets the last of two that name one
    join key win, whatever the join_key_map says."""
    fields: dict[str, str]
    entities: Mapping[str, Sequence[Any]]
    """For each stored join key the values of the entities that are stored."""
    stored_key: Mapping[str, str]
    full_names: bool
    singly: bool


class Draw:
    """Draws what a repository is made of."""

    def __init__(self, seed: str) -> None:
        self.random = random.Random(seed)
        self._names = 0

    def name(self, kind: str) -> str:
        self._names += 1
        return f"{kind}{self._names}"

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def some(self, options: Sequence[Any], least: int, most: int) -> list[Any]:
        count = min(len(options), self.random.randint(least, most))
        return self.random.sample(list(options), count)

    def value(self, dtype: str) -> Any:
        """A value that is not null; for a collection, one of up to five."""
        if dtype.startswith(("Array(", "Set(")):
            inner = dtype[dtype.index("(") + 1 : -1]
            values = [self.value(inner) for _ in range(self.random.randint(0, 5))]
            return values if dtype.startswith("Array(") else set(values)
        return _VALUES[dtype](self.random)

    def maybe(self, dtype: str) -> Any:
        return None if self.chance(0.1) else self.value(dtype)

    def key(self, dtype: str) -> Any:
        return self.value(dtype) or (b"0" if dtype == "Bytes" else self.value(dtype))


def _integer(bits: int) -> Callable[[random.Random], int]:
    least, most = -(1 << bits - 1), (1 << bits - 1) - 1

    def draw(chosen: random.Random) -> int:
        return chosen.choice([0, 1, -1, least, most, chosen.randint(least, most)])

    return draw


def _float32(chosen: random.Random) -> float:
    single: float = struct.unpack("<f", struct.pack("<f", chosen.uniform(-1e6, 1e6)))[0]
    return chosen.choice([0.0, -0.0, single, float("inf"), float("nan")])


def _text(chosen: random.Random) -> str:
    return "".join(chosen.choice("aZ0 :品\N{OWL}é\n") for _ in range(chosen.randint(0, 40)))


_VALUES: Mapping[str, Callable[[random.Random], Any]] = {
    "Bool": lambda chosen: chosen.random() < 0.5,
    "Bytes": lambda chosen: chosen.randbytes(chosen.randint(1, 200)),
    "Float32": _float32,
    "Float64": lambda chosen: chosen.choice([chosen.uniform(-1e9, 1e9), 0.1, float("nan")]),
    "Int32": _integer(32),
    "Int64": _integer(64),
    "String": _text,
    "UnixTimestamp": lambda chosen: datetime.fromtimestamp(
        chosen.choice([0, 1, -1, chosen.randint(-(10**9), 4 * 10**9)]), UTC
    ),
}


class Builder:
    """Builds one repository: definitions, then values, all through Feast."""

    def __init__(self, folder: Path, url: str, project: str, seed: str, covered: Covered) -> None:
        self._draw = Draw(seed)
        self._project = project
        self._covered = covered
        self._file = folder / "nothing.parquet"
        self._sources: dict[str, FeatureView] = {}
        versioned = self._draw.chance(0.25)
        self._store = FeatureStore(
            config=RepoConfig(
                project=project,
                provider="local",
                registry={
                    "path": str(folder / f"{project}.db"),
                    "enable_online_feature_view_versioning": versioned,
                },
                online_store={"type": "redis", "connection_string": connection_string(url)},
                offline_store={"type": "file"},
                entity_key_serialization_version=self._chosen_version(),
            )
        )
        self._versioned = versioned

    def build(self) -> Repository:
        draw = self._draw
        dtypes = {draw.name("key"): draw.random.choice(list(_KEY_TYPES)) for _ in range(4)}
        entities = {
            key: Entity(name=draw.name("entity"), join_keys=[key], value_type=_KEY_TYPES[dtype])
            for key, dtype in dtypes.items()
        }
        views = [self._view(entities, dtypes) for _ in range(draw.random.randint(1, 5))]
        made, fields = self._made(views)
        sources = {name for view in made for name in view.source_feature_view_projections}
        projections, renamed = self._projections(views, sources)
        listed = [*projections, *made]
        draw.random.shuffle(listed)
        service = FeatureService(name="service", features=listed)
        self._store.apply([*entities.values(), *views, *made, service])
        stored = self._write(dtypes)
        used = {column.name for view in self._sources.values() for column in view.entity_columns}
        keys = {key: dtypes[key] for key in dtypes if key in used} | {
            new: dtypes[old] for new, old in renamed.items()
        }
        return Repository(
            self._store,
            service,
            keys,
            fields,
            stored,
            {**{key: key for key in dtypes}, **renamed},
            # The SDK loses what a python function makes when it is asked for full names.
            not any(view.mode == "python" for view in made) and draw.chance(0.5),
            any(view.singleton for view in made),
        )

    def _chosen_version(self) -> int:
        version = self._draw.random.choice([2, 3])
        self._covered.constructs[f"key version {version}"] += 1
        return version

    def _view(self, entities: Mapping[str, Entity], dtypes: Mapping[str, str]) -> FeatureView:
        draw = self._draw
        keys = [] if draw.chance(0.12) else draw.some(list(entities), 1, 3)
        self._covered.constructs[f"{len(keys)} join keys"] += 1
        features = {draw.name("f"): draw.random.choice(_FEATURE_DTYPES) for _ in range(4)}
        self._covered.dtypes.update(features.values())
        version = {}
        if self._versioned and draw.chance(0.5):
            version = {"version": f"v{draw.random.randint(1, 3)}"}
            self._covered.constructs["version"] += 1
        view = FeatureView(
            name=draw.name("view"),
            entities=[entities[key] for key in keys],
            ttl=timedelta(0),
            schema=[
                *(Field(name=key, dtype=_DTYPES[dtypes[key]]) for key in keys),
                *(Field(name=name, dtype=_DTYPES[dtype]) for name, dtype in features.items()),
            ],
            source=FileSource(
                name=draw.name("file"), path=str(self._file), timestamp_field="known_at"
            ),
            **version,
        )
        self._sources[view.name] = view
        return view

    def _projections(
        self, views: Sequence[FeatureView], sources: set[str]
    ) -> tuple[list[Any], dict[str, str]]:
        """What the service asks of the views, and the join keys that it renames."""
        draw = self._draw
        projections: list[Any] = []
        renamed: dict[str, str] = {}
        for view in views:
            names = [feature.name for feature in view.features]
            if view.name in sources:
                if draw.chance(0.5):  # else it is read without being declared
                    projections.append(view[draw.some(names, 1, 4)])
                    self._covered.constructs["declared source"] += 1
                else:
                    self._covered.constructs["hidden source"] += 1
                continue
            draw.random.shuffle(names)
            # Feast cannot compare a service that has a view with and without an alias.
            parts = [names[:2], names[2:]] if draw.chance(0.3) else [names]
            for part in parts:
                projection = view[part]
                if len(parts) > 1 or draw.chance(0.3):
                    projection = projection.with_name(draw.name("alias"))
                    self._covered.constructs["alias"] += 1
                keys = [k for k in view.join_keys if k != DUMMY_ENTITY_ID]
                if keys and draw.chance(0.3):
                    key_map = {key: draw.name("renamed") for key in draw.some(keys, 1, 3)}
                    projection = projection.with_join_key_map(key_map)
                    renamed |= {new: old for old, new in key_map.items()}
                    self._covered.constructs["join_key_map"] += 1
                projections.append(projection)
        return projections, renamed

    def _made(
        self, views: Sequence[FeatureView]
    ) -> tuple[list[OnDemandFeatureView], dict[str, str]]:
        """On-demand views, and the fields of an instance that they read."""
        draw = self._draw
        fields = {draw.name("field"): draw.random.choice(_REQUEST_TYPES) for _ in range(2)}
        made, used = [], {}
        # Where there is a singleton the SDK is asked row by row, and pandas holds the integers of
        # one row and those of many with a null among them differently.
        modes = ["python", draw.random.choice(["python_singleton", "pandas"])]
        for _ in range(draw.random.choice([0, 0, 1, 2])):
            mode = draw.random.choice(modes)
            self._covered.constructs[f"on demand, {mode}"] += 1
            sources: list[Any] = []
            columns: dict[str, str] = {}
            # The SDK forgets the version of what an on-demand view reads, and finds nothing.
            unversioned = [view for view in views if view.version == "latest"]
            for view in draw.some(unversioned, 0, 2):
                # pandas' way there has no sets
                usable = [
                    f for f in view.features if mode != "pandas" or "Set(" not in str(f.dtype)
                ]
                chosen = draw.some([feature.name for feature in usable], 1, 3)
                if chosen:
                    sources.append(view[chosen])
                    columns |= {
                        f"{view.name}__{feature.name}": str(feature.dtype)
                        for feature in usable
                        if feature.name in chosen
                    }
            asked = draw.some(list(fields), 0 if sources else 1, 2)
            if asked:
                schema = [Field(name=name, dtype=_DTYPES[fields[name]]) for name in asked]
                sources.append(RequestSource(name=draw.name("request"), schema=schema))
                columns |= {name: fields[name] for name in asked}
                used |= {name: fields[name] for name in asked}
                self._covered.constructs["request field"] += len(asked)
            made.append(self._function(mode, sources, columns))
        return made, used

    def _function(
        self, mode: str, sources: Sequence[Any], columns: Mapping[str, str]
    ) -> OnDemandFeatureView:
        draw = self._draw
        outputs = {
            draw.name("made"): (draw.random.choice(list(columns)), draw.random.choice(_MADES))
            for _ in range(3)
        }
        name = draw.name("function")
        text = _program(name, mode, outputs, columns)
        scope: dict[str, Any] = {"pd": pd}
        exec(text, scope)
        return OnDemandFeatureView(
            name=draw.name("on_demand"),
            sources=list(sources),
            schema=[
                Field(name=output, dtype=_MADE_TYPES[kind]) for output, (_, kind) in outputs.items()
            ],
            mode=mode.removesuffix("_singleton"),
            singleton=mode == "python_singleton",
            udf=scope[name],
            udf_string=text,
        )

    def _write(self, dtypes: Mapping[str, str]) -> Mapping[str, Sequence[Any]]:
        """Write every view for some entities; returns the values of the join keys."""
        draw = self._draw
        values = {key: [draw.key(dtype) for _ in range(_ENTITIES)] for key, dtype in dtypes.items()}
        provider = self._store._get_provider()
        for name in self._sources:
            view = self._store.get_feature_view(name)
            keys = [column.name for column in view.entity_columns if column.name in dtypes]
            provider.online_write_batch(
                self._store.config,
                view,
                [
                    (
                        _entity_key(keys, [values[key][entity] for key in keys], dtypes),
                        self._stored_values(view),
                        datetime.now(UTC) - timedelta(seconds=draw.random.uniform(1, 1e8)),
                        None,
                    )
                    for entity in (range(_ENTITIES) if keys else range(1))
                ],
                progress=None,
            )
        return values

    def _stored_values(self, view: FeatureView) -> dict[str, Any]:
        """A value for most features of one row: a new feature has none in an old row."""
        return {
            feature.name: python_values_to_proto_values(
                [self._draw.maybe(str(feature.dtype))], feature.dtype.to_value_type()
            )[0]
            for feature in view.features
            if not self._draw.chance(0.05)
        }


def _entity_key(keys: Sequence[str], values: Sequence[Any], dtypes: Mapping[str, str]) -> EntityKey:
    if not keys:
        keys, values, dtypes = [DUMMY_ENTITY_ID], [DUMMY_ENTITY_VAL], {DUMMY_ENTITY_ID: "String"}
    return EntityKey(
        join_keys=keys,
        entity_values=[
            python_values_to_proto_values([value], _KEY_TYPES[dtypes[key]])[0]
            for key, value in zip(keys, values, strict=True)
        ],
    )


_MADES = tuple(_MADE_TYPES)
_EXPRESSIONS = {
    "Bool": "null(v)",
    "Float64": "None if null(v) else len(show(v)) / 7",
    "Int64": "-1 if null(v) else len(show(v))",
    "String": "'' if null(v) else show(v)",
}

_PANDAS_NUMBER = "float('nan') if null(v) else len(show(v)) / 7"


def _program(
    name: str, mode: str, outputs: Mapping[str, tuple[str, str]], columns: Mapping[str, str]
) -> str:
    """The text of a function that makes each output from one column."""
    each = {
        output: _PANDAS_NUMBER if (mode, kind) == ("pandas", "Float64") else _EXPRESSIONS[kind]
        for output, (_, kind) in outputs.items()
    }
    lines = [
        f"def {name}(inputs):",
        "    def null(v):",
        "        return v is None or (isinstance(v, float) and v != v)",
        "    def show(v):",
        "        return repr(sorted(v, key=repr) if isinstance(v, set) else v)",
    ]
    if mode == "pandas":
        lines.append("    made = pd.DataFrame(index=inputs.index)")
        for output, (column, _) in outputs.items():
            lines.append(
                f"    made[{output!r}] = [{each[output]} for v in inputs[{column!r}].tolist()]"
            )
        lines.append("    return made")
    else:
        lines.append("    made = {}")
        for output, (column, _) in outputs.items():
            value = f"[{each[output]} for v in inputs[{column!r}]]"
            if mode == "python_singleton":
                value = f"[{each[output]} for v in [inputs[{column!r}]]][0]"
            lines.append(f"    made[{output!r}] = {value}")
        lines.append("    return made")
    return "\n".join(lines) + "\n"


def _rows(repository: Repository, draw: Draw, count: int) -> dict[str, list[Any]]:
    """A request: mostly entities that are stored, some that are not, in any combination."""
    columns: dict[str, list[Any]] = {name: [] for name in (*repository.keys, *repository.fields)}
    for _ in range(count):
        entity = draw.random.randrange(_ENTITIES)
        for key, dtype in repository.keys.items():
            known = repository.entities[repository.stored_key[key]]
            other = draw.random.choice([draw.random.choice(known), draw.key(dtype)])
            columns[key].append(other if draw.chance(0.08) else known[entity])
        for name, dtype in repository.fields.items():
            value = draw.value(dtype)
            columns[name].append(0.5 if value != value else value)
    return columns


def _ask_feast(
    repository: Repository, columns: Mapping[str, list[Any]], count: int
) -> dict[str, list[Any]]:
    """What the SDK answers. A singleton sees the first row only, so it is asked row by row."""
    # The SDK counts the rows of what it is given, be it of no use.
    columns = columns or {"nothing": [""] * count}
    size = 1 if repository.singly else count
    answer: dict[str, list[Any]] = {}
    for first in range(0, count, size):
        part = {name: values[first : first + size] for name, values in columns.items()}
        found = repository.store.get_online_features(
            repository.store.get_feature_service("service", allow_cache=True),
            part,
            full_feature_names=repository.full_names,
        ).to_dict()
        for name, values in found.items():
            answer.setdefault(name, []).extend(values)
    return answer


def _compare(
    repository: Repository, plan: FeaturePlan, rows: FeatureRows, feast: Mapping[str, list[Any]]
) -> list[str]:
    """Differences in what the service declares; what is read besides is not in Feast's answer."""
    found = []
    columns = dict(zip(plan.references, rows.columns, strict=True))
    for reference in _declared(repository.service):
        view, feature = reference.split(":")
        theirs = feast.get(f"{view}__{feature}" if repository.full_names else feature)
        if theirs is None:
            found.append(f"{reference}: Feast does not answer it")
            continue
        for row, (ours, expected) in enumerate(
            zip(columns[reference].tolist(), theirs, strict=True)
        ):
            if canonical(ours) != canonical(expected):
                found.append(f"{reference} row {row}: {ours!r}, Feast says {expected!r}")
    return found


def _declared(service: FeatureService) -> list[str]:
    return [
        f"{projection.name_to_use()}:{feature.name}"
        for projection in service.feature_view_projections
        for feature in projection.features
    ]


def canonical(value: Any) -> Any:
    """A form in which equal values are equal: NaN is null, an integer may be held as a float."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_inner(each) for each in value]
    if isinstance(value, set | frozenset):
        return {_inner(each) for each in value}
    return None if isinstance(value, float) and value != value else value


def _inner(value: Any) -> Any:
    return "NaN" if isinstance(value, float) and value != value else value


def _same_tables(ours: FeatureRows, theirs: FeatureRows) -> list[str]:
    """Differences between what is read from Redis and through the SDK, statuses and times too."""
    found = []
    for name, left, right in zip(ours.plan.references, ours.columns, theirs.columns, strict=True):
        if list(map(canonical, left.tolist())) != list(map(canonical, right.tolist())):
            found.append(f"{name}: {left.tolist()}, through the SDK {right.tolist()}")
    if not np.array_equal(ours.status, theirs.status):
        found.append(f"statuses {ours.status.tolist()}, through the SDK {theirs.status.tolist()}")
    if not np.allclose(ours.event_time_s, theirs.event_time_s, atol=1e-5, equal_nan=True):
        found.append("event times differ")
    return found


def _whole(stored: FeatureSource, plan: FeaturePlan) -> FeatureSource:
    made = any(view.transformation is not None for view in plan.views)
    return OnDemandSource(stored, plan) if made else stored


async def prove(
    url: str,
    folder: Path,
    *,
    repositories: int,
    rows: int,
    seed: str,
    say: Callable[[str], None] = print,
) -> Covered:
    """Read `rows` rows of so many random repositories both ways."""
    pd.DataFrame({"known_at": [pd.Timestamp(0, tz="UTC")]}).to_parquet(folder / "nothing.parquet")
    covered = Covered()
    started_s = time.monotonic()
    async with RedisFeatures(parse_address(url)) as features:
        for number in range(repositories):
            if len(covered.differences) > 20:
                break
            left = (rows - covered.rows) / (repositories - number)
            # Those that the SDK has to be asked row by row get fewer, the others make up for it.
            await _prove_one(url, folder, f"{seed}-{number}", features, int(left) + 1, covered)
            if (number + 1) % 10 == 0:
                say(
                    f"  {time.monotonic() - started_s:6.1f} s  {number + 1} repositories  "
                    f"{covered.rows:,} rows  {covered.values:,} values  "
                    f"{len(covered.differences)} differences"
                )
    return covered


async def _prove_one(
    url: str, folder: Path, seed: str, features: RedisFeatures, rows: int, covered: Covered
) -> None:
    project = f"p{seed.replace('-', '_')}"
    repository = Builder(folder, url, project, seed, covered).build()
    plan = compile_plan(repository.store, "service")
    declared = _declared(repository.service)
    if [name for name in plan.references if name in set(declared)] != declared:
        covered.differences.append(f"{project}: the order is {plan.references}, not {declared}")
    stored = plan.stored()
    clock = WallClock()
    direct = StaticSource(stored) if not stored.views else RedisSource(features, stored, clock)
    source = _whole(direct, plan)
    draw = Draw(f"rows of {seed}")
    left = min(rows, _SINGLE_ROWS) if repository.singly else rows
    while left > 0:
        count = min(left, draw.random.choice([1, 1, 5, 20, 60, 100]))
        left -= count
        columns = _rows(repository, draw, count)
        table = await source.fetch(columns, count, Deadline.after(30))
        answer = _ask_feast(repository, columns, count)
        covered.differences += [
            f"{project}: {text}" for text in _compare(repository, plan, table, answer)
        ]
        covered.rows += count
        covered.values += count * len(declared)
        covered.nulls += int((table.status != 0).sum())
    if stored.views:
        columns = _rows(repository, draw, _COMPARED_ROWS)
        through = _whole(FeastSource(repository.store, stored, clock), plan)
        ours = await source.fetch(columns, _COMPARED_ROWS, Deadline.after(30))
        theirs = await through.fetch(columns, _COMPARED_ROWS, Deadline.after(30))
        covered.differences += [f"{project}: {text}" for text in _same_tables(ours, theirs)]
        await _close(repository.store)
    covered.repositories += 1


async def _close(store: FeatureStore) -> None:
    """The connections that a store has opened: hundreds of them would be left otherwise."""
    online = store._get_provider().online_store
    if online._client_async is not None:
        await online._client_async.aclose()
    if online._client is not None:
        online._client.close()


@contextmanager
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # key version 2 is deprecated, on-demand views experimental
        yield


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repositories", type=int, default=320)
    parser.add_argument("--rows", type=int, default=52_000)
    parser.add_argument("--seed", default=str(random.randrange(10**6)))
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    started_s = time.monotonic()
    with tempfile.TemporaryDirectory() as name, own_redis(Path(name) / "redis") as url, _quiet():
        covered = asyncio.run(
            prove(
                url,
                Path(name),
                repositories=arguments.repositories,
                rows=arguments.rows,
                seed=arguments.seed,
                say=lambda text: print(text, flush=True),
            )
        )
    for text in covered.differences[:20]:
        print(f"DIFFERENT  {text}")
    for kind, counts in (("types", covered.dtypes), ("constructs", covered.constructs)):
        print(f"{kind}: " + ", ".join(f"{name} {n}" for name, n in sorted(counts.items())))
    print(
        f"{covered.repositories} repositories, {covered.rows:,} rows, {covered.values:,} values "
        f"({covered.nulls:,} null), {len(covered.differences)} differences, "
        f"{time.monotonic() - started_s:.0f} s"
    )
    return 1 if covered.differences else 0


if __name__ == "__main__":
    sys.exit(main())
