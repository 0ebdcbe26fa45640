"""What a connection may take, in time and in memory, and how it ends."""

import asyncio
import json
import tracemalloc
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import pytest

from app.api.http_door import HttpLimits
from app.api.http_messages import MessageParser
from app.errors import ModelNotReady, Overloaded
from tests.api.http_serving import PREDICT, Client, Serving, request, serving

SHORT = HttpLimits(
    head_s=0.1, body_s=0.1, keep_alive_s=0.1, write_s=0.1, linger_s=0.1, look_every_s=0.02
)
TE = "Transfer-Encoding: chunked"


@pytest.fixture
async def patient() -> AsyncIterator[Serving]:
    async with serving() as opened:
        yield opened


@pytest.fixture
async def impatient() -> AsyncIterator[Serving]:
    async with serving(SHORT) as opened:
        yield opened


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not holds():  # noqa: ASYNC110 - the server tells nobody
            await asyncio.sleep(0.005)


async def drip(client: Client, data: bytes) -> None:
    """Byte by byte, until the server has enough of it."""
    for byte in data:
        await client.send(b"%c" % byte)
        await asyncio.sleep(0.005)


async def ask_on(client: Client) -> None:
    async with asyncio.timeout(10):
        while True:
            await client.send(request(b"{}"))
            await asyncio.sleep(0)


class TestDeadlines:
    async def test_a_connection_that_never_says_anything_is_closed(
        self, impatient: Serving
    ) -> None:
        async with await impatient.connect() as client:
            assert await client.is_closed()
        assert impatient.counted("hikyaku_closed_connections_total") == {"idle": 1}

    async def test_so_is_one_that_has_no_more_to_ask(self, impatient: Serving) -> None:
        async with await impatient.connect() as client:
            await client.send(request(b"{}"))
            assert (await client.answer()).status == 200
            assert await client.is_closed()

    @pytest.mark.parametrize(
        ("begun", "code"),
        [
            (b"POST /", "head_timeout"),
            (request(b"")[:-4] + b"\r\nX: ", "head_timeout"),
            (request(b"{}") + b"GET / HTTP/1.1\r\nX: ", "head_timeout"),
            (request(b"", framing="Content-Length: 500"), "body_timeout"),
            (request(b"", framing=TE) + b"ff\r\n", "body_timeout"),
        ],
        ids=["line", "headers", "second head", "body", "chunk"],
    )
    async def test_bytes_that_drip_do_not_buy_time(
        self, impatient: Serving, begun: bytes, code: str
    ) -> None:
        async with await impatient.connect() as client:
            await client.send(begun)
            dripping = asyncio.create_task(drip(client, b"x" * 500))
            answer = await client.answer()
            if answer.status == 200:
                answer = await client.answer()
            assert answer.status == 408
            assert json.loads(answer.body)["error"]["code"] == "deadline_exceeded"
            assert await client.is_closed()
            dripping.cancel()
        assert impatient.counted("hikyaku_closed_connections_total") == {code: 1}

    async def test_nor_do_they_for_the_application(self, impatient: Serving) -> None:
        async with await impatient.connect() as client:
            await client.send(request(b"", target="/echo", framing="Content-Length: 500"))
            assert (await client.answer()).status == 408
            assert await client.is_closed()

    async def test_a_body_that_is_late_counts_as_a_refused_prediction(
        self, impatient: Serving
    ) -> None:
        async with await impatient.connect() as client:
            await client.send(request(b"", framing="Content-Length: 500"))
            assert (await client.answer()).status == 408
        assert impatient.counted("hikyaku_requests_total") == {"m,deadline_exceeded": 1}

    async def test_a_prediction_under_way_has_no_deadline_here(self, impatient: Serving) -> None:
        impatient.predictions.held = True
        async with await impatient.connect() as client, await impatient.connect() as idle:
            await client.send(request(b"{}"))
            call = await impatient.predictions.begun.get()
            assert await idle.is_closed()  # the server has looked at them all
            call.answer()
            assert (await client.answer()).status == 200


class TestSlowReaders:
    async def test_a_client_that_takes_no_answers_is_cut_off(self) -> None:
        async with serving(SHORT) as served:
            served.predictions.answer = b"x" * 100_000
            async with await served.connect(receive_bytes=4096) as client:
                client.pause()
                with pytest.raises(ConnectionError):
                    await ask_on(client)
            await until(lambda: not served.counted("hikyaku_open_connections"))
            assert served.counted("hikyaku_closed_connections_total") == {"slow_reader": 1}

    async def test_nothing_more_is_predicted_for_it(self, patient: Serving) -> None:
        patient.predictions.answer = b"x" * 1_000_000
        async with await patient.connect(receive_bytes=65536) as client:
            await client.send(request(b"{}") * 20)
            await asyncio.sleep(0.05)
            assert len(patient.predictions.opened) < 20  # the kernel takes a few
            for _ in range(20):
                assert len((await client.answer()).body) == 1_000_000


