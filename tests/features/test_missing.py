"""What stands in for a missing value: each policy, by status, entity and age."""

from typing import Any

import numpy as np
import pytest

from app.contract import Features
from app.deadline import Deadline
from app.errors import FeaturesUnavailable
from app.features.missing import MissingValues
from app.features.plan import FeaturePlan, PlannedFeature, PlannedView
from app.features.source import FeatureRows, ValueStatus, all_with_status
from app.features.static_source import StaticSource

SHOP = FeaturePlan(
    project="shop",
    feature_service="shop",
    join_keys={"user": "int", "item": "int"},
    views=(
        PlannedView(
            "user",
            ("user",),
            None,
            (PlannedFeature("spent", "Float64"), PlannedFeature("name", "String")),
        ),
        PlannedView("pair", ("item", "user"), None, (PlannedFeature("bought", "Int64"),)),
        PlannedView("all", (), None, (PlannedFeature("sold", "Float32"),)),
    ),
)
MEANS = {"user:spent": 12.5, "all:sold": 50.0}
EVENT_TIME_S = 1_000.0
VALUES: Any = {
    "user": {(1,): {"spent": 10.0, "name": "ada"}, (2,): {"spent": None, "name": "bob"}},
    "pair": {(7, 1): {"bought": 3}, (1, 7): {"bought": 5}},
    "all": {(): {"sold": 100.0}},
}


def policies(max_entities: int = 100, unavailable: str = "answer", **missing: Any) -> MissingValues:
    """By the feature's name without its view; a text is the name of a policy."""
    views = {feature.name: view.name for view in SHOP.views for feature in view.features}
    document = {
        "when_unavailable": unavailable,
        "last_good_entities": max_entities,
        "missing": {
            f"{views[name]}:{name}": {"use": policy} if isinstance(policy, str) else policy
            for name, policy in missing.items()
        },
    }
    return MissingValues(Features.model_validate(document), SHOP, MEANS)


def asked(*pairs: tuple[int | None, int | None]) -> dict[str, list[int | None]]:
    return {"user": [user for user, _ in pairs], "item": [item for _, item in pairs]}


def in_one_array(rows: FeatureRows) -> FeatureRows:
    """As a source may answer that has nothing but numbers."""
    columns = np.array(rows.columns, dtype=np.float64)
    return FeatureRows(rows.plan, columns, rows.status, rows.event_time_s)


async def stored(
    *pairs: tuple[int | None, int | None], event_time_s: float = EVENT_TIME_S, values: Any = VALUES
) -> FeatureRows:
    source = StaticSource(SHOP, values, event_time_s)
    return await source.fetch(asked(*pairs), len(pairs), Deadline.after(1))


def nothing(rows: int, status: ValueStatus = ValueStatus.UNAVAILABLE) -> FeatureRows:
    return all_with_status(SHOP, rows, status)


def filled(
    missing: MissingValues,
    rows: FeatureRows,
    *pairs: tuple[int | None, int | None],
    now_s: float = EVENT_TIME_S,
) -> dict[str, list[Any]]:
    """What the model gets, null as None."""
    columns = missing.fill(rows, asked(*pairs), now_s).columns
    return {
        name: [None if value != value else value for value in column.tolist()]
        for name, column in zip(SHOP.references, columns, strict=True)
    }


def substitutes(missing: MissingValues, rows: FeatureRows, *pairs: Any) -> list[Any]:
    done = missing.fill(rows, asked(*pairs), EVENT_TIME_S).substitutes
    return [
        (SHOP.references[position], s.by, np.flatnonzero(rows).tolist())
        for s in done
        for position, rows in zip(s.positions, s.mask, strict=True)
        if rows.any()
    ]


UNUSABLE = [ValueStatus.NOT_FOUND, ValueStatus.OUTSIDE_MAX_AGE, ValueStatus.UNAVAILABLE]


async def test_without_a_policy_a_missing_value_stays_a_null() -> None:
    missing, pairs = policies(spent="null"), [(2, 7), (3, 7)]
    rows = await stored(*pairs)
    assert filled(missing, rows, *pairs)["user:spent"] == [None, None]
    assert substitutes(missing, rows, *pairs) == []


async def test_a_constant_fills_every_null_and_no_value() -> None:
    missing, pairs = policies(spent={"use": "constant", "value": 1.5}), [(1, 7), (2, 7), (3, 7)]
    rows = await stored(*pairs)
    assert filled(missing, rows, *pairs)["user:spent"] == [10.0, 1.5, 1.5]
    assert substitutes(missing, rows, *pairs) == [("user:spent", "constant", [1, 2])]


