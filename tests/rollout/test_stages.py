"""A release from its start to its end, as states, and what is told of each change."""

import msgspec

from app.evidence.feasibility import Traffic
from app.evidence.plan import Pace, Plan
from app.release.state import Chosen, ReleaseState, Rollout
from app.reload.told import events_of
from app.reload.verbs import rolled_back
from app.rollout.stages import (
    advanced,
    ended,
    next_share,
    paused,
    resumed,
    started,
    taken_over,
    watched_anew,
)

OLD, NEW = Chosen(1, "aa" * 32), Chosen(2, "bb" * 32)
TRAFFIC = Traffic(1_000, workers=2)
PACE = Pace(slow_s=0.25, median_s=0.05)
SERVING = ReleaseState(5, OLD, decided=5)


def begun(**changes: float) -> ReleaseState:
    rollout = Rollout(NEW, OLD, Plan(), 0.0, 0.05, 3_600.0, 1.2, 100.0, 0, "a", ())
    return started(SERVING, msgspec.structs.replace(rollout, **changes), 1.0, 100.0)


def told(before: ReleaseState, after: ReleaseState) -> list[str]:
    assert after.generation == before.generation + 1
    return [event.type for event in events_of("m", before, after, "a")]


def test_a_release_goes_from_the_shadow_to_all_and_is_watched() -> None:
    shown = begun()
    assert [shadow.chosen for shadow in shown.shadows] == [NEW]
    assert told(SERVING, shown) == ["release.started"]
    assert shown.rollout is not None
    assert next_share(shown.rollout.plan, 0.0) == 0.1
    first = advanced(shown, 0.1, PACE, TRAFFIC, 200.0)
    assert told(shown, first) == ["release.stage_began"]
    assert first.rollout is not None
    assert [each.stage.share for each in first.rollout.stages] == [0.0, 0.1]
    assert first.rollout.stages[-1].stage.keys == 125  # a quarter of a second of each worker
    taken = taken_over(first, PACE, TRAFFIC, 300.0)
    assert (taken.champion, taken.previous, taken.shadows) == (NEW, OLD, ())
    assert taken.rollout is not None
    assert (taken.rollout.stages[-1].stage.share, taken.rollout.is_watched) == (0.95, True)
    assert told(first, taken) == ["release.promoted"]
    again = watched_anew(taken, TRAFFIC, 400.0)
    assert told(taken, again) == []
    assert again.rollout is not None
    assert len(again.rollout.stages) == len(taken.rollout.stages)
    assert again.rollout.watched_since_s == 300.0
    over = ended(again)
    assert (over.champion, over.previous, over.rollout) == (NEW, OLD, None)
    assert told(again, over) == ["release.ended"]


def test_without_a_watch_a_release_ends_when_the_candidate_answers_all() -> None:
    first = advanced(begun(control=0.0), 0.5, None, TRAFFIC, 200.0)
    over = taken_over(first, PACE, TRAFFIC, 300.0)
    assert (over.champion, over.rollout) == (NEW, None)
    assert told(first, over) == ["release.promoted"]


def test_a_rollback_leaves_the_champion_of_before_and_a_quarantine() -> None:
    shown = begun()
    back = rolled_back(shown, "errors", 150.0)
    assert (back.champion, back.decided, back.shadows, back.rollout) == (OLD, 5, (), None)
    assert [(each.chosen, each.reason) for each in back.quarantined] == [(NEW, "errors")]
    assert told(shown, back) == ["release.rolled_back"]


def test_a_rollback_of_a_watched_version_is_a_decision_on_the_champion() -> None:
    taken = taken_over(advanced(begun(), 0.5, None, TRAFFIC, 200.0), PACE, TRAFFIC, 300.0)
    back = rolled_back(taken, "slow", 350.0)
    assert (back.champion, back.previous, back.decided) == (OLD, None, back.generation)
    assert told(taken, back) == ["release.rolled_back"]


def test_a_version_that_is_released_again_is_in_quarantine_no_more() -> None:
    back = rolled_back(begun(), "errors", 150.0)
    assert begun().rollout is not None
    again = started(back, msgspec.structs.replace(begun().rollout, stages=()), 1.0, 200.0)
    assert again.quarantined == ()


def test_a_pause_and_its_end_are_told_and_its_time_is_no_time_of_the_stage() -> None:
    shown = begun()
    waits = paused(shown, "a", 130.0)
    assert told(shown, waits) == ["release.paused"]
    goes_on = resumed(waits, 180.0)
    assert told(waits, goes_on) == ["release.resumed"]
    assert goes_on.rollout is not None
    assert (goes_on.rollout.stages[-1].began_s, goes_on.rollout.paused) == (150.0, "")


def test_a_load_that_ends_a_release_is_no_promotion() -> None:
    shown = begun()
    after = ReleaseState(shown.generation + 1, Chosen(3, "cc" * 32))
    assert told(shown, after) == ["release.ended"]


def test_a_rollback_for_no_harm_leaves_no_quarantine() -> None:
    assert rolled_back(begun(), None, 150.0).quarantined == ()
