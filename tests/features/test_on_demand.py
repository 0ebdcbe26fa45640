"""On-demand views: what their functions get and give, and what happens when one fails."""

import asyncio
import base64
import logging
import warnings
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest

from app.clock import ReplayClock, WallClock
from app.config import Settings
from app.deadline import Deadline
from app.errors import FeaturesUnavailable, InvalidModel
from app.features.plan import FeaturePlan, PlannedFeature, PlannedView, Transformation
from app.features.redis_address import parse_address
from app.features.redis_features import RedisFeatures
from app.features.redis_source import RedisSource
from app.features.source import FeatureRows, FeatureSource, ValueStatus
from app.features.static_source import StaticSource
from app.main import open_features
from tests.tiny_feast import FLEET, FLEET_VALUES, KNOWN_AT, Fleet

Make: TypeAlias = Callable[..., PlannedView]
RATING_AND_DEMAND = ("driver:rating", "city:demand")

DOUBLE = """
def double(inputs):
    return {"doubled": [None if r is None else 2 * r for r in inputs["rating"]]}
"""
SHARE = """
def share(inputs):
    if inputs["driver__rating"] is None or inputs["city__demand"] is None:
        return {"share": None}
    return {"share": inputs["driver__rating"] / inputs["city__demand"] + inputs["bonus"]}
"""
TABLE = """
def table(inputs):
    made = pd.DataFrame()
    made["trips_and_one"] = inputs["trips"].fillna(0).astype("int64") + 1
    made["label"] = inputs["plate"].fillna("none") + "!"
    return made
"""
SHOW = """
def show(inputs):
    return {"shown": [repr([inputs[name][0] for name in sorted(inputs)])]}
"""
RAISE = """
def fails(inputs):
    raise LookupError("nobody")
"""
TOO_FEW = """
def too_few(inputs):
    return {"doubled": [1.0]}
"""
WAIT = """
def wait(inputs):
    import os, time
    for path in set(inputs["path"]):
        while path and not os.path.exists(path):
            time.sleep(0.002)
    return {"doubled": [1.0 for _ in inputs["path"]]}
"""


def made(
    text: str,
    features: Mapping[str, str],
    inputs: Sequence[str] = (),
    fields: Mapping[str, str] | None = None,
    mode: str = "python",
) -> PlannedView:
    """An on-demand view as the compiler plans it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from feast import Field, OnDemandFeatureView, RequestSource
        from feast.feature_view_projection import FeatureViewProjection
        from feast.types import Float64, Int64, String

    dtypes = {"Float64": Float64, "Int64": Int64, "String": String}
    stored = {f"{v.name}:{f.name}": (v.name, f.name) for v in FLEET.views for f in v.features}
    by_view: dict[str, list[str]] = {}
    for view, feature in (stored[name] for name in inputs):
        by_view.setdefault(view, []).append(feature)
    sources: list[Any] = [
        FeatureViewProjection(
            name=view,
            name_alias=None,
            desired_features=[],
            features=[Field(name=name, dtype=Float64) for name in names],
        )
        for view, names in by_view.items()
    ]
    if fields:
        schema = [Field(name=name, dtype=dtypes[dtype]) for name, dtype in fields.items()]
        sources.append(RequestSource(name="asked", schema=schema))
    scope: dict[str, Any] = {}
    exec("import pandas as pd\n" + text, scope)
    function = next(value for name, value in scope.items() if f"def {name}(" in text)
    name = function.__name__
    definition = OnDemandFeatureView(
        name=name,
        sources=sources,
        schema=[Field(name=feature, dtype=dtypes[dtype]) for feature, dtype in features.items()],
        mode=mode.removesuffix("_singleton"),
        singleton=mode == "python_singleton",
        udf=function,
        udf_string=text,
    )
    serialized = definition.to_proto().spec.SerializeToString()
    return PlannedView(
        name,
        (),
        None,
        tuple(PlannedFeature(feature, dtype) for feature, dtype in features.items()),
        transformation=Transformation(
            mode,  # type: ignore[arg-type]  # one of three
            tuple(inputs),
            tuple(fields or ()),
            text,
            base64.b64encode(serialized).decode(),
        ),
    )


def planned(*views: PlannedView, fields: Mapping[str, str] | None = None) -> FeaturePlan:
    """The fleet's plan, with on-demand views in front."""
    return replace(FLEET, views=(*views, *FLEET.views), request_fields=fields or {})


