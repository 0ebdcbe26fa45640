"""Feast's stored values, decoded by columns: `feast.types.Value` and `google.protobuf.Timestamp`.

A value is one field of a oneof: a tag byte (field number and wire type), then the content.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Stored: TypeAlias = bytes | None
"""What Redis has for one field of one entity; None where there is no such field."""

_NAN_FLOAT = b"\x35\x00\x00\xc0\x7f"
_NAN_DOUBLE = b"\x29\x00\x00\x00\x00\x00\x00\xf8\x7f"
_FLOAT = np.dtype([("tag", "u1"), ("value", "<f4")])
_DOUBLE = np.dtype([("tag", "u1"), ("value", "<f8")])
_NULL_TAG = b"\x98\x01"  # null_val, field 19


class Corrupt(Exception):
    """The bytes are no value of the declared type."""


def is_null(stored: Stored) -> bool:
    """Not stored, stored as an empty message, or stored as Feast's explicit null."""
    return not stored or stored.startswith(_NULL_TAG)


def decode_column(dtype: str, stored: Sequence[Stored]) -> tuple[NDArray[Any], list[int]]:
    """Values of one type, null as NaN or None, and the places of those that are corrupt.

    Numbers become float64. A corrupt value is null and harms no other.
    """
    if dtype == "Float32":
        return _fixed(stored, _NAN_FLOAT, _FLOAT)
    if dtype == "Float64":
        return _fixed(stored, _NAN_DOUBLE, _DOUBLE)
    return _one_by_one(stored, _DECODERS[dtype], object if dtype == "String" else np.float64)


def decode_seconds(stored: Stored) -> float:
    """A serialized `google.protobuf.Timestamp` as seconds since 1970; NaN where there is none.

    Raises `Corrupt`.
    """
    if stored is None:
        return np.nan
    seconds, nanos, position = 0, 0, 0
    while position < len(stored):
        tag = stored[position]
        number, position = _varint(stored, position + 1)
        if tag == 0x08:
            seconds = _signed(number)
        elif tag == 0x10:
            nanos = _signed(number)
        else:
            raise Corrupt
    return seconds + nanos / 1e9


def decode_times(stored: Sequence[Stored]) -> tuple[NDArray[np.float64], list[int]]:
    """Serialized `google.protobuf.Timestamp`s as seconds since 1970, NaN where there is none, and
    the places of those that are corrupt."""
    seconds, corrupt = np.full(len(stored), np.nan), []
    for index, stamp in enumerate(stored):
        try:
            seconds[index] = decode_seconds(stamp)
        except Corrupt:
            corrupt.append(index)
    return seconds, corrupt


def _fixed(
    stored: Sequence[Stored], null: bytes, layout: np.dtype[Any]
) -> tuple[NDArray[Any], list[int]]:
    """Values of one width: joined and read as one array."""
    if _all_are(len(null), stored):
        values = np.frombuffer(b"".join(stored), layout)  # type: ignore[arg-type]  # none is None
        if (values["tag"] == null[0]).all():
            return values["value"].astype(np.float64), []
    fits = [v if v and len(v) == len(null) and v[0] == null[0] else null for v in stored]
    corrupt = [i for i, v in enumerate(stored) if fits[i] is null and not is_null(v)]
    return np.frombuffer(b"".join(fits), layout)["value"].astype(np.float64), corrupt


def _all_are(width: int, stored: Sequence[Stored]) -> bool:
    try:
        return set(map(len, stored)) == {width}  # type: ignore[arg-type]  # None is what we ask
    except TypeError:
        return False


def _one_by_one(
    stored: Sequence[Stored], decode: Callable[[bytes], Any], dtype: Any
) -> tuple[NDArray[Any], list[int]]:
    values = np.full(len(stored), None if dtype is object else np.nan, dtype=dtype)
    corrupt = []
    for index, value in enumerate(stored):
        if value is None or is_null(value):
            continue
        try:
            values[index] = decode(value)
        except (Corrupt, UnicodeDecodeError):
            corrupt.append(index)
    return values, corrupt


def _integer(tag: int) -> Callable[[bytes], int]:
    def decode(value: bytes) -> int:
        if value[0] != tag:
            raise Corrupt
        number, end = _varint(value, 1)
        if end != len(value):
            raise Corrupt
        return _signed(number)

    return decode


def _text(value: bytes) -> str:
    if value[0] != 0x12:
        raise Corrupt
    length, start = _varint(value, 1)
    if start + length != len(value):
        raise Corrupt
    return value[start:].decode()


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """An unsigned number of 7 bits a byte, the lowest first, and where it ends."""
    number = shift = 0
    for index in range(position, min(position + 10, len(data))):
        byte = data[index]
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, index + 1
        shift += 7
    raise Corrupt


def _signed(number: int) -> int:
    """Negative numbers are written as their 64-bit two's complement."""
    return number - (1 << 64) if number >= 1 << 63 else number


_DECODERS: Mapping[str, Callable[[bytes], Any]] = {
    "Int32": _integer(0x18),
    "Int64": _integer(0x20),
    "Bool": _integer(0x38),
    "String": _text,
}

DECODABLE = frozenset({"Float32", "Float64", *_DECODERS})
"""Feast types that these decoders know."""
