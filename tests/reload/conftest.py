"""Workers of one service in this process: each with models of its own, one release state."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, TypeAlias

import httpx
import pytest

from app.config import load_settings
from app.main import create_application
from app.telemetry.metrics import Metrics
from loadtests.oracle_model import MODEL, Row, instance, judge, publish_next, write_contract

ROWS: Sequence[Row] = ((1, 2), (30, 40), (999, 0))


class Worker:
    """One worker and who asks it."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self.client = client

    async def version(self) -> int:
        """Which version answers, its answers being held against what that version says."""
        body = {"instances": [instance(row) for row in ROWS]}
        response = await self.client.post(f"/v1/models/{MODEL}:predict", json=body)
        assert response.status_code == 200, response.text
        version, fault = judge(response.content, ROWS, "small")
        assert fault == ""
        return version

    async def ask(self, verb: str, **body: Any) -> httpx.Response:
        return await self.client.post(f"/v1/models/{MODEL}:{verb}", json=body)

    async def described(self) -> dict[str, Any]:
        document: dict[str, Any] = (await self.client.get(f"/v1/models/{MODEL}")).json()
        return document

    async def metrics(self) -> str:
        return (await self.client.get("/metrics")).text

    async def until(self, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """What it says of the model once that holds."""
        async with asyncio.timeout(20):
            # No event is set by another worker.
            while not holds(described := await self.described()):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        return described


class Service:
    """A repository, and workers that share what a machine shares."""

    def __init__(self, folder: Path) -> None:
        self.repository = folder / "models"
        self.folder = folder
        self._numbers = itertools.count(1)
        write_contract(self.repository)

    @property
    def model_dir(self) -> Path:
        return self.repository / MODEL

    async def publish(self) -> int:
        """The next version, which CURRENT names then."""
        version = next(self._numbers)
        await publish_next(self.repository, version)
        return version

    @asynccontextmanager
    async def worker(self, **settings: str) -> AsyncIterator[Worker]:
        """Nothing is loaded but by a verb, unless the settings say so."""
        environment = {
            "MODEL_REPOSITORY": str(self.repository),
            "HIKYAKU_WORK_DIR": str(self.folder / "work"),
            "HIKYAKU_FEATURE_REPO": str(self.folder / "no_feature_repo"),
            "HIKYAKU_REPOSITORY_POLL_S": "0",
        }
        application = create_application(
            load_settings(environment | settings), metrics=Metrics(), isolated_verification=False
        )
        transport = httpx.ASGITransport(application, client=("127.0.0.1", 1))
        async with (
            application.lifespan(),
            httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client,
        ):
            yield Worker(client)


Workers: TypeAlias = Callable[[int], AbstractAsyncContextManager[list[Worker]]]


@pytest.fixture
async def service(tmp_path: Path) -> Service:
    """With version 1 published."""
    made = Service(tmp_path)
    await made.publish()
    return made
