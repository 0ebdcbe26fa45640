"""What a stage counts of the requests that are routed, and how each may end."""

import asyncio

import pytest

from app.canary.table import ExposureTable
from tests.canary.releases import AGAINST, CANDIDATE, Together, Worker, keys_of, release

SLOW_S, MEDIAN_S = 0.5, 0.2


def worker(keys: int = 1, **given: object) -> Worker:
    return Worker(release(0.5, keys=keys, slow_s=SLOW_S, median_s=MEDIAN_S), **given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("how", "took_s", "error", "slow", "median"),
    [
        ("answered", 0.1, 0, 0, 0),
        ("answered", 0.3, 0, 0, 1),
        ("answered", 0.6, 0, 1, 1),
        ("failed", 0.1, 1, 1, 1),  # it was not answered in time, nor at any time
        ("failed", 0.6, 1, 1, 1),
        ("left", 0.1, 0, 0, 0),
        ("left", 0.3, 0, 0, 1),
        ("left", 0.6, 0, 1, 1),
    ],
)
async def test_an_end_counts_for_what_it_is(
    how: str, took_s: float, error: int, slow: int, median: int
) -> None:
    for is_candidates in (True, False):
        of = worker()
        mine, theirs = keys_of(of, 1, 1)
        exposure = of.begin(mine[0] if is_candidates else theirs[0])
        instant_s = exposure.began_s + took_s
        if how == "answered":
            exposure.answered(instant_s, CANDIDATE if is_candidates else AGAINST)
        else:
            getattr(exposure, how)(instant_s)
        table = await of.counted()
        arm, other = table.candidate, table.against
        if not is_candidates:
            arm, other = other, arm
        assert (arm.assigned, arm.resolved, arm.lost) == (1, 1, 0)
        assert (arm.errors, arm.slow, other.assigned) == (error, slow, 0)
        place = (lambda bad: (bad, 0)) if is_candidates else (lambda bad: (0, bad))
        assert table.errors == {place(error): 1}
        assert table.slow == {place(slow): 1}
        assert table.median == {place(median): 1}
        assert sum(arm.latencies.values()) == (how == "answered")


async def test_where_nothing_is_known_to_be_slow_nothing_is() -> None:
    of = Worker(release(0.5))
    mine, _ = keys_of(of, 1, 0)
    exposure = of.begin(mine[0])
    exposure.failed(exposure.began_s + 99)
    table = await of.counted()
    assert (table.errors, table.slow, table.candidate.slow) == ({(1, 0): 1}, {}, 0)
    assert table.median == {}


async def test_a_key_counts_once_however_it_ended() -> None:
    of = worker()
    [key], _ = keys_of(of, 1, 0)
    for _ in range(5):
        exposure = of.begin(key)
        exposure.failed(exposure.began_s)
    table = await of.counted()
    assert (table.candidate.errors, table.outside) == (1, {"not_first": 4})


async def test_a_key_counts_once_over_all_workers() -> None:
    store = Together()
    one, other = worker(store=store), worker(store=store)
    mine, theirs = keys_of(one, 20, 20)
    for each in (one, other):
        for key in (*mine, *theirs):
            exposure = each.begin(key)
            exposure.answered(exposure.began_s, exposure.by)
    tables = [await one.counted(), await other.counted()]
    total = tables[0] + tables[1]
    assert (total.candidate.resolved, total.against.resolved) == (20, 20)
    assert total.outside == {"not_first": 40}


async def test_requests_without_a_key_are_each_their_own() -> None:
    of = worker()
    for n in range(3):
        exposure = of.exposures.begin("champion", AGAINST, 0.0, f"id {n}", None, of.arm(f"id {n}"))
        exposure.by = CANDIDATE if exposure.is_candidates else AGAINST
        exposure.left(0.0)
    table = await of.counted()
    assert table.candidate.resolved + table.against.resolved == 3


