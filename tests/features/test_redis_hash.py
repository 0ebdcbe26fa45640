"""How the hash of an entity is read, and what makes its reply a row."""

import random
from collections.abc import Callable
from dataclasses import replace

import hiredis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.features.plan import FeaturePlan, PlannedFeature, PlannedView, RedisLayout
from app.features.redis_hash import EntityHash, Row, entity_hashes

SMALL, LARGE = 3, 40


def plan_of(features: int, views: int = 1) -> FeaturePlan:
    planned = tuple(
        PlannedView(
            f"v{view}",
            ("id",),
            None,
            tuple(PlannedFeature(f"f{number}", "Float32") for number in range(features)),
        )
        for view in range(views)
    )
    names = [name for view in planned for name in view.references()]
    fields = {name: number.to_bytes(4, "little").hex() for number, name in enumerate(names)}
    layout = RedisLayout(3, {"id": "Int64"}, fields)
    return FeaturePlan("p", "s", {"id": "int"}, planned, layout)


def hash_of(features: int) -> EntityHash:
    (read,) = entity_hashes(plan_of(features))
    return read


def asked(read: EntityHash) -> tuple[bytes, Callable[[object], Row]]:
    """The command for an entity, and what makes its reply a row."""
    form = read.form()
    (command,) = read.commands([(1,)], form)
    return command, form.row


def words(command: bytes) -> list[bytes]:
    reader = hiredis.Reader()
    reader.feed(command)
    parsed: list[bytes] = reader.gets()
    return parsed


def fields(features: int) -> list[bytes]:
    return [*(number.to_bytes(4, "little") for number in range(features)), b"_ts:v0"]


def stored(features: int) -> dict[bytes, bytes]:
    return {field: b"value of " + field for field in fields(features)}


def whole(content: dict[bytes, bytes]) -> list[bytes]:
    """How HGETALL answers."""
    return [part for pair in content.items() for part in pair]


def test_few_fields_are_asked_for_by_name() -> None:
    command, _ = asked(hash_of(SMALL))
    assert words(command)[0] == b"HMGET"
    assert words(command)[2:] == fields(SMALL)


def test_many_fields_are_read_as_the_whole_hash() -> None:
    few, _ = asked(hash_of(SMALL))
    many, _ = asked(hash_of(LARGE))
    assert words(many) == [b"HGETALL", words(few)[1]]


@given(st.permutations(fields(LARGE)), st.sets(st.sampled_from(fields(LARGE))), st.booleans())
def test_a_whole_hash_is_the_same_row_in_whatever_order_it_comes(
    order: list[bytes], missing: set[bytes], others: bool
) -> None:
    _, to_row = asked(hash_of(LARGE))
    content = stored(LARGE)
    kept = {field: content[field] for field in order if field not in missing}
    if others:
        kept = {b"another": b"1"} | kept | {b"_ts:other": b"2"}
    row = to_row(whole(kept))
    assert list(row) == [None if field in missing else content[field] for field in fields(LARGE)]


def test_the_order_may_change_from_reply_to_reply() -> None:
    _, to_row = asked(hash_of(LARGE))
    forward = stored(LARGE)
    backward = dict(reversed(forward.items()))
    for content in (forward, backward, {}, forward, backward):
        expected = [content.get(field) for field in fields(LARGE)]
        assert list(to_row(whole(content))) == expected


def test_many_orders_are_read_and_not_all_remembered() -> None:
    _, to_row = asked(hash_of(LARGE))
    content = stored(LARGE)
    for number in range(200):
        order = random.Random(number).sample(fields(LARGE), len(content))
        row = to_row(whole({field: content[field] for field in order}))
        assert list(row) == list(content.values())


def test_two_names_of_one_view_are_filled_from_the_same_fields() -> None:
    plan = plan_of(LARGE)
    assert plan.redis is not None
    (view,) = plan.views
    twin = replace(view, name="twin", stored_as="v0")
    layout = RedisLayout(
        3,
        {"id": "Int64"},
        dict(plan.redis.fields)
        | {f"twin:f{n}": n.to_bytes(4, "little").hex() for n in range(LARGE)},
    )
    (read,) = entity_hashes(replace(plan, views=(view, twin), redis=layout))
    _, to_row = asked(read)
    values = list(stored(LARGE).values())
    assert list(to_row(whole(stored(LARGE)))) == values[:-1] * 2 + values[-1:] * 2


def test_a_hash_with_much_that_is_not_wanted_is_read_by_fields_from_then_on() -> None:
    read = hash_of(LARGE)
    _, to_row = asked(read)
    content = stored(LARGE)
    assert list(to_row(whole(content | {b"blob": b"x" * 10_000}))) == list(content.values())
    command, to_row = asked(read)
    assert words(command)[0] == b"HMGET"
    assert list(to_row(list(content.values()))) == list(content.values())


@pytest.mark.parametrize("features", [SMALL, LARGE])
@pytest.mark.parametrize(
    "reply",
    [hiredis.ReplyError("ERR no"), b"text", 7, None],
    ids=["error", "text", "number", "nil"],
)
def test_a_reply_that_is_no_hash_is_a_row_of_corrupt_values(features: int, reply: object) -> None:
    _, to_row = asked(hash_of(features))
    row = to_row(reply)
    assert len(row) == features + 1
    assert None not in row


def test_a_reply_with_another_number_of_values_is_a_row_of_corrupt_values() -> None:
    _, to_row = asked(hash_of(SMALL))
    assert None not in to_row([None])


@pytest.mark.parametrize("features", [SMALL, LARGE])
def test_an_entity_that_is_not_stored_is_a_row_of_nothing(features: int) -> None:
    read = hash_of(features)
    command, to_row = asked(read)
    reply: list[bytes | None] = [] if words(command)[0] == b"HGETALL" else [None] * (features + 1)
    assert list(to_row(reply)) == read.nothing
