"""A candidate is shown the very rows that the champion answered, and cannot harm anybody."""

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from app.backends.backend import BackendDied
from app.contract import Contract
from app.deadline import Deadline
from app.errors import (
    BackendError,
    DeadlineExceeded,
    FeaturesUnavailable,
    ModelNotReady,
    Overloaded,
)
from app.features.encoding import Encoder
from app.features.plan import NO_FEATURES, FeaturePlan
from app.features.source import EntityColumns, FeatureRows
from app.features.static_source import StaticSource
from app.shadow.sampling import ShareOfKeys
from app.tensors import Tensors
from tests.shadow.lanes import as_champion, lane, probabilities
from tests.tiny_models import (
    DRIVER_VALUES,
    DRIVERS,
    LABELS,
    Kind,
    binary,
    contract,
    multiclass,
    stored,
)

NOW = {"shadow": {"hold_ms": 0}}


def row(a: float, b: float = 0.0) -> dict[str, float]:
    return {"a": a, "b": b}


async def test_the_very_rows_that_were_answered_are_executed(tmp_path: Path) -> None:
    async with lane(tmp_path) as setting:
        answers = [await setting.ask(row(n), row(n + 0.5)) for n in range(3)]
        told = await setting.told.about(6)
    inputs = np.concatenate([tensors["x"] for tensors in setting.backend.executed])
    np.testing.assert_array_equal(inputs, np.concatenate([a.inputs["x"] for a in answers]))
    assert told.column("champion") == [p["probability"] for a in answers for p in a.predictions]
    assert told.column("candidate") == pytest.approx(told.column("champion"), abs=1e-7)
    assert told.column("champion_decision") == [1] * 6
    assert told.column("candidate_decision") == [1] * 6
    assert told.drops == []


async def test_rows_that_come_soon_after_each_other_are_one_block(tmp_path: Path) -> None:
    async with lane(tmp_path, shadow={"hold_ms": 50, "block_rows": 8}) as setting:
        await asyncio.gather(*(setting.ask(row(n)) for n in range(5)))
        told = await setting.told.about(5)
    assert [len(pairs) for pairs in told.compared] == [5]


async def test_a_block_has_no_more_rows_than_model_yaml_says(tmp_path: Path) -> None:
    async with lane(tmp_path, shadow={"hold_ms": 1, "block_rows": 4}) as setting:
        await setting.ask(*(row(n) for n in range(10)))
        told = await setting.told.about(10)
    assert [len(pairs) for pairs in told.compared] == [4, 4, 2]
    assert told.column("champion") == pytest.approx([binary(n, 0) for n in range(10)], abs=1e-6)


async def test_a_candidate_that_hangs_costs_the_oldest_rows_and_nothing_else(
    tmp_path: Path,
) -> None:
    async with lane(tmp_path, shadow={"block_rows": 2, "pending_rows": 6}) as setting:
        setting.backend.gate.clear()
        await setting.ask(row(0), row(1))
        await setting.backend.begun.wait()
        for n in range(10):
            await setting.ask(row(n), row(n + 0.5))
            assert setting.lane.pending_rows <= 6
        assert setting.told.drops == [("queue_full", 2)] * 7
        setting.backend.gate.set()
        told = await setting.told.about(22)
    assert told.column("champion")[2:] == pytest.approx(
        [binary(a, 0) for a in (7, 7.5, 8, 8.5, 9, 9.5)], abs=1e-6
    )


async def test_of_a_request_that_is_larger_than_the_queue_the_last_rows_wait(
    tmp_path: Path,
) -> None:
    shadow = {"block_rows": 2, "pending_rows": 4, "hold_ms": 0}
    async with lane(tmp_path, shadow=shadow) as setting:
        setting.backend.gate.clear()
        await setting.ask(*(row(n) for n in range(100)))
        assert setting.told.drops == [("queue_full", 96)]
        setting.backend.gate.set()
        told = await setting.told.about(100)
    executed = np.concatenate([inputs["x"][:, 0] for inputs in setting.backend.executed])
    assert executed.tolist() == [96, 97, 98, 99]
    assert len(told.column("candidate")) == 4


