"""The whole service in process: tiny models of every kind, features from memory."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, TypeAlias

import httpx
import pytest
import uvloop

from app.clock import FeatureClock
from app.config import Settings, load_settings
from app.features.source import FeatureSource
from app.features.static_source import StaticSource
from app.main import create_application
from app.runtime import ALONE, OpenFeatures, OpenSource, Others
from tests.tiny_models import DRIVER_VALUES, DRIVERS, write_model

EVENT_TIME_S = 1_388_534_400.0  # 2014-01-01T00:00:00Z
CLOCK = "2014-01-01T00:30:00Z"

Serve: TypeAlias = Callable[..., AbstractAsyncContextManager[httpx.AsyncClient]]


def reading_from(source: FeatureSource) -> OpenFeatures:
    """Every plan is read from this source."""

    @asynccontextmanager
    async def opened(settings: Settings, clock: FeatureClock) -> AsyncIterator[OpenSource]:
        yield lambda plan: source

    return opened


IN_MEMORY = reading_from(StaticSource(DRIVERS, DRIVER_VALUES, EVENT_TIME_S))


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """What speaks to our protocol does so on the loop that serves in production."""
    if item.path.name.startswith("test_http_"):
        return {"uvloop": uvloop.new_event_loop}
    return {"asyncio": asyncio.new_event_loop}


@pytest.fixture
def serve(tmp_path: Path) -> Serve:
    """Publish the kinds and serve them: `async with serve("binary", …) as client`."""

    @asynccontextmanager
    async def serving(
        *kinds: Any,
        open_features: OpenFeatures = IN_MEMORY,
        environment: dict[str, str] | None = None,
        others: Others = ALONE,
        **contract_changes: Any,
    ) -> AsyncIterator[httpx.AsyncClient]:
        repository = tmp_path / "models"
        for kind in kinds:
            await write_model(repository, kind, kind, **contract_changes)
        settings = load_settings(
            {
                "MODEL_REPOSITORY": str(repository),
                "HIKYAKU_WORK_DIR": str(tmp_path / "work"),
                "HIKYAKU_FEATURE_REPO": str(tmp_path / "no_feature_repo"),
                "HIKYAKU_REPLAY_CLOCK": CLOCK,
            }
            | (environment or {})
        )
        application = create_application(
            settings, open_features, others=others, isolated_verification=False
        )
        # A real server answers 500 where the in-process transport would raise.
        transport = httpx.ASGITransport(application, raise_app_exceptions=False)
        async with (
            application.lifespan(),
            httpx.AsyncClient(transport=transport, base_url="http://localhost") as client,
        ):
            yield client

    return serving
