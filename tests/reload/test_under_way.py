"""What is under way when another version takes over."""

import asyncio
import json
from collections.abc import AsyncIterable, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.clock import FeatureClock
from app.config import Settings, load_settings
from app.deadline import Deadline
from app.features.source import EntityColumns, FeatureRows
from app.features.static_source import StaticSource
from app.main import create_application
from app.runtime import OpenSource
from tests.tiny_models import DRIVER_VALUES, DRIVERS, write_model

DRIVER = {"driver_id": 1, "city": "kyoto", "distance": 5}


class GatedSource:
    """Features that come once the gate is open."""

    def __init__(self) -> None:
        self.plan = DRIVERS
        self.asked = asyncio.Event()
        self.gate = asyncio.Event()
        self._source = StaticSource(DRIVERS, DRIVER_VALUES)

    async def fetch(self, entities: EntityColumns, rows: int, deadline: Deadline) -> FeatureRows:
        self.asked.set()
        await self.gate.wait()
        return await self._source.fetch(entities, rows, deadline)

    async def check(self) -> None:
        """It always answers."""

    @asynccontextmanager
    async def opened(self, settings: Settings, clock: FeatureClock) -> AsyncIterator[OpenSource]:
        yield lambda plan: self


class Worker:
    """A worker with three versions of a model that waits for its features."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client

    async def predict(self, body: AsyncIterable[bytes] | None = None) -> dict[str, Any]:
        response = await self._client.post(
            "/v1/models/stored:predict",
            content=json.dumps({"instances": [DRIVER]}) if body is None else body,
            headers={"Request-Timeout-Ms": "20000"},
        )
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        assert answer["predictions"][0]["score"] == 5274
        return answer

    async def load(self, version: str) -> None:
        response = await self._client.post("/v1/models/stored:load", json={"version": version})
        assert response.status_code == 200, response.text


@pytest.fixture
def source() -> GatedSource:
    return GatedSource()


@pytest.fixture
async def worker(tmp_path: Path, source: GatedSource) -> AsyncIterator[Worker]:
    """Version 1 serves."""
    for _ in range(3):
        await write_model(tmp_path / "models", "stored", "stored")
    settings = load_settings(
        {
            "MODEL_REPOSITORY": str(tmp_path / "models"),
            "HIKYAKU_WORK_DIR": str(tmp_path / "work"),
            "HIKYAKU_FEATURE_REPO": str(tmp_path / "none"),
            "HIKYAKU_REPOSITORY_POLL_S": "0",
        }
    )
    application = create_application(settings, source.opened, isolated_verification=False)
    transport = httpx.ASGITransport(application, client=("127.0.0.1", 1))
    async with (
        application.lifespan(),
        httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client,
    ):
        made = Worker(client)
        await made.load("1")
        yield made


async def test_it_finishes_on_the_version_that_it_began_with(
    worker: Worker, source: GatedSource
) -> None:
    began = asyncio.create_task(worker.predict())
    await source.asked.wait()
    await worker.load("2")
    await worker.load("3")  # now the first is neither champion nor standby
    source.gate.set()
    assert (await began)["model_version"] == "1"
    assert (await worker.predict())["model_version"] == "3"


async def test_a_body_that_comes_after_another_version_has_taken_over_is_answered_by_that(
    worker: Worker, source: GatedSource
) -> None:
    source.gate.set()
    sending, rest = asyncio.Event(), asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        yield b'{"instances": ['
        sending.set()
        await rest.wait()
        yield json.dumps(DRIVER).encode() + b"]}"

    slow = asyncio.create_task(worker.predict(body()))
    await sending.wait()
    await worker.load("2")
    await worker.load("3")
    rest.set()
    assert (await slow)["model_version"] == "3"
