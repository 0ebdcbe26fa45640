"""The hashes in which Feast's Redis store keeps the values of an entity, and how one is read."""

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Protocol, TypeAlias

from app.errors import InvalidInput, InvalidModel
from app.features.entity_key import EntityKeyEncoder
from app.features.plan import FeaturePlan, RedisLayout
from app.features.redis_connection import Reply
from app.features.redis_record import Varying, Word
from app.features.redis_shape import Member, Shape
from app.features.source import EntityColumns
from app.features.values import DECODABLE, FIXED_WIDTH, Stored

Entity: TypeAlias = tuple[Any, ...]
"""The values of its join keys, in the order of the key."""

Row: TypeAlias = Sequence[Stored]
"""What is stored of one entity, in an order of ours; None where there is nothing."""

Found: TypeAlias = Row | Member
"""What was found of one entity: what is stored, or what that says already."""

_MANY = 16
_MAX_ORDERS = 64
_MOST_UNWANTED_BYTES = 4096
# To find the end of one value that varies costs as much as hiredis takes for so many numbers.
_NUMBERS_PER_VARYING = 3

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
    command reads them all.

    A row of it holds the features, those of one type together (`blocks`), then a time stamp for
    each of `views`, from `stamps` on. Raises `InvalidModel` for what cannot be read from Redis.
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
        self.nothing: Row = [None] * len(fields)
        """The row of an entity that is not stored."""
        shapes = _Shapes(fields, self.blocks)
        self._by_fields = _Fields(fields, shapes)
        self._form: Form = _Whole(fields, shapes) if len(fields) >= _MANY else self._by_fields
        first = plan.views[views[0]]
        names = dict(zip(first.stored_keys or first.join_keys, first.join_keys, strict=True))
        self._keys = EntityKeyEncoder(
            {stored: layout.key_types[name] for stored, name in names.items()},
            plan.project,
            layout.key_version,
        )
        self._columns = [names[key] for key in self._keys.join_keys]

    def entities(self, columns_of: EntityColumns, rows: int) -> tuple[list[Entity], list[int]]:
        """The distinct entities, and for each row which of them it has, -1 where it has none."""
        columns = [columns_of[name] for name in self._columns]
        if not columns:
            return [()], [0] * rows
        if rows == 1:
            entity = tuple([column[0] for column in columns])
            return ([], [-1]) if None in entity else ([entity], [0])
        asked = list(zip(*columns, strict=True))
        if len(set(asked)) == rows and not any([None in column for column in columns]):
            return asked, list(range(rows))
        index_of: dict[Entity, int] = {}
        of_row = [
            -1 if None in entity else index_of.setdefault(entity, len(index_of)) for entity in asked
        ]
        return list(index_of), of_row

    def form(self) -> "Form":
        """How it is read now."""
        if self._form.wasteful:
            self._form = self._by_fields
        return self._form

    def commands(self, entities: Sequence[Entity], form: "Form") -> list[bytes]:
        """What to send, one for each, whose replies `form.row` makes rows.

        Raises `InvalidInput` for an entity that its type does not hold.
        """
        try:
            if len(entities) == 1:
                key = self._keys.encode(entities[0])
                return [b"%b%d\r\n%b%b" % (form.head, len(key), key, form.tail)]
            return self._keys.encode_all(entities, form.head, form.tail)
        except struct.error as exc:
            raise self._out_of_range(entities, exc) from None

    def _out_of_range(self, entities: Sequence[Entity], exc: struct.error) -> Exception:
        names = ", ".join(self._columns)
        for entity in entities:
            try:
                self._keys.encode(entity)
            except struct.error:
                return InvalidInput(f"{names}: {entity} is out of range: {exc}", field=names)
        return exc


class Form(Protocol):
    """A command that reads a hash. `wasteful` says that another would be better from now on."""

    head: bytes
    """What comes before the key's length."""
    tail: bytes
    """What comes after the key."""
    shape: Shape | None
    """That of the usual reply, where it is known and worth knowing."""
    wasteful: bool

    def row(self, reply: Reply) -> Row:
        """Any reply as a row: an error, or anything odd, is a row of corrupt values."""
        ...


