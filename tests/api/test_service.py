"""Health, models, the replay clock, documentation and metrics, as an operator sees them."""

import math
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from app.errors import ConfigurationError
from app.main import open_features
from app.runtime import OpenFeatures, Others
from tests.api.conftest import IN_MEMORY, Serve

PAIR = {"a": 2.0, "b": 1.0}


async def samples(
    client: httpx.AsyncClient,
) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    text = (await client.get("/metrics")).text
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_ready_says_what_time_it_is_for_features(serve: Serve) -> None:
    async with serve("binary") as client:
        await client.get("/metrics")  # the first comparison with the registry has its turn
        ready = await client.get("/v2/health/ready")
    assert ready.status_code == 200
    assert ready.json() == {
        "ready": True,
        "reasons": [],
        "feature_time": "2014-01-01T00:30:00Z",
        "plan_outdated": {},
        "registry_check": "no model reads stored features",
        "release_state": "read",
        "replay_clock": True,
    }


async def test_it_is_ready_once_all_workers_have_been(serve: Serve) -> None:
    missing = ["worker 2: not ready yet"]
    async with serve("binary", others=Others(0, lambda: missing, None)) as client:
        ready = await client.get("/v2/health/ready")
        assert (ready.status_code, ready.json()["reasons"]) == (503, missing)
        assert "hikyaku_ready 0.0" in (await client.get("/metrics")).text
        missing = []
        assert (await client.get("/v2/health/ready")).status_code == 200
        assert "hikyaku_ready 1.0" in (await client.get("/metrics")).text


@pytest.mark.parametrize("open_features", [IN_MEMORY, open_features])
async def test_a_registry_that_is_gone_stops_the_start_by_its_name(
    serve: Serve, tmp_path: Path, open_features: OpenFeatures
) -> None:
    """Through the SDK or not, before Feast would make an empty one."""
    (tmp_path / "feature_store.yaml").write_text("registry: registry.db")
    with pytest.raises(ConfigurationError, match=r"registry\.db.*hikyaku features apply"):
        async with serve(
            "stored",
            open_features=open_features,
            environment={"HIKYAKU_FEATURE_REPO": str(tmp_path)},
        ):
            pass
    assert not (tmp_path / "registry.db").exists()


async def test_a_model_without_stored_features_needs_no_registry(
    serve: Serve, tmp_path: Path
) -> None:
    (tmp_path / "feature_store.yaml").write_text("registry: registry.db")
    async with serve("binary", environment={"HIKYAKU_FEATURE_REPO": str(tmp_path)}) as client:
        assert (await client.get("/v2/health/ready")).status_code == 200


async def test_a_model_says_which_version_answers(serve: Serve) -> None:
    async with serve("stored") as client:
        model = (await client.get("/v1/models/stored")).json()
        absent = await client.get("/v1/models/absent")
    assert (model["name"], model["ready"], model["version"]) == ("stored", True, "1")
    assert model["feature_service"] == "drivers"
    assert re.fullmatch("[0-9a-f]{64}", model["sha256"])
    assert absent.status_code == 404
    assert absent.json()["error"]["code"] == "not_found"