def on_demand(plan: FeaturePlan, inner: FeatureSource | None = None) -> FeatureSource:
    from app.features.on_demand import OnDemandSource

    stored = StaticSource(plan.stored(), FLEET_VALUES, KNOWN_AT.timestamp())
    return OnDemandSource(inner or stored, plan)


async def fetch(
    source: FeatureSource,
    *rows: tuple[int | None, str | None],
    deadline_s: float = 30,
    **fields: Sequence[Any],
) -> FeatureRows:
    entities = {"driver_id": [row[0] for row in rows], "city": [row[1] for row in rows]}
    return await source.fetch(entities | fields, len(rows), Deadline.after(deadline_s))


def values(rows: FeatureRows, reference: str) -> list[Any]:
    column = rows.columns[rows.plan.references.index(reference)]
    return [None if value != value else value for value in column.tolist()]


def status(rows: FeatureRows, reference: str) -> list[str]:
    column = rows.status[:, rows.plan.references.index(reference)]
    return [ValueStatus(number).name for number in column]


@pytest.fixture(autouse=True)
def _feast(fleet: Fleet) -> None:
    """Feast is imported, with its warnings behind us."""


async def test_a_python_function_gets_columns_and_its_values_are_in_their_place() -> None:
    view = made(DOUBLE, {"doubled": "Float64"}, ["driver:rating"])
    rows = await fetch(on_demand(planned(view)), (1, "kyoto"), (2, "kyoto"), (0, ""))
    assert rows.plan.references == ("double:doubled", *FLEET.references)
    assert values(rows, "double:doubled") == [9.0, None, 1.0]
    assert status(rows, "double:doubled") == ["PRESENT", "NULL_VALUE", "PRESENT"]
    assert values(rows, "driver:rating") == [4.5, None, 0.5]
    assert values(rows, "driver_in_city:visits") == [10.0, None, 30.0]


async def test_a_singleton_gets_each_row_by_itself() -> None:
    fields = {"bonus": "Float64"}
    view = made(SHARE, {"share": "Float64"}, RATING_AND_DEMAND, fields, "python_singleton")
    source = on_demand(planned(view, fields=fields))
    rows = await fetch(source, (1, "kyoto"), (2, "東京"), (0, ""), bonus=[0.0, 1.0, 2.0])
    assert values(rows, "share:share") == [2.25, None, 4.0]


async def test_a_pandas_function_gets_a_table() -> None:
    view = made(
        TABLE,
        {"trips_and_one": "Int64", "label": "String"},
        ["driver:trips", "driver:plate"],
        mode="pandas",
    )
    rows = await fetch(on_demand(planned(view)), (1, "kyoto"), (-3, "kyoto"))
    assert values(rows, "table:trips_and_one") == [8.0, 1.0]
    assert values(rows, "table:label") == ["品川 11!", "none!"]


async def test_a_function_sees_what_training_saw() -> None:
    """Integers as integers, instants in UTC and of whole seconds, null as None."""
    fields = {"asked": "UnixTimestamp", "count": "Int64"}
    text_fields = {"count": "Int64"}
    view = made(SHOW, {"shown": "String"}, ["driver:trips", "driver:rating"], text_fields)
    assert view.transformation is not None
    view = replace(view, transformation=replace(view.transformation, request_fields=tuple(fields)))
    source = on_demand(planned(view, fields=fields))
    asked = datetime.fromisoformat("2013-06-01T21:00:00.75+09:00")
    rows = await fetch(source, (2, "kyoto"), asked=[asked], count=[3])
    at = datetime(2013, 6, 1, 12, tzinfo=UTC)
    # asked, city, count, driver__rating, driver__trips, driver_id, rating, trips
    assert values(rows, "show:shown") == [repr([at, "kyoto", 3, None, 3, 2, None, 3])]


