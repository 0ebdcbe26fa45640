"""POST /v1/models/{name}:predict, as a caller sees it."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import httpx
import numpy as np
import pytest

from app.deadline import Deadline
from app.errors import FeaturesUnavailable
from app.features.plan import FeaturePlan, PlannedFeature, PlannedView
from app.features.source import EntityColumns, FeatureRows
from app.features.static_source import StaticSource
from tests.api.conftest import EVENT_TIME_S, Serve, reading_from
from tests.tiny_models import DRIVER_VALUES, DRIVERS, binary, multiclass, regression, stored

PAIRS = [{"a": 2.0, "b": 1.0}, {"a": 0.0, "b": 3.5}]
KYOTO = {"driver_id": 1, "city": "kyoto", "distance": 5.0}


async def predict(
    client: httpx.AsyncClient, model: str, *instances: Any, **more: Any
) -> dict[str, Any]:
    response = await client.post(
        f"/v1/models/{model}:predict", json={"instances": list(instances), **more}
    )
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def test_every_answer_says_who_made_it_and_on_what(serve: Serve) -> None:
    async with serve("binary") as client:
        first, second = [await predict(client, "binary", *PAIRS) for _ in range(2)]
    assert set(first) == {
        *("predictions", "model_name", "model_version", "request_id"),
        *("route", "degraded", "degraded_reasons"),
    }
    assert (first["model_name"], first["model_version"]) == ("binary", "1")
    assert (first["route"], first["degraded"], first["degraded_reasons"]) == ("champion", False, [])
    assert len(first["request_id"]) == 32
    assert first["request_id"] != second["request_id"]


async def test_a_binary_model_answers_probability_and_decision(serve: Serve) -> None:
    async with serve("binary") as client:
        answer = await predict(client, "binary", *PAIRS)
    expected = [binary(**pair) for pair in PAIRS]
    assert [p["probability"] for p in answer["predictions"]] == pytest.approx(expected, abs=1e-6)
    assert [p["decision"] for p in answer["predictions"]] == [True, False]


async def test_a_regression_answers_its_number(serve: Serve) -> None:
    async with serve("regression") as client:
        answer = await predict(client, "regression", *PAIRS, {"a": 4, "b": 3})
    numbers = [regression(**pair) for pair in PAIRS]
    assert [p["value"] for p in answer["predictions"]] == [*numbers, 10.0]
    assert [p["decision"] for p in answer["predictions"]] == [False, False, True]


async def test_a_multiclass_model_answers_every_label(serve: Serve) -> None:
    async with serve("multiclass") as client:
        answer = await predict(client, "multiclass", *PAIRS)
    for prediction, pair in zip(answer["predictions"], PAIRS, strict=True):
        assert prediction["class"] == pytest.approx(multiclass(**pair), abs=1e-6)
    assert [p["decision"] for p in answer["predictions"]] == ["left", "right"]


async def test_all_models_of_the_repository_are_served_side_by_side(serve: Serve) -> None:
    async with serve("binary", "regression", "stored") as client:
        answers = await asyncio.gather(
            predict(client, "binary", PAIRS[0]),
            predict(client, "regression", PAIRS[0]),
            predict(client, "stored", KYOTO),
        )
        listed = (await client.get("/v1/models")).json()
    assert [answer["model_name"] for answer in answers] == ["binary", "regression", "stored"]
    assert listed == {"models": ["binary", "regression", "stored"]}


async def test_many_callers_at_once_each_get_their_own_rows(serve: Serve) -> None:
    async with serve("regression") as client:
        answers = await asyncio.gather(
            *(
                predict(client, "regression", *({"a": n, "b": row} for row in range(n % 7 + 1)))
                for n in range(100)
            )
        )
    for n, answer in enumerate(answers):
        expected = [regression(n, row) for row in range(n % 7 + 1)]
        assert [p["value"] for p in answer["predictions"]] == expected


async def test_a_request_larger_than_a_batch_keeps_its_order(serve: Serve) -> None:
    async with serve("regression", batching={"max_batch_rows": 16}) as client:
        answer = await predict(client, "regression", *({"a": n, "b": 0} for n in range(1000)))
    assert [p["value"] for p in answer["predictions"]] == list(range(1000))


class TestStoredFeatures:
    async def test_they_come_from_the_store(self, serve: Serve) -> None:
        async with serve("stored") as client:
            answer = await predict(client, "stored", KYOTO)
        assert answer["predictions"][0]["score"] == stored(4.0, 7, 2.0, 5.0)
        assert answer["degraded"] is False

    async def test_a_stored_null_is_a_value_like_any_other(self, serve: Serve) -> None:
        async with serve("stored") as client:
            answer = await predict(client, "stored", KYOTO | {"driver_id": 2})
        assert answer["predictions"][0]["score"] == stored(None, 3, 2.0, 5.0)
        assert answer["degraded"] is False

    async def test_an_unknown_entity_is_an_answer_that_says_so(self, serve: Serve) -> None:
        async with serve("stored") as client:
            answer = await predict(client, "stored", KYOTO, KYOTO | {"driver_id": 99})
        assert answer["predictions"][1]["score"] == stored(None, None, 2.0, 5.0)
        assert answer["degraded"] is True
        assert answer["degraded_reasons"] == [
            {"feature_view": "driver", "status": "NOT_FOUND", "instances": [1]}
        ]

    async def test_a_null_entity_is_no_entity(self, serve: Serve) -> None:
        async with serve("stored") as client:
            answer = await predict(client, "stored", KYOTO | {"city": None})
        assert answer["predictions"][0]["score"] == stored(4.0, 7, None, 5.0)
        assert answer["degraded_reasons"][0]["feature_view"] == "city"

    async def test_a_caller_may_give_a_stored_value_itself(self, serve: Serve) -> None:
        async with serve("stored") as client:
            answer = await predict(
                client,
                "stored",
                KYOTO | {"driver:trips": 10},
                KYOTO,
                KYOTO | {"driver_id": 99, "driver:rating": 1, "driver:trips": None},
            )
        assert [p["score"] for p in answer["predictions"]] == [
            stored(4.0, 10, 2.0, 5.0),
            stored(4.0, 7, 2.0, 5.0),
            stored(1.0, None, 2.0, 5.0),
        ]
        assert answer["degraded"] is False

    async def test_verbose_shows_values_statuses_and_ages(self, serve: Serve) -> None:
        async with serve("stored") as client:
            answer = await predict(client, "stored", KYOTO | {"driver_id": 2}, verbose=True)
            unknown = await predict(client, "stored", KYOTO | {"driver_id": 99}, verbose=True)
        features = answer["features"][0]
        assert features["driver:trips"] == {
            "value": 3.0,
            "status": "PRESENT",
            "event_time": "2014-01-01T00:00:00Z",
            "age_s": 1800.0,
        }
        assert features["driver:rating"]["status"] == "NULL_VALUE"
        assert unknown["features"][0]["driver:trips"] == {
            "value": None,
            "status": "NOT_FOUND",
            "event_time": None,
            "age_s": None,
        }

    async def test_a_stored_value_that_the_model_cannot_hold_harms_its_own_feature(
        self, serve: Serve
    ) -> None:
        huge = {"rating": 1e300, "trips": 7}
        stored = dict(DRIVER_VALUES) | {"driver": {**DRIVER_VALUES["driver"], (5,): huge}}
        source = StaticSource(DRIVERS, stored, EVENT_TIME_S)
        async with serve("stored", open_features=reading_from(source)) as client:
            alone = await predict(client, "stored", KYOTO)
            answer = await predict(client, "stored", KYOTO | {"driver_id": 5}, KYOTO)
            given = await client.post(
                "/v1/models/stored:predict",
                json={"instances": [KYOTO | {"driver:rating": 1e300}]},
            )
        assert answer["predictions"][1] == alone["predictions"][0]
        assert answer["degraded_reasons"] == [
            {"feature_view": "driver", "status": "UNAVAILABLE", "instances": [0]}
        ]
        assert given.status_code == 400
        assert given.json()["error"]["field"] == "instances[0].driver:rating"

    async def test_verbose_shows_a_time_beyond_the_calendar(self, serve: Serve) -> None:
        source = StaticSource(DRIVERS, DRIVER_VALUES, 1e12)
        async with serve("stored", open_features=reading_from(source)) as client:
            answer = await predict(client, "stored", KYOTO, verbose=True)
        assert answer["features"][0]["driver:trips"]["event_time"] == "9999-12-31T00:00:00Z"

    async def test_verbose_shows_values_that_json_has_no_type_for(self, serve: Serve) -> None:
        odd = {
            "Bytes": b"\x00\xff",
            "UnixTimestamp": datetime(2014, 1, 1, tzinfo=UTC),
            "Array(Float32)": np.array([0.5, np.nan], dtype=np.float32),
            "Array(String)": ["b", "a"],
            "Set(Int64)": {3, 1, 2},
            "Decimal": Decimal("1.50"),
            "Map": {"a": b"\x00\xff"},
        }
        view = PlannedView(
            "odd", ("city",), None, tuple(PlannedFeature(dtype, dtype) for dtype in odd)
        )
        plan = replace(DRIVERS, views=(*DRIVERS.views, view))
        source = StaticSource(plan, {**DRIVER_VALUES, "odd": {("kyoto",): odd}})
        async with serve("stored", open_features=reading_from(source), plan=plan) as client:
            answer = await predict(client, "stored", KYOTO, verbose=True)
        shown = {name: feature["value"] for name, feature in answer["features"][0].items()}
        assert {name: value for name, value in shown.items() if name.startswith("odd")} == {
            "odd:Bytes": "AP8=",
            "odd:UnixTimestamp": "2014-01-01T00:00:00+00:00",
            "odd:Array(Float32)": [0.5, None],
            "odd:Array(String)": ["b", "a"],
            "odd:Set(Int64)": [1, 2, 3],
            "odd:Decimal": "1.50",
            "odd:Map": {"a": "AP8="},
        }

    async def test_a_constant_may_stand_for_a_missing_value(self, serve: Serve) -> None:
        policy = {"missing": {"driver:rating": {"use": "constant", "value": 3}}}
        async with serve("stored", features=policy) as client:
            answer = await predict(client, "stored", KYOTO | {"driver_id": 99}, KYOTO)
        assert [p["score"] for p in answer["predictions"]] == [
            stored(3.0, None, 2.0, 5.0),
            stored(4.0, 7, 2.0, 5.0),
        ]
        assert answer["degraded"] is True

    async def test_a_contract_may_refuse_to_go_without_a_value(self, serve: Serve) -> None:
        policy = {"missing": {"driver:trips": {"use": "refuse"}}}
        async with serve("stored", features=policy) as client:
            refused = await client.post(
                "/v1/models/stored:predict",
                json={"instances": [KYOTO, KYOTO | {"driver_id": 99}]},
            )
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "features_unavailable"
        assert "instances[1]" in refused.json()["error"]["message"]
        assert "driver:trips" in refused.json()["error"]["message"]


class Outage:
    """A store that answers nothing."""

    plan: FeaturePlan = DRIVERS

    async def fetch(self, entities: EntityColumns, rows: int, deadline: Deadline) -> FeatureRows:
        raise FeaturesUnavailable("connection refused")

    async def check(self) -> None:
        raise FeaturesUnavailable("connection refused")


OUT_OF_ORDER = reading_from(Outage())


class TestWithoutTheStore:
    async def test_the_answer_rests_on_nulls_and_says_so(self, serve: Serve) -> None:
        async with serve("stored", open_features=OUT_OF_ORDER) as client:
            answer = await predict(client, "stored", KYOTO)
        assert answer["predictions"][0]["score"] == stored(None, None, None, 5.0)
        assert answer["degraded"] is True
        assert answer["degraded_reasons"] == [
            {"feature_view": view, "status": "UNAVAILABLE", "instances": [0]}
            for view in ("driver", "city")
        ]

    async def test_a_contract_may_refuse_instead(self, serve: Serve) -> None:
        refuse = {"when_unavailable": "refuse"}
        async with serve("stored", open_features=OUT_OF_ORDER, features=refuse) as client:
            refused = await client.post("/v1/models/stored:predict", json={"instances": [KYOTO]})
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "features_unavailable"
        assert refused.json()["error"]["retryable"] is True

    async def test_the_process_is_not_ready_and_says_why(self, serve: Serve) -> None:
        async with serve("stored", open_features=OUT_OF_ORDER) as client:
            ready = await client.get("/v2/health/ready")
            live = await client.get("/v2/health/live")
        assert ready.status_code == 503
        assert ready.json()["reasons"] == ["stored: features: connection refused"]
        assert live.status_code == 200


class TestRefusals:
    @pytest.mark.parametrize(
        ("body", "status", "code", "field"),
        [
            (b"", 400, "invalid_input", "body"),
            (b"{", 400, "invalid_input", "body"),
            (b'{"instances": []}', 400, "invalid_input", "instances"),
            (b'{"rows": []}', 400, "invalid_input", "rows"),
            (b'{"instances": [{"a": 1}]}', 400, "invalid_input", "instances[0].b"),
            (b'{"instances": [{"a": 1, "b": "2"}]}', 400, "invalid_input", "instances[0].b"),
            (b'{"instances": [{"a": 1, "b": 2, "c": 3}]}', 400, "invalid_input", "instances[0].c"),
            (b'{"instances": [{"a": NaN, "b": 2}]}', 400, "invalid_input", "a"),
            (b'{"instances": [{"a": 1e999, "b": 2}]}', 400, "invalid_input", "instances[0].a"),
        ],
    )
    async def test_bad_input_is_refused_by_name(
        self, serve: Serve, body: bytes, status: int, code: str, field: str
    ) -> None:
        async with serve("binary") as client:
            refused = await client.post("/v1/models/binary:predict", content=body)
        assert refused.status_code == status
        error = refused.json()["error"]
        assert (error["code"], error["field"], error["retryable"]) == (code, field, False)
        assert field in error["message"]
        assert len(refused.json()["request_id"]) == 32

    async def test_too_many_instances(self, serve: Serve) -> None:
        async with serve("binary") as client:
            body = json.dumps({"instances": [PAIRS[0]] * 10_001}).encode()
            refused = await client.post("/v1/models/binary:predict", content=body)
        assert refused.status_code == 413
        assert refused.json()["error"]["code"] == "payload_too_large"
        assert "instances: 10001 given" in refused.json()["error"]["message"]

    async def test_a_body_over_the_limit_is_not_read(self, serve: Serve) -> None:
        async with serve("binary", environment={"HIKYAKU_MAX_BODY_BYTES": "1000"}) as client:
            refused = await client.post("/v1/models/binary:predict", content=b"x" * 1001)
            exact = await client.post("/v1/models/binary:predict", content=b"x" * 1000)
        assert refused.status_code == 413
        assert "1000 bytes" in refused.json()["error"]["message"]
        assert exact.status_code == 400

    async def test_a_body_that_hides_its_length_is_counted_as_it_comes(self, serve: Serve) -> None:
        taken = 0

        async def endless() -> AsyncIterator[bytes]:
            nonlocal taken
            while True:
                taken += 100
                yield b"x" * 100

        async with serve("binary", environment={"HIKYAKU_MAX_BODY_BYTES": "1000"}) as client:
            refused = await client.post("/v1/models/binary:predict", content=endless())
        assert refused.status_code == 413
        assert taken <= 1200

    @pytest.mark.parametrize("name", ["nobody", "binary2", "..", "%2e%2e", "x" * 300, "ünï"])
    async def test_an_unknown_model(self, serve: Serve, name: str) -> None:
        async with serve("binary") as client:
            refused = await client.post(f"/v1/models/{name}:predict", json={"instances": PAIRS})
        assert refused.status_code == 404
        assert refused.json()["error"]["code"] == "not_found"

    @pytest.mark.parametrize("value", ["0", "-5", "soon", "1.5", "99999999999", ""])
    async def test_a_timeout_that_is_none(self, serve: Serve, value: str) -> None:
        async with serve("binary") as client:
            refused = await client.post(
                "/v1/models/binary:predict",
                json={"instances": PAIRS},
                headers={"Request-Timeout-Ms": value},
            )
        assert refused.status_code == 400
        assert refused.json()["error"]["field"] == "Request-Timeout-Ms"

    async def test_a_client_finds_its_own_id_beside_ours(self, serve: Serve) -> None:
        async with serve("binary") as client:
            response = await client.post(
                "/v1/models/binary:predict",
                json={"instances": PAIRS},
                headers={"X-Request-Id": "mine-1"},
            )
            split = await client.post(
                "/v1/models/binary:predict",
                json={"instances": PAIRS},
                headers={"X-Request-Id": "a b"},
            )
        assert response.headers["x-request-id"] == "mine-1"
        assert response.json()["request_id"] != "mine-1"
        assert "x-request-id" not in split.headers


class Stalled(StaticSource):
    """A store that answers when it is told to; until then it uses up all the time it is given."""

    def __init__(self) -> None:
        super().__init__(DRIVERS)
        self.given_s: list[float] = []

    async def fetch(self, entities: EntityColumns, rows: int, deadline: Deadline) -> FeatureRows:
        self.given_s.append(deadline.remaining_s())
        await asyncio.sleep(max(0, deadline.remaining_s()))
        raise FeaturesUnavailable("too slow")


async def test_a_stalled_store_leaves_time_for_an_answer(serve: Serve) -> None:
    stalled = Stalled()
    async with serve("stored", open_features=reading_from(stalled)) as client:
        response = await client.post(
            "/v1/models/stored:predict",
            json={"instances": [KYOTO]},
            headers={"Request-Timeout-Ms": "500"},
        )
    assert response.status_code == 200
    assert response.json()["degraded"] is True
    assert 0.15 < stalled.given_s[0] <= 0.2  # 40 % of it


async def test_the_contract_caps_the_timeout(serve: Serve) -> None:
    stalled = Stalled()
    async with serve(
        "stored",
        open_features=reading_from(stalled),
        limits={"max_timeout_ms": 50},
    ) as client:
        await client.post(
            "/v1/models/stored:predict",
            json={"instances": [KYOTO]},
            headers={"Request-Timeout-Ms": "60000"},
        )
    assert stalled.given_s[0] <= 0.02


class Defective(StaticSource):
    async def fetch(self, entities: EntityColumns, rows: int, deadline: Deadline) -> FeatureRows:
        raise ZeroDivisionError("secret detail")


async def test_a_defect_is_a_500_without_its_details(serve: Serve) -> None:
    async with serve("stored", open_features=reading_from(Defective(DRIVERS))) as client:
        refused = await client.post("/v1/models/stored:predict", json={"instances": [KYOTO]})
    assert refused.status_code == 500
    assert refused.json()["error"]["code"] == "internal"
    assert "secret" not in refused.text
    assert "Traceback" not in refused.text


class Slow(StaticSource):
    """A store that uses up the whole time of the request and answers all the same."""

    async def fetch(self, entities: EntityColumns, rows: int, deadline: Deadline) -> FeatureRows:
        await asyncio.sleep(0.06)
        return await super().fetch(entities, rows, deadline)


async def test_an_answer_that_comes_too_late_is_a_504(serve: Serve) -> None:
    async with serve("stored", open_features=reading_from(Slow(DRIVERS))) as client:
        refused = await client.post(
            "/v1/models/stored:predict",
            json={"instances": [KYOTO]},
            headers={"Request-Timeout-Ms": "50"},
        )
    assert refused.status_code == 504
    assert refused.json()["error"]["code"] == "deadline_exceeded"
    assert refused.json()["error"]["retryable"] is True


async def test_a_value_that_the_model_cannot_take_is_named_with_its_instance(serve: Serve) -> None:
    async with serve("binary") as client:
        refused = await client.post(
            "/v1/models/binary:predict", json={"instances": [PAIRS[0], {"a": 1e300, "b": 0}]}
        )
    assert refused.status_code == 400
    assert refused.json()["error"]["field"] == "instances[1].a"


async def test_a_model_that_returns_infinity_is_a_backend_error(serve: Serve) -> None:
    async with serve("regression") as client:
        refused = await client.post(
            "/v1/models/regression:predict", json={"instances": [{"a": 3e38, "b": 3e38}]}
        )
    assert refused.status_code == 500
    assert refused.json()["error"]["code"] == "backend_error"
    assert "'value'" in refused.json()["error"]["message"]


async def test_a_key_that_goes_on_and_on_does_not_come_back(serve: Serve) -> None:
    async with serve("binary") as client:
        refused = await client.post(
            "/v1/models/binary:predict", json={"instances": [PAIRS[0] | {"k" * 100_000: 1}]}
        )
    assert refused.status_code == 400
    assert len(refused.content) < 1000


HUGE = {"a": 3e38, "b": 3e38}  # a + 2 b is beyond float32


class TestNotFinite:
    SEEN = 'hikyaku_not_finite_values_total{model="regression",output="value"} 1.0'

    async def test_it_is_refused_by_output_and_instance(self, serve: Serve) -> None:
        async with serve("regression") as client:
            refused = await client.post(
                "/v1/models/regression:predict", json={"instances": [PAIRS[0], HUGE]}
            )
            metrics = (await client.get("/metrics")).text
        assert refused.status_code == 500
        error = refused.json()["error"]
        assert (error["code"], error["retryable"]) == ("backend_error", False)
        assert "'value' of instances[1]" in error["message"]
        assert self.SEEN in metrics

    async def test_a_contract_may_answer_null_for_that_instance_alone(self, serve: Serve) -> None:
        outputs = {"value": {"tensor": "y", "when_not_finite": None}}
        async with serve("regression", outputs=outputs) as client:
            answer = await predict(client, "regression", PAIRS[0], HUGE, PAIRS[1])
            metrics = (await client.get("/metrics")).text
        assert answer["predictions"] == [
            {"value": regression(**PAIRS[0]), "decision": False},
            {"value": None, "decision": None},
            {"value": regression(**PAIRS[1]), "decision": False},
        ]
        assert answer["degraded"] is True
        assert answer["degraded_reasons"] == [
            {"output": "value", "status": "NOT_FINITE", "instances": [1]}
        ]
        assert self.SEEN in metrics

    async def test_it_harms_nobody_who_shares_the_execution(self, serve: Serve) -> None:
        async with serve("regression") as client:
            url = "/v1/models/regression:predict"
            answers = await asyncio.gather(
                *(
                    client.post(url, json={"instances": [HUGE if n == 5 else PAIRS[0]]})
                    for n in range(10)
                )
            )
        assert [answer.status_code for answer in answers] == [200] * 5 + [500] + [200] * 4


@pytest.mark.parametrize(("priority", "status"), [("bulk", 200), ("live", 200), ("high", 400)])
async def test_a_caller_may_say_that_it_can_wait(serve: Serve, priority: str, status: int) -> None:
    async with serve("binary") as client:
        response = await client.post(
            "/v1/models/binary:predict",
            json={"instances": PAIRS},
            headers={"Request-Priority": priority},
        )
    assert response.status_code == status
    if status == 400:
        assert response.json()["error"]["field"] == "Request-Priority"
