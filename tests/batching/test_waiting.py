"""Which rows go next."""

import asyncio

import numpy as np
import pytest

from app.batching.priority import Priority
from app.batching.waiting import Entry, Executed, Shapes, WaitingRows
from app.deadline import Deadline

EVERYBODY = 1000


def entry(
    rows: int = 1,
    priority: Priority = Priority.LIVE,
    *,
    is_part: bool = False,
    shapes: Shapes = (),
    alone: bool = False,
    at_s: float = 0.0,
) -> Entry:
    answer: asyncio.Future[Executed] = asyncio.get_running_loop().create_future()
    inputs = {"x": np.zeros((rows, 1))}
    return Entry(inputs, rows, Deadline(1e9), at_s, answer, priority, is_part, shapes, "", alone)


def waiting(*entries: Entry) -> WaitingRows:
    queue = WaitingRows()
    for each in entries:
        queue.put(each)
    return queue


def taken(queue: WaitingRows, max_rows: int, max_entries: int = EVERYBODY) -> list[Entry]:
    batch, late = queue.take(max_rows, max_entries, 0.0)
    assert late == []
    return batch


def drained(queue: WaitingRows, max_rows: int = 1) -> list[Entry]:
    order = []
    while queue.rows:
        order += taken(queue, max_rows)
    return order


async def test_the_first_goes_first() -> None:
    entries = [entry() for _ in range(5)]
    assert taken(waiting(*entries), 3) == entries[:3]


async def test_rows_are_counted_and_not_entries() -> None:
    queue = waiting(entry(3), entry(3), entry(3))
    assert [e.rows for e in taken(queue, 8)] == [3, 3]
    assert queue.rows == 3


async def test_entries_are_limited_too() -> None:
    assert len(taken(waiting(*(entry() for _ in range(5))), 8, 2)) == 2


async def test_the_next_is_not_passed_over_for_a_smaller_one() -> None:
    large = entry(6)
    queue = waiting(entry(5), large, entry(1))
    taken(queue, 8)
    assert taken(queue, 8)[0] is large


async def test_an_entry_larger_than_the_batch_goes_by_itself() -> None:
    large = entry(9)
    queue = waiting(large, entry(1))
    assert taken(queue, 4) == [large]


async def test_one_that_is_kept_alone_shares_with_nobody() -> None:
    alone = entry(alone=True)
    queue = waiting(entry(), alone, entry())
    batches = [taken(queue, 8) for _ in range(2)]
    assert sorted(map(len, batches)) == [1, 2]
    assert [alone] in batches


async def test_those_that_are_kept_alone_cost_the_others_little() -> None:
    queue = waiting(*(entry(alone=True) for _ in range(50)), *(entry(8) for _ in range(16 * 4)))
    batches = [taken(queue, 8) for _ in range(34)]
    assert sum(batch[0].alone for batch in batches) <= 3


async def test_only_equal_shapes_share_a_batch() -> None:
    short, long = ((2,),), ((3,),)
    queue = waiting(
        entry(shapes=short, at_s=1), entry(shapes=long, at_s=2), entry(shapes=short, at_s=3)
    )
    assert [e.shapes for e in taken(queue, 8)] == [short, short]
    assert [e.shapes for e in taken(queue, 8)] == [long]
    assert queue.shapes == set()


async def test_of_different_shapes_the_longest_waiting_goes_first() -> None:
    queue = waiting(entry(shapes=((3,),), at_s=2), entry(shapes=((2,),), at_s=1))
    assert taken(queue, 8)[0].shapes == ((2,),)


async def test_priorities_share_by_their_weights_and_the_last_never_starves() -> None:
    queue = waiting(*(entry(priority=p) for p in Priority for _ in range(270)))
    order = [e.priority for e in drained(queue)][:270]
    shares = [order.count(priority) for priority in Priority]
    assert shares == pytest.approx([160, 80, 20, 10], abs=2)


async def test_who_waits_alone_gets_everything() -> None:
    queue = waiting(*(entry(priority=Priority.BULK) for _ in range(8)))
    assert len(taken(queue, 8)) == 8


async def test_a_pause_saves_up_nothing() -> None:
    queue = waiting(*(entry(priority=Priority.SHADOW) for _ in range(300)))
    for _ in range(100):
        taken(queue, 1)
    for _ in range(100):
        queue.put(entry(priority=Priority.BULK))
    order = [e.priority for e in drained(queue)][:90]
    assert order.count(Priority.BULK) == pytest.approx(30, abs=2)


async def test_a_request_of_many_parts_does_not_stand_before_everybody_else() -> None:
    parts = [entry(64, is_part=True) for _ in range(20)]
    queue = waiting(*parts, *(entry() for _ in range(64)))
    order = drained(queue, 64)
    single = [position for position, e in enumerate(order) if e.rows == 1]
    assert max(single) < 64 + 2


async def test_a_batch_mixes_flows_of_equal_shapes() -> None:
    queue = waiting(entry(priority=Priority.BULK), entry(), entry(priority=Priority.SHADOW))
    assert len(taken(queue, 8)) == 3


async def test_what_leaves_is_not_taken() -> None:
    leaves, stays = entry(), entry()
    queue = waiting(leaves, stays)
    assert queue.remove(leaves)
    assert not queue.remove(leaves)
    assert queue.rows == 1
    assert taken(queue, 8) == [stays]


async def test_who_would_be_late_makes_room_for_others() -> None:
    late, first, second = entry(), entry(), entry()
    late.deadline = Deadline(5.0)
    queue = waiting(first, late, second, entry())
    assert queue.take(2, EVERYBODY, 5.0) == ([first, second], [late])
    assert queue.rows == 1


async def test_rows_ahead_are_ones_own_and_what_the_others_get_meanwhile() -> None:
    queue = waiting(entry(10), entry(1000, Priority.BULK))
    assert queue.ahead(Priority.LIVE, is_part=False) == 10  # bulk gets a sixteenth of eleven: 0
    assert queue.ahead(Priority.BULK, is_part=False) == 1010
    assert queue.ahead(Priority.CANARY, is_part=False) == 2  # of the ten, two by weight


async def test_the_longest_wait_is_known() -> None:
    queue = waiting(entry(at_s=5), entry(priority=Priority.BULK, at_s=3))
    assert queue.oldest_s() == 3


async def test_everything_can_be_taken_at_once() -> None:
    queue = waiting(entry(), entry(priority=Priority.BULK), entry(shapes=((2,),)))
    assert len(queue.take_all()) == 3
    assert queue.rows == 0
