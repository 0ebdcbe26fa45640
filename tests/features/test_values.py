"""Decoding stored values: Feast's protobuf classes as the oracle, and what no class wrote."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from app.features.values import DECODABLE, decode_column, decode_times
from tests.tiny_feast import Fleet

SECONDS = (-62_135_596_800, 253_402_300_799)
NO_TIME = -(2**63)
SCALARS = {
    "Float32": ("float", st.floats(width=32)),
    "Float64": ("double", st.floats()),
    "Int32": ("int32", st.integers(-(2**31), 2**31 - 1)),
    "Int64": ("int64", st.integers(-(2**63), 2**63 - 1)),
    "Bool": ("bool", st.booleans()),
    "String": ("string", st.text(st.characters(exclude_categories=["Cs"]))),
    "Bytes": ("bytes", st.binary()),
    "UnixTimestamp": ("unix_timestamp", st.integers(*SECONDS) | st.just(NO_TIME)),
}
DTYPES = [
    *SCALARS,
    *(f"Array({name})" for name in SCALARS),
    *(f"Set({name})" for name in SCALARS),
]
NULLS = [None, b"", b"\x98\x01\x00"]
MANY = 64
"""Times as many values take other ways than a few."""


def field_of(dtype: str) -> str:
    """The member of Feast's oneof."""
    kind, _, name = dtype.removesuffix(")").rpartition("(")
    return SCALARS[name][0] + {"": "", "Array": "_list", "Set": "_set"}[kind] + "_val"


def proto(dtype: str, value: Any) -> Any:
    """`feast.types.Value` of a value of this type."""
    from feast.protos.feast.types.Value_pb2 import Value

    message = Value()
    field = field_of(dtype)
    if "(" in dtype:
        getattr(message, field).SetInParent()
        getattr(message, field).val.extend(value)
    else:
        setattr(message, field, value)
    return message


def stored_values(dtype: str) -> st.SearchStrategy[Any]:
    values = SCALARS[dtype.removesuffix(")").rpartition("(")[2]][1]
    return st.lists(values, max_size=20) if "(" in dtype else values


def plain(value: Any) -> Any:
    """Comparable: null is None, and NaN equals itself."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list | set):
        return type(value), sorted(map(repr, value)) if isinstance(value, set) else repr(value)
    return None if isinstance(value, float) and math.isnan(value) else value


def decoded(dtype: str, stored: Sequence[bytes | None]) -> tuple[list[Any], list[int]]:
    """The same, whether they are few or many."""
    column, corrupt = decode_column(dtype, stored)
    values = [plain(value) for value in column]
    many, many_corrupt = decode_column(dtype, list(stored) * MANY)
    count = len(stored)
    assert many_corrupt == [copy * count + index for copy in range(MANY) for index in corrupt]
    assert [plain(value) for value in many[:count]] == values
    assert [plain(value) for value in many[len(many) - count :]] == values
    return values, corrupt


def of_feast(message: Any) -> Any:
    """What Feast's SDK makes of it, but for its explicit null, which is the number 0 there."""
    from feast.type_map import feast_value_type_to_python_type

    if message.WhichOneof("val") == "null_val":
        return None
    return plain(feast_value_type_to_python_type(message))


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_values_are_those_that_feast_reads(fleet: Fleet, dtype: str, data: st.DataObject) -> None:
    values = data.draw(st.lists(stored_values(dtype) | st.sampled_from([None, ...])))
    messages = [None if v is None or v is ... else proto(dtype, v) for v in values]
    stored = [
        (None if value is None else b"") if message is None else message.SerializeToString()
        for value, message in zip(values, messages, strict=True)
    ]
    got, corrupt = decoded(dtype, stored)
    assert corrupt == []
    assert got == [None if message is None else of_feast(message) for message in messages]


def mutations(original: bytes) -> st.SearchStrategy[bytes]:
    places = st.integers(0, len(original) - 1)
    return st.one_of(
        places.map(lambda place: original[:place]),
        st.binary(min_size=1, max_size=12).map(lambda noise: original + noise),
        st.tuples(places, st.integers(1, 255)).map(
            lambda at: original[: at[0]] + bytes([original[at[0]] ^ at[1]]) + original[at[0] + 1 :]
        ),
        st.tuples(places, st.binary(min_size=1, max_size=3)).map(
            lambda at: original[: at[0]] + at[1] + original[at[0] :]
        ),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_damage_is_corrupt_or_read_as_feast_would(
    fleet: Fleet, dtype: str, data: st.DataObject
) -> None:
    """And it harms no other value."""
    from feast.protos.feast.types.Value_pb2 import Value
    from google.protobuf.message import DecodeError

    good = proto(dtype, data.draw(stored_values(dtype)))
    original = good.SerializeToString()
    damaged = data.draw(mutations(original))
    got, corrupt = decoded(dtype, [original, damaged, None, original])
    assert [got[0], got[2], got[3]] == [of_feast(good), None, of_feast(good)]
    if corrupt:
        assert corrupt == [1]
        assert got[1] is None
        return
    try:
        message = Value.FromString(damaged)
    except DecodeError:
        pytest.fail(f"protobuf refuses {damaged!r}")
    if got[1] is not None:
        assert message.WhichOneof("val") == field_of(dtype)
    assert got[1] == of_feast(message)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nulls_are_null_and_not_corrupt(dtype: str) -> None:
    assert decoded(dtype, NULLS) == ([None, None, None], [])


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        ("Float32", b"\x35\x00\x00\xc0\x7f"),
        ("Float32", b"\x35\x01\x00\xa0\x7f"),  # a signalling one, which warns where it is cast
        ("Float64", b"\x29" + bytes(6) + b"\xf8\x7f"),
        ("Float64", b"\x29\x01" + bytes(5) + b"\xf4\x7f"),
    ],
)
def test_a_stored_nan_is_null(dtype: str, stored: bytes) -> None:
    assert decoded(dtype, [stored]) == ([None], [])


