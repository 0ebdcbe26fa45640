"""What callers are told while Redis misbehaves: the whole service, a real Redis, a proxy of faults
between them. (Rows F1, F2, F4 and F13 of the failure catalogue.)"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.main import open_features
from loadtests.fault_proxy import Delay, Fault, FaultProxy, Pass, Refuse, Replace, Stall
from loadtests.redis_process import RedisProcess
from loadtests.telltale import CLOCK, TELLTALE, city, store, value_of
from tests.api.conftest import Serve
from tests.tiny_models import stored as score_of

TIMEOUT_S = 0.5
NOBODY_KNOWS = score_of(None, None, None, 5.0)

FAULTS: dict[str, Fault] = {
    "refuses": Refuse(),
    "silent": Stall(),
    "too slow": Delay(5.0),
    "loading": Replace(b"-LOADING Redis is loading the dataset in memory\r\n"),
}


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisProcess]:
    with RedisProcess(tmp_path_factory.mktemp("redis")) as process:
        store(process.url, 50, 5)
        yield process


@pytest.fixture
async def proxy(process: RedisProcess) -> AsyncIterator[FaultProxy]:
    async with FaultProxy(process.port) as proxy:
        yield proxy


@asynccontextmanager
async def serving(
    serve: Serve, process: RedisProcess, proxy: FaultProxy, folder: Path, **features: Any
) -> AsyncIterator[httpx.AsyncClient]:
    """The tiny model that reads drivers and cities through the proxy; there is no registry."""
    async with serve(
        "stored",
        plan=TELLTALE,
        open_features=open_features,
        environment={
            "FEATURE_REDIS_URL": process.url_through(proxy.port),
            "HIKYAKU_FEATURE_REPO": str(folder / "nowhere"),
            "HIKYAKU_REPLAY_CLOCK": CLOCK,
        },
        features=features,
    ) as client:
        yield client


async def ask(client: httpx.AsyncClient, driver: int = 7) -> httpx.Response:
    """An answer, within the time that was given."""
    started_s = time.monotonic()
    answer = await client.post(
        "/v1/models/stored:predict",
        json={"instances": [{"driver_id": driver, "city": city(3), "distance": 5.0}]},
        headers={"Request-Timeout-Ms": str(round(TIMEOUT_S * 1000))},
    )
    assert time.monotonic() - started_s < TIMEOUT_S + 0.5  # the machine may be busy
    return answer


def is_fresh(answer: httpx.Response, driver: int = 7) -> bool:
    """Whether it rests on every stored value; if not, it says so."""
    content = answer.json()
    own = score_of(value_of(0, driver), value_of(1, driver), value_of(2, 3), 5.0)
    assert content["degraded"] == (content["predictions"][0]["score"] != own)
    return not content["degraded"]


async def test_serving_needs_redis_and_no_registry(
    serve: Serve, process: RedisProcess, proxy: FaultProxy, tmp_path: Path
) -> None:
    async with serving(serve, process, proxy, tmp_path) as client:
        answers = [await ask(client, driver) for driver in range(50)]
    assert all(is_fresh(answer, driver) for driver, answer in enumerate(answers))


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
async def test_every_answer_without_redis_is_in_time_and_says_so(
    serve: Serve, process: RedisProcess, proxy: FaultProxy, tmp_path: Path, fault: Fault
) -> None:
    async with serving(serve, process, proxy, tmp_path) as client:
        assert is_fresh(await ask(client))
        await proxy.switch(fault)
        for _ in range(3):
            for answer in await asyncio.gather(*(ask(client, driver) for driver in range(20))):
                assert answer.status_code == 200
                content = answer.json()
                assert content["predictions"][0]["score"] == NOBODY_KNOWS
                assert content["degraded"] is True
                assert content["degraded_reasons"] == [
                    {"feature_view": view, "status": "UNAVAILABLE", "instances": [0]}
                    for view in ("driver", "city")
                ]


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
async def test_a_model_that_must_not_guess_refuses_in_time(
    serve: Serve, process: RedisProcess, proxy: FaultProxy, tmp_path: Path, fault: Fault
) -> None:
    async with serving(serve, process, proxy, tmp_path, when_unavailable="refuse") as client:
        assert is_fresh(await ask(client))
        await proxy.switch(fault)
        for answer in await asyncio.gather(*(ask(client, driver) for driver in range(20))):
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "features_unavailable"
            assert answer.json()["error"]["retryable"] is True


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
async def test_answers_are_fresh_again_once_it_is_over(
    serve: Serve, process: RedisProcess, proxy: FaultProxy, tmp_path: Path, fault: Fault
) -> None:
    async with serving(serve, process, proxy, tmp_path) as client:
        await proxy.switch(fault)
        for _ in range(5):
            assert not is_fresh(await ask(client))
        await proxy.switch(Pass())
        async with asyncio.timeout(2):  # promised within 1 s; the machine may be busy
            while not is_fresh(await ask(client)):  # noqa: ASYNC110  nobody tells that it is back
                await asyncio.sleep(0.01)


async def test_readiness_follows_redis(
    serve: Serve, process: RedisProcess, proxy: FaultProxy, tmp_path: Path
) -> None:
    async with serving(serve, process, proxy, tmp_path) as client:
        assert (await client.get("/v2/health/ready")).status_code == 200
        await proxy.switch(Refuse())
        unready = await client.get("/v2/health/ready")
        assert unready.status_code == 503
        assert "features" in unready.json()["reasons"][0]
        assert (await client.get("/v2/health/live")).status_code == 200