class _Shapes:
    """The shapes of replies with these fields: numbers of fixed width and their time stamps."""

    def __init__(self, fields: Sequence[bytes], blocks: Sequence[Block]) -> None:
        self._count = len(fields)
        self._blocks = blocks
        self._stamps = blocks[-1].stop if blocks else 0
        self._fixed = all(block.dtype in FIXED_WIDTH for block in blocks)

    def of(self, words: Sequence[bytes | None], places: Sequence[int]) -> Shape | None:
        """Where each field has its own place among the `words`, of which the others are names or
        (None) values. None where no shape is worth it."""
        varying = words.count(None) - self._stamps
        if not self._fixed or varying * _NUMBERS_PER_VARYING > self._stamps:
            return None
        shaped: list[Word] = [word or Varying.ANYTHING for word in words]
        for block in self._blocks:
            for place in places[block.start : block.stop]:
                shaped[place] = FIXED_WIDTH[block.dtype]
        for place in places[self._stamps :]:
            shaped[place] = Varying.TIME
        blocks = [places[block.start : block.stop] for block in self._blocks]
        return Shape(shaped, blocks, places[self._stamps :])


class _Fields:
    """HMGET: Redis picks the fields."""

    wasteful = False

    def __init__(self, fields: Sequence[bytes], shapes: _Shapes) -> None:
        self.head = b"*%d\r\n$5\r\nHMGET\r\n$" % (len(fields) + 2)
        self.tail = b"\r\n" + b"".join(b"$%d\r\n%b\r\n" % (len(f), f) for f in fields)
        self.shape = shapes.of([None] * len(fields), range(len(fields)))
        self._broken: Row = [_BROKEN] * len(fields)

    def row(self, reply: Reply) -> Row:
        usable = type(reply) is list and len(reply) == len(self._broken)
        row: Row = reply if usable else self._broken
        return row


class _Whole:
    """HGETALL: the whole hash comes, and the fields are picked here.

    Redis looks for each field of an HMGET from the start of a small hash: 33 of 33 take it 20 µs,
    the whole hash 3 µs. `wasteful` once a hash came with much that is not wanted.
    """

    def __init__(self, fields: Sequence[bytes], shapes: _Shapes) -> None:
        self.head = b"*2\r\n$7\r\nHGETALL\r\n$"
        self.tail = b"\r\n"
        self.shape: Shape | None = None
        self.wasteful = False
        self._fields = fields
        self._shapes = shapes
        self._nothing: Row = [None] * len(fields)
        self._broken: Row = [_BROKEN] * len(fields)
        # A hash has the order in which its fields were first written: nearly always the same one.
        self._usual_order: list[bytes] = []
        self._usual = _Order(lambda reply: self._nothing, None)
        self._known: dict[tuple[bytes, ...], _Order] = {}

    def row(self, reply: Reply) -> Row:
        if type(reply) is not list or len(reply) % 2:
            return self._broken
        if not reply:
            return self._nothing
        order = reply[::2]
        if order != self._usual_order:
            if {type(field) for field in order} != {bytes}:
                return self._broken
            self._usual_order = order
            self._usual = self._order(tuple(order))
            self.shape = self._usual.shape
        return self._usual.row(reply)

    def _order(self, order: tuple[bytes, ...]) -> "_Order":
        if order not in self._known:
            if len(self._known) >= _MAX_ORDERS:
                self._known.clear()
            self._known[order] = self._new_order(order)
        return self._known[order]

    def _new_order(self, order: Sequence[bytes]) -> "_Order":
        places = {field: 2 * index + 1 for index, field in enumerate(order)}
        own = [places.get(field, -1) for field in self._fields]
        pick: Callable[[list[Stored]], Row] = itemgetter(*own)
        unwanted = [place for field, place in places.items() if field not in self._fields]
        shape = None
        if len({*own, -1}) == len(own) + 1 and len(places) == len(order):
            words = [word for field in order for word in (field, None)]
            shape = self._shapes.of(words, own)
        if not unwanted and -1 not in own:
            return _Order(pick, shape)

        def pick_and_watch(reply: list[Stored]) -> Row:
            size = sum([len(reply[place] or b"") for place in unwanted])
            self.wasteful |= size > _MOST_UNWANTED_BYTES
            return pick([*reply, None])  # where the missing fields are

        return _Order(pick_and_watch, shape)


@dataclass(frozen=True, slots=True)
class _Order:
    """Fields in one order: what makes a row of such a reply, and its shape."""

    row: Callable[[list[Stored]], Row]
    shape: Shape | None


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