async def test_what_is_not_answered_in_time_is_dropped_and_no_failure(tmp_path: Path) -> None:
    def late(inputs: Tensors) -> Tensors:
        raise DeadlineExceeded("late")

    async with lane(tmp_path, late, **NOW) as setting:
        await setting.ask(row(1))
        told = await setting.told.about(1)
    assert (told.drops, told.compared) == ([("timed_out", 1)], [])


async def test_what_has_waited_for_too_long_is_not_executed(tmp_path: Path) -> None:
    shadow = {"block_rows": 1, "timeout_ms": 1}
    async with lane(tmp_path, shadow=shadow) as setting:
        setting.backend.gate.clear()
        await setting.ask(row(1))
        await setting.backend.begun.wait()
        await setting.ask(row(2))
        await asyncio.sleep(0.002)
        setting.backend.gate.set()
        told = await setting.told.about(2)
    assert told.drops == [("timed_out", 1)]
    assert len(setting.backend.executed) == 1


@pytest.mark.parametrize("error", [ModelNotReady("gone"), Overloaded("full", retry_after_s=1)])
async def test_a_candidate_that_is_not_there_fails_nothing(
    tmp_path: Path, error: Exception
) -> None:
    def absent(inputs: Tensors) -> Tensors:
        raise error

    async with lane(tmp_path, absent, **NOW) as setting:
        await setting.ask(row(1))
        told = await setting.told.about(1)
    assert (told.drops, told.compared) == ([("not_ready", 1)], [])


async def test_only_the_row_that_fails_counts_as_failed(tmp_path: Path) -> None:
    def fails(inputs: Tensors) -> Tensors:
        if (inputs["x"][:, 0] == 5).any():
            raise BackendError("five")
        return as_champion(inputs)

    async with lane(tmp_path, fails) as setting:
        await setting.ask(*(row(n) for n in range(8)))
        told = await setting.told.about(8)
    [pairs] = told.compared
    assert np.flatnonzero(pairs.failed).tolist() == [5]
    assert np.flatnonzero(np.isnan(pairs.candidate)).tolist() == [5]
    assert pairs.candidate_decision[5] == -1
    assert not np.isnan(pairs.champion).any()


async def test_a_candidate_that_always_fails_is_not_tried_for_ever(tmp_path: Path) -> None:
    def fails(inputs: Tensors) -> Tensors:
        raise BackendError("always")

    async with lane(tmp_path, fails) as setting:
        await setting.ask(*(row(n) for n in range(32)))
        told = await setting.told.about(32)
    assert told.column("failed") == [True] * 32
    assert len(setting.backend.executed) <= 16


async def test_rows_that_a_candidate_dies_of_are_not_shown_to_it_again(tmp_path: Path) -> None:
    def dies(inputs: Tensors) -> Tensors:
        raise BackendDied("dead")

    async with lane(tmp_path, dies) as setting:
        await setting.ask(*(row(n) for n in range(4)))
        told = await setting.told.about(4)
    assert told.column("failed") == [True] * 4
    assert len(setting.backend.executed) == 1


async def test_a_candidate_with_another_number_of_rows_has_failed(tmp_path: Path) -> None:
    async with lane(tmp_path, lambda inputs: probabilities(np.ones(3))) as setting:
        await setting.ask(row(1), row(2))
        told = await setting.told.about(2)
    assert told.column("failed") == [True, True]


async def test_a_defect_of_a_backend_does_not_end_the_comparison(tmp_path: Path) -> None:
    def breaks(inputs: Tensors) -> Tensors:
        if inputs["x"][0, 0] == 0:
            raise RuntimeError("a defect")
        return as_champion(inputs)

    async with lane(tmp_path, breaks, **NOW) as setting:
        await setting.ask(row(0))
        await setting.told.about(1)
        await setting.ask(row(1))
        told = await setting.told.about(2)
    assert told.drops == [("defect", 1)]
    assert told.column("champion") == pytest.approx([binary(1, 0)], abs=1e-6)


async def test_no_finite_number_is_an_answer_and_not_a_failure(tmp_path: Path) -> None:
    async with lane(tmp_path, lambda inputs: probabilities(np.array([0.9, np.nan]))) as setting:
        await setting.ask(row(1), row(2))
        told = await setting.told.about(2)
    assert told.column("failed") == [False, False]
    assert np.isnan(told.column("candidate")).tolist() == [False, True]
    assert told.column("candidate_decision") == [1, -1]


