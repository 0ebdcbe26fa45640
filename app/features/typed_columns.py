"""Turns columns of a file or a stream into values of Feast's types, and names every value that is
none."""

import base64
import binascii
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

Faults: TypeAlias = dict[int, str]
"""What is wrong with a value, by its place in the column."""

_INTEGER_RANGES = {"Int32": (-(2**31), 2**31 - 1), "Int64": (-(2**63), 2**63 - 1)}
_FLOAT32_MAX = float(np.finfo(np.float32).max)
_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}
_INTEGER = re.compile(r"[+-]?\d+")
_SHOWN_CHARACTERS = 80

_MICROSECONDS = pa.timestamp("us", tz="UTC")
# What a google.protobuf.Timestamp can hold.
_FIRST_US = int(datetime(1, 1, 1, tzinfo=UTC).timestamp()) * 1_000_000
_LAST_US = int(datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC).timestamp()) * 1_000_000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Unfit(ValueError):
    """A value that is none of its column's type; the text says why."""


def typed_values(column: pa.Array, dtype: str, *, from_text: bool) -> tuple[list[Any], Faults]:
    """A Python value of Feast's type `dtype` (`Float32`, …) for each of the column, None for null.

    `from_text`: the column is text to be read (of a CSV file, of a stream), else it has a type of
    its own, which must be that of the values. A value at fault is None and has its line in the
    faults.
    """
    column = _plain(column)
    quick = _quickly(column, dtype, from_text)
    if quick is not None:
        return quick, {}
    read = _READERS.get(dtype, _other)
    values: list[Any] = []
    faults: Faults = {}
    for place, value in enumerate(column.to_pylist()):
        try:
            values.append(None if value is None else read(value, dtype, from_text))
        except Unfit as exc:
            values.append(None)
            faults[place] = str(exc)
    return values, faults


def event_times_us(column: pa.Array) -> tuple[NDArray[np.int64], Faults]:
    """Microseconds since 1970 of instants: text of RFC 3339 or timestamps with a time zone.

    A value at fault is 0; null is one, as is an instant whose offset nobody gave.
    """
    column = _plain(column)
    is_instant = pa.types.is_timestamp(column.type) and column.type.tz is not None
    if (is_instant or _is_text(column.type)) and column.null_count == 0:
        try:
            instants = pc.cast(column, _MICROSECONDS, safe=_is_text(column.type))
            times_us = instants.cast(pa.int64()).to_numpy(zero_copy_only=False)
            if ((times_us >= _FIRST_US) & (times_us <= _LAST_US)).all():
                return times_us, {}
        except pa.ArrowInvalid:
            pass  # one by one, to name those at fault
    times = np.zeros(len(column), dtype=np.int64)
    faults: Faults = {}
    for place, value in enumerate(_to_python(column)):
        try:
            times[place] = _microseconds(_instant(value))
        except Unfit as exc:
            faults[place] = str(exc)
    return times, faults


def text_column(values: Sequence[str | None]) -> pa.Array:
    return pa.array(values, pa.string())


def _plain(column: pa.Array) -> pa.Array:
    """Without dictionary encoding: its values."""
    if pa.types.is_dictionary(column.type):
        return column.cast(column.type.value_type)
    return column


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _quickly(column: pa.Array, dtype: str, from_text: bool) -> list[Any] | None:
    """The values where Arrow can read them all; None: they must be read one by one."""
    values: list[Any]
    kind = column.type
    if pa.types.is_null(kind):
        return [None] * len(column)
    if dtype == "String":
        if not _is_text(kind):
            return None
        values = column.to_pylist()
        return values
    is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
    if dtype not in _ARROW_TYPES or not (from_text or is_number):
        return None
    try:
        numbers = column.cast(_ARROW_TYPES[dtype])
    except pa.ArrowInvalid:
        return None
    if dtype == "Float32":
        magnitudes = np.abs(numbers.to_numpy(zero_copy_only=False))
        if (np.isfinite(magnitudes) & (magnitudes > _FLOAT32_MAX)).any():
            return None
    values = numbers.to_pylist()
    return values


_ARROW_TYPES = {
    "Int32": pa.int32(),
    "Int64": pa.int64(),
    "Float32": pa.float64(),
    "Float64": pa.float64(),
}


def _to_python(column: pa.Array) -> list[Any]:
    if pa.types.is_timestamp(column.type):
        column = column.cast(pa.timestamp("us", tz=column.type.tz), safe=False)
    values: list[Any] = column.to_pylist()
    return values


