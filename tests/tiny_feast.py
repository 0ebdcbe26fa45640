"""A small Feast repository, written to a folder, materialized into a Redis of its own."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from app.features.entity_key import EntityKeyEncoder
from app.features.plan import FeaturePlan, PlannedFeature, PlannedView
from app.local.redis_server import own_redis

if TYPE_CHECKING:  # importing feast takes seconds
    from feast import FeatureStore

KNOWN_AT = datetime(2013, 6, 1, 12, tzinfo=UTC)
"""The instant at which every value below became known."""

TTL_S = 3600

FLEET = FeaturePlan(
    project="fleet",
    feature_service="fleet",
    join_keys={"driver_id": "int", "city": "string"},
    views=(
        PlannedView(
            "driver",
            ("driver_id",),
            float(TTL_S),
            (
                PlannedFeature("rating", "Float32"),
                PlannedFeature("trips", "Int64"),
                PlannedFeature("plate", "String"),
            ),
        ),
        PlannedView("city", ("city",), None, (PlannedFeature("demand", "Float32"),)),
        PlannedView(
            "driver_in_city",
            ("driver_id", "city"),
            float(TTL_S),
            (PlannedFeature("visits", "Int64"), PlannedFeature("known", "Bool")),
        ),
    ),
)

FLEET_VALUES: Mapping[str, Mapping[tuple[str | int | None, ...], Mapping[str, Any]]] = {
    "driver": {
        (0,): {"rating": 0.5, "trips": 0, "plate": ""},
        (1,): {"rating": 4.5, "trips": 7, "plate": "品川 11"},
        (2,): {"rating": None, "trips": 3, "plate": None},
        (-3,): {"rating": None, "trips": None, "plate": None},
        (2**53 + 1,): {"rating": 1.0, "trips": 1, "plate": "far"},
    },
    "city": {
        ("",): {"demand": 0.25},
        ("kyoto",): {"demand": 2.0},
        ("東京",): {"demand": 8.0},
    },
    "driver_in_city": {
        (1, "kyoto"): {"visits": 10, "known": True},
        (2, "東京"): {"visits": 20, "known": False},
        (0, ""): {"visits": 30, "known": True},
    },
}

DEFINITIONS = f"""
from datetime import timedelta

from feast import Entity, FeatureService, FeatureView, Field, FileSource, ValueType
from feast.types import Bool, Float32, Int64, String

driver_id = Entity(name="driver_id", join_keys=["driver_id"], value_type=ValueType.INT64)
city_name = Entity(name="city", join_keys=["city"], value_type=ValueType.STRING)


def view(name, keys, ttl, **features):
    return FeatureView(
        name=name,
        entities=[driver_id, city_name] if len(keys) == 2 else [
            driver_id if "driver_id" in keys else city_name
        ],
        ttl=ttl,
        schema=[Field(name=n, dtype=t) for n, t in (keys | features).items()],
        source=FileSource(
            name=name + "_file", path="data/" + name + ".parquet", timestamp_field="known_at"
        ),
    )


driver = view("driver", {{"driver_id": Int64}}, timedelta(seconds={TTL_S}),
              rating=Float32, trips=Int64, plate=String)
city = view("city", {{"city": String}}, timedelta(0), demand=Float32)
driver_in_city = view("driver_in_city", {{"driver_id": Int64, "city": String}},
                      timedelta(seconds={TTL_S}), visits=Int64, known=Bool)

fleet = FeatureService(name="fleet", features=[driver, city, driver_in_city])
part_of_fleet = FeatureService(
    name="part_of_fleet", features=[city, driver[["plate", "rating"]]]
)
"""

SETTINGS = """
project: fleet
provider: local
registry: data/registry.db
offline_store:
  type: duckdb
online_store:
  type: redis
  connection_string: "127.0.0.1:1"
entity_key_serialization_version: 3
"""

_DTYPES = {"Float32": "float32", "Int64": "Int64", "String": "object", "Bool": "boolean"}


@dataclass(frozen=True)
class Fleet:
    """The FLEET plan's repository with FLEET_VALUES online."""

    repo: Path
    redis_url: str
    plan: FeaturePlan
    """FLEET, with where Redis keeps its values."""

    def open_store(self) -> "FeatureStore":
        """A store with connections of its own."""
        from app.features.feast_repo import open_store

        return open_store(self.repo, self.redis_url)


def driver_key(driver: int) -> bytes:
    """Where Redis keeps what is known of a driver."""
    return EntityKeyEncoder({"driver_id": "Int64"}, FLEET.project, 3).encode((driver,))


def write_repository(folder: Path, definitions: str, module: str) -> Path:
    """A repository with these definitions and the files of FLEET_VALUES; returns its folder.

    Feast imports `module` by its name: give each repository of a process another one.
    """
    (folder / "data").mkdir(parents=True)
    (folder / "feature_store.yaml").write_text(SETTINGS)
    (folder / f"{module}.py").write_text(definitions)
    for view in FLEET.views:
        _values(view).to_parquet(folder / "data" / f"{view.name}.parquet")
    return folder


@contextmanager
def running_fleet(folder: Path) -> Iterator[Fleet]:
    """Start a Redis, apply the fleet's definitions and materialize its values."""
    from app.features.feast_plan import compile_plan
    from app.features.feast_repo import apply, open_store

    repo = write_repository(folder / "repo", DEFINITIONS, "fleet_definitions")
    with own_redis(folder / "redis") as redis_url:
        apply(repo, redis_url)
        plan = compile_plan(open_store(repo, redis_url), "fleet")
        yield materialize_fleet(Fleet(repo, redis_url, plan))


def materialize_fleet(fleet: Fleet) -> Fleet:
    """Let Feast write the fleet's values where its URL points."""
    from app.features.feast_repo import materialize

    for _ in materialize(fleet.open_store(), KNOWN_AT):
        pass
    return fleet


def _values(view: PlannedView) -> pd.DataFrame:
    """One row an entity, as the offline store holds them."""
    entities = FLEET_VALUES[view.name]
    columns: dict[str, Any] = {
        key: [entity[index] for entity in entities] for index, key in enumerate(view.join_keys)
    }
    for feature in view.features:
        columns[feature.name] = pd.array(
            [values[feature.name] for values in entities.values()], dtype=_DTYPES[feature.dtype]
        )
    return pd.DataFrame(columns).assign(known_at=pd.Timestamp(KNOWN_AT))


async def close_store(store: "FeatureStore") -> None:
    """Close the connection that a store has opened in this event loop.

    `FeatureStore.close` does nothing for Redis (feast 0.67), and an open connection is a warning.
    """
    client = store._get_provider().online_store._client_async
    if client is not None:
        await client.aclose()
