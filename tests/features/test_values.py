"""Decoding stored values: Feast's protobuf classes as the oracle, and what no class wrote."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.features.values import Corrupt, decode_column, decode_seconds
from tests.tiny_feast import Fleet

FIELDS = {
    "Float32": ("float_val", st.floats(width=32, allow_nan=False)),
    "Float64": ("double_val", st.floats(allow_nan=False)),
    "Int32": ("int32_val", st.integers(-(2**31), 2**31 - 1)),
    "Int64": ("int64_val", st.integers(-(2**53), 2**53)),
    "Bool": ("bool_val", st.booleans()),
    "String": ("string_val", st.text(st.characters(exclude_categories=["Cs"]))),
}
NULLS = [None, b"", b"\x98\x01\x00"]
COLUMNS = st.sampled_from(list(FIELDS)).flatmap(
    lambda dtype: st.tuples(
        st.just(dtype), st.lists(st.one_of(FIELDS[dtype][1], st.sampled_from([None, ...])))
    )
)


@given(COLUMNS)
def test_values_are_those_that_feast_wrote(fleet: Fleet, column: tuple[str, list[Any]]) -> None:
    from feast.protos.feast.types.Value_pb2 import NULL, Value

    dtype, values = column
    stored = [
        None
        if value is None
        else Value(null_val=NULL).SerializeToString()
        if value is ...
        else Value(**{FIELDS[dtype][0]: value}).SerializeToString()
        for value in values
    ]
    decoded, corrupt = decode_column(dtype, stored)
    assert corrupt == []
    for value, got in zip(values, decoded.tolist(), strict=True):
        if value is None or value is ...:
            assert got is None or math.isnan(got)
        else:
            assert got == value


@pytest.mark.parametrize("dtype", list(FIELDS))
def test_nulls_are_null_and_not_corrupt(dtype: str) -> None:
    decoded, corrupt = decode_column(dtype, NULLS)
    assert corrupt == []
    assert all(value is None or math.isnan(value) for value in decoded.tolist())


@pytest.mark.parametrize("dtype", list(FIELDS))
@given(noise=st.binary(min_size=1, max_size=12))
def test_noise_harms_no_other_value(dtype: str, noise: bytes) -> None:
    """Noise may happen to be a value of the type; its neighbours are what they were."""
    good = {
        "Float32": b"\x35\x00\x00\x80\x3f",
        "Float64": b"\x29\x00\x00\x00\x00\x00\x00\xf0\x3f",
        "Int32": b"\x18\x01",
        "Int64": b"\x20\x01",
        "Bool": b"\x38\x01",
        "String": b"\x12\x011",
    }[dtype]
    decoded, corrupt = decode_column(dtype, [good, noise, good])
    assert {decoded[0], decoded[2]} == {"1" if dtype == "String" else 1.0}
    assert set(corrupt) <= {1}


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        ("Float32", b"\x29\x00\x00\x00\x00\x00\x00\xf0\x3f"),  # a double
        ("Float32", b"\x35\x00\x00"),  # cut short
        ("Int64", b"\x20"),
        ("Int64", b"\x20" + b"\xff" * 11),
        ("Int64", b"\x20\x01\x01"),
        ("String", b"\x12\x05ab"),
        ("String", b"\x12\x01\xff"),
        ("Bool", b"\x20\x01"),
    ],
)
def test_another_type_or_half_a_value_is_corrupt(dtype: str, stored: bytes) -> None:
    assert decode_column(dtype, [stored])[1] == [0]


@given(st.integers(-(2**40), 2**40), st.integers(0, 999_999_999))
def test_time_stamps_are_those_that_feast_wrote(fleet: Fleet, seconds: int, nanos: int) -> None:
    from google.protobuf.timestamp_pb2 import Timestamp

    stored = Timestamp(seconds=seconds, nanos=nanos).SerializeToString()
    assert decode_seconds(stored) == pytest.approx(seconds + nanos / 1e9)


def test_no_time_stamp_is_no_time() -> None:
    assert np.isnan(decode_seconds(None))
    assert decode_seconds(b"") == 0.0


@pytest.mark.parametrize("stored", [b"\xff", b"\x08", b"\x18\x01", b"\x08" + b"\xff" * 11])
def test_a_broken_time_stamp_is_corrupt(stored: bytes) -> None:
    with pytest.raises(Corrupt):
        decode_seconds(stored)
