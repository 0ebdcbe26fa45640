"""The plan of a feature service: its order, its bytes and its digest."""

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.features.plan import (
    NO_FEATURES,
    FeaturePlan,
    PlannedFeature,
    PlannedView,
    RedisLayout,
    Transformation,
    differences,
    plan_from_json,
    value_type,
)
from tests.tiny_feast import FLEET

NAMES = st.text(min_size=1, max_size=8)
TRANSFORMATIONS = st.builds(
    Transformation,
    mode=st.sampled_from(["python", "python_singleton", "pandas"]),
    inputs=st.lists(NAMES, max_size=2).map(tuple),
    request_fields=st.lists(NAMES, max_size=2).map(tuple),
    source=st.text(max_size=8),
    definition=st.text(max_size=8),
)
VIEWS = st.builds(
    PlannedView,
    name=NAMES,
    join_keys=st.lists(NAMES, max_size=2).map(tuple),
    ttl_s=st.none() | st.floats(0, 1e9),
    features=st.lists(
        st.builds(PlannedFeature, NAMES, st.sampled_from(["Float32", "String", "Array(Int64)"])),
        max_size=3,
    ).map(tuple),
    stored_as=st.none() | NAMES,
    stored_keys=st.none() | st.lists(NAMES, max_size=2).map(tuple),
    transformation=st.none() | TRANSFORMATIONS,
)
PLANS = st.builds(
    FeaturePlan,
    project=NAMES,
    feature_service=NAMES,
    join_keys=st.dictionaries(
        NAMES, st.sampled_from(["string", "int", "bytes", "timestamp"]), max_size=3
    ),
    views=st.lists(VIEWS, max_size=3).map(tuple),
    request_fields=st.dictionaries(NAMES, st.sampled_from(["Float32", "String"]), max_size=2),
)


@given(PLANS)
def test_a_plan_survives_its_json(plan: FeaturePlan) -> None:
    read = plan_from_json(plan.to_json())
    assert read == plan
    assert read.to_json() == plan.to_json()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"[" * 100_000,
        b'{"project": "p"}',
        NO_FEATURES.to_json().replace(b'"join_keys": {}', b'"join_keys": []'),
        NO_FEATURES.to_json().replace(b'"views": []', b'"views": [1]'),
    ],
    ids=["empty", "list", "deep", "parts lack", "keys of another type", "views of another type"],
)
def test_what_is_no_plan_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match="not a feature plan"):
        plan_from_json(content)


def test_features_are_in_the_order_of_the_views() -> None:
    assert FLEET.references == (
        "driver:rating",
        "driver:trips",
        "driver:plate",
        "city:demand",
        "driver_in_city:visits",
        "driver_in_city:known",
    )


@given(PLANS)
def test_the_columns_of_the_views_are_all_references_in_order(plan: FeaturePlan) -> None:
    found = [reference for columns in plan.view_columns for reference in plan.references[columns]]
    assert tuple(found) == plan.references
    assert [plan.references[columns] for columns in plan.view_columns] == [
        view.references() for view in plan.views
    ]


def test_the_document_does_not_depend_on_the_order_in_which_join_keys_were_met() -> None:
    reordered = replace(FLEET, join_keys=dict(reversed(FLEET.join_keys.items())))
    assert reordered.to_json() == FLEET.to_json()


@pytest.mark.parametrize(
    "other",
    [
        replace(FLEET, project="others"),
        replace(FLEET, feature_service="others"),
        replace(FLEET, join_keys={"driver_id": "string", "city": "string"}),
        replace(FLEET, views=FLEET.views[::-1]),
        replace(FLEET, views=(replace(FLEET.views[0], ttl_s=None), *FLEET.views[1:])),
        replace(FLEET, views=(replace(FLEET.views[0], ttl_s=3601.0), *FLEET.views[1:])),
        replace(
            FLEET,
            views=(replace(FLEET.views[0], features=FLEET.views[0].features[:2]), *FLEET.views[1:]),
        ),
    ],
    ids=["project", "service", "key type", "order", "no ttl", "another ttl", "fewer features"],
)
def test_another_plan_is_another_document(other: FeaturePlan) -> None:
    assert other.to_json() != FLEET.to_json()


