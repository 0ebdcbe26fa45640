"""What arrives in one turn of the event loop goes together, and nobody is harmed by it."""

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from app.batching.priority import Priority
from app.clock import WallClock
from app.deadline import Deadline
from app.errors import (
    BackendError,
    DeadlineExceeded,
    FeaturesUnavailable,
    InvalidInput,
    Overloaded,
)
from app.features.plan import FeaturePlan
from app.features.source import EntityColumns, FeatureRows
from app.features.static_source import StaticSource
from app.outputs import Prediction
from app.predictor import Answer, Asked, Asker, Observer, Predictor
from app.served_model import ServedModel
from tests.tiny_models import DRIVER_VALUES, DRIVERS, loaded, stored, write_model

KNOWN = {"driver_id": 1, "city": "kyoto"}
BEYOND = -7
"""A driver that the store below cannot look up."""


class GatedSource:
    """Driver values behind a gate; each fetch's rows are recorded. One entity breaks a fetch."""

    def __init__(self) -> None:
        self._stored = StaticSource(DRIVERS, DRIVER_VALUES)
        self.fetched: list[int] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.started = asyncio.Event()
        self.cancelled = 0
        self.is_down = False

    @property
    def plan(self) -> FeaturePlan:
        return self._stored.plan

    async def fetch(self, entities: EntityColumns, rows: int, deadline: Deadline) -> FeatureRows:
        self.fetched.append(rows)
        self.started.set()
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.is_down:
            raise FeaturesUnavailable("it is down")
        if BEYOND in entities["driver_id"]:
            raise InvalidInput("driver_id: out of range", field="driver_id")
        return await self._stored.fetch(entities, rows, deadline)

    async def check(self) -> None: ...


class Caller:
    """Begins a request, and waits for what it is told."""

    def __init__(self, predictor: Predictor, model: ServedModel) -> None:
        self._predictor = predictor
        self._model = model
        self.told: list[Answer | Exception] = []
        self._ended = asyncio.Event()
        self.asked: Asked | None = None

    def begin(self, instances: Sequence[Mapping[str, Any]], deadline: Deadline) -> "Caller":
        decoded = self._model.decoder.decode(json.dumps({"instances": instances}).encode())
        self.asked = self._predictor.begin(
            self._model, decoded, deadline, Priority.LIVE, Asker("1"), self._tell
        )
        return self

    def leave(self) -> None:
        assert self.asked is not None
        self.asked.leave()

    async def ended(self) -> None:
        await self._ended.wait()

    async def answer(self) -> Answer:
        await self.ended()
        [told] = self.told
        if isinstance(told, Exception):
            raise told
        return told

    async def predictions(self) -> list[Prediction]:
        return (await self.answer()).predictions

    def _tell(self, told: Answer | Exception) -> None:
        self.told.append(told)
        self._ended.set()


def one_of(scores: Sequence[float], *errors: type[Exception]) -> Callable[[list[Any]], bool]:
    """Whether a caller was told once, and either these scores or one of these errors."""

    def fits(told: list[Answer | Exception]) -> bool:
        [one] = told
        if isinstance(one, Exception):
            return isinstance(one, errors)
        return [prediction["score"] for prediction in one.predictions] == scores

    return fits


class Setting:
    """A model whose features come from a gated source, and callers of it."""

    def __init__(
        self, model: ServedModel, source: GatedSource, observers: Mapping[str, Observer]
    ) -> None:
        self.model = model
        self.source = source
        self._predictor = Predictor({"stored": model}, WallClock(), observers)
        self._soon = Deadline.after(60.0)

    def begin(self, *instances: Mapping[str, Any], deadline: Deadline | None = None) -> Caller:
        """Without a deadline of its own it has the same one as the others."""
        return Caller(self._predictor, self.model).begin(instances, deadline or self._soon)


@asynccontextmanager
async def stored_model(
    folder: Path, observer: Observer | None = None, **contract_changes: Any
) -> AsyncIterator[Setting]:
    source = GatedSource()
    await write_model(folder / "models", "stored", "stored", **contract_changes)
    async with loaded(folder / "models" / "stored", source) as model:
        yield Setting(model, source, {} if observer is None else {"stored": observer})


def asked_at(distance: float) -> dict[str, Any]:
    return {**KNOWN, "distance": distance}


def score(distance: float) -> float:
    return stored(4.0, 7, 2.0, distance)


async def test_requests_of_one_turn_share_a_fetch_and_each_gets_its_own(tmp_path: Path) -> None:
    async with stored_model(tmp_path) as setting:
        callers = [setting.begin(*[asked_at(n)] * (1 + n % 3)) for n in range(10)]
        answers = [[p["score"] for p in await caller.predictions()] for caller in callers]
    assert setting.source.fetched == [sum(1 + n % 3 for n in range(10))]
    assert answers == [[score(n)] * (1 + n % 3) for n in range(10)]


async def test_a_large_request_goes_by_itself(tmp_path: Path) -> None:
    async with stored_model(tmp_path, batching={"max_batch_rows": 16}) as setting:
        small, large = setting.begin(asked_at(1)), setting.begin(*map(asked_at, range(50)))
        assert [p["score"] for p in await small.predictions()] == [score(1)]
        assert [p["score"] for p in await large.predictions()] == [score(n) for n in range(50)]
    assert sorted(setting.source.fetched) == [1, 50]


