"""The policies of model.yaml as a caller and an operator see them."""

from typing import Any

import httpx
import pytest

from app.deadline import Deadline
from app.errors import FeaturesUnavailable
from app.features.plan import FeaturePlan
from app.features.source import EntityColumns, FeatureRows
from app.features.static_source import StaticSource
from tests.api.conftest import EVENT_TIME_S, Serve, reading_from
from tests.api.test_predict import KYOTO, predict
from tests.api.test_service import samples
from tests.tiny_models import DRIVER_VALUES, DRIVERS, stored

RATING = "driver:rating"


class Store:
    """DRIVER_VALUES, until it is told to answer no more."""

    plan: FeaturePlan = DRIVERS

    def __init__(self) -> None:
        self.answers = True
        self._source = StaticSource(DRIVERS, DRIVER_VALUES, EVENT_TIME_S)

    async def fetch(self, entities: EntityColumns, rows: int, deadline: Deadline) -> FeatureRows:
        if not self.answers:
            raise FeaturesUnavailable("connection refused")
        return await self._source.fetch(entities, rows, deadline)

    async def check(self) -> None:
        return None


def missing(**policies: Any) -> dict[str, Any]:
    return {"missing": {f"driver:{name}": policy for name, policy in policies.items()}}


async def score(client: httpx.AsyncClient, instance: Any) -> float:
    answer = await predict(client, "stored", instance)
    return float(answer["predictions"][0]["score"])


async def test_a_last_good_value_bridges_an_outage_and_the_answer_is_flagged(serve: Serve) -> None:
    store = Store()
    policy = missing(rating={"use": "last_good", "max_age_s": 7200})
    async with serve("stored", open_features=reading_from(store), features=policy) as client:
        await predict(client, "stored", KYOTO)
        store.answers = False
        answer = await predict(client, "stored", KYOTO, KYOTO | {"driver_id": 99}, verbose=True)
        await client.put("/v1/replay-clock", json={"now": "2014-01-01T02:00:01Z"})
        too_late = await score(client, KYOTO)
    assert [p["score"] for p in answer["predictions"]] == [
        stored(4.0, None, None, 5.0),
        stored(None, None, None, 5.0),
    ]
    assert {reason["status"] for reason in answer["degraded_reasons"]} == {"UNAVAILABLE"}
    assert answer["features"][0][RATING] == {
        "value": None,
        "status": "UNAVAILABLE",
        "event_time": None,
        "age_s": None,
        "substitute": {"by": "last_good", "value": 4.0},
    }
    assert "substitute" not in answer["features"][0]["driver:trips"]
    assert "substitute" not in answer["features"][1][RATING]
    assert too_late == stored(None, None, None, 5.0)


async def test_what_one_caller_gives_is_no_last_good_value_of_another(serve: Serve) -> None:
    store = Store()
    policy = missing(rating={"use": "last_good", "max_age_s": 7200})
    async with serve("stored", open_features=reading_from(store), features=policy) as client:
        assert await score(client, KYOTO | {RATING: 1}) == stored(1.0, 7, 2.0, 5.0)
        store.answers = False
        assert await score(client, KYOTO) == stored(4.0, None, None, 5.0)
        assert await score(client, KYOTO | {RATING: 2}) == stored(2.0, None, None, 5.0)
        assert await score(client, KYOTO | {"driver_id": 99, RATING: 2}) == stored(
            2.0, None, None, 5.0
        )
        assert await score(client, KYOTO | {"driver_id": 99}) == stored(None, None, None, 5.0)


async def test_the_training_mean_comes_from_the_manifest(serve: Serve) -> None:
    policy = missing(trips={"use": "training_mean"})
    async with serve("stored", features=policy) as client:
        assert await score(client, KYOTO | {"driver_id": 99}) == stored(None, 5.0, 2.0, 5.0)


async def test_verbose_shows_what_stood_for_a_stored_null(serve: Serve) -> None:
    policy = missing(rating={"use": "constant", "value": 3})
    async with serve("stored", features=policy) as client:
        answer = await predict(client, "stored", KYOTO | {"driver_id": 2}, verbose=True)
    rating = answer["features"][0][RATING]
    assert (rating["value"], rating["status"]) == (None, "NULL_VALUE")
    assert rating["substitute"] == {"by": "constant", "value": 3.0}
    assert answer["degraded"] is False


async def test_what_the_caller_gives_needs_no_store(serve: Serve) -> None:
    policy = missing(rating={"use": "refuse"}, trips={"use": "constant", "value": 0})
    async with serve("stored", features=policy) as client:
        unknown = KYOTO | {"driver_id": 99, RATING: 5}
        assert await score(client, unknown) == stored(5.0, 0.0, 2.0, 5.0)


@pytest.mark.parametrize(
    "policy", [{"use": "constant", "value": 3}, {"use": "last_good", "max_age_s": 60}]
)
async def test_a_contract_that_refuses_an_outage_refuses_it_whatever_else_it_has(
    serve: Serve, policy: Any
) -> None:
    store = Store()
    features = missing(rating=policy) | {"when_unavailable": "refuse"}
    async with serve("stored", open_features=reading_from(store), features=features) as client:
        await predict(client, "stored", KYOTO)
        store.answers = False
        refused = await client.post("/v1/models/stored:predict", json={"instances": [KYOTO]})
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "features_unavailable"


async def test_substitutes_are_counted_by_view_and_policy(serve: Serve) -> None:
    store = Store()
    policy = missing(
        rating={"use": "last_good", "max_age_s": 7200, "value": 3},
        trips={"use": "constant", "value": 0},
    )
    async with serve("stored", open_features=reading_from(store), features=policy) as client:
        await predict(client, "stored", KYOTO)
        store.answers = False
        await predict(client, "stored", KYOTO, KYOTO, KYOTO | {"driver_id": 99})
        seen = await samples(client)

    def counted(policy: str) -> float:
        labels = (("feature_view", "driver"), ("model", "stored"), ("policy", policy))
        return seen["hikyaku_substituted_values_total", labels]

    assert counted("last_good") == 2  # the rating of the driver that was read before
    assert counted("constant") == 1 + 3
