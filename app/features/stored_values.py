"""Values as Feast stores them, encoded by columns: the inverse of app/features/values.py."""

import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_UNSIGNED_64 = (1 << 64) - 1
_FLOAT = struct.Struct("<Bf")
_DOUBLE = struct.Struct("<Bd")
_NULL = b""  # a feast.types.Value that is not set


def encode_column(dtype: str, values: Sequence[Any]) -> list[bytes]:
    """Each value as a serialized `feast.types.Value`; None and NaN are null.

    `dtype` is one of `ENCODABLE`; an integer must fit its type.
    """
    encode = _ENCODERS[dtype]
    return [_NULL if value is None or value != value else encode(value) for value in values]


def _float(value: float) -> bytes:
    return _FLOAT.pack(0x35, value)


def _double(value: float) -> bytes:
    return _DOUBLE.pack(0x29, value)


def _integer(tag: bytes) -> Callable[[int], bytes]:
    def encode(value: int) -> bytes:
        return tag + _varint(value & _UNSIGNED_64)  # a negative one as its two's complement

    return encode


def _bool(value: bool) -> bytes:
    return b"\x38\x01" if value else b"\x38\x00"


def _text(value: str) -> bytes:
    content = value.encode()
    return b"\x12" + _varint(len(content)) + content


def _bytes(value: bytes) -> bytes:
    return b"\x0a" + _varint(len(value)) + value


def _varint(number: int) -> bytes:
    if number < 0x80:
        return _SHORT[number]
    groups = bytearray()
    while number >= 0x80:
        groups.append(number & 0x7F | 0x80)
        number >>= 7
    groups.append(number)
    return bytes(groups)


_SHORT = [bytes([number]) for number in range(0x80)]

_ENCODERS: Mapping[str, Callable[[Any], bytes]] = {
    "Float32": _float,
    "Float64": _double,
    "Int32": _integer(b"\x18"),
    "Int64": _integer(b"\x20"),
    "Bool": _bool,
    "String": _text,
    "Bytes": _bytes,
    "UnixTimestamp": _integer(b"\x40"),
}

ENCODABLE = frozenset(_ENCODERS)
"""Feast types that these encoders know."""
