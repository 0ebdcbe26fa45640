"""Compiling a feature service: what the plan holds, and what is refused by name."""

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from app.errors import InvalidModel
from tests.tiny_feast import DEFINITIONS, FLEET, Fleet, write_repository

if TYPE_CHECKING:
    from feast import FeatureStore

REFUSED = """
from feast import RequestSource
from feast.on_demand_feature_view import on_demand_feature_view


@on_demand_feature_view(
    sources=[RequestSource(name="asked", schema=[Field(name="distance", dtype=Int64)])],
    schema=[Field(name="doubled", dtype=Int64)],
    mode="python",
)
def computed(inputs):
    return {"doubled": [2 * distance for distance in inputs["distance"]]}


known = Entity(name="known", join_keys=["known"], value_type=ValueType.BOOL)
by_bool = FeatureView(
    name="by_bool",
    entities=[known],
    schema=[Field(name="known", dtype=Bool), Field(name="visits", dtype=Int64)],
    source=FileSource(
        name="by_bool_file", path="data/driver_in_city.parquet", timestamp_field="known_at"
    ),
)
history_only = FeatureView(
    name="history_only",
    entities=[city_name],
    schema=[Field(name="city", dtype=String), Field(name="demand", dtype=Float32)],
    online=False,
    source=FileSource(
        name="history_only_file", path="data/city.parquet", timestamp_field="known_at"
    ),
)

with_computed = FeatureService(name="with_computed", features=[driver, computed])
with_bool_key = FeatureService(name="with_bool_key", features=[by_bool])
with_history_only = FeatureService(name="with_history_only", features=[driver, history_only])
with_alias = FeatureService(name="with_alias", features=[driver.with_name("chauffeur")])
with_other_keys = FeatureService(
    name="with_other_keys", features=[driver.with_join_key_map({"driver_id": "rider_id"})]
)
"""


@pytest.fixture
def store(fleet: Fleet) -> "FeatureStore":
    return fleet.open_store()


@pytest.fixture(scope="module")
def refused(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> "FeatureStore":
    """A registry of services that cannot be served."""
    from app.features.feast_repo import apply, open_store

    repo = write_repository(
        tmp_path_factory.mktemp("refused") / "repo", DEFINITIONS + REFUSED, "refused_definitions"
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="On demand feature view is an experimental")
        apply(repo, fleet.redis_url)
    return open_store(repo, None)


def test_the_plan_holds_views_keys_ages_and_features_in_their_declared_order(
    store: "FeatureStore",
) -> None:
    from app.features.feast_plan import compile_plan

    assert replace(compile_plan(store, "fleet"), redis=None) == FLEET


def test_the_plan_holds_only_what_the_service_asks_for(store: "FeatureStore") -> None:
    from app.features.feast_plan import compile_plan

    plan = compile_plan(store, "part_of_fleet")
    assert plan.references == ("city:demand", "driver:plate", "driver:rating")
    assert plan.join_keys == {"city": "string", "driver_id": "int"}


def test_compiling_twice_gives_the_same_document(fleet: Fleet) -> None:
    from app.features.feast_plan import compile_plan

    documents = {compile_plan(fleet.open_store(), "fleet").to_json() for _ in range(2)}
    assert len(documents) == 1


@pytest.mark.parametrize(
    ("service", "message"),
    [
        ("flete", r"no feature service 'flete' in the registry: \[.*'fleet'"),
        ("with_history_only", "with_history_only: view history_only has no online data"),
        ("with_computed", "with_computed: computed is not an ordinary feature view"),
        ("with_alias", "with_alias: driver is renamed"),
        ("with_other_keys", "with_other_keys: driver is renamed"),
        ("with_bool_key", "by_bool: join key known is Bool"),
    ],
)
def test_a_service_that_cannot_be_served_is_refused_by_name(
    refused: "FeatureStore", service: str, message: str
) -> None:
    from app.features.feast_plan import compile_plan

    with pytest.raises(InvalidModel, match=message):
        compile_plan(refused, service)
