"""A service in this process whose candidates run in processes of their own, as they always do."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

from app.config import load_settings
from app.main import create_application
from app.telemetry.metrics import Metrics

SHOWN_S = 60


class Service:
    """One worker of a model, and who asks it."""

    def __init__(self, client: httpx.AsyncClient, model: str) -> None:
        self.client = client
        self.model = model

    async def predict(self, *instances: Mapping[str, Any], **headers: str) -> dict[str, Any]:
        response = await self.client.post(
            f"/v1/models/{self.model}:predict", json={"instances": instances}, headers=headers
        )
        assert response.status_code == 200, response.text
        document: dict[str, Any] = response.json()
        return document

    async def ask(self, verb: str, **body: Any) -> httpx.Response:
        return await self.client.post(f"/v1/models/{self.model}:{verb}", json=body, timeout=60)

    async def shadow(self, version: int, **body: Any) -> dict[str, Any]:
        response = await self.ask("shadow", version=version, **body)
        assert response.status_code == 200, response.text
        document: dict[str, Any] = response.json()
        return document

    async def candidates(self) -> Sequence[dict[str, Any]]:
        response = await self.client.get(f"/v1/models/{self.model}/comparison")
        assert response.status_code == 200, response.text
        found: Sequence[dict[str, Any]] = response.json()["candidates"]
        return found

    async def compared(self, holds: Callable[[Mapping[str, Any]], bool]) -> dict[str, Any]:
        """The comparison with the only candidate, once that holds of it."""
        async with asyncio.timeout(SHOWN_S):
            while True:
                [candidate] = await self.candidates()
                if candidate["comparison"] is not None and holds(candidate["comparison"]):
                    document: dict[str, Any] = candidate["comparison"]
                    return document
                await asyncio.sleep(0.05)

    async def until_shown(self, by: int = 1) -> None:
        """Every one of so many workers shows every candidate requests."""
        async with asyncio.timeout(SHOWN_S):
            while True:
                document = (await self.client.get(f"/v1/models/{self.model}")).json()
                wanted = {each["chosen"]["sha256"]: "" for each in document["release"]["shadows"]}
                workers = document["workers"].values()
                if len(workers) == by and all(each["candidates"] == wanted for each in workers):
                    return
                await asyncio.sleep(0.05)

    async def metrics(self) -> str:
        return (await self.client.get("/metrics")).text


@asynccontextmanager
async def serving(folder: Path, model: str, **settings: str) -> AsyncIterator[Service]:
    """Of the models in `folder/models`."""
    environment = {
        "MODEL_REPOSITORY": str(folder / "models"),
        "HIKYAKU_WORK_DIR": str(folder / "work"),
        "HIKYAKU_FEATURE_REPO": str(folder / "no_feature_repo"),
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
        yield Service(client, model)
