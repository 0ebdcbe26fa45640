import json
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest

from app.contract import Contract
from app.errors import InvalidInput, PayloadTooLarge
from app.features.plan import FeaturePlan, PlannedFeature, PlannedView, Transformation
from app.instances import InstanceDecoder

PLAN = FeaturePlan(
    "test",
    "drivers",
    {"driver_id": "int", "city": "string"},
    (
        PlannedView(
            "driver",
            ("driver_id",),
            None,
            (PlannedFeature("rating", "Float32"), PlannedFeature("badge", "String")),
        ),
    ),
)
CONTRACT = Contract.model_validate(
    {
        "request_fields": {
            "distance": "float",
            "asked_at": "timestamp",
            "seats": "int",
            "night": "bool",
            "note": "string",
        },
        "inputs": [{"tensor": "x", "columns": ["distance"]}],
        "outputs": {"y": {"tensor": "y"}},
        "limits": {"max_instances": 3},
    }
)
DECODER = InstanceDecoder(CONTRACT, PLAN)
INSTANCE: dict[str, Any] = {
    "driver_id": 7,
    "city": "Ōsaka",
    "distance": 1.5,
    "asked_at": "2013-12-31T18:30:00-05:00",
    "seats": 2,
    "night": True,
    "note": "",
}


def body(*instances: Any, **more: Any) -> bytes:
    return json.dumps({"instances": list(instances), **more}).encode()


def test_instances_become_columns_in_their_order() -> None:
    decoded = DECODER.decode(body(INSTANCE, INSTANCE | {"driver_id": 8, "distance": 2}))
    assert decoded.count == 2
    assert decoded.fields["driver_id"] == [7, 8]
    assert decoded.fields["distance"] == [1.5, 2.0]
    assert decoded.fields["asked_at"][0].isoformat() == "2013-12-31T18:30:00-05:00"
    assert decoded.overrides == {}
    assert decoded.verbose is False


def test_an_entity_may_be_null_but_not_absent() -> None:
    assert DECODER.decode(body(INSTANCE | {"city": None})).fields["city"] == [None]
    without = {name: value for name, value in INSTANCE.items() if name != "city"}
    with pytest.raises(InvalidInput) as refused:
        DECODER.decode(body(without))
    assert refused.value.field == "instances[0].city"


def test_a_stored_feature_may_be_given_by_some_instances() -> None:
    decoded = DECODER.decode(body(INSTANCE, INSTANCE | {"driver:rating": 4.5}))
    assert decoded.overrides == {"driver:rating": [msgspec.UNSET, 4.5]}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"distance": "far"}, "instances[1].distance"),
        ({"distance": None}, "instances[1].distance"),
        ({"distance": [1.0]}, "instances[1].distance"),
        ({"driver_id": "7"}, "instances[1].driver_id"),
        ({"driver_id": 7.5}, "instances[1].driver_id"),
        ({"driver_id": 2**63}, "instances[1].driver_id"),
        ({"driver_id": True}, "instances[1].driver_id"),
        ({"city": 7}, "instances[1].city"),
        ({"city": "x" * 257}, "instances[1].city"),
        ({"asked_at": "yesterday"}, "instances[1].asked_at"),
        ({"asked_at": "2013-12-31T18:30:00"}, "instances[1].asked_at"),
        ({"asked_at": 1388532600}, "instances[1].asked_at"),
        ({"seats": 1.5}, "instances[1].seats"),
        ({"seats": 2**60}, "instances[1].seats"),
        ({"night": "yes"}, "instances[1].night"),
        ({"note": None}, "instances[1].note"),
        ({"driver:rating": "good"}, "instances[1].driver:rating"),
        ({"driver:unknown": 1}, "instances[1].driver:unknown"),
        ({"tailnumm": "N1"}, "instances[1].tailnumm"),
    ],
)
def test_a_faulty_value_is_named_with_its_instance(change: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        DECODER.decode(body(INSTANCE, INSTANCE | change))
    assert refused.value.field == field
    assert field in str(refused.value)


@pytest.mark.parametrize("name", ["distance", "asked_at", "seats", "night", "note", "driver_id"])
def test_a_missing_field_is_named(name: str) -> None:
    without = {key: value for key, value in INSTANCE.items() if key != name}
    with pytest.raises(InvalidInput) as refused:
        DECODER.decode(body(without))
    assert refused.value.field == f"instances[0].{name}"


@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"-Infinity", b"1e999", b"0x1", b"01"])
def test_a_number_that_json_does_not_have_names_its_field(number: bytes) -> None:
    given = body(INSTANCE).replace(b'"distance": 1.5', b'"distance": ' + number)
    with pytest.raises(InvalidInput) as refused:
        DECODER.decode(given)
    assert refused.value.field is not None
    assert refused.value.field.endswith("distance")


