"""Versions that answer side by side keep their predictions together, whatever their contracts say
about other things."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis

from app.batching.priority import Priority
from app.clock import ReplayClock
from app.deadline import Deadline
from app.evidence.counts import WHOLE
from app.labels.feedback import Outcome, Told
from app.labels.keeper import LabelKeeper
from app.predictor import Answer, Asker, Predictor
from app.release.state import Chosen
from app.served_model import ServedModel
from app.telemetry.metrics import Metrics
from tests.labels.label_workers import (
    BEGAN,
    CANDIDATE,
    HOUR_S,
    Worker,
    advance,
    clock,
    tiny_model,
)

ROW = {"a": 1.0, "b": 0.0}


class Service:
    """Keeps what the versions of one model answer; the first one is the champion."""

    def __init__(
        self, url: str, versions: list[ServedModel], time: ReplayClock | None = None
    ) -> None:
        self.versions = versions
        self.metrics = Metrics()
        self.champion: dict[str, ServedModel | None] = {"m": versions[0]}
        now = time or clock()
        self.keeper = LabelKeeper(url, self.champion, now, self.metrics)
        self._predictor = Predictor(self.champion, now, {"m": self.keeper})

    async def answer(self, by: int = 0, began: int = BEGAN) -> str:
        """The id of a request that is led to this version; a candidate is shown it, too."""
        champion = self.champion["m"]
        assert champion is not None
        asker = Asker(self.keeper.new_id(champion))
        model = self.versions[by]
        decoded = model.decoder.decode(json.dumps({"instances": [ROW]}).encode())
        told: asyncio.Future[Answer | Exception] = asyncio.Future()
        deadline = Deadline.after(10)
        self._predictor.begin(model, decoded, deadline, Priority.LIVE, asker, told.set_result)
        assert isinstance(await told, Answer)
        self.keeper.compared("m", asker.request_id, CANDIDATE, began, 0, np.array([0.5]))
        return asker.request_id

    def left_out(self) -> float | None:
        return self.metrics.registry.get_sample_value(
            "hikyaku_label_predictions_total", {"model": "m", "outcome": "other_contract"}
        )


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


async def versions(stack: AsyncExitStack, folder: Path, **candidate: Any) -> list[ServedModel]:
    """Of a champion, and of one whose contract says something else."""
    models = [tiny_model(folder / "1"), tiny_model(folder / "2", **candidate)]
    return [await stack.enter_async_context(model) for model in models]


def kept(client: "redis.Redis[Any]") -> tuple[int, int, int]:
    """Buckets, predictions in them, and candidates' numbers."""
    fields = [client.hkeys(key) for key in client.keys("*:bucket:*")]
    kinds = [field[:1] for each in fields for field in each]
    return len(fields), kinds.count(b"r"), kinds.count(b"c")


async def test_versions_whose_contracts_differ_elsewhere_keep_their_predictions_together(
    url: str, client: "redis.Redis[Any]", tmp_path: Path, stack: AsyncExitStack
) -> None:
    margins = {"margins": {"errors": 0.002}}
    service = Service(url, await versions(stack, tmp_path, release=margins))
    async with service.keeper:
        for by in (0, 1) * 5:
            await service.answer(by)
    assert kept(client) == (1, 10, 10)


async def test_what_another_contract_would_keep_in_another_way_ends_nothing(
    url: str, client: "redis.Redis[Any]", tmp_path: Path, stack: AsyncExitStack
) -> None:
    segments = {"b": {"edges": [0.5]}}
    service = Service(url, await versions(stack, tmp_path, segments=segments))
    async with service.keeper:
        for by in (0, 1) * 5:
            await service.answer(by)
    assert kept(client) == (1, 5, 5)
    assert service.left_out() == 5


async def test_a_promotion_and_its_rollback_lose_nothing_that_is_under_way(
    url: str, client: "redis.Redis[Any]", tmp_path: Path, stack: AsyncExitStack
) -> None:
    segments = {"b": {"edges": [0.5]}}
    service = Service(url, await versions(stack, tmp_path, segments=segments))
    async with service.keeper:
        before = await service.answer(0)
        service.champion["m"] = service.versions[1]
        await service.answer(1)
        service.keeper.compared("m", before, service.versions[1].id, BEGAN, 0, np.array([0.5]))
        service.champion["m"] = service.versions[0]
        await service.answer(0)
    assert kept(client) == (2, 3, 4)
    assert service.left_out() is None


async def test_labels_say_about_a_trial_what_was_shown_in_it(
    url: str, tmp_path: Path, stack: AsyncExitStack
) -> None:
    time, models = clock(), await versions(stack, tmp_path)
    service = Service(url, models, time)
    async with service.keeper as keeper:
        for _ in range(5):  # whose labels never come
            await service.answer(began=3)
        told = [Told(await service.answer(began=7), True) for _ in range(2)]
        assert await keeper.tell("m", told) == [Outcome.ACCEPTED] * 2
    advance(time, 3 * HOUR_S)
    judge = Worker(url, models[0], time)
    await judge.mature()
    pairs = (await judge.quality())["pairs"]
    judge.close()
    assert {pair["began"]: (pair["shown"], pair["missing"]) for pair in pairs} == {
        3: (5, 5),
        7: (2, 0),
    }
    champion, candidate = (Chosen(i.version, i.sha256) for i in (models[0].id, CANDIDATE))
    async with Service(url, models, time).keeper as keeper:
        now = (await keeper.losses("m", champion, candidate, 7))[WHOLE]
        assert (now.labels_due, now.labels_missing) == (2, 0)
        assert sum(buckets for *_, buckets in now.loss) == 1
        assert await keeper.losses("m", champion, candidate, 8) == {}
