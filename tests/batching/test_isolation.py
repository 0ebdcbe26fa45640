"""How the poison in a failed batch is found, and what that may cost."""

import asyncio
import math
from itertools import combinations

import numpy as np
import pytest

from app.batching.isolation import (
    IsolationBudget,
    Refused,
    Suspects,
    isolate,
    most_runs,
    split,
)
from app.batching.waiting import Entry
from app.deadline import Deadline
from app.errors import BackendError


class Model:
    """Fails a run in which an entry of `poison` takes part, or every run; keeps what it ran."""

    def __init__(self, poison: set[int], *, broken: bool = False) -> None:
        self.poison = poison
        self.broken = broken
        self.runs: list[list[int]] = []
        self.answered: set[int] = set()

    async def run(self, entries: list[Entry]) -> BackendError | None:
        numbers = [int(entry.caller) for entry in entries]
        self.runs.append(numbers)
        if self.broken or self.poison & set(numbers):
            return BackendError("poison")
        self.answered |= set(numbers)
        return None


def batch(size: int) -> list[Entry]:
    loop = asyncio.get_running_loop()
    return [
        Entry({"x": np.zeros((1, 1))}, 1, Deadline(1e9), 0.0, loop.create_future(), caller=str(i))
        for i in range(size)
    ]


async def isolated(
    model: Model, size: int, budget: IsolationBudget | None = None
) -> list[list[int]]:
    """Who was refused together with whom."""
    refused = await isolate(
        batch(size), BackendError("first"), model.run, budget or IsolationBudget(0.05)
    )
    assert all(isinstance(group, Refused) for group in refused)
    return [[int(entry.caller) for entry in group.entries] for group in refused]


@pytest.mark.parametrize("size", [2, 3, 5, 8, 10, 11, 31, 64, 100, 1024])
async def test_one_poisonous_request_is_found_and_nobody_else_is_refused(size: int) -> None:
    for poison in {0, 1, size // 2, size - 1}:
        model = Model({poison})
        assert await isolated(model, size) == [[poison]]
        assert model.answered == set(range(size)) - {poison}
        assert len(model.runs) <= 4 + 2 * math.log2(size)


@pytest.mark.parametrize("size", [4, 7, 10])
async def test_any_poison_among_ten_is_found(size: int) -> None:
    for poison in combinations(range(size), 3):
        model = Model(set(poison))
        refused = await isolated(model, size)
        if len(model.answered) == size - 3:
            assert sorted(refused) == [[each] for each in poison]
        else:  # the first four that ran were all poisonous or all of them
            assert len(model.runs) <= most_runs(size)


@pytest.mark.parametrize("size", [16, 64, 1024])
@pytest.mark.parametrize("share", [0.05, 0.2, 0.5])
async def test_much_poison_costs_no_more_runs(size: int, share: float) -> None:
    numbers = np.random.default_rng(size)
    for _ in range(50):
        model = Model(set(np.flatnonzero(numbers.random(size) < share).tolist()))
        refused = await isolated(model, size)
        assert len(model.runs) <= 4 + 2 * math.log2(size)
        together = [number for group in refused for number in group]
        assert sorted(together + list(model.answered)) == list(range(size))


async def test_a_broken_backend_is_noticed_after_six_runs() -> None:
    model = Model(set(), broken=True)
    refused = await isolated(model, 64)
    assert len(model.runs) == 6
    assert sum(map(len, refused)) == 64


async def test_poison_in_every_part_is_not_taken_for_a_broken_backend() -> None:
    model = Model({0, 8, 16, 24})
    await isolated(model, 32)
    assert len(model.answered) >= 16


async def test_nothing_is_repeated_without_a_budget() -> None:
    model = Model({3})
    budget = IsolationBudget(0.05)
    while budget.runs:
        budget.repeated()
    assert await isolated(model, 8, budget) == [list(range(8))]
    assert model.runs == []


def test_a_batch_is_split_as_evenly_as_can_be() -> None:
    assert [split(list(range(7)), parts) for parts in (2, 3, 9)] == [  # type: ignore[arg-type]
        [[0, 1, 2, 3], [4, 5, 6]],
        [[0, 1], [2, 3, 4], [5, 6]],
        [[0], [1], [2], [3], [4], [5], [6]],
    ]


def test_company_is_what_the_budget_can_pay_for() -> None:
    budget = IsolationBudget(0.05)
    assert budget.company > 10**6
    for _ in range(200):
        budget.repeated()
        assert most_runs(budget.company) <= 32
    assert budget.company == 1


def test_the_budget_comes_back_with_executions() -> None:
    budget = IsolationBudget(0.05)
    for _ in range(100):
        budget.repeated()
    assert budget.runs == 0
    for _ in range(21):
        budget.executed()
    assert budget.runs == 1
    for _ in range(40):
        budget.executed()
    assert budget.company == 3


def test_a_caller_whose_rows_keep_failing_is_kept_alone_until_they_no_longer_do() -> None:
    suspects = Suspects()
    for _ in range(3):
        suspects.failed("mallory")
    assert "mallory" not in suspects
    suspects.failed("mallory")
    assert "mallory" in suspects
    assert "alice" not in suspects
    for _ in range(4):
        suspects.succeeded("mallory")
    assert "mallory" not in suspects


def test_a_proxy_that_speaks_for_many_is_not_suspected_for_a_few() -> None:
    suspects = Suspects()
    for number in range(1000):
        (suspects.failed if number % 20 == 0 else suspects.succeeded)("proxy")
        assert "proxy" not in suspects


def test_only_so_many_callers_are_remembered() -> None:
    suspects = Suspects(remembered=2)
    for caller in ("a", "b", "c"):
        for _ in range(10):
            suspects.failed(caller)
    assert [caller in suspects for caller in ("a", "b", "c")] == [False, True, True]


def test_nobody_is_suspected_without_a_name() -> None:
    suspects = Suspects()
    for _ in range(10):
        suspects.failed("")
    assert "" not in suspects
