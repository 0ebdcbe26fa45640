"""The keys of entities: Feast's own golden bytes, and Feast itself as the oracle."""

import struct
from datetime import UTC
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.features.entity_key import EntityKeyEncoder, KeyType
from tests.tiny_feast import Fleet


@pytest.mark.parametrize(
    ("types", "values", "project", "expected"),
    [
        (
            {"entity": "Int32"},
            (1,),
            "test",
            "01000000 02000000 06000000 656e74697479 03000000 04000000 01000000 74657374",
        ),
        (
            {"driver_id": "Int64"},
            (1001,),
            "my_project",
            "01000000 02000000 09000000 6472697665725f6964 04000000 08000000 e903000000000000"
            " 6d795f70726f6a656374",
        ),
        (
            {},
            (),
            "p1",
            "01000000 02000000 0a000000 5f5f64756d6d795f6964 02000000 00000000 7031",
        ),
    ],
)
def test_golden_keys(
    types: dict[str, KeyType], values: tuple[Any, ...], project: str, expected: str
) -> None:
    assert EntityKeyEncoder(types, project, 3).encode(values) == bytes.fromhex(expected)


@pytest.mark.parametrize(
    ("kind", "value"), [("Int32", 2**31), ("Int32", -(2**31) - 1), ("Int64", 2**63)]
)
def test_an_integer_that_its_type_does_not_hold_is_refused(kind: KeyType, value: int) -> None:
    with pytest.raises(struct.error):
        EntityKeyEncoder({"id": kind}, "p", 3).encode((value,))


def test_other_versions_are_refused() -> None:
    with pytest.raises(ValueError, match="1 is not 2 or 3"):
        EntityKeyEncoder({"id": "Int64"}, "p", 1)


NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
VALUES: dict[KeyType, st.SearchStrategy[Any]] = {
    "String": st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    "Int32": st.integers(-(2**31), 2**31 - 1),
    "Int64": st.integers(-(2**63), 2**63 - 1),
    "Bytes": st.binary(min_size=1, max_size=20),  # Feast takes none for a null
    "UnixTimestamp": st.datetimes(timezones=st.just(UTC)),
}
FEAST_TYPES: dict[KeyType, str] = {
    "String": "STRING",
    "Int32": "INT32",
    "Int64": "INT64",
    "Bytes": "BYTES",
    "UnixTimestamp": "UNIX_TIMESTAMP",
}
ENTITIES = st.dictionaries(
    NAMES,
    st.sampled_from(list(VALUES)).flatmap(lambda t: st.tuples(st.just(t), VALUES[t])),
    min_size=1,
    max_size=3,
)


@given(ENTITIES, st.sampled_from([2, 3]), NAMES)
def test_keys_are_those_that_feast_writes(
    fleet: Fleet, entity: dict[str, tuple[KeyType, Any]], version: int, project: str
) -> None:
    import warnings

    from feast.infra.online_stores.helpers import _redis_key
    from feast.protos.feast.types.EntityKey_pb2 import EntityKey
    from feast.type_map import python_values_to_proto_values
    from feast.value_type import ValueType

    ours = EntityKeyEncoder({k: kind for k, (kind, _) in entity.items()}, project, version)
    theirs = EntityKey(
        join_keys=list(entity),
        entity_values=[
            python_values_to_proto_values([value], ValueType[FEAST_TYPES[kind]])[0]
            for kind, value in entity.values()
        ],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # version 2 is deprecated
        expected = _redis_key(project, theirs, entity_key_serialization_version=version)
    assert ours.encode([entity[key][1] for key in ours.join_keys]) == expected


@given(
    st.lists(st.sampled_from(list(VALUES)), min_size=1, max_size=2).flatmap(
        lambda kinds: st.tuples(
            st.just(kinds), st.lists(st.tuples(*(VALUES[kind] for kind in kinds)), max_size=5)
        )
    )
)
def test_many_keys_are_encoded_as_each_alone(
    drawn: tuple[list[KeyType], list[tuple[Any, ...]]],
) -> None:
    kinds, entities = drawn
    keys = EntityKeyEncoder({f"k{n}": kind for n, kind in enumerate(kinds)}, "p", 3)
    alone = [keys.encode(entity) for entity in entities]
    assert keys.encode_all(entities, b"$", b"!") == [
        b"$%d\r\n%b!" % (len(key), key) for key in alone
    ]