def _integer(value: Any, dtype: str, from_text: bool) -> int | None:
    number: Any = value
    if from_text:
        text = value.strip()
        number = int(text) if _INTEGER.fullmatch(text) else _float_of_text(text, dtype)
    # pandas writes integers as floats where a column has nulls, which are NaN.
    if isinstance(number, float):
        if math.isnan(number):
            return None
        if number.is_integer() and abs(number) <= 2**53:
            number = int(number)
    if isinstance(number, bool) or not isinstance(number, int):
        raise Unfit(f"{_shown(value)} is no {dtype}")
    least, most = _INTEGER_RANGES[dtype]
    if not least <= number <= most:
        raise Unfit(f"{_shown(value)} is beyond {dtype}")
    return number


def _float(value: Any, dtype: str, from_text: bool) -> float:
    given = _float_of_text(value, dtype) if from_text else value
    if isinstance(given, bool) or not isinstance(given, int | float | Decimal):
        raise Unfit(f"{_shown(value)} is no {dtype}")
    number = float(given)
    if dtype == "Float32" and math.isfinite(number) and abs(number) > _FLOAT32_MAX:
        raise Unfit(f"{_shown(value)} is beyond {dtype}")
    return number


def _float_of_text(text: str, dtype: str) -> float:
    try:
        if "_" in text:  # which Python reads as nothing
            raise ValueError
        return float(text)
    except ValueError:
        raise Unfit(f"{_shown(text)} is no {dtype}") from None


def _boolean(value: Any, dtype: str, from_text: bool) -> bool:
    if from_text:
        value = _BOOLEANS.get(value.strip().lower(), value)
    if not isinstance(value, bool):
        raise Unfit(f"{_shown(value)} is no {dtype}")
    return value


def _text(value: Any, dtype: str, from_text: bool) -> str:
    if not isinstance(value, str):
        raise Unfit(f"{_shown(value)} is no {dtype}")
    return value


def _bytes(value: Any, dtype: str, from_text: bool) -> bytes:
    if from_text:
        try:
            return base64.b64decode(value, validate=True)
        except binascii.Error:
            raise Unfit(f"{_shown(value)} is no base64, the form of {dtype} in text") from None
    if not isinstance(value, bytes):
        raise Unfit(f"{_shown(value)} is no {dtype}")
    return value


def _seconds(value: Any, dtype: str, from_text: bool) -> int:
    """Of a feature that is an instant: Feast keeps whole seconds, and takes their number too."""
    if from_text and _INTEGER.fullmatch(value):
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        return _microseconds(_instant(value)) // 1_000_000
    if not _FIRST_US <= value * 1_000_000 <= _LAST_US:
        raise Unfit(f"{value} is beyond {dtype}, in seconds since 1970")
    return value


def _other(value: Any, dtype: str, from_text: bool) -> Any:
    """Lists and maps are JSON in text; Feast itself says whether they are of the type."""
    if from_text and dtype not in _KEPT_AS_TEXT:
        try:
            value = json.loads(value)
        except ValueError:
            raise Unfit(f"{_shown(value)} is no JSON, the form of {dtype} in text") from None
    # Feast would take the names in a map and the letters of a text.
    if dtype.startswith(("Array", "Set")) and not isinstance(value, list):
        raise Unfit(f"{_shown(value)} is no {dtype}")
    return value


_KEPT_AS_TEXT = frozenset({"Json", "Uuid", "TimeUuid", "Decimal"})

_READERS: Mapping[str, Callable[[Any, str, bool], Any]] = {
    "Int32": _integer,
    "Int64": _integer,
    "Float32": _float,
    "Float64": _float,
    "Bool": _boolean,
    "String": _text,
    "Bytes": _bytes,
    "UnixTimestamp": _seconds,
}


def _instant(value: Any) -> datetime:
    if value is None:
        raise Unfit("is null")
    if isinstance(value, str):
        try:
            instant = datetime.fromisoformat(value.strip())
        except ValueError:
            raise Unfit(f"{_shown(value)} is no instant of RFC 3339") from None
    elif isinstance(value, datetime):
        instant = value
    else:
        raise Unfit(f"{_shown(value)} is no instant")
    if instant.tzinfo is None:
        raise Unfit(f"{_shown(str(value))} has no offset from UTC, as in 2013-12-31T18:00:00Z")
    return instant


def _microseconds(instant: datetime) -> int:
    since = instant - _EPOCH
    return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds


def _shown(value: Any) -> str:
    shown = repr(value)
    if len(shown) <= _SHOWN_CHARACTERS:
        return shown
    return f"{shown[:_SHOWN_CHARACTERS]}… ({len(shown)} characters)"
