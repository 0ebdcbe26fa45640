"""The batcher, driven by a backend whose executions wait at a gate."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
import pytest

from app.backends.backend import BackendDied
from app.backends.execution_times import ExecutionTimes
from app.batching.batcher import DynamicBatcher
from app.batching.policy import BatchPolicy, Greedy, Hold
from app.batching.priority import Priority
from app.deadline import Deadline, DeadlineSweep
from app.errors import BackendError, DeadlineExceeded, ModelNotReady, Overloaded, ShuttingDown
from app.tensors import Signature, Tensors, TensorSpec, row_count

SOON = 30.0


class GatedBackend:
    """Doubles `x`. While the gate is shut executions wait; each batch's values are recorded."""

    signature = Signature((), ())
    concurrency = 1

    def __init__(self) -> None:
        self.batches: list[list[float]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.started = asyncio.Event()

    async def execute(self, inputs: Tensors, deadline: Deadline) -> Tensors:
        self.batches.append(inputs["x"][:, 0].tolist())
        self.started.set()
        await self.gate.wait()
        if np.isnan(inputs["x"]).any():
            raise BackendError("poison")
        return {"y": inputs["x"] * 2}

    async def warm_up(self, example: Tensors, max_rows: int) -> ExecutionTimes:
        return ExecutionTimes({})

    async def check(self) -> None: ...

    async def close(self) -> None: ...


class MortalBackend(GatedBackend):
    """Dies of NaN, and the first `deaths` times of anything."""

    def __init__(self, deaths: int = 0) -> None:
        super().__init__()
        self.deaths = deaths

    async def execute(self, inputs: Tensors, deadline: Deadline) -> Tensors:
        self.batches.append(inputs["x"][:, 0].tolist())
        self.deaths -= 1
        if self.deaths >= 0 or np.isnan(inputs["x"]).any():
            raise BackendDied("it died")
        return {"y": inputs["x"] * 2}


class AbsentBackend(GatedBackend):
    """Cannot be reached."""

    async def execute(self, inputs: Tensors, deadline: Deadline) -> Tensors:
        self.batches.append(inputs["x"][:, 0].tolist())
        raise ModelNotReady("it cannot be reached")


class StuckBackend(GatedBackend):
    """The first execution never ends, unless it is cancelled."""

    async def execute(self, inputs: Tensors, deadline: Deadline) -> Tensors:
        if not self.batches:
            self.batches.append(inputs["x"][:, 0].tolist())
            self.started.set()
            await asyncio.Event().wait()
        return await super().execute(inputs, deadline)


class ForgetfulBackend(GatedBackend):
    """Answers one row less than it was given."""

    async def execute(self, inputs: Tensors, deadline: Deadline) -> Tensors:
        return {"y": inputs["x"][1:]}


class DefectiveBackend(GatedBackend):
    """Raises what no backend should."""

    async def execute(self, inputs: Tensors, deadline: Deadline) -> Tensors:
        raise ZeroDivisionError("a defect")


class Ledger:
    """Keeps what the batcher reports."""

    def __init__(self) -> None:
        self.under_way = 0
        self.rows: list[int] = []
        self.outcomes: list[str] = []
        self.repetitions = 0
        self.departures = 0
        self.refusals: list[str] = []

    def began(self) -> None:
        self.under_way += 1

    def ended(self) -> None:
        self.under_way -= 1

    def executed(self, rows: int, waited_s: float, took_s: float) -> None:
        assert waited_s >= 0
        assert took_s >= 0
        self.rows.append(rows)

    def failed(self, outcome: str) -> None:
        self.outcomes.append(outcome)

    def repeated(self) -> None:
        self.repetitions += 1

    def left(self) -> None:
        self.departures += 1

    def refused(self, reason: str) -> None:
        self.refusals.append(reason)


@asynccontextmanager
async def batching(
    backend: GatedBackend,
    policy: BatchPolicy | None = None,
    *,
    max_batch_rows: int = 8,
    max_queue_rows: int = 64,
    times: ExecutionTimes | None = None,
    observer: "Ledger | None" = None,
    drain_s: float = SOON,
) -> AsyncIterator[DynamicBatcher]:
    async with (
        DeadlineSweep(interval_s=0.001) as sweep,
        DynamicBatcher(
            backend,
            policy or Greedy(max_batch_rows),
            sweep,
            times or ExecutionTimes({}),
            observer or Ledger(),
            max_batch_rows=max_batch_rows,
            max_queue_rows=max_queue_rows,
            drain_s=drain_s,
        ) as batcher,
    ):
        yield batcher


def rows(*values: float) -> Tensors:
    return {"x": np.array([[value] for value in values], np.float32)}


async def ask(
    batcher: DynamicBatcher,
    *values: float,
    within_s: float = SOON,
    priority: Priority = Priority.LIVE,
    caller: str = "",
) -> list[float]:
    execution = await batcher.submit(
        rows(*values), Deadline.after(within_s), priority=priority, caller=caller
    )
    answer: list[float] = execution.outputs["y"][:, 0].tolist()
    return answer


async def occupied(batcher: DynamicBatcher, backend: GatedBackend) -> "asyncio.Task[list[float]]":
    """Shut the gate behind an execution that is under way, so that what follows queues up."""
    backend.gate.clear()
    backend.started.clear()
    first = asyncio.create_task(ask(batcher, 0))
    await backend.started.wait()
    return first


async def queued(batcher: DynamicBatcher, count: int) -> None:
    while batcher.queued_rows < count:  # noqa: ASYNC110  each turn lets a submitter run
        await asyncio.sleep(0)


async def test_rows_that_arrive_during_an_execution_share_the_next_one() -> None:
    backend = GatedBackend()
    async with batching(backend) as batcher:
        first = await occupied(batcher, backend)
        asked = [asyncio.create_task(ask(batcher, value)) for value in (1, 2, 3)]
        await queued(batcher, 3)
        backend.gate.set()
        assert await first == [0]
        assert [await task for task in asked] == [[2], [4], [6]]
    assert backend.batches == [[0], [1, 2, 3]]


async def test_requests_of_one_turn_of_the_loop_share_an_execution() -> None:
    backend = GatedBackend()
    async with batching(backend) as batcher:
        await asyncio.gather(*(ask(batcher, value) for value in range(5)))
    assert backend.batches == [[0, 1, 2, 3, 4]]


async def test_a_batch_never_exceeds_its_limit() -> None:
    backend = GatedBackend()
    ledger = Ledger()
    async with batching(backend, max_batch_rows=4, observer=ledger) as batcher:
        answers = await asyncio.gather(*(ask(batcher, v, v + 0.5, v + 0.75) for v in range(4)))
    assert answers == [[2 * v, 2 * v + 1, 2 * v + 1.5] for v in range(4)]
    assert ledger.rows == [3, 3, 3, 3]


async def test_a_request_over_the_limit_is_split_and_joined_in_order() -> None:
    backend = GatedBackend()
    async with batching(backend, max_batch_rows=4) as batcher:
        assert await ask(batcher, *range(10)) == [2 * value for value in range(10)]
    assert [len(batch) for batch in backend.batches] == [4, 4, 2]


async def test_a_caller_that_left_is_taken_out_before_execution() -> None:
    backend = GatedBackend()
    async with batching(backend) as batcher:
        first = await occupied(batcher, backend)
        left, stays = (asyncio.create_task(ask(batcher, value)) for value in (1, 2))
        await queued(batcher, 2)
        left.cancel()
        backend.gate.set()
        assert await first == [0]
        assert await stays == [4]
    assert backend.batches == [[0], [2]]


async def test_a_caller_that_leaves_during_execution_harms_nobody() -> None:
    backend = GatedBackend()
    async with batching(backend) as batcher:
        first = await occupied(batcher, backend)
        backend.started.clear()
        left, stays = (asyncio.create_task(ask(batcher, value)) for value in (1, 2))
        await queued(batcher, 2)
        backend.gate.set()
        assert await first == [0]
        await backend.started.wait()
        left.cancel()
        assert await stays == [4]


async def test_all_callers_leaving_keeps_the_batcher_serving() -> None:
    backend = GatedBackend()
    async with batching(backend) as batcher:
        first = await occupied(batcher, backend)
        leavers = [asyncio.create_task(ask(batcher, value)) for value in (1, 2)]
        await queued(batcher, 2)
        for task in leavers:
            task.cancel()
        backend.gate.set()
        await first
        assert await ask(batcher, 3) == [6]


async def test_a_deadline_that_passes_in_the_queue_is_answered_and_not_executed() -> None:
    backend = GatedBackend()
    async with batching(backend) as batcher:
        first = await occupied(batcher, backend)
        with pytest.raises(DeadlineExceeded):
            await ask(batcher, 1, within_s=0.01)
        backend.gate.set()
        await first
        assert await ask(batcher, 2) == [4]
    assert backend.batches == [[0], [2]]


async def test_a_deadline_that_passes_during_execution_is_answered_on_time() -> None:
    backend = GatedBackend()
    async with batching(backend) as batcher:
        backend.gate.clear()
        with pytest.raises(DeadlineExceeded):
            await ask(batcher, 1, within_s=0.01)
        backend.gate.set()


async def test_a_failed_batch_fails_its_callers_and_nobody_after() -> None:
    backend = GatedBackend()
    async with batching(backend) as batcher:
        with pytest.raises(BackendError, match="poison"):
            await ask(batcher, float("nan"))
        assert await ask(batcher, 1) == [2]


async def test_a_poisonous_request_fails_alone() -> None:
    backend = GatedBackend()
    ledger = Ledger()
    async with batching(backend, observer=ledger) as batcher:
        asked = [ask(batcher, value) for value in (1, 2, float("nan"), 4, 5)]
        answers = await asyncio.gather(*asked, return_exceptions=True)
    assert isinstance(answers[2], BackendError)
    assert answers[:2] + answers[3:] == [[2], [4], [8], [10]]
    assert ledger.repetitions == 5
    assert ledger.outcomes == ["failed", "failed"]


async def test_who_left_meanwhile_is_not_run_again() -> None:
    backend = GatedBackend()
    async with batching(backend) as batcher:
        backend.gate.clear()
        asked = [asyncio.create_task(ask(batcher, value)) for value in (1, 2, float("nan"))]
        await backend.started.wait()
        asked[0].cancel()
        backend.gate.set()
        await asyncio.gather(*asked, return_exceptions=True)
        assert asked[1].result() == [4]
    assert [1.0] not in backend.batches


async def test_a_caller_whose_rows_keep_failing_shares_no_batch() -> None:
    backend = GatedBackend()
    async with batching(backend) as batcher:
        for _ in range(4):
            poison = ask(batcher, float("nan"), caller="mallory")
            await asyncio.gather(poison, ask(batcher, 1, caller="a"), return_exceptions=True)
        backend.batches.clear()
        asked = [ask(batcher, value, caller=who) for value, who in ((1, "a"), (2, "mallory"))]
        await asyncio.gather(*asked, ask(batcher, 3, caller="b"))
    assert sorted(backend.batches) == [[1, 3], [2]]


async def test_a_backend_that_failed_makes_nobody_suspect() -> None:
    backend = GatedBackend()
    async with batching(backend) as batcher:
        for _ in range(10):
            with pytest.raises(BackendError):
                await ask(batcher, float("nan"), caller="alice")
        backend.batches.clear()
        await asyncio.gather(*(ask(batcher, v, caller="alice") for v in range(3)))
    assert backend.batches == [[0, 1, 2]]


async def test_what_a_row_says_of_itself_is_not_told_to_those_who_failed_beside_it() -> None:
    backend = GatedBackend()
    async with batching(backend, max_batch_rows=64) as batcher:
        values = [float("nan") if number % 3 else 1.0 for number in range(40)]
        answers = await asyncio.gather(
            *(ask(batcher, value) for value in values), return_exceptions=True
        )
    beside = [a for a, v in zip(answers, values, strict=True) if v == 1 and not isinstance(a, list)]
    assert all("poison" not in str(error) for error in beside)


async def test_who_cannot_be_reached_is_the_operators_affair() -> None:
    async with batching(AbsentBackend()) as batcher:
        with pytest.raises(ModelNotReady) as refused:
            await ask(batcher, 1)
    assert "reached" not in str(refused.value)


async def test_a_cancellation_that_was_not_ours_is_an_error_of_the_backend() -> None:
    class Cancelled(GatedBackend):
        async def execute(self, inputs: Tensors, deadline: Deadline) -> Tensors:
            if inputs["x"][0, 0] == 1:
                raise asyncio.CancelledError
            return await super().execute(inputs, deadline)

    async with batching(Cancelled()) as batcher:
        with pytest.raises(BackendError, match="gave the execution up"):
            await ask(batcher, 1)
        assert await ask(batcher, 2) == [4]


async def test_a_request_of_many_parts_is_tried_by_a_free_backend() -> None:
    times = ExecutionTimes({1: 60.0})
    async with batching(GatedBackend(), times=times, max_batch_rows=2) as batcher:
        assert await ask(batcher, *range(6), within_s=20) == [0, 2, 4, 6, 8, 10]


async def test_small_batches_are_predicted_where_poison_makes_them_small() -> None:
    backend = GatedBackend()
    times = ExecutionTimes({1: 0.5, 64: 0.5})
    async with batching(backend, times=times, max_batch_rows=64) as batcher:
        for _ in range(30):
            asked = [ask(batcher, value) for value in (float("nan"), *range(7))]
            await asyncio.gather(*asked, return_exceptions=True)
        for _ in range(300):
            times.observe(1, 0.5)
        first = await occupied(batcher, backend)
        waiting = [asyncio.create_task(ask(batcher, value)) for value in range(20)]
        await queued(batcher, 20)
        assert batcher.predicted_s(1) > 5
        backend.gate.set()
        await asyncio.gather(first, *waiting)


async def test_executions_that_were_too_late_teach_how_long_they_take() -> None:
    class Late(GatedBackend):
        ended = asyncio.Semaphore(0)

        async def execute(self, inputs: Tensors, deadline: Deadline) -> Tensors:
            await asyncio.sleep(max(0.0, deadline.remaining_s()))
            self.ended.release()
            raise DeadlineExceeded("too late")

    backend, times = Late(), ExecutionTimes({1: 0.001})
    async with batching(backend, times=times) as batcher:
        for _ in range(5):
            with pytest.raises(DeadlineExceeded):
                await ask(batcher, 1, within_s=0.02)
            # The sweep may answer the caller first; the next one must find a free backend.
            await backend.ended.acquire()
    assert times.predicted_s(1) > 0.002


async def test_a_hold_ends_in_time_for_the_most_urgent() -> None:
    backend = GatedBackend()
    async with batching(backend, Hold(60, max_batch_rows=8)) as batcher:
        assert await ask(batcher, 1, within_s=0.5) == [2]


async def test_batches_shrink_while_poison_is_frequent() -> None:
    backend = GatedBackend()
    async with batching(backend) as batcher:
        for _ in range(20):
            values = (float("nan"), 1, 2, 3, 4, 5, 6, 7)
            asked = [ask(batcher, value) for value in values]
            await asyncio.gather(*asked, return_exceptions=True)
        backend.batches.clear()
        await asyncio.gather(*(ask(batcher, value) for value in range(4)))
    assert backend.batches == [[0], [1], [2], [3]]


async def test_rows_whose_execution_died_are_run_once_more_each_by_itself() -> None:
    backend = MortalBackend(deaths=1)
    async with batching(backend) as batcher:
        assert await asyncio.gather(*(ask(batcher, value) for value in (1, 2, 3))) == [
            [2],
            [4],
            [6],
        ]
    assert backend.batches == [[1, 2, 3], [1], [2], [3]]


async def test_what_dies_twice_of_a_request_refuses_it_and_nobody_else() -> None:
    backend = MortalBackend()
    ledger = Ledger()
    async with batching(backend, observer=ledger) as batcher:
        asked = [ask(batcher, value) for value in (1, float("nan"), 3)]
        answers = await asyncio.gather(*asked, return_exceptions=True)
    assert isinstance(answers[1], BackendDied)
    assert [answers[0], answers[2]] == [[2], [6]]
    assert ledger.outcomes == ["died", "died"]


async def test_what_says_nothing_about_the_rows_is_not_repeated() -> None:
    backend = AbsentBackend()
    async with batching(backend) as batcher:
        answers = await asyncio.gather(
            *(ask(batcher, value) for value in (1, 2)), return_exceptions=True
        )
    assert [type(answer) for answer in answers] == [ModelNotReady, ModelNotReady]
    assert backend.batches == [[1, 2]]


async def test_an_execution_that_nobody_waits_for_any_more_is_given_up() -> None:
    backend = StuckBackend()
    ledger = Ledger()
    async with batching(backend, observer=ledger) as batcher:
        with pytest.raises(DeadlineExceeded):
            await ask(batcher, 1, within_s=0.01)
        assert await ask(batcher, 2) == [4]
    assert ledger.outcomes == ["given_up"]


async def test_what_waits_behind_a_stuck_execution_is_answered_while_closing() -> None:
    backend = StuckBackend()
    async with batching(backend) as batcher:
        with pytest.raises(DeadlineExceeded):
            await ask(batcher, 1, within_s=0.01)
        waiting = asyncio.create_task(ask(batcher, 2))
        await queued(batcher, 1)
    assert await waiting == [4]


async def test_several_executions_are_under_way_where_the_backend_takes_them() -> None:
    backend = GatedBackend()
    backend.concurrency = 2
    backend.gate.clear()
    async with batching(backend) as batcher:
        first = await occupied(batcher, backend)
        backend.started.clear()
        second = asyncio.create_task(ask(batcher, 1))
        await backend.started.wait()
        third = asyncio.create_task(ask(batcher, 2))
        await queued(batcher, 1)
        backend.gate.set()
        assert [await first, await second, await third] == [[0], [2], [4]]
    assert backend.batches == [[0], [1], [2]]


async def test_urgent_rows_go_first() -> None:
    backend = GatedBackend()
    async with batching(backend, max_batch_rows=1) as batcher:
        first = await occupied(batcher, backend)
        asked = [
            asyncio.create_task(ask(batcher, value, priority=priority))
            for value, priority in ((1, Priority.BULK), (2, Priority.BULK), (3, Priority.LIVE))
        ]
        await queued(batcher, 3)
        backend.gate.set()
        await asyncio.gather(first, *asked)
    assert backend.batches.index([3.0]) < backend.batches.index([2.0])


async def test_only_rows_of_equal_shapes_share_an_execution() -> None:
    backend = GatedBackend()
    backend.signature = Signature((TensorSpec("x", "float32", (-1,)),), ())
    async with batching(backend) as batcher:
        short = [{"x": np.full((1, 2), value, np.float32)} for value in (1, 2)]
        long = {"x": np.full((1, 3), 3, np.float32)}
        answers = await asyncio.gather(
            *(batcher.submit(inputs, Deadline.after(SOON)) for inputs in (short[0], long, short[1]))
        )
    assert [answer.outputs["y"].tolist() for answer in answers] == [[[2, 2]], [[6, 6, 6]], [[4, 4]]]
    assert backend.batches == [[1, 2], [3]]


async def test_different_shapes_that_wait_are_bounded() -> None:
    backend = GatedBackend()
    backend.signature = Signature((TensorSpec("x", "float32", (-1,)),), ())
    ledger = Ledger()
    async with batching(backend, observer=ledger) as batcher:
        first = await occupied(batcher, backend)
        waiting = [
            asyncio.create_task(
                batcher.submit({"x": np.ones((1, width), np.float32)}, Deadline.after(SOON))
            )
            for width in range(1, 33)
        ]
        await queued(batcher, 32)
        with pytest.raises(Overloaded, match="32 different shapes"):
            await batcher.submit({"x": np.ones((1, 99), np.float32)}, Deadline.after(SOON))
        backend.gate.set()
        await asyncio.gather(first, *waiting)
    assert ledger.refusals == ["shapes"]


async def test_what_cannot_be_answered_by_its_deadline_is_refused_at_once() -> None:
    backend = GatedBackend()
    ledger = Ledger()
    times = ExecutionTimes({1: 0.5, 8: 1.0})
    async with batching(backend, times=times, observer=ledger) as batcher:
        first = await occupied(batcher, backend)
        waiting = [asyncio.create_task(ask(batcher, *range(8))) for _ in range(3)]
        await queued(batcher, 24)
        # The rest of the half second under way, three full batches, and its own.
        with pytest.raises(Overloaded, match="too late for the deadline") as refused:
            await ask(batcher, 1, within_s=4)
        assert 3.0 < refused.value.retry_after_s < 4.6
        backend.gate.set()
        await asyncio.gather(first, *waiting)
    assert ledger.refusals == ["deadline"]


async def test_what_would_be_late_makes_room_in_the_batch_for_what_would_not() -> None:
    backend = GatedBackend()
    times = ExecutionTimes({1: 1e-6, 2: 1e-6})
    async with batching(backend, times=times, max_batch_rows=2) as batcher:
        first = await occupied(batcher, backend)
        hurried = asyncio.create_task(ask(batcher, 1, within_s=5))
        patient = [asyncio.create_task(ask(batcher, value)) for value in (2, 3)]
        await queued(batcher, 3)
        for _ in range(200):
            times.observe(2, 10)  # from now on an execution takes ten seconds
        assert times.predicted_s(2) > 5
        backend.gate.set()
        with pytest.raises(DeadlineExceeded, match="could not be executed in time"):
            await hurried
        assert await asyncio.gather(first, *patient) == [[0], [4], [6]]
    assert [2, 3] in backend.batches


async def test_a_free_backend_is_tried_whatever_is_predicted() -> None:
    times = ExecutionTimes({1: 60.0})
    async with batching(GatedBackend(), times=times) as batcher:
        assert await ask(batcher, 1, within_s=20) == [2]


async def test_rows_that_leave_the_queue_take_no_room_in_it() -> None:
    backend = GatedBackend()
    ledger = Ledger()
    async with batching(backend, max_queue_rows=2, observer=ledger) as batcher:
        first = await occupied(batcher, backend)
        waiting = [asyncio.create_task(ask(batcher, value)) for value in (1, 2)]
        await queued(batcher, 2)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert batcher.queued_rows == 0
        another = asyncio.create_task(ask(batcher, 3))
        await queued(batcher, 1)
        backend.gate.set()
        assert [await first, await another] == [[0], [6]]
    assert ledger.departures == 2


async def test_a_failing_part_gives_up_the_rest_of_its_request() -> None:
    backend = GatedBackend()
    async with batching(backend, max_batch_rows=2) as batcher:
        with pytest.raises(BackendError):
            await ask(batcher, 1, 2, float("nan"), 4, 5, 6)
        assert await ask(batcher, 7) == [14]
    assert [5.0, 6.0] not in backend.batches


async def test_the_loop_gets_a_turn_between_the_batches_of_a_large_request() -> None:
    backend = GatedBackend()
    async with batching(backend, max_batch_rows=1) as batcher:
        large = asyncio.create_task(ask(batcher, *range(50)))
        await backend.started.wait()
        turns = 0
        while not large.done():
            turns += 1
            await asyncio.sleep(0)
        assert turns >= 45


async def test_the_wrong_number_of_rows_is_no_answer() -> None:
    async with batching(ForgetfulBackend()) as batcher:
        with pytest.raises(BackendError, match="2 rows for a batch of 3"):
            await ask(batcher, 1, 2, 3)


async def test_a_defect_of_the_backend_is_an_answer_and_not_the_end() -> None:
    async with batching(DefectiveBackend()) as batcher:
        for _ in range(2):
            with pytest.raises(BackendError, match="ZeroDivisionError"):
                await ask(batcher, 1)


async def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    backend = GatedBackend()
    async with batching(backend, max_queue_rows=3) as batcher:
        first = await occupied(batcher, backend)
        waiting = [asyncio.create_task(ask(batcher, value)) for value in (1, 2, 3)]
        await queued(batcher, 3)
        with pytest.raises(Overloaded, match="3 of 3 rows") as refused:
            await ask(batcher, 4)
        assert refused.value.retry_after_s >= 0
        backend.gate.set()
        await asyncio.gather(first, *waiting)
        assert await ask(batcher, 5) == [10]


async def test_a_request_larger_than_the_queue_is_served_while_nobody_waits() -> None:
    backend = GatedBackend()
    async with batching(backend, max_batch_rows=4, max_queue_rows=4) as batcher:
        assert await ask(batcher, *range(9)) == [2 * value for value in range(9)]


async def test_closing_answers_what_is_queued_and_refuses_what_comes() -> None:
    backend = GatedBackend()
    async with batching(backend) as batcher:
        first = await occupied(batcher, backend)
        waiting = asyncio.create_task(ask(batcher, 1))
        await queued(batcher, 1)
        asyncio.get_running_loop().call_soon(backend.gate.set)
    assert await first == [0]
    assert await waiting == [2]
    with pytest.raises(ShuttingDown):
        await ask(batcher, 2)


async def test_an_execution_that_never_ends_does_not_keep_the_batcher_open() -> None:
    backend = GatedBackend()
    async with batching(backend, drain_s=0.01) as batcher:
        stuck = await occupied(batcher, backend)
        waiting = asyncio.create_task(ask(batcher, 1))
        await queued(batcher, 1)
    for task in (stuck, waiting):
        with pytest.raises(ShuttingDown):
            await task


async def test_a_hold_lets_a_batch_fill_up() -> None:
    backend = GatedBackend()
    async with batching(backend, Hold(30, max_batch_rows=3), max_batch_rows=3) as batcher:
        first = asyncio.create_task(ask(batcher, 1))
        await queued(batcher, 1)
        second = asyncio.create_task(ask(batcher, 2))
        await queued(batcher, 2)
        assert await ask(batcher, 3) == [6]
        await asyncio.gather(first, second)
    assert backend.batches == [[1, 2, 3]]


async def test_a_hold_ends_by_itself() -> None:
    backend = GatedBackend()
    async with batching(backend, Hold(0.002, max_batch_rows=3), max_batch_rows=3) as batcher:
        assert await ask(batcher, 1) == [2]


async def test_the_inputs_are_left_as_they_are() -> None:
    given = rows(1, 2)
    async with batching(GatedBackend()) as batcher:
        await batcher.submit(given, Deadline.after(SOON))
    assert given["x"].tolist() == [[1], [2]]
    assert row_count(given) == 2
