"""What the Triton backend does with several endpoints, and with answers no real Triton gives."""

import asyncio
import contextlib
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from app.backends.backend import Event
from app.backends.triton import TritonBackend
from app.deadline import Deadline
from app.errors import BackendError, DeadlineExceeded, InvalidModel, ModelNotReady
from loadtests.triton_process import TritonProcess
from tests.backends.fake_triton import FakeTriton
from tests.backends.opened_triton import SOON, answered, opened, rows
from tests.tiny_models import onnx_model

NOBODY = "127.0.0.1:1"


async def test_the_answer_of_another_version_is_never_given() -> None:
    async with FakeTriton() as fake, opened([fake.endpoint], protocol="http") as backend:
        fake.version = "2"
        with pytest.raises(ModelNotReady, match="version 2 answered for version 1"):
            await backend.execute(rows(), SOON)


async def test_a_connection_that_was_kept_for_too_long_fails_no_caller() -> None:
    async with FakeTriton() as fake, opened([fake.endpoint], protocol="http") as backend:
        fake.hang_up_after = 4
        for _ in range(20):
            assert await answered(backend) == [5.0, 11.0]


async def test_what_a_connection_is_lost_of_is_sent_again_within_the_budget_and_told() -> None:
    events: list[Event] = []
    async with (
        FakeTriton() as fake,
        opened([fake.endpoint], tell=events.append, protocol="http") as backend,
    ):
        fake.dies = True
        with pytest.raises(ModelNotReady):
            await backend.execute(rows(), SOON)
    assert (fake.asked, events) == (2, ["sent_again"])


async def test_without_any_endpoint_nothing_is_opened() -> None:
    with pytest.raises(InvalidModel, match=r"no Triton has it ready: 127.0.0.1:1: .*refused"):
        async with opened([NOBODY], start_timeout_s=0):
            pass


async def test_the_start_waits_for_an_endpoint() -> None:
    async with FakeTriton() as fake:
        fake.is_ready = False
        opening = asyncio.create_task(_opened_and_closed(fake.endpoint))
        await fake.was_asked.wait()
        fake.is_ready = True
        await opening


async def test_an_endpoint_that_is_not_there_harms_nobody() -> None:
    events: list[Event] = []
    async with (
        FakeTriton() as fake,
        opened([NOBODY, fake.endpoint], tell=events.append, protocol="http") as backend,
    ):
        for _ in range(10):
            assert await answered(backend) == [5.0, 11.0]
        await backend.check()
    assert events == []


async def test_an_endpoint_with_another_signature_is_not_asked() -> None:
    async with FakeTriton() as good, FakeTriton() as other:
        other.outputs = [{"name": "y", "datatype": "FP64", "shape": [-1, 1]}]
        async with opened([good.endpoint, other.endpoint], protocol="http") as backend:
            for _ in range(10):
                await answered(backend)
    assert (good.asked, other.asked) == (10, 0)


async def test_what_is_under_way_is_spread_over_the_endpoints() -> None:
    async with AsyncExitStack() as stack:
        fakes = [await stack.enter_async_context(FakeTriton()) for _ in range(3)]
        endpoints = [fake.endpoint for fake in fakes]
        async with opened(endpoints, protocol="http", in_flight=2) as backend:
            assert backend.concurrency == 6
            before = await _until_all_are_asked(backend, fakes)
            await asyncio.gather(*(answered(backend) for _ in range(60)))
            assert _asked_since(before, fakes) == [20, 20, 20]


async def test_an_endpoint_that_keeps_failing_is_ejected() -> None:
    async with (
        FakeTriton() as good,
        FakeTriton() as bad,
        opened([good.endpoint, bad.endpoint], protocol="http") as backend,
    ):
        before = await _until_all_are_asked(backend, [good, bad])
        bad.failing = True
        failures = await _failures(backend, 100)
        assert failures == 5
        assert _asked_since(before, [good, bad]) == [95, 5]


async def test_endpoints_that_all_keep_failing_are_not_asked_until_they_are_well() -> None:
    async with AsyncExitStack() as stack:
        fakes = [await stack.enter_async_context(FakeTriton()) for _ in range(2)]
        endpoints = [fake.endpoint for fake in fakes]
        backend = await stack.enter_async_context(opened(endpoints, protocol="http"))
        await backend.warm_up(rows(), 2)
        for fake in fakes:
            fake.failing = True
        with pytest.raises(ModelNotReady, match="keeps failing"):
            await _failures(backend, 100)
        for fake in fakes:
            fake.failing = False
        await _until_up(backend)
        assert await _failures(backend, 10) == 0