@pytest.mark.parametrize("dtype", ["Float32", "Float64", "Int32", "Int64", "Bool"])
def test_numbers_are_float64(fleet: Fleet, dtype: str) -> None:
    stored = [None, proto(dtype, 1).SerializeToString()]
    for column in (stored, stored * MANY, [None] * MANY):
        assert decode_column(dtype, column)[0].dtype == np.float64


@pytest.mark.parametrize("edge", [2**53, -(2**53), 2**63 - 1, -(2**63), 2**56, 2**49, -1, 0])
def test_integers_beyond_the_exact_floats_are_exact(fleet: Fleet, edge: int) -> None:
    integers = [n for n in (edge - 1, edge, edge + 1) if -(2**63) <= n < 2**63]
    stored = [proto("Int64", n).SerializeToString() for n in integers]
    assert decoded("Int64", [*stored, None]) == ([*integers, None], [])
    column, _ = decode_column("Int64", stored * MANY)
    beyond = any(abs(n) > 2**53 for n in integers)
    assert column.dtype == (object if beyond else np.float64)


@pytest.mark.parametrize(
    ("dtype", "element"),
    [
        ("Float32", np.float32),
        ("Float64", np.float64),
        ("Int32", np.int32),
        ("Int64", np.int64),
        ("Bool", np.bool_),
    ],
)
def test_arrays_of_numbers_are_the_callers_own_numpy_arrays(
    fleet: Fleet, dtype: str, element: type[np.generic]
) -> None:
    stored = proto(f"Array({dtype})", [1, 0]).SerializeToString()
    column, _ = decode_column(f"Array({dtype})", [stored, stored])
    assert [array.dtype for array in column] == [element, element]
    column[0][0] = 0
    assert column[1].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("dtype", "inner"),
    [
        ("Float32", b"\x0d\x00\x00\x80\x3f" * 2 + b"\x0a\x04\x00\x00\x80\x3f"),
        ("Float64", b"\x0a\x08" + bytes(8) + b"\x09" + bytes(8)),
        ("Int32", b"\x08\x01\x0a\x02\x80\x01\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01\x08\x00"),
        ("Int64", b"\x08\x80\x80\x80\x80\x10\x08\x05"),
        ("Bool", b"\x08\x01\x08\x00\x0a\x01\x01"),
        ("UnixTimestamp", b"\x08\x80\x94\xeb\xdc\x03"),
    ],
)
def test_unpacked_lists_are_read_too(fleet: Fleet, dtype: str, inner: bytes) -> None:
    from feast.protos.feast.types.Value_pb2 import Value

    dtype = f"Array({dtype})"
    stored = proto(dtype, []).SerializeToString()[:-1] + bytes([len(inner)]) + inner
    assert decoded(dtype, [stored]) == ([of_feast(Value.FromString(stored))], [])


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        ("Float32", b"\x29\x00\x00\x00\x00\x00\x00\xf0\x3f"),  # a double
        ("Float32", b"\x35\x00\x00"),  # cut short
        ("Int64", b"\x20"),
        ("Int64", b"\x20" + b"\xff" * 11),
        ("Int64", b"\x20" + b"\xff" * 9 + b"\x03"),  # 65 bits
        ("Int64", b"\x20" + b"\x80" * 10 + b"\x00"),  # 11 bytes
        ("Int64", b"\x20\x01\x01"),
        ("Int64", b"\x20\xff"),
        ("Int64", b"\x98\x01"),  # half a null
        ("Int64", b"\x98\x01\x00\x20\x01"),  # more than a null
        ("Int32", b"\x18\x80\x80\x80\x80\x08"),  # 2**31
        ("Int32", b"\x18\xff\xff\xff\xff\xf7\xff\xff\xff\xff\x01"),  # -(2**31) - 1
        ("String", b"\x12\x05ab"),
        ("String", b"\x12\x01\xff"),
        ("String", b"\x12"),
        ("Bytes", b"\x12\x01a"),
        ("Bool", b"\x20\x01"),
        ("Bool", b"\x38\x02"),
        ("UnixTimestamp", b"\x40\x80\x83\xd1\xff\xaf\x07"),  # the year 10000
        ("Array(Float32)", b"\x82\x01\x05\x0a\x03\x00\x00\x00"),
        ("Array(Int32)", b"\x6a\x07\x0a\x05\x80\x80\x80\x80\x08"),  # 2**31
        ("Array(Int64)", b"\x72\x05\x0a\x01\x80\x0a\x00"),  # a number in two runs
        ("Array(Bool)", b"\x8a\x01\x03\x0a\x01\x02"),
        ("Array(String)", b"\x62\x03\x0a\x01\xff"),
        ("Array(UnixTimestamp)", b"\x92\x01\x08\x0a\x06\x80\x83\xd1\xff\xaf\x07"),
    ],
)
def test_another_type_or_half_a_value_is_corrupt(dtype: str, stored: bytes) -> None:
    assert decoded(dtype, [None, stored, stored]) == ([None, None, None], [1, 2])


