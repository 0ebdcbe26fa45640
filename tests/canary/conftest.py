"""A service in this process whose releases the test makes itself."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

from app.canary.canary import Canary
from app.config import load_settings
from app.main import application_of, open_features
from app.release.state import Rollout
from app.runtime import Runtime
from app.served_model import ServedModel
from app.telemetry.metrics import Metrics
from tests.canary.releases import release

ONE: Mapping[str, float] = {"a": 1.0, "b": 2.0}


class Releasing:
    """One worker of the model `m`, of which version 1 and 2 are open; 2 answers, unless the test
    says otherwise, and 1 is the candidate."""

    def __init__(
        self,
        runtime: Runtime,
        client: httpx.AsyncClient,
        champion: ServedModel,
        candidate: ServedModel,
    ) -> None:
        self.runtime = runtime
        self.client = client
        self.champion = champion
        self.candidate = candidate
        self.rollout: Rollout | None = None

    @property
    def canary(self) -> Canary:
        return self.runtime.canaries["m"]

    def begin(self, share: float, **given: Any) -> Rollout:
        """A stage of the release of the candidate, from now on."""
        self.rollout = release(
            share, candidate=self.candidate.id, against=self.champion.id, **given
        )
        self.canary.follow(self.rollout, self.candidate, self.champion)
        return self.rollout

    async def ask(self, *instances: Mapping[str, Any], **headers: str) -> httpx.Response:
        return await self.client.post(
            "/v1/models/m:predict",
            json={"instances": instances or [ONE]},
            headers={name.replace("_", "-"): value for name, value in headers.items()},
        )

    async def answer(self, *instances: Mapping[str, Any], **headers: str) -> tuple[str, str]:
        """Which version, by which route."""
        response = await self.ask(*instances, **headers)
        assert response.status_code == 200, response.text
        document = response.json()
        return document["model_version"], document["route"]

    async def answers(self, *keys: str) -> list[tuple[str, str]]:
        return list(await asyncio.gather(*(self.answer(routing_key=key) for key in keys)))

    async def counted(self) -> dict[str, Any]:
        """Of the stage that goes on, in this worker."""
        await self.canary.settle(is_last=True)
        report = self.canary.report()
        assert report is not None
        counted: dict[str, Any] = report["counted"]
        return counted

    async def metrics(self) -> str:
        return (await self.client.get("/metrics")).text


@asynccontextmanager
async def releasing(folder: Path, **settings: str) -> AsyncIterator[Releasing]:
    """Of the model `m` in `folder/models`."""
    environment = {
        "MODEL_REPOSITORY": str(folder / "models"),
        "HIKYAKU_WORK_DIR": str(folder / "work"),
        "HIKYAKU_FEATURE_REPO": str(folder / "no_feature_repo"),
        "HIKYAKU_REPOSITORY_POLL_S": "0",
    }
    runtime = Runtime(
        load_settings(environment | settings),
        Metrics(),
        open_features,
        isolated_verification=False,
    )
    application = application_of(runtime)
    transport = httpx.ASGITransport(application, client=("127.0.0.1", 1))
    async with (
        application.lifespan(),
        httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client,
    ):
        champion = runtime.models["m"]
        assert champion is not None
        residents = runtime.reload.followed["m"].residents
        candidate = await residents.open(1)
        with residents.pinned(candidate):
            yield Releasing(runtime, client, champion, candidate.model)