async def test_a_text_has_a_constant_too() -> None:
    missing, pairs = policies(name={"use": "constant", "value": "?"}), [(1, 7), (3, 7)]
    assert filled(missing, await stored(*pairs), *pairs)["user:name"] == ["ada", "?"]


async def test_the_training_mean_fills_every_null() -> None:
    missing, pairs = policies(spent="training_mean"), [(1, 7), (2, 7), (3, 7)]
    rows = await stored(*pairs)
    assert filled(missing, rows, *pairs)["user:spent"] == [10.0, 12.5, 12.5]
    assert substitutes(missing, rows, *pairs) == [("user:spent", "training_mean", [1, 2])]


async def test_integers_beyond_the_reach_of_a_float_are_filled_among_their_own() -> None:
    missing = policies(bought={"use": "constant", "value": 1})
    rows = await stored((1, 7), (1, 8))
    large = np.array([2**53 + 1, None], dtype=object)
    columns = (*rows.columns[:2], large, *rows.columns[3:])
    rows = FeatureRows(SHOP, columns, rows.status, rows.event_time_s)
    assert filled(missing, rows, (1, 7), (1, 8))["pair:bought"] == [2**53 + 1, 1.0]


async def test_what_the_store_said_is_not_changed() -> None:
    missing, pairs = policies(spent="training_mean", name=LAST_GOOD), [(1, 7), (3, 7)]
    missing.remember(await stored(*pairs), asked(*pairs))
    rows = nothing(2)
    missing.fill(rows, asked(*pairs), EVENT_TIME_S)
    assert (rows.status == ValueStatus.UNAVAILABLE).all()
    assert all(v is None or v != v for column in rows.columns for v in column.tolist())


@pytest.mark.parametrize("status", [s for s in ValueStatus if s != ValueStatus.PRESENT])
async def test_refuse_refuses_whatever_is_not_present_and_names_it(status: ValueStatus) -> None:
    rows = await stored((1, 7), (1, 7))
    rows.status[1, 0] = status
    with pytest.raises(FeaturesUnavailable) as refused:
        filled(policies(spent="refuse"), rows, (1, 7), (1, 7))
    for words in ("instances[1]", "user:spent", status.name):
        assert words in str(refused.value)


async def test_refuse_is_about_its_own_feature() -> None:
    rows = await stored((1, 7))
    rows.status[0, 1:] = ValueStatus.UNAVAILABLE
    assert filled(policies(spent="refuse"), rows, (1, 7))["user:spent"] == [10.0]


async def test_a_contract_that_refuses_an_unavailable_store_refuses_one_unavailable_value() -> None:
    missing = policies(unavailable="refuse", bought={"use": "constant", "value": 0})
    rows = await stored((1, 7), (3, 7))
    filled(missing, rows, (1, 7), (3, 7))  # what is not found is no fault of the store
    rows.status[1, 2] = ValueStatus.UNAVAILABLE
    with pytest.raises(FeaturesUnavailable, match=r"instances\[1\]: pair:bought is UNAVAILABLE"):
        filled(missing, rows, (1, 7), (3, 7))


LAST_GOOD = {"use": "last_good", "max_age_s": 60}