async def test_what_is_made_has_the_worst_status_and_the_oldest_time_of_what_was_read() -> None:
    fields = {"bonus": "Float64"}
    view = made(SHARE, {"share": "Float64"}, RATING_AND_DEMAND, fields, "python_singleton")
    plan = planned(view, fields=fields)
    rows = await fetch(on_demand(plan), (1, "kyoto"), (1, "nowhere"), bonus=[0.0, 0.0])
    assert status(rows, "share:share") == ["PRESENT", "NOT_FOUND"]
    assert values(rows, "share:share")[1] is None
    known_at_s = KNOWN_AT.timestamp()
    np.testing.assert_array_equal(rows.event_time_s[:, 0], [known_at_s, known_at_s])


async def test_a_value_that_is_too_old_is_null_to_the_function(
    fleet: Fleet,
) -> None:
    view = made(DOUBLE, {"doubled": "Float64"}, ["driver:rating"])
    plan = replace(planned(view), redis=fleet.plan.redis)
    clock = ReplayClock(KNOWN_AT.replace(hour=14))
    async with RedisFeatures(parse_address(fleet.redis_url)) as features:
        rows = await fetch(on_demand(plan, RedisSource(features, plan.stored(), clock)), (1, ""))
    assert values(rows, "double:doubled") == [None]
    assert status(rows, "double:doubled") == ["OUTSIDE_MAX_AGE"]


async def test_stored_numbers_keep_their_values_behind_what_is_made(fleet: Fleet) -> None:
    """They come as one array of two dimensions, which would add itself to a list."""
    view = made(WAIT, {"doubled": "Float64"}, (), {"path": "String"})
    city = next(view for view in FLEET.views if view.name == "city")
    plan = replace(
        planned(view, fields={"path": "String"}), views=(view, city), redis=fleet.plan.redis
    )
    async with RedisFeatures(parse_address(fleet.redis_url)) as features:
        source = on_demand(plan, RedisSource(features, plan.stored(), WallClock()))
        rows = await fetch(source, (1, "kyoto"), (1, "東京"), path=["", ""])
    assert [column.tolist() for column in rows.columns] == [[1.0, 1.0], [2.0, 8.0]]


async def test_a_function_of_the_instance_alone_needs_no_store() -> None:
    fields = {"path": "String"}
    view = made(WAIT, {"doubled": "Float64"}, (), fields)
    plan = replace(planned(view, fields=fields), views=(view,), join_keys={})
    source = on_demand(plan, StaticSource(plan.stored()))
    rows = await source.fetch({"path": ["", ""]}, 2, Deadline.after(30))
    assert values(rows, "wait:doubled") == [1.0, 1.0]
    assert status(rows, "wait:doubled") == ["PRESENT", "PRESENT"]
    assert np.isnan(rows.event_time_s).all()


async def test_a_function_that_raises_harms_its_own_values_and_is_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    failing = made(RAISE, {"doubled": "Float64"}, ["driver:rating"])
    working = made(DOUBLE, {"doubled": "Float64"}, ["driver:rating"])
    source = on_demand(planned(failing, working))
    with caplog.at_level(logging.WARNING, "app.features.on_demand"):
        for _ in range(3):
            rows = await fetch(source, (1, "kyoto"))
    assert (values(rows, "fails:doubled"), status(rows, "fails:doubled")) == (
        [None],
        ["UNAVAILABLE"],
    )
    assert values(rows, "double:doubled") == [9.0]
    assert values(rows, "driver:rating") == [4.5]
    (record,) = caplog.records
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], LookupError)


async def test_a_function_that_returns_another_number_of_values_has_failed() -> None:
    view = made(TOO_FEW, {"doubled": "Float64"}, ["driver:rating"])
    rows = await fetch(on_demand(planned(view)), (1, "kyoto"), (2, "kyoto"))
    assert status(rows, "too_few:doubled") == ["UNAVAILABLE", "UNAVAILABLE"]


