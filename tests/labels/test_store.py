"""What waits for labels is kept once, within its bytes, and judged once, whatever is lost."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
import redis

from app.clock import ReplayClock
from app.labels.bucket import BUCKET_CHARGE, row_charge
from app.labels.feedback import Outcome
from app.release.state import StateUnavailable
from app.served_model import ServedModel
from loadtests.fault_proxy import Cut, FaultProxy, Pass, Refuse
from tests.labels.label_workers import HOUR_S, LABELS, Worker, advance, clock, tiny_model
from tests.topologies import PASSWORD, Server

ROW = {"a": 1.0, "b": 0.0}
CHARGED = "hikyaku:labels:m:bytes"
DUE = "hikyaku:labels:m:due"
Start: TypeAlias = Callable[..., Worker]


@pytest.fixture
async def model(tmp_path: Path) -> AsyncIterator[ServedModel]:
    async with tiny_model(tmp_path, labels={**LABELS, "max_megabytes": 1}) as model:
        yield model


@pytest.fixture
def time() -> ReplayClock:
    return clock()


@pytest.fixture
def start(url: str, model: ServedModel, time: ReplayClock) -> Iterator[Start]:
    """Another worker, at this Redis or through a proxy on this port."""
    workers = []

    def started(port: int | None = None) -> Worker:
        through = url if port is None else f"redis://:{PASSWORD}@127.0.0.1:{port}"
        workers.append(Worker(through, model, time))
        return workers[-1]

    yield started
    for worker in workers:
        worker.close()


def of_metric(worker: Worker, outcome: str) -> float:
    value = worker.metrics.registry.get_sample_value(
        "hikyaku_label_predictions_total", {"model": "m", "outcome": outcome}
    )
    return value or 0.0


def charges(client: "redis.Redis[Any]") -> int:
    """What the buckets say that they count for."""
    return sum(int(client.hget(key, "b")) for key in client.keys("*:bucket:*"))


async def test_no_more_is_kept_than_the_cap_and_there_is_room_again_after_the_horizon(
    start: Start, client: "redis.Redis[Any]", time: ReplayClock
) -> None:
    workers = [start(), start()]
    for _ in range(15):
        for worker in workers:
            await worker.predict(*[ROW] * 500)
        await asyncio.gather(*(worker.writer.write() for worker in workers))
        assert int(client.get(CHARGED)) == charges(client) <= 1_000_000
    kept, full = (sum(of_metric(w, what) for w in workers) for what in ("kept", "full"))
    assert kept + full == 15_000
    assert kept > 7_000
    used = sum(client.memory_usage(key, samples=0) for key in client.keys("*:bucket:*"))
    assert used <= int(client.get(CHARGED))
    advance(time, 3 * HOUR_S)
    await workers[0].mature()
    assert int(client.get(CHARGED)) == 0
    assert await workers[1].tell(await workers[1].keep(ROW), True) is Outcome.ACCEPTED
    [version] = (await workers[0].quality())["versions"]
    assert version["due"] == kept


async def test_a_batch_whose_reply_is_lost_is_kept_once(
    start: Start, running: Server, client: "redis.Redis[Any]"
) -> None:
    async with FaultProxy(running.port) as proxy:
        worker = start(proxy.port)
        await worker.keep(ROW)
        # Wherever the replies of a transaction end.
        for after_bytes in range(0, 160, 4):
            await worker.predict(ROW, ROW)
            await proxy.switch(Cut(after_bytes=after_bytes))
            for _ in range(3):
                try:
                    await worker.writer.write()
                except StateUnavailable:
                    continue
                break
        await proxy.switch(Pass())
        await worker.writer.write()
    buckets = len(client.keys("*:bucket:*"))
    expected = buckets * BUCKET_CHARGE + 81 * row_charge(worker.sample.form)
    assert int(client.get(CHARGED)) == charges(client) == expected
    rows = sum(f.startswith(b"r") for k in client.keys("*:bucket:*") for f in client.hkeys(k))
    assert rows == of_metric(worker, "kept") == 81


async def test_what_is_due_is_judged_once_by_whoever_does_and_whatever_reply_is_lost(
    start: Start, running: Server, client: "redis.Redis[Any]", time: ReplayClock
) -> None:
    async with FaultProxy(running.port) as proxy:
        workers = [start(proxy.port), start(proxy.port)]
        rows = 0
        for after_bytes in range(0, 400, 20):
            request = await workers[0].keep(*[ROW] * 20)
            assert await workers[1].tell(request, True) is Outcome.ACCEPTED
            rows += 20
            advance(time, 3 * HOUR_S)
            await proxy.switch(Cut(after_bytes=after_bytes))
            client.delete("hikyaku:labels:m:turn")
            judging = [worker.maturity.take_turn(b"%d" % n) for n, worker in enumerate(workers)]
            await asyncio.gather(*judging, return_exceptions=True)
            await proxy.switch(Pass())
        client.delete("hikyaku:labels:m:turn")
        await workers[0].mature()
        await workers[0].maturity.gather(workers[0].sample.form)
        [version] = (await workers[0].quality())["versions"]
    assert (version["due"], version["labelled"]) == (rows, 20)
    assert client.zcard(DUE) == int(client.get(CHARGED)) == 0


async def test_tables_are_gathered_and_say_the_same(
    start: Start, client: "redis.Redis[Any]", time: ReplayClock
) -> None:
    worker = start()
    for _ in range(70):
        request = await worker.keep({"a": float(time.now_s() % 7), "b": 1.0})
        await worker.tell(request, True)
        advance(time, 3 * HOUR_S)
        await worker.mature()
    [tables] = client.keys("*:quality:*")
    before = await worker.quality()
    assert client.llen(tables) == 70
    await worker.maturity.gather(worker.sample.form)
    assert client.llen(tables) < 10
    assert (await worker.quality())["versions"][0]["due"] == 70
    assert (await worker.quality())["versions"][0]["losses"]["brier"]["value"] == pytest.approx(
        before["versions"][0]["losses"]["brier"]["value"], abs=1e-12
    )


async def test_what_a_candidate_says_after_the_horizon_leaves_nothing_behind(
    start: Start, client: "redis.Redis[Any]", time: ReplayClock
) -> None:
    worker = start()
    request = await worker.keep(ROW)
    advance(time, 3 * HOUR_S)
    await worker.mature()
    worker.compare(request, np.array([0.5]))
    await worker.writer.write()
    await worker.mature()
    assert client.keys("*:bucket:*") == []
    assert int(client.get(CHARGED)) == client.zcard(DUE) == 0
    assert (await worker.quality())["pairs"] == []


async def test_while_redis_is_gone_a_bounded_number_waits(
    start: Start, running: Server, client: "redis.Redis[Any]"
) -> None:
    async with FaultProxy(running.port) as proxy:
        await proxy.switch(Refuse())
        worker = start(proxy.port)
        requests = [await worker.predict(*[ROW] * 1_000) for _ in range(25)]
        with pytest.raises(StateUnavailable):
            await worker.writer.write()
        await proxy.switch(Pass())
        await worker.writer.write()
        assert of_metric(worker, "overflow") == 5_000
        assert await worker.tell(requests[0], True, instance=999) is Outcome.ACCEPTED


async def test_a_prediction_without_a_horizon_is_not_kept(
    url: str, tmp_path: Path, time: ReplayClock
) -> None:
    labels = {"horizon": {"from": "b", "after_s": 60}}
    async with tiny_model(tmp_path / "from", labels=labels) as model:
        worker = Worker(url, model, time)
        at_s = time.now_s() + 100
        request = await worker.keep({"a": 1.0, "b": at_s}, {"a": 1.0, "b": at_s - 161})
        assert of_metric(worker, "kept") == of_metric(worker, "no_horizon") == 1
        advance(time, 159)
        assert await worker.tell(request, True) is Outcome.ACCEPTED
        worker.close()