class TestReplayClock:
    async def test_it_advances_and_ages_the_values(self, serve: Serve) -> None:
        async with serve("stored") as client:
            put = await client.put("/v1/replay-clock", json={"now": "2014-01-01T02:00:00Z"})
            assert put.json() == {"now": "2014-01-01T02:00:00Z"}
            answer = await client.post(
                "/v1/models/stored:predict",
                json={
                    "instances": [{"driver_id": 1, "city": "kyoto", "distance": 5}],
                    "verbose": True,
                },
            )
            now = await client.get("/v1/replay-clock")
        assert answer.json()["features"][0]["driver:trips"]["age_s"] == 7200.0
        assert now.json() == {"now": "2014-01-01T02:00:00Z"}

    async def test_it_never_goes_back(self, serve: Serve) -> None:
        async with serve("binary") as client:
            back = await client.put("/v1/replay-clock", json={"now": "2013-01-01T00:00:00Z"})
        assert back.status_code == 409
        assert back.json()["error"]["code"] == "conflict"

    @pytest.mark.parametrize("body", [{"now": "2014-01-01T02:00:00"}, {"now": "later"}, {}, []])
    async def test_what_is_no_instant_is_refused_by_name(self, serve: Serve, body: Any) -> None:
        async with serve("binary") as client:
            refused = await client.put("/v1/replay-clock", json=body)
        assert refused.status_code == 400
        assert refused.json()["error"]["code"] == "invalid_input"
        assert refused.json()["error"]["field"].startswith("body")

    async def test_only_the_loopback_interface_may_advance_it(self, serve: Serve) -> None:
        async with serve("binary") as client:
            application = client._transport.app  # type: ignore[attr-defined]  # the one in service
            outside = httpx.ASGITransport(application, client=("192.0.2.7", 5000))
            async with httpx.AsyncClient(
                transport=outside, base_url="http://localhost"
            ) as stranger:
                refused = await stranger.put(
                    "/v1/replay-clock", json={"now": "2014-01-01T02:00:00Z"}
                )
                looked = await stranger.get("/v1/replay-clock")
        assert refused.status_code == 403
        assert refused.json()["error"]["code"] == "forbidden"
        assert looked.json() == {"now": "2014-01-01T00:30:00Z"}

    async def test_a_proxy_on_this_machine_is_not_the_operator(self, serve: Serve) -> None:
        async with serve("binary") as client:
            refused = await client.put(
                "/v1/replay-clock",
                json={"now": "2014-01-01T02:00:00Z"},
                headers={"X-Forwarded-For": "192.0.2.7"},
            )
        assert refused.status_code == 403

    async def test_an_instant_that_cannot_be_written_is_refused(self, serve: Serve) -> None:
        async with serve("binary") as client:
            refused = await client.put(
                "/v1/replay-clock", json={"now": "9999-12-31T23:59:59-14:00"}
            )
            ready = await client.get("/v2/health/ready")
        assert refused.status_code == 400
        assert ready.status_code == 200

    async def test_a_process_on_wall_time_has_none(self, serve: Serve) -> None:
        async with serve("binary", environment={"HIKYAKU_REPLAY_CLOCK": ""}) as client:
            absent = await client.put("/v1/replay-clock", json={"now": "2014-01-01T02:00:00Z"})
            ready = await client.get("/v2/health/ready")
        assert absent.status_code == 404
        assert ready.json()["replay_clock"] is False


class TestRefusals:
    @pytest.mark.parametrize(
        ("method", "path", "status"),
        [("GET", "/nothing", 404), ("GET", "/v1/models/x/y", 404), ("POST", "/v1/models", 405)],
    )
    async def test_they_have_the_same_shape_everywhere(
        self, serve: Serve, method: str, path: str, status: int
    ) -> None:
        async with serve("binary") as client:
            refused = await client.request(method, path)
        assert refused.status_code == status
        assert set(refused.json()) == {"error", "request_id"}

    async def test_the_open_inference_protocol_reads_a_text(self, serve: Serve) -> None:
        async with serve("binary") as client:
            refused = await client.get("/v2/nothing")
        assert refused.status_code == 404
        assert isinstance(refused.json()["error"], str)

    async def test_predict_with_another_method_is_no_prediction(self, serve: Serve) -> None:
        async with serve("binary") as client:
            refused = await client.get("/v1/models/binary:predict")
        assert refused.status_code == 405
        assert refused.headers["allow"] == "POST"


class TestDocumentation:
    async def test_it_shows_each_models_own_fields_and_an_example(self, serve: Serve) -> None:
        async with serve("binary", "stored") as client:
            schema = (await client.get("/openapi.json")).json()
            page = await client.get("/docs")
            content = schema["paths"]["/v1/models/stored:predict"]["post"]["requestBody"]["content"]
            example = content["application/json"]["example"]
            answer = await client.post("/v1/models/stored:predict", json=example)
        instance = schema["components"]["schemas"]["stored.Instance"]
        assert set(instance["required"]) == {"driver_id", "city", "distance"}
        assert "driver:rating" in instance["properties"]
        assert "/v1/models/binary:predict" in schema["paths"]
        assert answer.status_code == 200
        assert page.status_code == 200
        assert "//" not in page.text.replace(str(client.base_url), "").replace("</", "")


