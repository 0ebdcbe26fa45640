"""What is observed of a release, from tables as workers have stored them."""

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from app.canary.table import ArmTable, ExposureTable
from app.comparison.pairs import Pairs
from app.comparison.table import ComparisonTable
from app.evidence.counts import WHOLE, Counts
from app.evidence.plan import Plan, Stage
from app.labels.losses import Losses
from app.release.state import BegunStage, Chosen, ModelReport, ReleaseState, Rollout, WorkerReport
from app.release.tables import StoredTable
from app.rollout.observed import Observations

CANDIDATE, AGAINST = Chosen(2, "b" * 64), Chosen(1, "a" * 64)
TRIAL = f"comparison:m:1.{'a' * 12}-2.{'b' * 12}-2-"


class Tables:
    """What is stored."""

    def __init__(self, **tables: ExposureTable | ComparisonTable) -> None:
        self._tables = tables

    async def read(self, prefix: str) -> Mapping[str, StoredTable]:
        return {
            name: StoredTable([table.encode()], {})
            for name, table in self._tables.items()
            if name.startswith(prefix)
        }


async def no_losses(
    model: str, champion: Chosen, candidate: Chosen, began: int
) -> Mapping[str, Losses]:
    return {}


def report(worker: str, **fields: Any) -> WorkerReport:
    """Of one that routes by the release."""
    return WorkerReport(worker, {"m": ModelReport(20, AGAINST, routes=20, **fields)})


async def observed(*reports: WorkerReport, **tables: Any) -> Counts:
    """Of a release that is in its second stage, which began in generation 20."""
    stages = (
        BegunStage(Stage(0.0, 1, None), 2, time.time()),
        BegunStage(Stage(0.5, 8, None), 20, time.time()),
    )
    rollout = Rollout(CANDIDATE, AGAINST, Plan(), 0.0, 0.0, 0.0, 1.0, 10.0, 2, "somebody", stages)
    observations = Observations(Tables(**tables), no_losses)  # type: ignore[arg-type]  # it reads
    return (
        await observations.observe("m", ReleaseState(20, AGAINST, rollout=rollout), reports)
    ).counts


def compared(rows: int, *segments: str, at_s: float = 1.0) -> ComparisonTable:
    """A block of rows, all of which the candidate has failed."""
    table = ComparisonTable.empty((segments,) if segments else (), 0, True)
    said, none = np.zeros(rows), np.full(rows, -1, np.int32)
    groups = np.zeros((rows, 1 if segments else 0), np.int32)
    failed = np.ones(rows, np.bool_)
    blocks = np.zeros(rows, np.int32)
    table.add(Pairs(blocks, said, said, none, none, failed, groups, said, said), at_s)
    return table


async def test_a_stage_has_what_was_counted_in_it_and_not_in_one_whose_number_begins_alike() -> (
    None
):
    counts = await observed(
        **{
            "canary:m:2": ExposureTable(against=ArmTable(latencies={1: 1})),
            "canary:m:20": ExposureTable(against=ArmTable(assigned=7, resolved=7)),
            "canary:m:201": ExposureTable(against=ArmTable(assigned=9, resolved=9)),
        }
    )
    assert [stage.champion.assigned for stage in counts.stages] == [0, 7]


async def test_what_workers_compared_by_another_model_yaml_counts_too() -> None:
    counts = await observed(
        **{f"{TRIAL}11111111": compared(3), f"{TRIAL}22222222": compared(4, at_s=2.0)}
    )
    assert counts.paired[WHOLE].rows == 7
    assert sorted(counts.paired[WHOLE].errors) == [(3, 3, 1), (4, 4, 1)]


async def test_of_other_segments_the_latest_count() -> None:
    counts = await observed(
        **{f"{TRIAL}11111111": compared(3), f"{TRIAL}22222222": compared(4, "b=1", at_s=2.0)}
    )
    assert counts.paired[WHOLE].rows == 4


@pytest.mark.parametrize(
    ("of_candidate", "of_against", "trips"),
    [
        (1, 0, []),
        (2, 0, ["2 workers have died while they executed it"]),
        (2, 2, []),
        (3, 2, ["3 workers have died while they executed it"]),
    ],
)
async def test_who_ends_more_workers_than_the_version_before_does_not_go_on(
    of_candidate: int, of_against: int, trips: list[str]
) -> None:
    died = {CANDIDATE.sha256: of_candidate, AGAINST.sha256: of_against}
    # Both are of one service and tell of the same deaths.
    counts = await observed(report("a", died=died), report("b", died=died))
    assert list(counts.trips) == trips


async def test_a_candidate_whose_processes_have_died_twice_waits_for_an_operator() -> None:
    once, twice = {CANDIDATE.sha256: 1}, {CANDIDATE.sha256: 2}
    reason = "its processes have died 2 times while it was shown requests"
    assert reason not in (await observed(report("a", ended=once))).blocked
    assert reason in (await observed(report("a", ended=twice))).blocked
    assert reason in (await observed(report("a", ended=once), report("b", ended=once))).blocked
