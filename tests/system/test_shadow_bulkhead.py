"""The short form of `make prove-shadow`, on a real server."""

import pytest

from loadtests import prove_shadow

pytestmark = pytest.mark.system


async def test_a_candidate_that_hangs_or_crashes_changes_no_answer_and_every_row_is_counted() -> (
    None
):
    plan = prove_shadow.Plan(
        rounds=1,
        faults=("hang", "crash"),
        healthy=False,
        run_s=1.5,
        settle_s=0.0,
        rate=200,
        peak_s=0.2,
        seed=2013,
    )
    report = await prove_shadow.prove(plan)
    assert report.violations == []
    assert sorted(run.kind for run in report.runs) == ["crash", "hang"]
