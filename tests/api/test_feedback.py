"""Labels over HTTP: who tells them, and what is answered."""

from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest

from tests.api.conftest import Serve
from tests.topologies import PASSWORD, Server, server

ROW = {"a": 1.0, "b": 0.0}
UNKNOWN = "0" * 32
PATH = "/v1/models/binary:feedback"


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with server(tmp_path_factory.mktemp("redis") / "r", "appendonly yes") as started:
        yield started


@pytest.fixture
async def client(serve: Serve, redis_server: Server) -> AsyncIterator[httpx.AsyncClient]:
    url = f"redis://:{PASSWORD}@127.0.0.1:{redis_server.port}"
    labels = {"horizon": {"after_s": 3600}}
    async with serve("binary", environment={"STATE_REDIS_URL": url}, labels=labels) as client:
        yield client


async def predicted(client: httpx.AsyncClient, *rows: dict[str, float]) -> str:
    answer = await client.post("/v1/models/binary:predict", json={"instances": rows})
    return answer.json()["request_id"]


async def test_labels_are_taken_together_and_each_is_told_what_became_of_it(
    client: httpx.AsyncClient,
) -> None:
    request = await predicted(client, ROW, ROW)
    told = [
        {"request_id": request, "instance": 0, "label": True},
        {"request_id": request, "instance": 0, "label": True},
        {"request_id": request, "label": False},
        {"request_id": request, "instance": 1, "label": None},
        {"request_id": UNKNOWN, "label": True},
    ]
    answer = await client.post(PATH, json={"labels": told})
    assert answer.status_code == 200
    document = answer.json()
    results = [result["status"] for result in document.pop("results")]
    assert results == ["accepted", "duplicate", "conflict", "accepted", "unknown"]
    assert document == {
        **dict.fromkeys(("duplicate", "conflict", "unknown"), 1),
        **{"accepted": 2, "expired": 0, "not_sampled": 0},
    }


async def test_one_label_alone_is_refused_where_it_does_not_count(
    client: httpx.AsyncClient,
) -> None:
    request = await predicted(client, ROW)
    label = {"request_id": request, "label": True}
    for status in ("accepted", "duplicate"):
        answer = await client.post(PATH, json=label)
        assert (answer.status_code, answer.json()["status"]) == (200, status)
    answer = await client.post(PATH, json={**label, "label": False})
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "conflict")
    answer = await client.post(PATH, json={**label, "request_id": UNKNOWN})
    assert answer.status_code == 404
    assert answer.json()["error"]["message"].startswith("unknown: no prediction that is kept")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "request_id"),
        ({"request_id": UNKNOWN}, "label"),
        ({"labels": [{"request_id": UNKNOWN}]}, "labels[0].label"),
        ({"labels": [{"request_id": UNKNOWN, "label": 1}] * 2}, "labels[0].label"),
        ({"request_id": UNKNOWN, "label": "late"}, "label"),
        ({"labels": [], "label": True}, "labels"),
        ({"request_id": UNKNOWN, "label": True, "instance": -1}, "instance"),
        ({"request_id": UNKNOWN, "label": True, "lable": 1}, "lable"),
    ],
)
async def test_a_body_that_is_none_is_refused_by_its_field(
    client: httpx.AsyncClient, body: dict[str, Any], field: str
) -> None:
    answer = await client.post(PATH, json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["field"] == field


async def test_more_labels_than_ten_thousand_are_refused(client: httpx.AsyncClient) -> None:
    labels = [{"request_id": UNKNOWN, "label": True}] * 10_001
    answer = await client.post(PATH, json={"labels": labels})
    assert answer.status_code == 413


async def test_a_model_without_labels_takes_none(serve: Serve) -> None:
    async with serve("binary") as client:
        answer = await client.post(PATH, json={"request_id": UNKNOWN, "label": True})
        assert answer.status_code == 404
        answer = await client.post("/v1/models/other:feedback", json={"labels": []})
        assert answer.status_code == 404


async def test_without_an_operator_nobody_tells_labels(serve: Serve) -> None:
    environment = {"HIKYAKU_OPERATOR_TOKEN": "a-long-enough-secret-token"}
    async with serve("binary", environment=environment) as client:
        answer = await client.post(PATH, json={"request_id": UNKNOWN, "label": True})
        assert answer.status_code == 401
