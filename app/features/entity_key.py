"""The Redis key of an entity, byte for byte as Feast writes it.

Layout: `feast.infra.key_encoding_utils.serialize_entity_key`, then the project's name.
"""

import struct
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import partial
from typing import Any, Literal, TypeAlias

KeyType: TypeAlias = Literal["String", "Int32", "Int64", "Bytes", "UnixTimestamp"]
"""Feast's type of a join key: it comes from the registry, not from the value."""

EntityValue: TypeAlias = str | int | bytes | datetime
"""bytes for Bytes; an aware datetime for UnixTimestamp, of which Feast keeps whole seconds."""

_BYTES, _STRING, _INT32, _INT64, _UNIX_TIMESTAMP = 1, 2, 3, 4, 8

# Feast materializes a view without entities under this key and this value, and reads it there.
_NO_ENTITY = "__dummy_id"


class EntityKeyEncoder:
    """Encodes the values of some join keys of one project.

    `types` names the join keys as they are stored; without any it is the key of a view without
    entities. `version` is Feast's entity_key_serialization_version, 2 or 3.
    """

    def __init__(self, types: Mapping[str, KeyType], project: str, version: int) -> None:
        self.join_keys: tuple[str, ...] = tuple(sorted(types))
        """The order in which `encode` takes the values."""
        self._packers = [_PACKERS[types[key]] for key in self.join_keys]
        self._head = _head(self.join_keys or (_NO_ENTITY,), version)
        if not types:
            self._head += _string("")
        self._project = project.encode()
        self._is_number = [*types.values()] in (["Int32"], ["Int64"])

    def encode(self, values: Sequence[EntityValue]) -> bytes:
        """Raises `struct.error` for an integer that its type does not hold."""
        if len(self._packers) == 1:
            return self._head + self._packers[0](values[0]) + self._project
        packed = [pack(value) for pack, value in zip(self._packers, values, strict=True)]
        return b"".join([self._head, *packed, self._project])

    def encode_all(
        self, entities: Sequence[Sequence[EntityValue]], head: bytes, tail: bytes
    ) -> list[bytes]:
        """For each the head, the length of its key, a line's end, its key and the tail.

        Raises `struct.error` for an integer that its type does not hold.
        """
        if not self._is_number or not entities:
            encode = self.encode
            return [
                b"%b%d\r\n%b%b" % (head, len(key := encode(entity)), key, tail)
                for entity in entities
            ]
        (pack,) = self._packers  # whose keys are equally long
        head = b"%b%d\r\n%b" % (head, len(self.encode(entities[0])), self._head)
        tail = self._project + tail
        return [head + pack(value) + tail for (value,) in entities]


def _head(join_keys: Sequence[str], version: int) -> bytes:
    if version not in {2, 3}:
        raise ValueError(f"entity_key_serialization_version {version} is not 2 or 3")
    parts = [struct.pack("<I", len(join_keys))] if version == 3 else []
    for key in join_keys:
        name = key.encode()
        parts.append(struct.pack("<I", _STRING))
        if version == 3:
            parts.append(struct.pack("<I", len(name)))
        parts.append(name)
    return b"".join(parts)


def _string(value: str) -> bytes:
    text = value.encode()
    return struct.pack("<II", _STRING, len(text)) + text


def _bytes(value: bytes) -> bytes:
    return struct.pack("<II", _BYTES, len(value)) + value


def _unix_timestamp(value: datetime) -> bytes:
    return struct.pack("<IIq", _UNIX_TIMESTAMP, 8, int(value.timestamp()))


_PACKERS: Mapping[KeyType, Callable[[Any], bytes]] = {
    "String": _string,
    "Int32": partial(struct.Struct("<IIi").pack, _INT32, 4),
    "Int64": partial(struct.Struct("<IIq").pack, _INT64, 8),
    "Bytes": _bytes,
    "UnixTimestamp": _unix_timestamp,
}
