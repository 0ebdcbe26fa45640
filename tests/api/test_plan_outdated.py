"""A registry that no longer matches the served plan is told, and changes nothing."""

import asyncio

import pytest

from tests.api.conftest import Serve
from tests.api.test_predict import KYOTO, predict
from tests.tiny_feast import Fleet

pytestmark = pytest.mark.system


async def test_a_server_says_so_and_answers_as_before(serve: Serve, fleet: Fleet) -> None:
    """The registry has no service of the name that the model was published with."""
    environment = {"HIKYAKU_FEATURE_REPO": str(fleet.repo)}
    async with serve("stored", environment=environment) as client:
        before = await predict(client, "stored", KYOTO)
        async with asyncio.timeout(100):
            while True:  # the comparison is another process's, and takes seconds
                ready = await client.get("/v2/health/ready")
                if ready.json()["plan_outdated"]:
                    break
                await asyncio.sleep(0.1)
        after = await predict(client, "stored", KYOTO)
        metrics = (await client.get("/metrics")).text
    assert ready.status_code == 200
    assert ready.json()["ready"] is True
    assert ready.json()["registry_check"] == "done"
    assert "no feature service 'drivers'" in ready.json()["plan_outdated"]["stored"]
    assert 'hikyaku_plan_outdated{model="stored"} 1.0' in metrics
    assert after["predictions"] == before["predictions"]
    assert after["degraded"] is False
