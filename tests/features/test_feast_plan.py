"""Compiling a feature service: what the plan holds, and what is refused by name."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from app.errors import InvalidModel
from app.features.plan import FeaturePlan, PlannedFeature, PlannedView
from tests.tiny_feast import DEFINITIONS, FLEET, SETTINGS, Fleet, write_repository

if TYPE_CHECKING:
    from feast import FeatureStore

MORE = """
from feast import OnDemandFeatureView, RequestSource
from feast.aggregation import Aggregation
from feast.on_demand_feature_view import on_demand_feature_view
from feast.types import Array, Bytes, Float64, Int32, Map, UnixTimestamp

ASKED = RequestSource(name="asked", schema=[Field(name="distance", dtype=Float32)])


def on_demand(name, sources, **options):
    @on_demand_feature_view(
        name=name,
        sources=sources,
        schema=[Field(name="doubled", dtype=Float64)],
        mode="python",
        **options,
    )
    def double(inputs):
        one = next(iter(inputs.values()))
        return {"doubled": [2.0 for _ in one] if isinstance(one, list) else 2.0}

    return double


doubled = on_demand("doubled", [ASKED])
rated = on_demand("rated", [driver[["rating"]], city, ASKED])
single = on_demand("single", [ASKED], singleton=True)
stored_rating = on_demand(
    "stored_rating", [driver[["rating"]], ASKED], write_to_online_store=True, entities=[driver_id]
)
renamed_source = on_demand("renamed_source", [driver.with_name("chauffeur"), ASKED])
made_of_made = on_demand("made_of_made", [doubled.projection, ASKED])


def asking(name, field, dtype):
    source = RequestSource(name="for_" + name, schema=[Field(name=field, dtype=dtype)])
    return on_demand(name, [driver, source])


asks_for_a_key = asking("asks_for_a_key", "driver_id", Int64)
asks_for_a_list = asking("asks_for_a_list", "settings", Array(Int64))
asks_for_a_number = asking("asks_for_a_number", "distance", Int64)


def keyed(name, kind, dtype, **options):
    entity = Entity(name=name, join_keys=[name], value_type=kind)
    return entity, FeatureView(
        name="by_" + name,
        entities=[entity],
        schema=[Field(name=name, dtype=dtype), Field(name="visits", dtype=Int64)],
        source=FileSource(
            name=name + "_file", path="data/driver_in_city.parquet", timestamp_field="known_at"
        ),
        **options,
    )


known, by_known = keyed("known", ValueType.BOOL, Bool)
token, by_token = keyed("token", ValueType.BYTES, Bytes)
instant, by_instant = keyed("instant", ValueType.UNIX_TIMESTAMP, UnixTimestamp)
small, by_small = keyed("small", ValueType.INT32, Int32)
hidden, by_hidden = keyed("hidden", ValueType.STRING, String, online=False)
off, by_off = keyed("off", ValueType.STRING, String, enabled=False)
everywhere = FeatureView(
    name="everywhere",
    schema=[Field(name="level", dtype=Float32)],
    source=FileSource(name="all_file", path="data/city.parquet", timestamp_field="known_at"),
)
shapes = view("shapes", {"city": String}, timedelta(0), outline=Map)
clash = view("clash", {"city": String}, timedelta(0), f68939=Float32, f114997=Float32)
aggregated = OnDemandFeatureView(
    name="aggregated",
    sources=[driver],
    schema=[Field(name="sum_trips", dtype=Int64)],
    aggregations=[Aggregation(column="trips", function="sum")],
)

services = {
    "renamed": [
        driver[["rating"]].with_name("chauffeur"),
        driver.with_name("passenger").with_join_key_map({"driver_id": "rider_id"}),
    ],
    "mapped": [driver_in_city.with_join_key_map({"city": "destination"})],
    "other_keys": [by_token, by_instant, by_small],
    "everywhere_too": [everywhere, city],
    "made": [rated, driver[["trips", "plate"]], doubled],
    "singly": [single],
    "written": [stored_rating[["doubled"]]],
    "only_feast_reads": [shapes],
    "with_history_only": [driver, by_hidden],
    "with_disabled": [by_off],
    "with_bool_key": [by_known],
    "with_key_of_two_types": [driver, by_small.with_join_key_map({"small": "driver_id"})],
    "twice": [driver[["rating"]], driver],
    "one_name": [driver.with_name("it"), city.with_name("it")],
    "by_two_keys": [rated, driver.with_join_key_map({"driver_id": "rider_id"})],
    "with_renamed_source": [renamed_source],
    "with_made_of_made": [made_of_made],
    "with_key_field": [asks_for_a_key],
    "with_list_field": [asks_for_a_list],
    "with_field_of_two_types": [doubled, asks_for_a_number],
    "clashing": [clash],
    "half_clashing": [clash[["f68939"]]],
    "aggregated_too": [aggregated],
}
for name, views in services.items():
    globals()["service_" + name] = FeatureService(name=name, features=views)
