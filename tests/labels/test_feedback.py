"""A label counts once, for the prediction that it names, and who tells it is told what became of
it."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import redis

from app.clock import ReplayClock
from app.errors import InvalidInput
from app.labels.feedback import Outcome
from app.release.state import StateUnavailable
from app.request_ids import RequestIds
from app.served_model import ServedModel
from tests.labels.label_workers import HOUR_S, LABELS, Worker, advance, clock, tiny_model

ROW = {"a": 1.0, "b": 0.0}
Start: TypeAlias = Callable[[], Worker]


@pytest.fixture
async def model(tmp_path: Path) -> AsyncIterator[ServedModel]:
    async with tiny_model(tmp_path) as model:
        yield model


@pytest.fixture
def time() -> ReplayClock:
    return clock()


@pytest.fixture
def start(url: str, model: ServedModel, time: ReplayClock) -> Iterator[Start]:
    """Another worker."""
    workers = []

    def started() -> Worker:
        workers.append(Worker(url, model, time))
        return workers[-1]

    yield started
    for worker in workers:
        worker.close()


async def test_the_first_label_counts_whichever_worker_is_told(start: Start) -> None:
    ours, theirs = start(), start()
    request = await ours.keep(ROW, ROW)
    assert await theirs.tell(request, True) is Outcome.ACCEPTED
    assert await ours.tell(request, True) is Outcome.DUPLICATE
    assert await ours.tell(request, False) is Outcome.CONFLICT
    assert await ours.tell(request, None) is Outcome.CONFLICT
    assert await ours.tell(request, None, instance=1) is Outcome.ACCEPTED
    assert await theirs.tell(request, None, instance=1) is Outcome.DUPLICATE


async def test_labels_of_one_batch_for_one_prediction_are_told_apart(start: Start) -> None:
    worker = start()
    request = await worker.keep(ROW)
    told = [(request, 0, True), (request, 0, True), (request, 0, False)]
    assert await worker.tell_all(told) == [
        Outcome.ACCEPTED,
        Outcome.DUPLICATE,
        Outcome.CONFLICT,
    ]


async def test_a_label_that_comes_before_its_prediction_is_written_waits_for_it(
    start: Start,
) -> None:
    ours, theirs = start(), start()
    request = await ours.predict(ROW)
    telling = asyncio.create_task(theirs.tell(request, True))
    await asyncio.sleep(0.1)  # it has looked in vain
    await ours.writer.write()
    assert await telling is Outcome.ACCEPTED


async def test_what_is_no_prediction_of_ours_is_unknown(start: Start) -> None:
    worker = start()
    request = await worker.keep(ROW)
    told = [
        ("no id", 0, True),
        (RequestIds().next(), 0, True),
        (request[:-1] + ("0" if request[-1] != "0" else "1"), 0, True),
        (request, 1, True),
        (request, 500, True),
    ]
    assert set(await worker.tell_all(told)) == {Outcome.UNKNOWN}


async def test_what_is_not_known_is_waited_for_once_however_many_are_told(start: Start) -> None:
    worker = start()
    ids = RequestIds()
    async with asyncio.timeout(6):  # ten times a second, if it were anew for each thousand
        outcomes = await worker.tell_all([(ids.next(), 0, True) for _ in range(10_000)])
    assert set(outcomes) == {Outcome.UNKNOWN}


async def test_labels_count_until_the_horizon(start: Start, time: ReplayClock) -> None:
    worker = start()
    request = await worker.keep(*[ROW] * 100)
    advance(time, 2 * HOUR_S - 1)
    assert await worker.tell(request, True) is Outcome.ACCEPTED
    advance(time, 1)
    assert await worker.tell(request, True, instance=1) is Outcome.EXPIRED
    await worker.mature()
    told = [(request, 0, True), (request, 99, True)]
    assert await start().tell_all(told) == [Outcome.EXPIRED] * 2


async def test_a_request_outside_the_sample_is_told_so(
    url: str, tmp_path: Path, time: ReplayClock
) -> None:
    async with tiny_model(tmp_path / "sampled", labels={**LABELS, "share": 0.5}) as model:
        worker = Worker(url, model, time)
        requests = [await worker.predict(ROW) for _ in range(200)]
        await worker.writer.write()
        outcomes = await worker.tell_all([(request, 0, True) for request in requests])
        worker.close()
    accepted = outcomes.count(Outcome.ACCEPTED)
    assert 60 < accepted < 140
    assert outcomes.count(Outcome.NOT_SAMPLED) == 200 - accepted


async def test_a_label_of_another_kind_is_refused_and_none_of_its_batch_counts(
    start: Start,
) -> None:
    worker = start()
    request = await worker.keep(ROW, ROW)
    for wrong in (1, "true", 0.5):
        with pytest.raises(InvalidInput, match="true or false, or null"):
            await worker.tell_all([(request, 0, True), (request, 1, wrong)])
    assert await worker.tell(request, True) is Outcome.ACCEPTED


async def test_a_label_is_of_the_form_that_predictions_had_when_its_own_was_made(
    url: str, tmp_path: Path, time: ReplayClock
) -> None:
    """The contract was changed from classes to numbers while they waited."""
    classes, numbers = (
        {**LABELS, "kind": "class"},
        {**LABELS, "kind": "number"},
    )
    async with (
        tiny_model(tmp_path / "c", kind="multiclass", labels=classes) as before,
        tiny_model(tmp_path / "n", kind="regression", labels=numbers) as after,
    ):
        ours, theirs = Worker(url, before, time), Worker(url, after, time)
        old, new = await ours.keep(ROW, ROW), await theirs.keep(ROW)
        told = [(new, 0, 1.5), (old, 0, "left")]
        assert set(await theirs.tell_all(told)) == {Outcome.ACCEPTED}
        for wrong in (2, "up"):
            with pytest.raises(InvalidInput, match=r"labels\[1\].label: one of left, right") as no:
                await theirs.tell_all([(new, 0, 1.5), (old, 1, wrong)])
            assert no.value.field == "labels[1].label"
        assert await theirs.tell(old, "right", instance=1) is Outcome.ACCEPTED
        with pytest.raises(InvalidInput, match="label: a number"):
            await theirs.tell(RequestIds().next(), "left")
        ours.close()
        theirs.close()


async def test_a_label_for_what_was_taken_out_meanwhile_leaves_nothing_behind(
    start: Start, client: "redis.Redis[Any]", time: ReplayClock
) -> None:
    """As where another machine's clock is ahead of the one that is told the label."""
    ours = start()
    request = await ours.keep(ROW)
    name = b"hikyaku:labels:m:bucket:" + bytes.fromhex(request[:14])
    fields = client.hgetall(name)
    advance(time, 3 * HOUR_S)
    await ours.mature()
    assert client.exists(name) == 0
    # What is found first is what was there; the label is written afterwards.
    client.hset(name, mapping={b"l" + bytes.fromhex(request[14:]) + b"\0" * 4: b"\0" * 16})
    client.zadd("hikyaku:labels:m:due", {bytes.fromhex(request[:14]): 0})
    await ours.mature()
    assert fields
    assert client.exists(name) == 0
    assert client.zcard("hikyaku:labels:m:due") == 0
    assert (await ours.quality())["versions"][0]["due"] == 1


async def test_without_redis_nothing_is_told_to_be_accepted(
    model: ServedModel, time: ReplayClock
) -> None:
    worker = Worker("redis://127.0.0.1:1", model, time)
    request = await worker.predict(ROW)
    with pytest.raises(StateUnavailable):
        await worker.tell(request, True)
