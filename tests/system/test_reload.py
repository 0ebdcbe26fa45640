"""The short forms of `make prove-reload` and `make prove-admin-races`, on real servers."""

import pytest

from loadtests import prove_admin_races, prove_reload

pytestmark = pytest.mark.system


async def test_every_answer_under_reloads_is_of_a_version_that_may_serve_and_right() -> None:
    plan = prove_reload.Plan(
        reloads=11, corrupted=2, versions=3, workers=2, rate=200, peak_s=0.2, seed=2013
    )
    report = await prove_reload.prove(plan)
    assert report.violations == []
    assert report.answers > 500
    assert [len(report.load_s), len(report.rollback_s)] == [10, 1]
    assert [len(report.refused_s), len(report.followed_s)] == [2, 1]


async def test_operators_who_race_each_other_harm_no_prediction() -> None:
    plan = prove_admin_races.Plan(clients=8, calls=5, versions=3, rate=200, think_s=0.2, seed=2013)
    report = await prove_admin_races.prove(plan)
    assert report.violations == []
    assert report.changes > 1
    assert sum(report.outcomes.values()) == 8 * 5
