"""The service tells the receivers that its settings name, also what happens as it closes."""

import json
from pathlib import Path

import pytest

from app.config import load_settings
from app.errors import ConfigurationError
from app.events.event import Event
from app.features.static_source import StaticSource
from app.runtime import Runtime
from app.telemetry.metrics import Metrics
from tests.api.conftest import reading_from
from tests.events.receiving import SECRET, receiving
from tests.tiny_models import DRIVER_VALUES, DRIVERS, write_model

IN_MEMORY = reading_from(StaticSource(DRIVERS, DRIVER_VALUES, 0.0))


async def runtime(tmp_path: Path, **environment: str) -> Runtime:
    await write_model(tmp_path / "models", "m", "binary")
    settings = load_settings(
        {
            "MODEL_REPOSITORY": str(tmp_path / "models"),
            "HIKYAKU_WORK_DIR": str(tmp_path / "work"),
            "HIKYAKU_FEATURE_REPO": str(tmp_path / "no_feature_repo"),
            **environment,
        }
    )
    return Runtime(settings, Metrics(), IN_MEMORY, isolated_verification=False)


async def test_receivers_of_the_settings_are_told(tmp_path: Path) -> None:
    async with receiving("200") as receiver:
        service = await runtime(
            tmp_path,
            HIKYAKU_WEBHOOKS=f"http://localhost:{receiver.port}/hook",
            HIKYAKU_WEBHOOK_HOSTS="localhost",
            HIKYAKU_WEBHOOK_SECRET=SECRET,
        )
        async with service:
            service.events.tell(Event("release.held", "m", 1))
        request = receiver.requests.get_nowait()
    event = json.loads(request.body)
    assert (event["type"], event["data"]["version"]) == ("release.held", 1)
    assert event["source"].startswith("urn:hikyaku:")


async def test_without_receivers_nobody_is_told(tmp_path: Path) -> None:
    async with await runtime(tmp_path) as service:
        service.events.tell(Event("release.held", "m", 1))


async def test_a_host_that_is_not_on_the_list_stops_the_start(tmp_path: Path) -> None:
    service = await runtime(
        tmp_path, HIKYAKU_WEBHOOKS="https://a.example/planted", HIKYAKU_WEBHOOK_SECRET=SECRET
    )
    with pytest.raises(ConfigurationError, match="is not in HIKYAKU_WEBHOOK_HOSTS") as no:
        async with service:
            pass
    assert "planted" not in str(no.value)