async def test_what_cannot_be_asked_for_is_left_out_however_it_ends() -> None:
    store = Together()
    of = worker(store=store)
    mine, _ = keys_of(of, 4, 0)
    store.is_down = True
    for key in mine[:2]:
        exposure = of.begin(key)
        exposure.failed(exposure.began_s)
    first = await of.counted()
    assert (first.errors, first.outside) == ({}, {"unavailable": 2})
    store.is_down = False
    for key in mine:
        exposure = of.begin(key)
        exposure.failed(exposure.began_s)
    second = await of.counted()
    assert (second.errors, second.outside) == ({(1, 0): 2}, {"not_first": 2})


async def test_blocks_are_filled_in_the_order_of_beginning() -> None:
    """The last of a block to end holds up whatever began later."""
    of = worker(keys=4)
    mine, theirs = keys_of(of, 4, 4)
    order = [key for pair in zip(mine, theirs, strict=True) for key in pair]
    begun = [of.begin(key) for key in order]
    for exposure in begun[1:]:
        exposure.answered(exposure.began_s, exposure.by)
    table = await of.counted()
    assert (table.candidate.assigned, table.against.assigned) == (4, 4)
    assert (table.candidate.resolved, table.errors) == (0, {})
    begun[0].failed(begun[0].began_s)
    table = await of.counted()
    assert (table.candidate.resolved, table.against.resolved) == (4, 4)
    assert table.errors == {(1, 0): 1, (0, 0): 1}


async def test_what_never_ends_is_lost_and_holds_nothing_up() -> None:
    of = worker(keys=2)
    mine, theirs = keys_of(of, 1, 1)
    of.begin(mine[0], began_s=-1_000.0)
    exposure = of.begin(theirs[0])
    exposure.answered(exposure.began_s, exposure.by)
    table = await of.counted()
    assert (table.candidate.lost, table.candidate.resolved) == (1, 0)
    assert (table.against.resolved, table.errors) == (1, {(0, 0): 1})


async def test_who_is_answered_by_another_version_is_misrouted() -> None:
    of = worker()
    mine, theirs = keys_of(of, 2, 2)
    led_wrong = of.begin(mine[0], by=AGAINST)
    led_wrong.answered(led_wrong.began_s, AGAINST)
    answered_wrong = of.begin(theirs[0])
    answered_wrong.answered(answered_wrong.began_s, CANDIDATE)
    wrong_arm = of.exposures.begin("canary", CANDIDATE, 0.0, theirs[1], 77, True)
    wrong_arm.answered(0.0, CANDIDATE)
    right = of.begin(mine[1])
    right.answered(right.began_s, CANDIDATE)
    table = await of.counted()
    assert table.misrouted == 3
    assert (table.candidate.assigned, table.candidate.resolved) == (1, 1)
    assert table.against.resolved == 0
    assert table.errors == {(0, 0): 1}


async def test_what_has_begun_in_a_stage_that_is_over_is_counted_still() -> None:
    of = worker()
    mine, _ = keys_of(of, 1, 0)
    exposure = of.begin(mine[0])
    of.exposures.end()
    assert (await of.counted()).candidate.resolved == 0
    exposure.answered(exposure.began_s, CANDIDATE)
    assert (await of.counted()).candidate.resolved == 1
    assert not of.exposures.is_over


async def test_nothing_new_is_nothing_to_write() -> None:
    of = worker()
    assert await of.counted() == ExposureTable()
    assert of.exposures.take() is None


async def test_others_have_turns_while_what_has_ended_is_recorded() -> None:
    of = worker()
    for _ in range(5_000):
        of.exposures.pass_by("champion", AGAINST, 0.0).answered(0.1, AGAINST)
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(others())
    await of.exposures.settle()
    task.cancel()
    assert turns >= 5_000 / 256


async def test_that_an_exposure_was_assigned_is_told_before_how_it_ended() -> None:
    of = worker()
    [key], _ = keys_of(of, 1, 0)
    of.begin(key).answered(0.1, CANDIDATE)
    await of.exposures.settle()
    first = of.exposures.take()  # all that is left of a worker that is killed now
    assert first is not None
    assert (first.candidate.assigned, first.candidate.resolved, first.errors) == (1, 0, {})
    await of.exposures.settle()
    second = of.exposures.take()
    assert second is not None
    assert (second.candidate.assigned, second.candidate.resolved) == (0, 1)