@pytest.mark.parametrize(
    ("given", "field"),
    [
        (b"", "body"),
        (b"{", "body"),
        (b"nonsense", "body"),
        (b"null", "body"),
        (b"[]", "body"),
        (b"\xef\xbb\xbf{}", "body"),
        (b"[" * 100_000, "body"),
        (b"{}", "instances"),
        (b'{"instances": []}', "instances"),
        (b'{"instances": {}}', "instances"),
        (b'{"instances": null}', "instances"),
        (b'{"instances": [1]}', "instances[0]"),
        (b'{"instances": [null]}', "instances[0]"),
        (body(INSTANCE, verbose="yes"), "verbose"),
        (body(INSTANCE, signature="x"), "signature"),
        (body(INSTANCE) + b"{}", "body"),
    ],
)
def test_a_body_of_another_shape_is_refused(given: bytes, field: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        DECODER.decode(given)
    assert refused.value.field == field


def test_bytes_that_are_no_text_are_refused() -> None:
    with pytest.raises(InvalidInput):
        DECODER.decode(body(INSTANCE).replace(b"far", b"f\xffr").replace(b"\\u014c", b"\xff"))


def test_instances_over_the_limit_are_refused_with_both_numbers() -> None:
    with pytest.raises(PayloadTooLarge, match=r"4 given, at most 3"):
        DECODER.decode(body(*[INSTANCE] * 4))
    assert DECODER.decode(body(*[INSTANCE] * 3)).count == 3


def test_keys_of_bytes_are_base64_and_those_of_instants_rfc_3339() -> None:
    plan = replace(PLAN, join_keys={"token": "bytes", "since": "timestamp"})
    given = {"token": "AP8=", "since": "2020-01-01T09:00:00.5+09:00"}
    without = {name: value for name, value in INSTANCE.items() if name not in PLAN.join_keys}
    fields = InstanceDecoder(CONTRACT, plan).decode(body(without | given)).fields
    assert fields["token"] == [b"\x00\xff"]
    assert fields["since"] == [datetime(2020, 1, 1, 0, 0, 0, 500_000, tzinfo=UTC)]
    for name, faulty in (("token", "no base64!"), ("since", "2020-01-01")):
        with pytest.raises(InvalidInput) as refused:
            InstanceDecoder(CONTRACT, plan).decode(body(without | given | {name: faulty}))
        assert refused.value.field == f"instances[0].{name}"


MADE = PlannedView(
    "made",
    (),
    None,
    (PlannedFeature("score", "Float64"),),
    transformation=Transformation("python", ("driver:rating",), ("weight", "seats"), "", ""),
)
WITH_MADE = replace(
    PLAN, views=(*PLAN.views, MADE), request_fields={"weight": "Int32", "seats": "Int64"}
)


@pytest.mark.parametrize("faulty", [None, "1", 1.5, 2**31])
def test_an_instance_holds_what_on_demand_views_read(faulty: Any) -> None:
    decoder = InstanceDecoder(CONTRACT, WITH_MADE)
    assert decoder.decode(body(INSTANCE | {"weight": 3})).fields["weight"] == [3]
    for given in (INSTANCE, INSTANCE | {"weight": faulty}):
        with pytest.raises(InvalidInput) as refused:
            decoder.decode(body(given))
        assert refused.value.field == "instances[0].weight"


def test_what_model_yaml_declares_of_such_a_field_holds() -> None:
    decoder = InstanceDecoder(CONTRACT, WITH_MADE)
    with pytest.raises(InvalidInput) as refused:
        decoder.decode(body(INSTANCE | {"weight": 3, "seats": 2**60}))
    assert refused.value.field == "instances[0].seats"


def test_a_feature_that_others_are_made_of_cannot_be_given() -> None:
    decoder = InstanceDecoder(CONTRACT, WITH_MADE)
    given = INSTANCE | {"weight": 3, "made:score": 0.5}
    assert decoder.decode(body(given)).overrides == {"made:score": [0.5]}
    with pytest.raises(InvalidInput) as refused:
        decoder.decode(body(given | {"driver:rating": 4.5}))
    assert refused.value.field == "instances[0].driver:rating"