class TestMetrics:
    async def test_requests_are_counted_by_their_outcome(self, serve: Serve) -> None:
        async with serve("binary") as client:
            for body in ({"instances": [PAIR]}, {"instances": [PAIR, PAIR]}, {"instances": []}):
                await client.post("/v1/models/binary:predict", json=body)
            await client.post("/v1/models/nobody:predict", json={})
            seen = await samples(client)

        def requests(model: str, code: str) -> float:
            return seen["hikyaku_requests_total", (("code", code), ("model", model))]

        assert requests("binary", "ok") == 2
        assert requests("binary", "invalid_input") == 1
        assert requests("unknown", "not_found") == 1

    async def test_names_from_outside_make_no_series(self, serve: Serve) -> None:
        async with serve("binary") as client:
            for index in range(20):
                await client.post(f"/v1/models/nobody{index}:predict", json={})
            seen = await samples(client)
        models = {dict(labels).get("model") for _, labels in seen}
        assert models == {None, "binary", "unknown"}

    async def test_the_stages_add_up_to_the_request(self, serve: Serve) -> None:
        async with serve("binary") as client:
            for _ in range(10):
                await client.post("/v1/models/binary:predict", json={"instances": [PAIR] * 100})
            seen = await samples(client)
        stages = {
            dict(labels)["stage"]: value
            for (name, labels), value in seen.items()
            if name == "hikyaku_stage_duration_seconds_sum"
        }
        assert list(stages) == ["parse", "features", "queue", "execution", "respond"]
        whole = seen["hikyaku_request_duration_seconds_sum", (("model", "binary"),)]
        assert sum(stages.values()) == pytest.approx(whole, rel=1e-9)

    async def test_predictions_are_a_distribution(self, serve: Serve) -> None:
        async with serve("regression") as client:
            instances = [{"a": value, "b": 0} for value in (-3, 0.31, 7, 700)]
            await client.post("/v1/models/regression:predict", json={"instances": instances})
            seen = await samples(client)
        labels = {"model": "regression", "role": "champion", "output": "value"}

        def below(bound: str) -> float:
            key = tuple(sorted({**labels, "le": bound}.items()))
            return seen["hikyaku_prediction_bucket", key]

        assert [below(b) for b in ("-5.0", "-2.0", "0.35", "10.0", "+Inf")] == [0, 1, 2, 3, 4]

    async def test_degraded_answers_name_the_view(self, serve: Serve) -> None:
        async with serve("stored") as client:
            unknown = {"driver_id": 99, "city": "kyoto", "distance": 0}
            await client.post("/v1/models/stored:predict", json={"instances": [unknown] * 3})
            seen = await samples(client)
        view = (("feature_view", "driver"), ("model", "stored"), ("status", "NOT_FOUND"))
        assert seen["hikyaku_degraded_requests_total", view] == 1
        assert seen["hikyaku_feature_values_total", view] == 6
        city = (("feature_view", "city"), ("model", "stored"))
        assert seen["hikyaku_feature_age_seconds_sum", city] == 3 * 1800

    async def test_the_newest_row_read_of_a_view_ages_by_feature_time(self, serve: Serve) -> None:
        def age(seen: dict[Any, float], view: str) -> float:
            labels = (("feature_view", view), ("model", "stored"))
            return seen["hikyaku_feature_newest_age_seconds", labels]

        unknown = {"driver_id": 99, "city": "kyoto", "distance": 0}
        async with serve("stored") as client:
            before = await samples(client)
            await client.post("/v1/models/stored:predict", json={"instances": [unknown]})
            read = await samples(client)
            await client.put("/v1/replay-clock", json={"now": "2014-01-01T02:00:00Z"})
            later = await samples(client)
        assert math.isnan(age(before, "city"))
        assert age(read, "city") == 1800
        assert age(later, "city") == 7200
        assert math.isnan(age(later, "driver"))

    async def test_the_loaded_version_and_its_batches_are_there(self, serve: Serve) -> None:
        async with serve("binary") as client:
            await client.post("/v1/models/binary:predict", json={"instances": [PAIR] * 5})
            await client.get("/v2/health/ready")
            seen = await samples(client)
            sha256 = (await client.get("/v1/models/binary")).json()["sha256"]
        info = {"model": "binary", "version": "1", "sha256": sha256, "role": "champion"}
        assert seen["hikyaku_model_info", tuple(sorted(info.items()))] == 1
        assert seen["hikyaku_batch_rows_sum", (("model", "binary"),)] == 5
        assert seen["hikyaku_queued_rows", (("model", "binary"),)] == 0
        assert seen["hikyaku_ready", ()] == 1
