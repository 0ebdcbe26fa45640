"""The short form of `make prove-batcher`: each caller gets its own answer, once."""

import logging
from collections.abc import Iterator
from dataclasses import replace

import pytest

from loadtests.prove_batcher import Plan, Summary, prove, without_mishaps


@pytest.fixture(autouse=True)
def _silent() -> Iterator[None]:
    """Thousands of executions fail, and each would be logged."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def proven(plan: Plan) -> Summary:
    summary = prove(plan)
    assert not summary.violations, summary.violations[:5]
    assert summary.operations >= plan.operations
    return summary


@pytest.mark.parametrize("concurrency", [1, 2])
def test_random_operations(concurrency: int) -> None:
    summary = proven(Plan(6_000, seed=concurrency, concurrency=concurrency))
    assert summary.outcomes["answered"] > 3_000
    assert {"left", "BackendError", "BackendDied", "DeadlineExceeded"} <= summary.outcomes.keys()


def test_poison_is_nobody_elses_however_many_executions_are_under_way() -> None:
    plan = without_mishaps(8_000, seed=1, poison=0.02)
    summary = proven(replace(plan, concurrency=4))
    assert summary.innocent_answered == summary.innocent_rows > 14_000


def test_callers_that_leave_touch_nobody() -> None:
    summary = proven(without_mishaps(3_000, seed=1, poison=0.0, cancelled=0.3))
    assert summary.outcomes["left"] > 500
    assert summary.innocent_answered == summary.innocent_rows > 3_000