def test_types_have_the_names_that_feast_gives_them(fleet: Fleet) -> None:
    from feast import types

    scalars = [getattr(types, name) for name in SCALARS]
    names = {str(kind) for scalar in scalars for kind in (scalar, types.Array(scalar))}
    assert names | {str(types.Set(scalar)) for scalar in scalars} == DECODABLE
    assert set(DTYPES) == DECODABLE


stamps = st.tuples(st.integers(*SECONDS), st.integers(0, 999_999_999))


def times(stored: Sequence[bytes | None]) -> tuple[list[float | None], list[int]]:
    """The same, whether they are few or many."""
    seconds, corrupt = decode_times(stored)
    many, many_corrupt = decode_times(list(stored) * MANY)
    count = len(stored)
    assert seconds.dtype == many.dtype == np.float64
    assert many_corrupt == [copy * count + index for copy in range(MANY) for index in corrupt]
    np.testing.assert_array_equal(many, np.tile(seconds, MANY))
    return [None if math.isnan(second) else second for second in seconds.tolist()], corrupt


@given(
    st.lists(
        stamps | st.tuples(st.integers(1_500_000_000, 1_800_000_000), st.integers(0, 999_999_999))
    )
)
@example([(2**28, 0), (2**28 - 1, 1), (2**35 - 1, 127), (2**35, 128), (0, 0), (-1, 999_999_999)])
@example([(1_700_000_000, 5)] * 3)
def test_time_stamps_are_those_that_feast_wrote(
    fleet: Fleet, values: list[tuple[int, int]]
) -> None:
    from google.protobuf.timestamp_pb2 import Timestamp

    stored = [Timestamp(seconds=s, nanos=n).SerializeToString() for s, n in values]
    assert times(stored) == ([s + n / 1e9 for s, n in values], [])


def test_no_time_stamp_is_no_time_and_an_empty_one_is_1970() -> None:
    assert times([None, b""]) == ([None, 0.0], [])
    assert times([None]) == ([None], [])


@given(data=st.data())
def test_damaged_time_stamps_are_corrupt_or_read_as_protobuf_would(
    fleet: Fleet, data: st.DataObject
) -> None:
    from google.protobuf.message import DecodeError
    from google.protobuf.timestamp_pb2 import Timestamp

    seconds, nanos = data.draw(stamps)
    original = Timestamp(seconds=seconds, nanos=nanos).SerializeToString()
    damaged = data.draw(mutations(original or b"\x10\x05"))
    good = b"\x08\x80\xe2\xcf\xaa\x06"
    got, corrupt = times([good, damaged, None, good])
    assert [got[0], got[2], got[3]] == [1_700_000_000.0, None, got[0]]
    if corrupt:
        assert corrupt == [1]
        assert got[1] is None
        return
    try:
        message = Timestamp.FromString(damaged)
    except DecodeError:
        pytest.fail(f"protobuf refuses {damaged!r}")
    assert got[1] == message.seconds + message.nanos / 1e9


@pytest.mark.parametrize(
    "stored",
    [
        b"\xff",
        b"\x08",
        b"\x18\x01",
        b"\x08" + b"\xff" * 11,
        b"\x08\x80\xe2\xcf\xaa\x06\x10",
        b"\x08\x80\xe2\xcf\xaa\x06\x10\x80\x94\xeb\xdc\x03",  # 10**9 nanoseconds
        b"\x08\x80\x83\xd1\xff\xaf\x07",  # the year 10000
    ],
)
def test_a_broken_time_stamp_is_corrupt(stored: bytes) -> None:
    assert times([None, stored]) == ([None, None], [1])
    assert times([stored]) == ([None], [0])