class TestBudget:
    async def test_large_bodies_that_come_slowly_find_no_room(self, patient: Serving) -> None:
        budget = patient.application.hot_paths.bodies
        assert budget.hold(64 * 1024 * 1024 - 600) is None
        head = request(b"", framing="Content-Length: 1000")
        async with await patient.connect() as first, await patient.connect() as second:
            await first.send(head + b"x" * 500)
            await until(lambda: bool(patient.predictions.opened))
            await second.send(head + b"x" * 500)
            answer = await second.answer()
            assert answer.status == 503
            assert json.loads(answer.body)["error"]["code"] == "overloaded"
            await first.send(b"x" * 500)
            assert (await first.answer()).status == 200
        await until(lambda: not patient.counted("hikyaku_open_connections"))
        assert budget.hold(600) is None  # all is given back


class TestFraming:
    async def test_small_chunks_buy_no_room_for_trailers(self, patient: Serving) -> None:
        small = b"1\r\nx\r\n" * 900 + b"0\r\n"
        async with await patient.connect() as client:
            await client.send(request(small + b"a:\r\n" * 20_000, framing=TE))
            assert (await client.answer()).status == 431

    async def test_a_body_in_small_pieces_takes_little_more_than_its_size(self) -> None:
        parser = MessageParser(max_head_bytes=65536)
        parser.feed(request(b"", framing=TE))
        pieces = b"2\r\nxy\r\n" * 500
        tracemalloc.start()
        try:
            for _ in range(100):
                parser.feed(pieces)
            taken, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert parser.messages[0].size == 100_000
        assert taken < 200_000


class TestPipelining:
    async def test_one_request_of_a_connection_is_under_way_at_a_time(
        self, patient: Serving
    ) -> None:
        patient.predictions.held = True
        async with await patient.connect() as client, await patient.connect() as another:
            await client.send(request(b"1") + request(b"2") + request(b"3")[:-1])
            first = await patient.predictions.begun.get()
            await client.send(b"3")
            await another.send(request(b"other"))
            other = await patient.predictions.begun.get()
            assert other.body == b"other"  # and not 2
            for expected in (b"1", b"2", b"3"):
                first.answer()
                assert (await client.answer()).body == expected
                if expected != b"3":
                    first = await patient.predictions.begun.get()

    async def test_what_is_sent_ahead_stays_with_the_client(self, patient: Serving) -> None:
        patient.predictions.held = True
        async with await patient.connect() as client:
            await client.send(request(b"{}"))
            call = await patient.predictions.begun.get()
            sending = asyncio.create_task(client.send(request(b"x" * 999) * 5_000))
            await asyncio.sleep(0.1)
            assert not sending.done()
            call.answer()
            assert (await client.answer()).body == b"{}"
            patient.predictions.held = False
            (await patient.predictions.begun.get()).answer()
            for _ in range(5_000):
                assert len((await client.answer()).body) == 999
            await sending

    async def test_who_is_answered_at_once_does_not_keep_others_waiting(
        self, patient: Serving
    ) -> None:
        opened = patient.predictions.opened
        at_once = [0]
        async with await patient.connect() as client:
            await client.send(request(b"{}") * 2000)
            while len(opened) < 2000:
                before = len(opened)
                await asyncio.sleep(0)  # a turn of the loop
                at_once.append(len(opened) - before)
            for _ in range(2000):
                assert (await client.answer()).status == 200
        assert max(at_once) < 100

    async def test_who_sends_ahead_while_refused_is_closed(self) -> None:
        async with serving(replace(SHORT, pause_s=0.01)) as served:
            served.predictions.refusal = Overloaded("full", retry_after_s=1)
            async with await served.connect() as client:
                await client.send(request(b"{}") * 10)
                answers = [await client.answer() for _ in range(2)]
                assert [answer.status for answer in answers] == [503, 503]
                assert "connection" not in answers[0].headers
                assert answers[1].headers["connection"] == "close"
                assert answers[1].headers["retry-after"] == "1"
                assert await client.is_closed()
            assert served.counted("hikyaku_closed_connections_total") == {"refused_ahead": 1}

    async def test_so_is_one_that_is_refused_for_another_reason_for_now(
        self, impatient: Serving
    ) -> None:
        impatient.predictions.refusal = ModelNotReady("not warm")
        async with await impatient.connect() as client:
            await client.send(request(b"{}") * 10)
            assert [(await client.answer()).status for _ in range(2)] == [503, 503]
            assert await client.is_closed()

    async def test_who_waits_for_its_refusal_is_not(self, patient: Serving) -> None:
        patient.predictions.refusal = Overloaded("full", retry_after_s=1)
        async with await patient.connect() as client:
            for _ in range(5):
                await client.send(request(b"{}"))
                assert (await client.answer()).status == 503
            patient.predictions.refusal = None
            await client.send(request(b"{}"))
            assert (await client.answer()).status == 200

    async def test_who_sends_ahead_goes_on_after_a_pause(self, patient: Serving) -> None:
        patient.predictions.refusal = Overloaded("full", retry_after_s=1)
        async with await patient.connect() as client:
            await client.send(request(b"1") + request(b"2"))
            assert (await client.answer()).status == 503
            patient.predictions.refusal = None
            assert (await client.answer()).body == b"2"