class TestLastGood:
    @pytest.mark.parametrize("status", UNUSABLE)
    async def test_it_stands_for_what_the_store_has_not(self, status: ValueStatus) -> None:
        missing = policies(spent=LAST_GOOD, name=LAST_GOOD, bought=LAST_GOOD, sold=LAST_GOOD)
        pairs = [(3, 7), (1, 7)]
        missing.remember(await stored(*pairs), asked(*pairs))
        assert filled(missing, nothing(2, status), *pairs) == {
            "user:spent": [None, 10.0],
            "user:name": [None, "ada"],
            "pair:bought": [None, 3.0],
            "all:sold": [100.0, 100.0],
        }
        assert substitutes(missing, nothing(2, status), *pairs) == [
            ("user:spent", "last_good", [1]),
            ("user:name", "last_good", [1]),
            ("pair:bought", "last_good", [1]),
            ("all:sold", "last_good", [0, 1]),
        ]

    async def test_it_takes_the_columns_of_one_array(self) -> None:
        missing = policies(spent=LAST_GOOD | {"value": 9}, sold="training_mean")
        numbers = {"user": {(1,): {"spent": 10.0}}}
        pairs = [(3, 7), (1, 7)]
        read = in_one_array(await stored(*pairs, values=numbers))
        missing.remember(read, asked(*pairs))
        assert filled(missing, read, *pairs)["user:spent"] == [9.0, 10.0]
        away = in_one_array(nothing(2))
        assert filled(missing, away, *pairs)["user:spent"] == [9.0, 10.0]
        assert filled(missing, away, *pairs)["all:sold"] == [50.0, 50.0]
        assert np.isnan(away.columns).all()

    async def test_a_value_that_is_there_is_not_replaced(self) -> None:
        missing = policies(spent=LAST_GOOD)
        missing.remember(await stored((1, 7)), asked((1, 7)))
        newer = await stored((1, 7), values={"user": {(1,): {"spent": 11.0}}})
        newer.status[0, 1] = ValueStatus.UNAVAILABLE
        assert filled(missing, newer, (1, 7))["user:spent"] == [11.0]

    async def test_a_stored_null_stays_a_null(self) -> None:
        missing = policies(spent=LAST_GOOD | {"value": 9})
        missing.remember(await stored((2, 7)), asked((2, 7)))
        null = await stored((2, 7))
        assert filled(missing, null, (2, 7))["user:spent"] == [None]

    @pytest.mark.parametrize(("age_s", "value"), [(59, 10.0), (60, 10.0), (61, None)])
    async def test_it_serves_until_its_own_event_time_is_too_long_ago(
        self, age_s: float, value: float | None
    ) -> None:
        missing = policies(spent=LAST_GOOD)
        missing.remember(await stored((1, 7)), asked((1, 7)))
        now_s = EVENT_TIME_S + age_s
        assert filled(missing, nothing(1), (1, 7), now_s=now_s)["user:spent"] == [value]

    async def test_another_value_may_follow_it(self) -> None:
        missing = policies(spent=LAST_GOOD | {"value": 9}, name=LAST_GOOD | {"value": "?"})
        missing.remember(await stored((1, 7)), asked((1, 7)))
        pairs = [(1, 7), (3, 7)]
        assert filled(missing, nothing(2), *pairs)["user:spent"] == [10.0, 9.0]
        assert filled(missing, nothing(2), *pairs)["user:name"] == ["ada", "?"]
        assert substitutes(missing, nothing(2), *pairs)[:2] == [
            ("user:spent", "last_good", [0]),
            ("user:spent", "constant", [1]),
        ]
        late_s = EVENT_TIME_S + 61
        assert filled(missing, nothing(1), (1, 7), now_s=late_s)["user:name"] == ["?"]

    async def test_each_feature_keeps_its_own_last_value_and_its_age(self) -> None:
        missing = policies(spent=LAST_GOOD, name=LAST_GOOD)
        missing.remember(await stored((1, 7)), asked((1, 7)))
        half = {"user": {(1,): {"spent": None, "name": "eve"}}}
        later_s = EVENT_TIME_S + 50
        missing.remember(await stored((1, 7), event_time_s=later_s, values=half), asked((1, 7)))
        known = filled(missing, nothing(1), (1, 7), now_s=later_s)
        assert (known["user:spent"], known["user:name"]) == ([10.0], ["eve"])
        known = filled(missing, nothing(1), (1, 7), now_s=later_s + 20)
        assert (known["user:spent"], known["user:name"]) == ([None], ["eve"])

    async def test_an_entity_never_gets_the_value_of_another(self) -> None:
        """Two join keys with their values exchanged, another user, another item, no entity."""
        missing = policies(spent=LAST_GOOD, bought=LAST_GOOD)
        pairs = [(1, 7), (7, 1)]
        missing.remember(await stored(*pairs), asked(*pairs))
        others = [(7, 1), (1, 7), (2, 7), (1, 8), (None, 7), (1, None), (None, None)]
        known = filled(missing, nothing(7), *others)
        assert known["pair:bought"] == [5.0, 3.0, None, None, None, None, None]
        assert known["user:spent"] == [None, 10.0, None, 10.0, None, 10.0, None]

    async def test_only_the_entities_asked_for_last_are_kept(self) -> None:
        missing = policies(max_entities=2, spent=LAST_GOOD)
        values = {"user": {(user,): {"spent": float(user)} for user in range(5)}}

        async def read(*users: int) -> None:
            pairs = [(user, 7) for user in users]
            missing.remember(await stored(*pairs, values=values), asked(*pairs))

        def known() -> list[int]:
            pairs = [(user, 7) for user in range(5)]
            spent = filled(missing, nothing(5), *pairs)["user:spent"]
            return [user for user, value in enumerate(spent) if value is not None]

        await read(0, 1, 2)
        assert known() == [1, 2]
        filled(missing, nothing(1), (1, 7))  # asked for while the store was away
        await read(3)
        assert known() == [1, 3]

    async def test_nothing_is_kept_of_a_feature_without_the_policy(self) -> None:
        missing = policies(spent=LAST_GOOD, name={"use": "constant", "value": "?"})
        missing.remember(await stored((1, 7)), asked((1, 7)))
        known = filled(missing, nothing(1), (1, 7))
        assert (known["user:name"], known["all:sold"]) == (["?"], [None])
