"""What callers and operators see of a model's backend and of its batcher."""

import asyncio
import math
import os
import signal
from typing import Any

import httpx
import pytest

from tests.api.conftest import Serve
from tests.backends.isolated_models import processes

URL = "/v1/models/regression:predict"


def asking(*values: float) -> dict[str, Any]:
    return {"instances": [{"a": value, "b": 0} for value in values]}


async def scraped(client: httpx.AsyncClient, series: str) -> float:
    """The value of a series; 0 where it is not there."""
    for line in (await client.get("/metrics")).text.splitlines():
        if line.startswith(series):
            return float(line.rpartition(" ")[2])
    return 0.0


async def test_a_model_in_a_process_of_its_own_survives_its_death(serve: Serve) -> None:
    backend = {"use": "onnx", "isolated": {}}
    async with serve("regression", backend=backend) as client:
        assert (await client.post(URL, json=asking(3))).json()["predictions"][0]["value"] == 3
        os.kill(processes()[0], signal.SIGKILL)
        while await scraped(client, "hikyaku_backend_events_total") == 0:  # noqa: ASYNC110  its end
            await asyncio.sleep(0.01)  # is told by the kernel, when it likes
        again = await client.post(URL, json=asking(4), headers={"Request-Timeout-Ms": "20000"})
        assert again.json()["predictions"][0]["value"] == 4
        event = 'hikyaku_backend_events_total{event="process_ended",model="regression"}'
        assert await scraped(client, event) == 1
        assert (await client.get("/v2/health/ready")).status_code == 200


@pytest.mark.parametrize("priority", ["live", "bulk"])
async def test_a_caller_may_say_that_it_can_wait(serve: Serve, priority: str) -> None:
    async with serve("regression") as client:
        answer = await client.post(URL, json=asking(2), headers={"Request-Priority": priority})
        assert answer.status_code == 200


async def test_executions_are_counted_and_timed(serve: Serve) -> None:
    async with serve("regression") as client:
        await client.post(URL, json=asking(*range(5)))
        for series in ("execution_duration_seconds", "queue_delay_seconds", "batch_rows"):
            assert await scraped(client, f'hikyaku_{series}_count{{model="regression"}}') == 1
        assert await scraped(client, 'hikyaku_batch_rows_sum{model="regression"}') == 5


async def test_a_triton_that_is_not_there_stops_the_start_with_its_address(serve: Serve) -> None:
    backend = {"use": "triton", "endpoints": ["127.0.0.1:1"], "start_timeout_s": 0}
    with pytest.raises(Exception, match=r"127\.0\.0\.1:1"):
        async with serve("regression", backend=backend):
            pass


async def test_a_local_copy_serves_while_no_triton_is_there(serve: Serve) -> None:
    backend = {
        "use": "triton",
        "endpoints": ["127.0.0.1:1"],
        "start_timeout_s": 0,
        "failover": "onnx",
    }
    async with serve("regression", backend=backend) as client:
        answer = await client.post(URL, json=asking(7))
        assert answer.json()["predictions"][0]["value"] == 7
        assert (await client.get("/v2/health/ready")).status_code == 200
        assert await scraped(client, "hikyaku_backend_events_total") >= 1
        assert not math.isnan(await scraped(client, "hikyaku_ready"))
