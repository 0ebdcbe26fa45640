"""Feast's values in Python: to the columns of a table and back, as its SDK would show them."""

import math
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
from feast.type_map import feast_value_type_to_python_type
from numpy.typing import NDArray

from app.features.values import DECODABLE, decode_column


def column_of(dtype: str, values: Sequence[Any]) -> tuple[NDArray[Any], list[int]]:
    """`feast.types.Value` messages as a column, and the places of those that are of another type.

    What is read through Feast and what is read from Redis pass the same decoder. A type that it
    does not know becomes what Feast makes of it.
    """
    if dtype in DECODABLE:
        return decode_column(dtype, [value.SerializeToString() for value in values])
    column = np.full(len(values), None, dtype=object)
    for row, value in enumerate(values):
        if value.WhichOneof("val") != "null_val":
            column[row] = feast_value_type_to_python_type(value)
    return column, []


def python_values(dtype: str, column: Sequence[Any] | NDArray[Any]) -> list[Any]:
    """A column as the values that Feast gives to a function: null is None, an integer that a table
    holds as a float is an integer, an array is a list."""
    plain = column.tolist() if isinstance(column, np.ndarray) else column
    convert = _CONVERSIONS.get(dtype, _plain)
    return [None if _is_null(value) else convert(value) for value in plain]


def nulls(column: NDArray[Any]) -> NDArray[np.bool_]:
    """Which values of a column are null."""
    return np.array([_is_null(value) for value in column.tolist()], dtype=bool)


def _is_null(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


def _instant(value: datetime) -> datetime:
    return datetime.fromtimestamp(int(value.timestamp()), UTC)  # Feast keeps whole seconds


_CONVERSIONS: Mapping[str, Callable[[Any], Any]] = {
    "Int32": int,
    "Int64": int,
    "Bool": bool,
    "UnixTimestamp": _instant,
}
