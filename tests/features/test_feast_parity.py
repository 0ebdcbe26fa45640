"""Against Feast itself: the same values where both are right, and each place where we differ."""

import json
import warnings
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from app.clock import ReplayClock
from app.deadline import Deadline
from app.features.plan import FeaturePlan
from app.features.redis_address import parse_address
from app.features.redis_features import RedisFeatures
from app.features.redis_source import RedisSource
from app.features.source import FeatureRows, ValueStatus
from tests.tiny_feast import DEFINITIONS, KNOWN_AT, TTL_S, Fleet, write_repository

if TYPE_CHECKING:
    from feast import FeatureStore

MORE = """
from feast import RequestSource
from feast.on_demand_feature_view import on_demand_feature_view
from feast.types import Float64

everywhere = FeatureView(
    name="everywhere",
    schema=[Field(name="demand", dtype=Float32)],
    source=FileSource(name="all_file", path="data/one.parquet", timestamp_field="known_at"),
)


@on_demand_feature_view(
    sources=[driver[["trips"]], RequestSource(name="r", schema=[Field(name="extra", dtype=Int64)])],
    schema=[Field(name="total", dtype=Int64)],
    mode="python",
    singleton=True,
)
def summed(inputs):
    return {"total": (inputs["trips"] or 0) + inputs["extra"]}


@on_demand_feature_view(
    sources=[driver[["rating"]]],
    entities=[driver_id],
    schema=[Field(name="stars", dtype=Float64)],
    mode="python",
    write_to_online_store=True,
)
def written(inputs):
    return {"stars": [2.0 for _ in inputs["rating"]]}


services = {
    "all_over": [everywhere, city],
    "sums": [summed],
    "stars": [written[["stars"]]],
    "two_drivers": [
        driver[["trips"]].with_name("first"),
        driver[["trips"]].with_name("other").with_join_key_map({"driver_id": "other_id"}),
    ],
}
for name, views in services.items():
    globals()["service_" + name] = FeatureService(name=name, features=views)
"""


@pytest.fixture(scope="module")
def more(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> "FeatureStore":
    """The fleet with more services and the same values, in a project of its own."""
    import pandas as pd

    from app.features.feast_repo import apply, materialize, open_store

    folder = tmp_path_factory.mktemp("parity") / "repo"
    repo = write_repository(folder, DEFINITIONS + MORE, "definitions_parity")
    settings = repo / "feature_store.yaml"
    # Feast's duckdb store cannot materialize a view without entities.
    settings.write_text(
        settings.read_text()
        .replace("project: fleet", "project: parity")
        .replace("type: duckdb", "type: file")
    )
    row = pd.DataFrame({"demand": [0.5]}).assign(known_at=pd.Timestamp(KNOWN_AT))
    row.to_parquet(repo / "data" / "one.parquet")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="On demand feature view is an experimental")
        apply(repo, fleet.redis_url)
    store = open_store(repo, fleet.redis_url)
    for _ in materialize(store, KNOWN_AT):
        pass
    return store


def plan_of(store: "FeatureStore", service: str) -> FeaturePlan:
    from app.features.feast_plan import compile_plan

    return compile_plan(store, service)


def ask_feast(
    store: "FeatureStore", service: str, entities: dict[str, list[Any]], *, full: bool = True
) -> Any:
    definition = store.get_feature_service(service)
    return store.get_online_features(definition, entities, full_feature_names=full)


async def read(
    fleet: Fleet, plan: FeaturePlan, entities: dict[str, list[Any]], *, age_s: float = 0
) -> FeatureRows:
    """As the service reads it, `age_s` after the values became known."""
    from app.features.on_demand import OnDemandSource

    clock = ReplayClock(KNOWN_AT + timedelta(seconds=age_s))
    async with RedisFeatures(parse_address(fleet.redis_url)) as features:
        source = OnDemandSource(RedisSource(features, plan.stored(), clock), plan)
        count = len(next(iter(entities.values())))
        return await source.fetch(entities, count, Deadline.after(30))