async def test_a_hasty_request_does_not_bound_the_read_of_others(tmp_path: Path) -> None:
    async with stored_model(tmp_path) as setting:
        hasty = setting.begin(asked_at(1), deadline=Deadline.after(0.5))
        callers = [setting.begin(asked_at(1)), hasty, setting.begin(asked_at(1))]
        for caller in callers:
            await caller.answer()
    assert sorted(setting.source.fetched) == [1, 2]


async def test_nobody_loses_more_than_a_tenth_of_its_time_to_a_more_hasty_one(
    tmp_path: Path,
) -> None:
    async with stored_model(tmp_path) as setting:
        now_s = time.monotonic()
        deadlines = [Deadline(now_s + ms / 1000) for ms in (400, 350, 300, 250, 200)]
        callers = [setting.begin(asked_at(1), deadline=deadline) for deadline in deadlines]
        for caller in callers:
            await caller.answer()
    assert setting.source.fetched == [1] * 5


async def test_one_whose_entity_cannot_be_looked_up_harms_nobody(tmp_path: Path) -> None:
    async with stored_model(tmp_path) as setting:
        well = [setting.begin(asked_at(n)) for n in (1, 2)]
        beyond = setting.begin({**asked_at(3), "driver_id": BEYOND})
        assert [(await caller.predictions())[0]["score"] for caller in well] == [score(1), score(2)]
        with pytest.raises(InvalidInput, match="out of range"):
            await beyond.answer()


async def test_one_whose_missing_value_is_refused_harms_nobody(tmp_path: Path) -> None:
    missing = {"city:demand": {"use": "refuse"}}
    async with stored_model(tmp_path, features={"missing": missing}) as setting:
        well = setting.begin(asked_at(1))
        unknown = setting.begin({**asked_at(2), "city": "nowhere"})
        assert (await well.predictions())[0]["score"] == score(1)
        with pytest.raises(FeaturesUnavailable, match=r"instances\[0\]: city:demand"):
            await unknown.answer()
    assert setting.source.fetched == [2]


async def test_only_those_with_missing_values_are_degraded(tmp_path: Path) -> None:
    async with stored_model(tmp_path) as setting:
        well = setting.begin(asked_at(1), asked_at(2))
        unknown = setting.begin(asked_at(3), {**asked_at(4), "city": "nowhere"})
        assert list((await well.answer()).degraded) == []
        [reason] = (await unknown.answer()).degraded
    assert (reason.instances, reason.status.name) == ((1,), "NOT_FOUND")


async def test_a_store_that_is_down_is_everybodys_fate_and_asked_once(tmp_path: Path) -> None:
    async with stored_model(tmp_path, features={"when_unavailable": "refuse"}) as setting:
        setting.source.is_down = True
        for caller in [setting.begin(asked_at(n)) for n in range(5)]:
            with pytest.raises(FeaturesUnavailable):
                await caller.answer()
    assert setting.source.fetched == [5]


async def test_who_leaves_during_the_fetch_is_told_nothing_and_harms_nobody(tmp_path: Path) -> None:
    async with stored_model(tmp_path) as setting:
        setting.source.gate.clear()
        callers = [setting.begin(asked_at(n)) for n in range(3)]
        await setting.source.started.wait()
        callers[1].leave()
        setting.source.gate.set()
        assert (await callers[0].predictions())[0]["score"] == score(0)
        assert (await callers[2].predictions())[0]["score"] == score(2)
    assert callers[1].told == []
    assert setting.source.cancelled == 0


async def test_a_fetch_that_nobody_waits_for_ends(tmp_path: Path) -> None:
    async with stored_model(tmp_path) as setting:
        setting.source.gate.clear()
        callers = [setting.begin(asked_at(n)) for n in range(3)]
        await setting.source.started.wait()
        for caller in callers:
            caller.leave()
        while not setting.source.cancelled:  # noqa: ASYNC110  each turn lets the fetch run
            await asyncio.sleep(0)
    assert [caller.told for caller in callers] == [[], [], []]


async def test_who_leaves_before_its_turn_costs_nothing(tmp_path: Path) -> None:
    async with stored_model(tmp_path) as setting:
        gone = setting.begin(asked_at(1))
        stays = setting.begin(asked_at(2))
        gone.leave()
        await stays.answer()
    assert setting.source.fetched == [1]
    assert gone.told == []


async def test_who_comes_when_the_first_of_its_turn_has_left_is_answered(tmp_path: Path) -> None:
    async with stored_model(tmp_path) as setting:
        setting.begin(asked_at(1)).leave()
        assert (await setting.begin(asked_at(2)).predictions())[0]["score"] == score(2)


async def test_a_deadline_that_passes_during_the_fetch_is_told(tmp_path: Path) -> None:
    async with stored_model(tmp_path) as setting:
        setting.source.gate.clear()
        late = setting.begin(asked_at(1), deadline=Deadline.after(0.01))
        await setting.source.started.wait()
        assert late.asked is not None
        await asyncio.sleep(late.asked.deadline.remaining_s() + 0.001)
        setting.source.gate.set()
        with pytest.raises(DeadlineExceeded):
            await late.answer()