@given(PLANS)
def test_a_plan_does_not_differ_from_itself(plan: FeaturePlan) -> None:
    assert differences(plan, plan_from_json(plan.to_json())) == []


MADE = PlannedView(
    "made",
    (),
    None,
    (PlannedFeature("score", "Float64"),),
    transformation=Transformation("python", ("city:demand",), ("hour",), "return 1", "AAAA"),
)
PUBLISHED = replace(
    FLEET,
    views=(*FLEET.views, MADE),
    redis=RedisLayout(3, {"driver_id": "Int64", "city": "String"}, {}),
    request_fields={"hour": "Int64"},
)


def _with(index: int, **changes: Any) -> FeaturePlan:
    views = list(PUBLISHED.views)
    views[index] = replace(views[index], **changes)
    return replace(PUBLISHED, views=tuple(views))


@pytest.mark.parametrize(
    ("registry", "said"),
    [
        (_with(0, ttl_s=60.0), ["view driver: ttl_s was 3600.0, is 60.0"]),
        (_with(0, features=FLEET.views[0].features[1:]), ["view driver: feature rating is gone"]),
        (
            _with(1, features=(PlannedFeature("demand", "Float64"),)),
            ["view city: feature demand was 'Float32', is 'Float64'"],
        ),
        (_with(1, stored_as="city_v1"), ["view city: stored as was 'city', is 'city_v1'"]),
        (_with(1, name="town"), ["view city is gone", "view town is new"]),
        (
            _with(1, join_keys=("place",), stored_keys=("city",)),
            ["view city: join keys was ('city',), is ('place',)"],
        ),
        (
            _with(3, transformation=replace(MADE.transformation, source="return 2")),  # type: ignore[type-var]  # it is not None
            ["view made: source was 'return 1', is 'return 2'"],
        ),
        (
            replace(PUBLISHED, redis=RedisLayout(2, {"driver_id": "Int32", "city": "String"}, {})),
            ["Feast type of driver_id was 'Int64', is 'Int32'", "key_version was 3, is 2"],
        ),
        (replace(PUBLISHED, request_fields={}), ["request field hour is gone"]),
        (
            replace(PUBLISHED, views=PUBLISHED.views[::-1]),
            ["the order of the features has changed"],
        ),
    ],
)
def test_what_the_registry_says_otherwise_is_told_in_words(
    registry: FeaturePlan, said: list[str]
) -> None:
    assert differences(PUBLISHED, registry) == said


def test_another_pickle_of_the_same_function_is_no_difference() -> None:
    repickled = replace(MADE.transformation, definition="BBBB")  # type: ignore[type-var]  # not None
    assert differences(PUBLISHED, _with(3, transformation=repickled)) == []


def test_a_model_without_stored_features_has_an_empty_plan() -> None:
    assert NO_FEATURES.references == ()
    assert plan_from_json(NO_FEATURES.to_json()) == NO_FEATURES


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("Float32", "number"),
        ("Float64", "number"),
        ("Int32", "number"),
        ("Int64", "number"),
        ("Bool", "number"),
        ("String", "text"),
        ("Bytes", "other"),
        ("UnixTimestamp", "other"),
        ("Array(Float32)", "other"),
    ],
)
def test_value_types_are_feasts_types_as_a_model_sees_them(dtype: str, expected: str) -> None:
    assert value_type(dtype) == expected


def _without(key: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(FLEET.to_json())
    del document[key]
    return document


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"{",
        b"\xff",
        b"null",
        b"[]",
        b"{}",
        json.dumps(_without("views")).encode(),
        json.dumps(_without("join_keys")).encode(),
        json.dumps(json.loads(FLEET.to_json()) | {"views": [{"name": "driver"}]}).encode(),
        FLEET.to_json().replace(b'"dtype"', b'"type"'),
    ],
    ids=["empty", "cut", "not text", "null", "list", "{}", "no views", "no keys", "view", "type"],
)
def test_another_document_is_refused(document: bytes) -> None:
    with pytest.raises((KeyError, ValueError)):
        plan_from_json(document)