async def test_of_labels_both_say_something_about_the_label_of_the_champion(
    tmp_path: Path,
) -> None:
    def other(inputs: Tensors) -> Tensors:
        return {"probabilities": np.array([[0.2, 0.5, 0.3]], np.float32)}

    async with lane(tmp_path, other, kind="multiclass", **NOW) as setting:
        await setting.ask(row(3, 1))
        told = await setting.told.about(1)
    [pairs] = told.compared
    assert pairs.champion == pytest.approx([multiclass(3, 1)["left"]], abs=1e-6)
    assert pairs.candidate == pytest.approx([0.2])
    assert (pairs.champion_decision[0], pairs.candidate_decision[0]) == (0, 1)
    assert told.said[0].numbers.shape == (1, len(LABELS))


async def test_what_the_policy_does_not_admit_is_not_shown(tmp_path: Path) -> None:
    policy = ShareOfKeys(0.5, "salt")
    keys = [f"key {n}" for n in range(20)]
    admitted = [key for key in keys if policy.admits("0" * 32, key)]
    shadow = {"by": "routing_key", "hold_ms": 0}
    async with lane(tmp_path, policy=policy, shadow=shadow) as setting:
        for n, key in enumerate(keys):
            await setting.ask(row(n), key=key)
        told = await setting.told.about(len(admitted))
        assert setting.lane.pending_rows == 0
    expected = [binary(keys.index(key), 0) for key in admitted]
    assert told.column("champion") == pytest.approx(expected, abs=1e-6)


async def test_the_routing_key_of_a_request_is_a_field_of_its_first_instance(
    tmp_path: Path,
) -> None:
    policy = ShareOfKeys(0.5, "salt")
    admitted = [float(n) for n in range(20) if policy.admits("0" * 32, str(float(n)))]
    shadow = {"by": "routing_key", "hold_ms": 0}
    async with lane(tmp_path, policy=policy, shadow=shadow, routing_key="b") as setting:
        for n in range(20):
            await setting.ask(row(0, float(n)), row(0, -1.0))
        told = await setting.told.about(2 * len(admitted))
    expected = [binary(0, n) for key in admitted for n in (key, -1)]
    assert told.column("champion") == pytest.approx(expected, abs=1e-6)


async def test_what_waits_when_a_candidate_is_given_up_is_counted(tmp_path: Path) -> None:
    async with lane(tmp_path, shadow={"block_rows": 2, "hold_ms": 1000}) as setting:
        setting.backend.gate.clear()
        await setting.ask(row(0), row(1))
        await setting.backend.begun.wait()
        await setting.ask(row(2), row(3))
        await setting.ask(row(4))
        await setting.lane.close()
        assert setting.told.drops == [("ended", 2), ("ended", 2), ("ended", 1)]


DRIVER = {"driver_id": 1, "city": "kyoto"}


def plan_of(kind: Kind) -> FeaturePlan:
    return DRIVERS if kind == "stored" else NO_FEATURES


class CountingSource(StaticSource):
    """The drivers' values, and how often they were asked for."""

    def __init__(self, plan: FeaturePlan, *, is_down: bool = False) -> None:
        super().__init__(plan, DRIVER_VALUES)
        self.fetched = 0
        self._is_down = is_down

    async def fetch(self, entities: EntityColumns, rows: int, deadline: Deadline) -> FeatureRows:
        self.fetched += 1
        if self._is_down:
            raise FeaturesUnavailable("down")
        return await super().fetch(entities, rows, deadline)


def score(inputs: Tensors) -> Tensors:
    """What the tiny model with stored features says, where none is missing."""
    return {"y": inputs["x"] @ np.array([[1.0], [10.0], [100.0], [1000.0]], np.float32)}


async def test_the_features_that_were_read_are_not_read_again(tmp_path: Path) -> None:
    source = CountingSource(DRIVERS)
    parts = {"source": source}
    async with lane(tmp_path, score, kind="stored", candidate=parts, **NOW) as setting:
        await setting.ask({**DRIVER, "distance": 5})
        told = await setting.told.about(1)
    assert told.column("candidate") == told.column("champion") == [stored(4, 7, 2, 5)]
    assert source.fetched == 0