async def test_each_is_told_its_own_once_whatever_the_others_do(tmp_path: Path) -> None:
    """Callers that leave, are late, ask for what cannot be looked up, is not stored or overflows,
    among others whose answers must be their own."""
    draw = random.Random(2013)
    expected: list[tuple[Caller, Callable[[list[Any]], bool]]] = []
    left: list[Caller] = []
    async with stored_model(tmp_path, batching={"max_batch_rows": 16}) as setting:
        for number in range(4000):
            kind = draw.choices(
                ["well", "leaves", "late", "beyond", "unknown", "overflows", "large"],
                [60, 12, 6, 4, 6, 4, 1],
            )[0]
            instances = [asked_at(number + n / 8) for n in range(draw.randint(1, 4))]
            scores = [score(instance["distance"]) for instance in instances]
            if kind == "late":
                caller = setting.begin(*instances, deadline=Deadline.after(draw.random() * 0.004))
                expected.append((caller, one_of(scores, DeadlineExceeded, Overloaded)))
            elif kind == "beyond":
                caller = setting.begin(*instances, {**instances[0], "driver_id": BEYOND})
                expected.append((caller, one_of([], InvalidInput)))
            elif kind == "unknown":
                caller = setting.begin({**instances[0], "city": "nowhere"})
                expected.append((caller, one_of([stored(4.0, 7, None, instances[0]["distance"])])))
            elif kind == "overflows":
                caller = setting.begin(*instances, asked_at(1e38))
                expected.append((caller, one_of([], BackendError)))
            elif kind == "large":
                caller = setting.begin(*instances * 20)
                expected.append((caller, one_of(scores * 20)))
            else:
                caller = setting.begin(*instances)
                if kind == "leaves":
                    left.append(caller)
                else:
                    expected.append((caller, one_of(scores)))
            for _ in range(draw.choice([0, 0, 0, 0, 1, 2, 5])):
                await asyncio.sleep(0)
            if left and draw.random() < 0.2:
                left[-1].leave()
        for caller in left:
            caller.leave()
        for caller, _ in expected:
            await caller.ended()
    assert [number for number, (caller, fits) in enumerate(expected) if not fits(caller.told)] == []


class Seen:
    """Keeps what it is offered, and fails when it is told to."""

    def __init__(self) -> None:
        self.offered: list[tuple[Asker, Answer]] = []
        self.told_before: list[int] = []
        self.callers: list[Caller] = []
        self.is_broken = False

    def offer(self, asker: Asker, answer: Answer) -> None:
        self.offered.append((asker, answer))
        self.told_before.append(sum(len(caller.told) for caller in self.callers))
        if self.is_broken:
            raise RuntimeError("a defect")


async def test_an_observer_is_offered_what_was_answered_after_it_was(tmp_path: Path) -> None:
    seen = Seen()
    async with stored_model(tmp_path, seen) as setting:
        seen.callers = [setting.begin(asked_at(1), asked_at(2)), setting.begin(asked_at(3))]
        for caller in seen.callers:
            await caller.answer()
    assert seen.told_before == [1, 2]
    for caller, (asker, answer), distances in zip(
        seen.callers, seen.offered, ([1, 2], [3]), strict=True
    ):
        assert caller.asked is not None
        assert asker is caller.asked.asker
        assert answer is caller.told[0]
        assert answer.instances.fields["distance"] == distances
        stop = answer.first_input + len(distances)
        assert answer.inputs["x"][answer.first_input : stop, 3].tolist() == distances
        assert [[score(d)] for d in distances] == answer.executed.outputs["y"].tolist()


async def test_a_request_larger_than_a_batch_is_offered_whole(tmp_path: Path) -> None:
    seen = Seen()
    async with stored_model(tmp_path, seen, batching={"max_batch_rows": 4}) as setting:
        await setting.begin(*map(asked_at, range(10))).answer()
    [(_, answer)] = seen.offered
    assert answer.inputs["x"][answer.first_input :, 3].tolist() == list(range(10))
    assert answer.executed.outputs["y"].ravel().tolist() == [score(n) for n in range(10)]


async def test_what_was_refused_is_not_offered(tmp_path: Path) -> None:
    seen = Seen()
    async with stored_model(tmp_path, seen) as setting:
        with pytest.raises(InvalidInput):
            await setting.begin({**asked_at(3), "driver_id": BEYOND}).answer()
    assert seen.offered == []


async def test_an_observer_that_fails_harms_nobody(tmp_path: Path) -> None:
    seen = Seen()
    seen.is_broken = True
    async with stored_model(tmp_path, seen) as setting:
        for n in range(3):
            callers = [setting.begin(asked_at(n)), setting.begin(asked_at(n + 1))]
            assert (await callers[0].predictions())[0]["score"] == score(n)
            assert (await callers[1].predictions())[0]["score"] == score(n + 1)
    assert len(seen.offered) == 6