"""


@pytest.fixture
def store(fleet: Fleet) -> "FeatureStore":
    return fleet.open_store()


@pytest.fixture(scope="module")
def more(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> "FeatureStore":
    """A registry of everything that a service may hold, and of what cannot be served."""
    return _applied(MORE, tmp_path_factory.mktemp("more") / "repo", fleet)


def _applied(definitions: str, repo: Path, fleet: Fleet) -> "FeatureStore":
    from app.features.feast_repo import apply, open_store

    write_repository(repo, DEFINITIONS + definitions, f"definitions_{repo.parent.name}")
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


def _plan(store: "FeatureStore", service: str) -> FeaturePlan:
    from app.features.feast_plan import compile_plan

    return compile_plan(store, service)


def test_an_alias_is_a_views_name_here_and_not_in_the_store(more: "FeatureStore") -> None:
    plan = _plan(more, "renamed")
    assert plan.references == (
        "chauffeur:rating",
        "passenger:rating",
        "passenger:trips",
        "passenger:plate",
    )
    assert [(view.name, view.stored_as) for view in plan.views] == [
        ("chauffeur", "driver"),
        ("passenger", "driver"),
    ]
    assert plan.redis is not None
    assert plan.redis.fields["chauffeur:rating"] == plan.redis.fields["passenger:rating"]


def test_a_join_key_map_names_the_fields_of_an_instance(more: "FeatureStore") -> None:
    renamed, mapped = _plan(more, "renamed"), _plan(more, "mapped")
    assert renamed.join_keys == {"driver_id": "int", "rider_id": "int"}
    assert [(view.join_keys, view.stored_keys) for view in renamed.views] == [
        (("driver_id",), None),
        (("rider_id",), ("driver_id",)),
    ]
    assert mapped.join_keys == {"driver_id": "int", "destination": "string"}
    # Feast keeps the entity columns of a view in no order of the definition.
    (view,) = mapped.views
    assert dict(zip(view.join_keys, view.stored_keys or (), strict=True)) == {
        "driver_id": "driver_id",
        "destination": "city",
    }


def test_a_join_key_has_the_type_that_the_registry_gives_it(more: "FeatureStore") -> None:
    plan = _plan(more, "other_keys")
    assert plan.join_keys == {"token": "bytes", "instant": "timestamp", "small": "int"}
    assert plan.redis is not None
    assert plan.redis.key_types == {
        "token": "Bytes",
        "instant": "UnixTimestamp",
        "small": "Int32",
    }


def test_a_view_without_entities_has_no_join_keys(more: "FeatureStore") -> None:
    plan = _plan(more, "everywhere_too")
    assert plan.views[0].join_keys == ()
    assert plan.views[0].stored_keys is None
    assert plan.join_keys == {"city": "string"}


def test_the_hash_fields_are_those_that_feast_writes(store: "FeatureStore") -> None:
    from feast.infra.online_stores.helpers import _mmh3

    plan = _plan(store, "fleet")
    assert plan.redis is not None
    assert plan.redis.key_version == 3
    assert plan.redis.fields == {name: _mmh3(name).hex() for name in FLEET.references}


@pytest.mark.parametrize(
    ("reference", "field"),
    [
        ("feature_view_1:feature_10", "266d5f39"),
        ("feature_view_1:feature_11", "c3379abf"),
        ("driver_hourly_stats:conv_rate", "6160e3da"),
        ("driver_hourly_stats:acc_rate", "fa5e58ad"),
        ("driver_hourly_stats:avg_daily_trips", "18a5e5a3"),
    ],
)
def test_golden_hash_fields(reference: str, field: str) -> None:
    from feast.infra.online_stores.helpers import _mmh3

    assert _mmh3(reference).hex() == field


def test_an_on_demand_view_keeps_its_place_and_what_it_reads_comes_last(
    more: "FeatureStore",
) -> None:
    plan = _plan(more, "made")
    assert plan.references == (
        "rated:doubled",
        "driver:trips",
        "driver:plate",
        "driver:rating",
        "doubled:doubled",
        "city:demand",
    )
    assert plan.stored().references == (
        "driver:trips",
        "driver:plate",
        "driver:rating",
        "city:demand",
    )
    assert plan.request_fields == {"distance": "Float32"}
    assert plan.inputs == {"driver:rating", "city:demand"}
    rated = plan.views[0].transformation
    assert rated is not None
    assert (rated.mode, rated.inputs, rated.request_fields) == (
        "python",
        ("city:demand", "driver:rating"),
        ("distance",),
    )
    assert "2.0 for _ in one" in rated.source
    assert plan.views[0].join_keys == ()
    assert plan.join_keys == {"driver_id": "int", "city": "string"}


def test_a_singleton_is_told_apart(more: "FeatureStore") -> None:
    (view,) = _plan(more, "singly").views
    assert view.transformation is not None
    assert view.transformation.mode == "python_singleton"


def test_an_on_demand_view_that_is_written_online_is_read_like_any_other(
    more: "FeatureStore",
) -> None:
    plan = _plan(more, "written")
    assert plan.views == (
        PlannedView("stored_rating", ("driver_id",), None, (PlannedFeature("doubled", "Float64"),)),
    )
    assert plan.request_fields == {}
    assert plan.redis is not None


def test_a_value_that_only_feast_can_read_leaves_the_plan_to_feast(more: "FeatureStore") -> None:
    from app.features.feast_plan import why_not_from_redis

    plan = _plan(more, "only_feast_reads")
    assert plan.redis is None
    assert "shapes:outline (Map)" in why_not_from_redis(more, plan)


def test_a_version_of_a_view_is_stored_under_its_number(
    fleet: Fleet, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from app.features.feast_repo import apply, open_store

    folder = tmp_path_factory.mktemp("versions") / "repo"
    write_repository(folder, DEFINITIONS, "definitions_versions")
    settings = folder / "feature_store.yaml"
    settings.write_text(
        SETTINGS.replace(
            "registry: data/registry.db",
            "registry:\n  path: data/registry.db\n  enable_online_feature_view_versioning: true",
        ).replace("serialization_version: 3", "serialization_version: 2")
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # version 2 is deprecated
        apply(folder, fleet.redis_url)
        store = open_store(folder, None)
    first = _plan(store, "fleet")
    wider = store.get_feature_view("driver")
    wider.features = [*wider.features, type(wider.features[0])(name="age", dtype=_feast_float())]
    store.apply([wider])
    second = _plan(store, "part_of_fleet")
    pinned = store.get_feature_service("part_of_fleet")
    for projection in pinned.feature_view_projections:
        projection.version_tag = 0 if projection.name == "driver" else None
    pinned.name = "pinned"
    store.apply([pinned])
    third = _plan(store, "pinned")
    assert [view.stored_as for view in first.views] == [None, None, None]
    assert [(view.name, view.stored_as) for view in second.views] == [
        ("city", None),
        ("driver", "driver_v1"),
    ]
    assert [(view.name, view.stored_as) for view in third.views] == [
        ("city", None),
        ("driver@v0", "driver"),
    ]
    assert first.redis is not None
    assert first.redis.key_version == 2


def _feast_float() -> Any:
    from feast.types import Float32

    return Float32


@pytest.mark.parametrize(
    ("service", "message"),
    [
        ("flete", r"no feature service 'flete' in the registry: \[.*'fleet'"),
        ("with_history_only", "with_history_only: view by_hidden has no online data"),
        ("with_disabled", "with_disabled: view by_off is disabled"),
        ("with_bool_key", "by_known: join key known is Bool"),
        ("with_key_of_two_types", "by_small: join key driver_id is Int32 here and Int64 elsewhere"),
        ("twice", "twice: driver:rating is asked for twice"),
        ("one_name", "one_name: it names two views"),
        ("by_two_keys", "by_two_keys: driver names two views, or one with two sets of join keys"),
        ("with_renamed_source", "renamed_source: reads driver under another name"),
        ("with_made_of_made", "made_of_made: reads doubled, which is made on demand too"),
        ("with_key_field", "asks_for_a_key: request field driver_id is a join key too"),
        ("with_list_field", "asks_for_a_list: request field settings is Array"),
        ("with_field_of_two_types", "asks_for_a_number: request field distance is Int64 here"),
        ("clashing", "clash:.* and clash:.* share the hash field abcd6c53"),
        ("half_clashing", "clash:.* and clash:.* share the hash field abcd6c53"),
        ("aggregated_too", "aggregated aggregates on demand, which is not served"),
    ],
)
def test_a_service_that_cannot_be_served_is_refused_by_name(
    more: "FeatureStore", service: str, message: str
) -> None:
    with pytest.raises(InvalidModel, match=message):
        _plan(more, service)