@pytest.mark.parametrize("kind", ["binary", "stored"])
async def test_other_categories_have_the_same_values_encoded_anew(
    tmp_path: Path, kind: Kind
) -> None:
    inputs = Contract.model_validate(contract(kind)).inputs
    encoder = Encoder(inputs, {"city": ["kyoto"]})
    parts = {"encoder": encoder, "row_encoder": None, "source": CountingSource(plan_of(kind))}
    says = score if kind == "stored" else as_champion
    asked = [row(1), row(2)] if kind == "binary" else [{**DRIVER, "distance": d} for d in (5, 6)]
    async with lane(tmp_path, says, kind=kind, candidate=parts, **NOW) as setting:
        answer = await setting.ask(*asked)
        told = await setting.told.about(2)
    [executed] = setting.backend.executed
    np.testing.assert_array_equal(executed["x"], answer.inputs["x"])
    assert not np.shares_memory(executed["x"], answer.inputs["x"])
    assert told.column("candidate") == pytest.approx(told.column("champion"), abs=1e-6)
    assert parts["source"].fetched == 0


async def test_features_of_another_plan_are_read_by_the_candidate_itself(tmp_path: Path) -> None:
    plan = replace(DRIVERS, views=(replace(DRIVERS.views[0], ttl_s=60.0), *DRIVERS.views[1:]))
    source = CountingSource(plan)
    parts = {"source": source}
    async with lane(tmp_path, score, kind="stored", candidate=parts, **NOW) as setting:
        await setting.ask({**DRIVER, "distance": 5})
        told = await setting.told.about(1)
    assert told.column("candidate") == [stored(4, 7, 2, 5)]
    assert source.fetched == 1


async def test_features_that_cannot_be_read_are_no_failure_of_the_candidate(
    tmp_path: Path,
) -> None:
    plan = replace(DRIVERS, views=(replace(DRIVERS.views[0], ttl_s=60.0), *DRIVERS.views[1:]))
    features = {"when_unavailable": "refuse"}
    parts = {"source": CountingSource(plan, is_down=True)}
    async with lane(
        tmp_path, score, kind="stored", candidate=parts, features=features, **NOW
    ) as setting:
        await setting.ask({**DRIVER, "distance": 5})
        told = await setting.told.about(1)
    assert (told.drops, told.compared) == ([("features_unavailable", 1)], [])


async def test_rows_are_told_apart_by_the_segments_of_the_contract(tmp_path: Path) -> None:
    segments = {"a": {"edges": [0, 10]}, "sign": {"from": "b", "edges": [0]}}
    async with lane(tmp_path, segments=segments) as setting:
        await setting.ask(row(-1, 1), row(0, -1), row(10, 0))
        told = await setting.told.about(3)
    assert told.column("segments") == [[0, 1], [1, 0], [2, 1]]


async def test_what_the_caller_gives_itself_the_candidate_gets_too(tmp_path: Path) -> None:
    plan = replace(DRIVERS, views=(replace(DRIVERS.views[0], ttl_s=60.0), *DRIVERS.views[1:]))
    parts = {"source": CountingSource(plan)}
    async with lane(
        tmp_path, score, kind="stored", candidate=parts, shadow={"hold_ms": 50}
    ) as setting:
        await setting.ask({**DRIVER, "distance": 5})
        await setting.ask({**DRIVER, "distance": 6, "driver:rating": 1.0})
        told = await setting.told.about(2)
    assert told.column("candidate") == [stored(4, 7, 2, 5), stored(1, 7, 2, 6)]
    assert told.column("candidate") == told.column("champion")


async def test_what_decides_something_else_is_not_comparable(tmp_path: Path) -> None:
    document = contract("binary")
    del document["decision"]
    parts = {"contract": Contract.model_validate(document)}
    async with lane(tmp_path, candidate=parts, **NOW) as setting:
        await setting.ask(row(1))
        told = await setting.told.about(1)
    assert (told.drops, told.compared) == ([("not_comparable", 1)], [])
