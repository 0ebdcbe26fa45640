"""The hashes in which Feast's Redis store keeps the values of an entity, and how one is read."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from app.errors import InvalidInput, InvalidModel
from app.features.entity_key import EntityKeyEncoder
from app.features.plan import FeaturePlan, RedisLayout
from app.features.source import EntityColumns
from app.features.values import DECODABLE, Stored

Entity: TypeAlias = tuple[Any, ...]
"""The values of its join keys, in the order of the key."""

# The join key of a view without entities, whose value is "".
_NO_ENTITY = "__dummy_id"
# No value and no time stamp begins so: each is corrupt.
_BROKEN = b"\xff"


@dataclass(frozen=True, slots=True)
class Block:
    """The features of one type: their places in a reply and in the plan."""

    dtype: str
    start: int
    stop: int
    features: list[int]


class EntityHash:
    """The views with the same join keys: Feast keeps an entity's values of them in one hash, so one
    HMGET reads them all.

    A reply holds the features, those of one type together (`blocks`), then a time stamp for each of
    `views`, from `stamps` on. Raises `InvalidModel` for what cannot be read from Redis.
    """

    def __init__(self, plan: FeaturePlan, views: Sequence[int]) -> None:
        layout = _layout(plan)
        self.views = list(views)
        self.blocks = _blocks(plan, views)
        self.stamps = sum(len(block.features) for block in self.blocks)
        fields = [
            *(
                bytes.fromhex(layout.fields[plan.references[feature]])
                for block in self.blocks
                for feature in block.features
            ),
            *(f"_ts:{plan.views[v].stored_as or plan.views[v].name}".encode() for v in views),
        ]
        self.nothing: list[Stored] = [None] * len(fields)
        """The reply for an entity that is not stored."""
        self.broken: list[Stored] = [_BROKEN] * len(fields)
        """Stands for a reply that cannot be used."""
        first = plan.views[views[0]]
        names = dict(zip(first.stored_keys or first.join_keys, first.join_keys, strict=True))
        self._keys = EntityKeyEncoder(
            {stored: layout.key_types[name] for stored, name in names.items()}
            or {_NO_ENTITY: "String"},
            plan.project,
            layout.key_version,
        )
        self._columns = [names[key] for key in self._keys.join_keys] if names else []
        self._head = b"*%d\r\n$5\r\nHMGET\r\n$" % (len(fields) + 2)
        self._tail = b"\r\n" + b"".join(b"$%d\r\n%b\r\n" % (len(f), f) for f in fields)

    def entities(self, columns_of: EntityColumns, rows: int) -> tuple[list[Entity], list[int]]:
        """The distinct entities, and for each row which of them it has, -1 where it has none."""
        columns = [columns_of[name] for name in self._columns]
        if not columns:
            return [("",)], [0] * rows
        if rows == 1:
            entity = tuple([column[0] for column in columns])
            return ([], [-1]) if None in entity else ([entity], [0])
        index_of: dict[Entity, int] = {}
        of_row = [
            -1 if None in entity else index_of.setdefault(entity, len(index_of))
            for entity in zip(*columns, strict=True)
        ]
        return list(index_of), of_row

    def command(self, entity: Entity) -> bytes:
        """Raises `InvalidInput` for an entity that its type does not hold."""
        try:
            key = self._keys.encode(entity)
        except struct.error as exc:
            names = ", ".join(self._columns)
            raise InvalidInput(f"{names}: {entity} is out of range: {exc}", field=names) from None
        return b"%b%d\r\n%b%b" % (self._head, len(key), key, self._tail)


def entity_hashes(plan: FeaturePlan) -> list[EntityHash]:
    """One for each set of join keys of the plan."""
    groups: dict[tuple[tuple[str, str], ...], list[int]] = {}
    for index, view in enumerate(plan.views):
        pairs = zip(view.stored_keys or view.join_keys, view.join_keys, strict=True)
        groups.setdefault(tuple(sorted(pairs)), []).append(index)
    return [EntityHash(plan, views) for views in groups.values()]


def _layout(plan: FeaturePlan) -> RedisLayout:
    if plan.redis is None:
        raise InvalidModel(f"{plan.feature_service}: the plan is not for Redis; publish again")
    return plan.redis


def _blocks(plan: FeaturePlan, views: Sequence[int]) -> list[Block]:
    by_dtype: dict[str, list[int]] = {}
    for view in views:
        first = plan.view_columns[view].start
        for feature, planned in enumerate(plan.views[view].features, start=first):
            if planned.dtype not in DECODABLE:
                raise InvalidModel(
                    f"{plan.references[feature]}: {planned.dtype} cannot be served from Redis"
                )
            by_dtype.setdefault(planned.dtype, []).append(feature)
    blocks, start = [], 0
    for dtype, features in by_dtype.items():
        blocks.append(Block(dtype, start, start + len(features), features))
        start += len(features)
    return blocks