class TestDisconnects:
    @pytest.mark.parametrize(
        "ahead",
        [b"", request(b"{}")[:20], request(b"{}") * 10, request(b"x" * 999) * 14],
        ids=["nothing", "a part", "ten", "almost 16 KiB"],
    )
    @pytest.mark.parametrize("how", ["close", "reset"])
    async def test_a_client_that_goes_leaves_its_prediction(
        self, patient: Serving, how: str, ahead: bytes
    ) -> None:
        patient.predictions.held = True
        async with await patient.connect() as client:
            await client.send(request(b"{}") + ahead[:100])
            call = await patient.predictions.begun.get()
            await client.send(ahead[100:])
            if how == "reset":
                client.reset()
        async with asyncio.timeout(10):
            await call.left.wait()
        await until(lambda: not patient.counted("hikyaku_open_connections"))
        assert patient.predictions.opened == [call]  # and nothing of what was sent ahead

    async def test_so_does_one_whose_body_was_still_to_come(self, patient: Serving) -> None:
        async with await patient.connect() as client:
            await client.send(request(b"{}")[:-1])
            await until(lambda: bool(patient.predictions.opened))
        async with asyncio.timeout(10):
            await patient.predictions.opened[0].left.wait()

    async def test_many_that_go_leave_nothing_behind(self, patient: Serving) -> None:
        clients = [await patient.connect() for _ in range(50)]
        for number, client in enumerate(clients):
            target = PREDICT if number % 2 else "/echo"
            await client.send(request(b"{}", target=target)[: 20 + 2 * number])
        for client in clients:
            client.reset()
        await until(lambda: not patient.counted("hikyaku_open_connections"))
        assert not patient.server.server_state.connections
        await until(lambda: not patient.server.server_state.tasks)


class TestDraining:
    async def test_what_is_under_way_is_answered_and_is_the_last(self) -> None:
        async with serving(SHORT) as served:
            served.predictions.held = True
            async with await served.connect() as client:
                await client.send(request(b"{}"))
                call = await served.predictions.begun.get()
                served.server.should_exit = True
                await asyncio.sleep(0.2)
                call.answer()
                answer = await client.answer()
                assert answer.status == 200
                assert answer.headers["connection"] == "close"
                assert await client.is_closed()

    @pytest.mark.parametrize("target", [PREDICT, "/echo"])
    async def test_an_idle_connection_gets_a_last_answer(self, target: str) -> None:
        async with serving(HttpLimits(drain_s=0.5, linger_s=0.1, look_every_s=0.02)) as served:
            async with await served.connect() as client, await served.connect() as silent:
                await client.send(request(b"{}"))
                assert (await client.answer()).status == 200
                served.server.should_exit = True
                await asyncio.sleep(0.2)  # uvicorn looks ten times a second
                await client.send(request(b"{}", target=target))
                answer = await client.answer()
                assert answer.status == 200
                assert answer.headers["connection"] == "close"
                assert await silent.is_closed()
            assert served.counted("hikyaku_closed_connections_total") == {"drained": 1}

    async def test_a_body_under_way_may_still_come(self, patient: Serving) -> None:
        async with await patient.connect() as client:
            await client.send(request(b"{}")[:-1])
            await until(lambda: bool(patient.predictions.opened))
            patient.server.should_exit = True
            await asyncio.sleep(0.2)
            await client.send(b"}")
            assert (await client.answer()).body == b"{}"
