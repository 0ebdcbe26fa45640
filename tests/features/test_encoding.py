"""Encoding: what each transform makes of values, and that rows do not depend on their company."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from app.contract import Column, InputTensor
from app.errors import HikyakuError
from app.features.encoding import Encoder, StoredMisfit

CARRIERS = {"UA": 0.0, "AA": 1.0}

NEW_YORK = timezone(timedelta(hours=-5))


def encode(
    transform: str, values: Any, dtype: str = "float32", categories: Mapping[str, float] = CARRIERS
) -> NDArray[Any]:
    """One column of values by one transform."""
    spec = InputTensor.model_validate(
        {"tensor": "x", "dtype": dtype, "columns": [{"from": "source", "as": transform}]}
    )
    tensors = Encoder([spec], {"source": categories}).encode({"source": values}, len(values))
    assert tensors["x"].shape == (len(values), 1)
    return tensors["x"][:, 0]


@pytest.mark.parametrize(
    ("transform", "values", "expected"),
    [
        ("number", [1.5, 2, True, False], [1.5, 2, 1, 0]),
        ("number", [None, 0.0], [np.nan, 0.0]),
        ("category", ["AA", "UA"], [1, 0]),
        ("category", ["ZZ", None, ""], [np.nan, np.nan, np.nan]),
        ("category", ["ua", " UA"], [np.nan, np.nan]),
        (
            "minute_of_day",
            [
                datetime(2013, 1, 1, 0, 0, tzinfo=UTC),
                datetime(2013, 1, 1, 23, 59, 59, tzinfo=UTC),
                None,
            ],
            [0, 1439, np.nan],
        ),
        (
            "day_of_week",
            [
                datetime(2013, 9, 2, tzinfo=UTC),  # a Monday
                datetime(2013, 9, 8, 23, 59, tzinfo=UTC),
                None,
            ],
            [0, 6, np.nan],
        ),
    ],
)
def test_values_become_numbers(
    transform: str, values: Sequence[Any], expected: Sequence[float]
) -> None:
    np.testing.assert_array_equal(encode(transform, values), np.float32(expected))


def test_texts_stay_texts_and_a_null_is_empty() -> None:
    assert encode("text", ["UA", "東京", "", None], "str").tolist() == ["UA", "東京", "", ""]


def test_the_clock_is_that_of_the_timestamps_own_place() -> None:
    """Midnight on Monday in Greenwich is seven on Sunday evening in New York."""
    instant = datetime(2013, 9, 2, 0, 0, tzinfo=UTC)
    instants = [instant, instant.astimezone(NEW_YORK)]
    assert encode("minute_of_day", instants).tolist() == [0, 19 * 60]
    assert encode("day_of_week", instants).tolist() == [0, 6]


@pytest.mark.parametrize("dtype", ["float32", "float64", "int64"])
def test_the_tensor_has_the_declared_type(dtype: str) -> None:
    encoded = encode("number", [1, 2, 3], dtype)
    assert encoded.dtype == np.dtype(dtype)
    assert encoded.tolist() == [1, 2, 3]


def test_float64_keeps_what_float32_would_round() -> None:
    assert encode("number", [0.1], "float64").tolist() == [0.1]
    assert encode("number", [0.1], "float32").tolist() == [float(np.float32(0.1))]


def test_each_tensor_has_its_columns_in_order() -> None:
    encoder = Encoder(
        [
            InputTensor(tensor="numbers", columns=(Column(source="b"), Column(source="a"))),
            InputTensor(
                tensor="texts", dtype="str", columns=(Column(source="carrier", transform="text"),)
            ),
        ],
        {},
    )
    columns = {"a": [1, 2], "b": [3, 4], "carrier": ["UA", None], "unused": [9, 9]}
    tensors = encoder.encode(columns, 2)
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {
        "numbers": [[3, 1], [4, 2]],
        "texts": [["UA"], [""]],
    }


def test_values_are_not_changed() -> None:
    numbers = np.array([1.0, np.nan])
    numbers.flags.writeable = False
    texts = ["UA", None]
    encode("number", numbers)
    encode("text", texts, "str")
    np.testing.assert_array_equal(numbers, [1.0, np.nan])
    assert texts == ["UA", None]


@pytest.mark.parametrize(
    ("transform", "dtype", "values", "array"),
    [
        ("number", "float32", [1.5, None], np.array([1.5, np.nan])),
        ("number", "float32", [1.5, None], np.array([1.5, None], dtype=object)),
        ("number", "float64", [1, 2], np.array([1, 2])),
        ("number", "float32", [True, False], np.array([True, False])),
        ("category", "float32", ["UA", None, "ZZ"], np.array(["UA", None, "ZZ"], dtype=object)),
        ("category", "float32", ["UA", "AA"], np.array(["UA", "AA"])),
        ("text", "str", ["UA", None], np.array(["UA", None], dtype=object)),
        (
            "minute_of_day",
            "float32",
            [datetime(2013, 1, 1, 5, 15, tzinfo=NEW_YORK), None],
            np.array([datetime(2013, 1, 1, 5, 15, tzinfo=NEW_YORK), None], dtype=object),
        ),
    ],
)
def test_lists_and_arrays_give_the_same(
    transform: str, dtype: str, values: Sequence[Any], array: NDArray[Any]
) -> None:
    np.testing.assert_array_equal(encode(transform, values, dtype), encode(transform, array, dtype))


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([None], "int64"),
        (np.array([np.nan]), "int64"),
        ([1e300], "float32"),
        (np.array([1e300]), "float32"),
    ],
    ids=["null", "missing stored value", "large number", "large stored number"],
)
def test_a_value_that_the_tensor_cannot_hold_is_refused(values: Any, dtype: str) -> None:
    """It must not reach the model as another number, infinity or the smallest integer."""
    with pytest.raises(HikyakuError):
        encode("number", values, dtype)


INSTANTS = st.datetimes(timezones=st.sampled_from([UTC, NEW_YORK]))
ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "number": st.none() | st.floats(width=32),
            "carrier": st.none() | st.sampled_from(["UA", "AA", "ZZ"]),
            "at": st.none() | INSTANTS,
            "name": st.none() | st.text(max_size=5),
        }
    ),
    min_size=1,
    max_size=12,
)
ENCODER = Encoder(
    [
        InputTensor.model_validate(
            {
                "tensor": "numbers",
                "columns": [
                    "number",
                    {"from": "carrier", "as": "category"},
                    {"from": "at", "as": "minute_of_day"},
                    {"from": "at", "as": "day_of_week"},
                ],
            }
        ),
        InputTensor.model_validate(
            {"tensor": "texts", "dtype": "str", "columns": [{"from": "name", "as": "text"}]}
        ),
    ],
    {"carrier": CARRIERS},
)


@given(ROWS)
def test_a_row_is_encoded_alone_as_it_is_in_company(rows: list[dict[str, Any]]) -> None:
    together = _encode_rows(rows)
    alone = [_encode_rows([row]) for row in rows]
    for name, tensor in together.items():
        np.testing.assert_array_equal(tensor, np.concatenate([part[name] for part in alone]))


@given(ROWS, st.randoms(use_true_random=False))
def test_the_order_of_rows_is_kept(rows: list[dict[str, Any]], random: Any) -> None:
    order = list(range(len(rows)))
    random.shuffle(order)
    straight, shuffled = _encode_rows(rows), _encode_rows([rows[index] for index in order])
    for name, tensor in straight.items():
        np.testing.assert_array_equal(tensor[order], shuffled[name])


def _encode_rows(rows: list[dict[str, Any]]) -> Mapping[str, NDArray[Any]]:
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return ENCODER.encode(columns, len(rows))


STORED = ("view:number", "view:other")
ANY_NUMBER = (
    st.floats(allow_nan=False)
    | st.sampled_from([np.nan, -0.0, 3.4028235677973366e38, 1e300, 1e-46, 2**60 + 2**36 + 1])
    | st.integers(-(2**63), 2**63)
    | st.booleans()
)
MIXED_ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "number": ANY_NUMBER | st.none(),
            "carrier": st.none() | st.sampled_from(["UA", "AA", "ZZ"]),
            "at": st.none() | INSTANTS,
            **dict.fromkeys(STORED, st.floats(allow_nan=False) | st.just(np.nan)),
        }
    ),
    min_size=1,
    max_size=8,
)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@given(MIXED_ROWS)
def test_rows_are_encoded_as_their_columns_are_bit_for_bit(
    dtype: str, rows: list[dict[str, Any]]
) -> None:
    """Or not at all: what no row can hold is for the columns to name."""
    columns = [
        {"from": "carrier", "as": "category"},
        STORED[1],
        {"from": "at", "as": "minute_of_day"},
        {"from": "at", "as": "day_of_week"},
        "number",
        STORED[0],
    ]
    tensors = [
        {"tensor": "mixed", "dtype": dtype, "columns": columns},
        {"tensor": "one", "dtype": dtype, "columns": ["number"]},
    ]
    encoder = Encoder([InputTensor.model_validate(spec) for spec in tensors], {"carrier": CARRIERS})
    fields = ("carrier", "at", "number")
    by_rows = encoder.for_rows(fields, STORED)
    assert by_rows is not None
    matrix = np.array([[row[name] for row in rows] for name in STORED], dtype=np.float64)
    fast = by_rows.encode([[row[name] for name in fields] for row in rows], matrix)
    by_source: dict[str, Any] = {name: [row[name] for row in rows] for name in rows[0]}
    by_source |= {name: np.array(by_source[name], dtype=np.float64) for name in STORED}
    try:
        expected = encoder.encode(by_source, len(rows))
    except (HikyakuError, StoredMisfit):
        assert fast is None
        return
    if fast is None:
        assert any(row["number"] is None for row in rows)
        return
    assert {name: tensor.dtype for name, tensor in fast.items()} == {
        name: tensor.dtype for name, tensor in expected.items()
    }
    assert {name: (tensor.shape, tensor.tobytes()) for name, tensor in fast.items()} == {
        name: (tensor.shape, tensor.tobytes()) for name, tensor in expected.items()
    }


def test_fields_in_the_order_of_the_tensor_are_encoded_as_they_are() -> None:
    encoder = Encoder([InputTensor.model_validate({"tensor": "x", "columns": ["a", "b"]})], {})
    by_rows = encoder.for_rows(("a", "b"))
    assert by_rows is not None
    tensors = by_rows.encode([(1, 0.1), (True, -2.5)])
    assert tensors is not None
    np.testing.assert_array_equal(tensors["x"], np.float32([[1, 0.1], [1, -2.5]]))


@pytest.mark.parametrize("dtype", ["int64", "str"])
def test_rows_of_other_types_are_left_to_the_columns(dtype: str) -> None:
    spec = InputTensor.model_validate({"tensor": "x", "dtype": dtype, "columns": ["a"]})
    assert Encoder([spec], {}).for_rows(("a",)) is None