async def test_random_repositories_are_read_as_feast_reads_them(
    fleet: Fleet, tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Feast's, of key version 2 and of on-demand views
        from loadtests.prove_feast_parity import prove

        covered = await prove(
            fleet.redis_url, tmp_path, repositories=8, rows=240, seed="tests", say=lambda _: None
        )
    assert covered.differences == []
    assert (covered.repositories, covered.rows >= 200) == (8, True)


async def test_a_view_without_entities_is_read_where_feast_materializes_it(
    fleet: Fleet, more: "FeatureStore"
) -> None:
    rows = await read(fleet, plan_of(more, "all_over"), {"city": ["kyoto", "nowhere"]})
    assert rows.columns[0].tolist() == [0.5, 0.5]
    answer = ask_feast(more, "all_over", {"city": ["kyoto", "nowhere"]}).to_dict()
    assert answer["everywhere__demand"] == [0.5, 0.5]


async def test_an_on_demand_view_that_was_written_is_read(
    fleet: Fleet, more: "FeatureStore"
) -> None:
    import pandas as pd

    row = pd.DataFrame({"driver_id": [1], "rating": [4.5], "known_at": [pd.Timestamp(KNOWN_AT)]})
    more.write_to_online_store("written", row)  # Feast gives it the time of writing
    plan = plan_of(more, "stars")
    async with RedisFeatures(parse_address(fleet.redis_url)) as features:
        from app.clock import WallClock

        source = RedisSource(features, plan, WallClock())
        rows = await source.fetch({"driver_id": [1, 2]}, 2, Deadline.after(30))
    assert rows.columns[0][0] == 2.0
    assert rows.status.tolist() == [[ValueStatus.PRESENT], [ValueStatus.NOT_FOUND]]


# Where we differ: docs/feast.md has the list.


async def test_an_entity_that_is_not_stored_is_not_found_and_feast_says_present(
    fleet: Fleet, more: "FeatureStore"
) -> None:
    response = ask_feast(more, "fleet", {"driver_id": [99], "city": ["nowhere"]}).proto
    assert set(response.results[-1].statuses) == {1}  # PRESENT
    assert response.results[-1].event_timestamps[0].seconds == 0
    rows = await read(fleet, plan_of(more, "fleet"), {"driver_id": [99], "city": ["nowhere"]})
    assert set(rows.status[0]) == {ValueStatus.NOT_FOUND}


async def test_a_value_older_than_its_ttl_is_null_and_feast_returns_it(
    fleet: Fleet, more: "FeatureStore"
) -> None:
    asked = {"driver_id": [1], "city": ["kyoto"]}
    answer = ask_feast(more, "fleet", asked).to_dict()  # years later
    assert answer["driver__trips"] == [7]
    plan = plan_of(more, "fleet")
    trips = plan.references.index("driver:trips")
    young, old = [await read(fleet, plan, asked, age_s=age) for age in (TTL_S, TTL_S + 1)]
    assert (young.columns[trips][0], ValueStatus(young.status[0, trips])) == (
        7.0,
        ValueStatus.PRESENT,
    )
    assert old.columns[trips][0] != old.columns[trips][0]  # NaN
    assert ValueStatus(old.status[0, trips]) is ValueStatus.OUTSIDE_MAX_AGE


async def test_a_value_from_the_future_is_not_found_and_feast_returns_it(
    fleet: Fleet, more: "FeatureStore"
) -> None:
    asked = {"driver_id": [1], "city": ["kyoto"]}
    rows = await read(fleet, plan_of(more, "fleet"), asked, age_s=-61)
    assert set(rows.status[0]) == {ValueStatus.NOT_FOUND}


async def test_a_singleton_makes_every_row_and_feast_the_first(
    fleet: Fleet, more: "FeatureStore"
) -> None:
    asked = {"driver_id": [1, 2], "extra": [100, 200]}
    answer = ask_feast(more, "sums", asked, full=False).to_dict()
    assert answer["total"] == [107]
    plan = plan_of(more, "sums")
    rows = await read(fleet, plan, asked)
    assert rows.columns[plan.references.index("summed:total")].tolist() == [107.0, 203.0]


async def test_a_python_function_has_a_full_name_and_feast_loses_it(
    fleet: Fleet, more: "FeatureStore"
) -> None:
    answer = ask_feast(more, "sums", {"driver_id": [1], "extra": [100]}).to_dict()
    assert "summed__total" not in answer
    assert "summed:total" in plan_of(more, "sums").references


@pytest.mark.parametrize("order", [("driver_id", "other_id"), ("other_id", "driver_id")])
async def test_a_join_key_map_holds_whatever_the_order_of_the_instance(
    fleet: Fleet, more: "FeatureStore", order: tuple[str, str]
) -> None:
    values = {"driver_id": [1], "other_id": [2]}
    asked = {key: values[key] for key in order}
    rows = await read(fleet, plan_of(more, "two_drivers"), asked)
    assert [column[0] for column in rows.columns] == [7.0, 3.0]
    answer = ask_feast(more, "two_drivers", asked).to_dict()
    last = 3 if order[-1] == "other_id" else 7  # Feast: the last field that names the join key
    assert answer["other__trips"] == [last]


def test_the_plan_of_every_construct_survives_its_json(more: "FeatureStore") -> None:
    from app.features.plan import plan_from_json

    for service in ("all_over", "sums", "stars", "two_drivers"):
        plan = plan_of(more, service)
        assert plan_from_json(plan.to_json()) == plan
        assert json.loads(plan.to_json())["feature_service"] == service
