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
    Transformation,
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
    join_keys=st.dictionaries(NAMES, st.sampled_from(["string", "int"]), max_size=3),
    views=st.lists(VIEWS, max_size=3).map(tuple),
    request_fields=st.dictionaries(NAMES, st.sampled_from(["Float32", "String"]), max_size=2),
)


@given(PLANS)
def test_a_plan_survives_its_json(plan: FeaturePlan) -> None:
    read = plan_from_json(plan.to_json())
    assert read == plan
    assert read.to_json() == plan.to_json()


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