async def test_short_deadlines_eject_nobody() -> None:
    async with AsyncExitStack() as stack:
        fakes = [await stack.enter_async_context(FakeTriton()) for _ in range(4)]
        endpoints = [fake.endpoint for fake in fakes]
        backend = await stack.enter_async_context(opened(endpoints, protocol="http"))
        await _until_all_are_asked(backend, fakes)
        for fake in fakes:
            fake.takes_s = 0.03
        for _ in range(40):
            with pytest.raises(DeadlineExceeded):
                await backend.execute(rows(), Deadline.after(0.01))
        before = [fake.asked for fake in fakes]
        for _ in range(20):
            await answered(backend)
        assert _asked_since(before, fakes) == [5] * 4


async def test_a_triton_whose_model_hangs_is_left_though_it_says_that_it_is_ready() -> None:
    async with (
        FakeTriton() as fake,
        opened([fake.endpoint], protocol="http", in_flight=4) as backend,
    ):
        await backend.warm_up(rows(), 2)
        fake.hangs = True
        with pytest.raises(ModelNotReady, match="keeps failing"):
            await _late_until_refused(backend)


async def test_no_more_than_half_of_the_endpoints_are_ejected() -> None:
    async with AsyncExitStack() as stack:
        fakes = [await stack.enter_async_context(FakeTriton()) for _ in range(3)]
        endpoints = [fake.endpoint for fake in fakes]
        backend = await stack.enter_async_context(opened(endpoints, protocol="http"))
        await backend.warm_up(rows(), 2)
        fakes[0].failing = fakes[1].failing = True
        await _failures(backend, 100)
        fakes[0].failing = fakes[1].failing = False
        await asyncio.wait_for(_until_asked(backend, fakes, 2), 20)


async def test_endpoints_that_answer_differently_are_refused_at_warm_up() -> None:
    async with FakeTriton() as one, FakeTriton() as other:
        other.answers = [5.0, 12.0]
        async with opened([one.endpoint, other.endpoint], protocol="http") as backend:
            with pytest.raises(InvalidModel, match="'y' is not the same at"):
                await backend.warm_up(rows(), 2)


@pytest.mark.triton
@pytest.mark.parametrize("protocol", ["grpc", "http"])
async def test_of_two_tritons_one_may_be_killed_under_load(
    triton: TritonProcess, protocol: str, tmp_path: Path
) -> None:
    other = TritonProcess(tmp_path)
    other.put("regression", onnx_model("regression").SerializeToString())
    endpoints = [triton.endpoint(protocol), other.endpoint(protocol)]
    with other:
        events: list[Event] = []
        async with opened(endpoints, tell=events.append, protocol=protocol, in_flight=2) as backend:

            async def ask(times: int) -> None:
                for turn in range(times):
                    assert await answered(backend, (turn, 1)) == [turn + 2.0]

            asking = [asyncio.create_task(ask(300)) for _ in range(4)]
            await answered(backend, (1, 2))
            other.kill()
            await asyncio.gather(*asking)
            assert events.count("sent_again") <= 10


async def _opened_and_closed(endpoint: str) -> None:
    async with opened([endpoint], protocol="http", start_timeout_s=60):
        pass


async def _failures(backend: TritonBackend, executions: int) -> int:
    failures = 0
    for _ in range(executions):
        try:
            await answered(backend)
        except BackendError:
            failures += 1
    return failures


async def _until_up(backend: TritonBackend) -> None:
    while True:
        try:
            return await backend.check()
        except ModelNotReady:
            await asyncio.sleep(0.01)


async def _until_all_are_asked(backend: TritonBackend, fakes: list[FakeTriton]) -> list[int]:
    """How often each was asked by then. One that was slow to say that it is ready is down at first:
    it is looked at again."""
    await _until_asked(backend, fakes, len(fakes))
    return [fake.asked for fake in fakes]


async def _until_asked(backend: TritonBackend, fakes: list[FakeTriton], count: int) -> None:
    while True:
        before = [fake.asked for fake in fakes]
        for _ in range(2 * len(fakes)):
            await answered(backend)
        if sum(asked > 0 for asked in _asked_since(before, fakes)) >= count:
            return
        await asyncio.sleep(0.05)


def _asked_since(before: list[int], fakes: list[FakeTriton]) -> list[int]:
    return [fake.asked - earlier for fake, earlier in zip(fakes, before, strict=True)]


async def _late_until_refused(backend: TritonBackend) -> None:
    while True:
        with contextlib.suppress(DeadlineExceeded):
            await backend.execute(rows(), Deadline.after(0.05))