@pytest.fixture
async def waiting(tmp_path: Path) -> AsyncIterator[tuple[FeatureSource, Path]]:
    """A source whose function waits for a file, which is there in the end."""
    gate = tmp_path / "gate"
    fields = {"path": "String"}
    yield on_demand(planned(made(WAIT, {"doubled": "Float64"}, (), fields), fields=fields)), gate
    gate.touch()


async def test_a_function_that_is_late_leaves_the_stored_values(
    waiting: tuple[FeatureSource, Path],
) -> None:
    source, gate = waiting
    rows = await fetch(source, (1, "kyoto"), deadline_s=0.05, path=[str(gate)])
    assert status(rows, "wait:doubled") == ["UNAVAILABLE"]
    assert values(rows, "driver:rating") == [4.5]


async def test_functions_that_never_return_take_four_threads_and_no_more(
    waiting: tuple[FeatureSource, Path],
) -> None:
    source, gate = waiting
    late = [fetch(source, (1, "kyoto"), deadline_s=0.2, path=[str(gate)]) for _ in range(20)]
    for rows in await asyncio.gather(*late):
        assert status(rows, "wait:doubled") == ["UNAVAILABLE"]
    rows = await fetch(source, (1, "kyoto"), deadline_s=0.05, path=[""])
    assert status(rows, "wait:doubled") == ["UNAVAILABLE"]
    gate.touch()
    rows = await fetch(source, (1, "kyoto"), path=[""])
    assert status(rows, "wait:doubled") == ["PRESENT"]


async def test_requests_at_the_same_time_get_their_own_values() -> None:
    source = on_demand(planned(made(DOUBLE, {"doubled": "Float64"}, ["driver:rating"])))
    drivers = [0, 1, 2, 99] * 10
    answers = await asyncio.gather(*(fetch(source, (driver, "kyoto")) for driver in drivers))
    doubled = {0: 1.0, 1: 9.0, 2: None, 99: None}
    assert [values(rows, "double:doubled") for rows in answers] == [[doubled[d]] for d in drivers]


async def test_a_store_that_is_unavailable_stays_so() -> None:
    class Nothing(StaticSource):
        async def fetch(self, *_: Any) -> FeatureRows:
            raise FeaturesUnavailable("gone")

        async def check(self) -> None:
            raise FeaturesUnavailable("gone")

    plan = planned(made(DOUBLE, {"doubled": "Float64"}, ["driver:rating"]))
    source = on_demand(plan, Nothing(plan.stored()))
    with pytest.raises(FeaturesUnavailable):
        await fetch(source, (1, "kyoto"))
    with pytest.raises(FeaturesUnavailable):
        await source.check()


def test_a_function_that_cannot_be_loaded_is_refused_by_name() -> None:
    view = made(DOUBLE, {"doubled": "Float64"}, ["driver:rating"])
    assert view.transformation is not None
    broken = replace(view, transformation=replace(view.transformation, definition="no base64"))
    with pytest.raises(InvalidModel, match="double: the function cannot be loaded"):
        on_demand(planned(broken))


async def test_the_service_makes_what_a_plan_says(fleet: Fleet) -> None:
    view = made(DOUBLE, {"doubled": "Float64"}, ["driver:rating"])
    plan = replace(planned(view), redis=fleet.plan.redis)
    settings = Settings(feature_redis_url=fleet.redis_url, feature_repo=fleet.repo)
    async with open_features(settings, WallClock()) as open_source:
        rows = await fetch(open_source(plan), (1, "kyoto"), (99, "kyoto"))
    assert rows.plan == plan
    # A decade later the rating is too old, and the demand never is.
    assert status(rows, "double:doubled") == ["OUTSIDE_MAX_AGE", "NOT_FOUND"]
    assert values(rows, "city:demand") == [2.0, 2.0]
