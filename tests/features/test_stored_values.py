"""Encoded values are byte for byte Feast's, and what the reader decodes again."""

from datetime import UTC
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.features.stored_values import ENCODABLE, encode_column
from app.features.values import DECODABLE, decode_column
from tests.tiny_feast import Fleet

VALUES: dict[str, st.SearchStrategy[Any]] = {
    "Float32": st.floats(width=32, allow_nan=False),
    "Float64": st.floats(allow_nan=False),
    "Int32": st.integers(-(2**31), 2**31 - 1),
    "Int64": st.integers(-(2**63), 2**63 - 1),
    "Bool": st.booleans(),
    "String": st.text(),
    "Bytes": st.binary(min_size=1),  # Feast makes null of bytes that are empty
    "UnixTimestamp": st.datetimes().map(lambda at: int(at.replace(tzinfo=UTC).timestamp())),
}
COLUMNS = st.sampled_from(sorted(VALUES)).flatmap(
    lambda dtype: st.tuples(st.just(dtype), st.lists(st.none() | VALUES[dtype], max_size=5))
)


@pytest.fixture(autouse=True)
def _feast(fleet: Fleet) -> None:
    """Whoever imports Feast first gets its warnings: let it be the fixture."""


def test_every_encodable_type_is_looked_at() -> None:
    assert set(VALUES) == ENCODABLE


@given(COLUMNS)
def test_the_bytes_are_feasts(column: tuple[str, list[Any]]) -> None:
    from feast import types
    from feast.type_map import python_values_to_proto_values

    dtype, values = column
    kind = getattr(types, dtype).to_value_type()
    protos = [python_values_to_proto_values([value], kind)[0] for value in values]
    assert encode_column(dtype, values) == [proto.SerializeToString() for proto in protos]


@given(COLUMNS.filter(lambda column: column[0] in DECODABLE))
def test_the_reader_decodes_what_was_encoded(column: tuple[str, list[Any]]) -> None:
    dtype, values = column
    decoded, corrupt = decode_column(dtype, encode_column(dtype, values))
    assert corrupt == []
    if dtype == "UnixTimestamp":
        assert [at and int(at.timestamp()) for at in decoded.tolist()] == values
    elif decoded.dtype == object:
        assert decoded.tolist() == values
    else:
        expected = [np.nan if value is None else float(value) for value in values]
        np.testing.assert_array_equal(decoded, np.array(expected, dtype=np.float64))


def test_nan_is_null() -> None:
    assert encode_column("Float64", [float("nan")]) == [b""]
