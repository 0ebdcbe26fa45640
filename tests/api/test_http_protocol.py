"""What comes over the wire, well framed or not, and what goes back."""

import asyncio
import json
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.api.http_serving import MAX_BODY_BYTES, PREDICT, Serving, chunked, request, serving

pytestmark = pytest.mark.asyncio(loop_scope="module")

TE = "Transfer-Encoding: chunked"
H2C = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAAP__")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared() -> AsyncIterator[Serving]:
    async with serving() as opened:
        yield opened


WELL_FRAMED = {
    "by length": request(b'{"a": 1}'),
    "in chunks": request(chunked(b'{"a"', b": 1}"), framing=TE),
    "in chunks of one byte": request(chunked(*(b"%c" % c for c in b'{"a": 1}')), framing=TE),
    "with a chunk extension": request(b'8;x=y\r\n{"a": 1}\r\n0\r\n\r\n', framing=TE),
    "with a trailer": request(chunked(b'{"a": 1}', trailer=b"Host: other\r\n"), framing=TE),
    "behind empty lines": b"\r\n\r\n" + request(b'{"a": 1}'),
    "to an absolute target": request(b'{"a": 1}', target=f"http://test{PREDICT}"),
    "to an escaped target": request(b'{"a": 1}', target="/v1/models/%6d%3Apredict"),
    "with a query": request(b'{"a": 1}', target=f"{PREDICT}?x=y"),
    "by HTTP/1.0": request(b'{"a": 1}', version="1.0"),
    "as it is": request(b'{"a": 1}', "Content-Encoding: identity"),
    "offering HTTP/2": request(b'{"a": 1}', *H2C),
    "offering HTTP/2, in chunks": request(chunked(b'{"a": 1}'), *H2C, framing=TE),
    "with a long head": request(b'{"a": 1}', *(f"X-{n}: {'x' * 1000}" for n in range(60))),
}


@pytest.mark.parametrize("data", WELL_FRAMED.values(), ids=WELL_FRAMED)
async def test_a_prediction_gets_its_body(shared: Serving, data: bytes) -> None:
    answer = await shared.ask(data)
    assert answer.status == 200
    assert answer.body == b'{"a": 1}'


@pytest.mark.parametrize(
    "name", ["by length", "in chunks", "with a trailer", "offering HTTP/2, in chunks"]
)
async def test_a_request_may_come_in_two_pieces_of_any_size(shared: Serving, name: str) -> None:
    data = WELL_FRAMED[name]
    async with await shared.connect() as client:
        for cut in range(1, len(data)):
            await client.send(data[:cut])
            await asyncio.sleep(0)
            await client.send(data[cut:])
            assert (await client.answer()).body == b'{"a": 1}'


async def test_a_request_may_come_byte_by_byte(shared: Serving) -> None:
    async with await shared.connect() as client:
        for byte in WELL_FRAMED["in chunks"]:
            await client.send(b"%c" % byte)
            await asyncio.sleep(0)
        assert (await client.answer()).body == b'{"a": 1}'


async def test_what_repeats_the_head_of_others_is_read_with_its_own_body(shared: Serving) -> None:
    async with await shared.connect() as client:
        for n in range(20):
            await client.send(request(b"%04d" % n))
            assert (await client.answer()).body == b"%04d" % n
        # The same head again, with more behind it, and with less.
        await client.send(request(b"more") + request(b"last"))
        assert [(await client.answer()).body for _ in range(2)] == [b"more", b"last"]
        await client.send(request(b"less")[:-1])
        await client.send(b"!")
        assert (await client.answer()).body == b"les!"


async def test_a_head_that_others_repeat_keeps_its_own_meaning(shared: Serving) -> None:
    refused = request(b"", target="/v1/models/none:predict")
    others = request(b"x" * 60)
    # What follows the refused head is as long as the length that the request behind it declares.
    unfinished = request(b"", framing=f"Content-Length: {len(others)}").ljust(len(others), b"y")
    for _ in range(2):
        async with await shared.connect() as client:
            await client.send(refused + unfinished[: len(others)])
            assert (await client.answer()).status == 404
    async with await shared.connect() as client:
        await client.send(refused + others)
        assert [(await client.answer()).status for _ in range(2)] == [404, 200]


MALFORMED = {
    "length and chunks": request(b"0\r\n\r\n", "Content-Length: 5", framing=TE),
    "chunks and length": request(b"0\r\n\r\n", TE, framing="Content-Length: 5"),
    "two lengths": request(b"{}", "Content-Length: 3"),
    "the same length twice": request(b"{}", "Content-Length: 2"),
    "a list of lengths": request(b"{}", framing="Content-Length: 2, 2"),
    "a signed length": request(b"{}", framing="Content-Length: +2"),
    "a hexadecimal length": request(b"{}", framing="Content-Length: 0x2"),
    "a length past 64 bits": request(b"{}", framing=f"Content-Length: {2**64}"),
    "a folded line": request(b"{}", "X: a\r\n b"),
    "bare line feeds": request(b"{}").replace(b"\r\n", b"\n"),
    "one bare line feed": request(b"{}", "X: a\nY: b"),
    "a bare carriage return": request(b"{}", "X: a\rY: b"),
    "a space before the colon": request(b"{}", "X : a"),
    "a nameless header": request(b"{}", ": a"),
    "a NUL": request(b"{}", "X: \0"),
    "a coding before chunked": request(b"0\r\n\r\n", framing="Transfer-Encoding: gzip, chunked"),
    "chunked twice": request(b"0\r\n\r\n", TE, framing=TE),
    "an unknown coding": request(b"0\r\n\r\n", framing="Transfer-Encoding: xchunked"),
    "chunks in HTTP/1.0": request(b"0\r\n\r\n", framing=TE, version="1.0"),
    "a chunk behind a bare line feed": request(b"2\n{}\r\n0\r\n\r\n", framing=TE),
    "a chunk of no size": request(b"zz\r\n{}\r\n0\r\n\r\n", framing=TE),
    "a chunk past 64 bits": request(b"f" * 17 + b"\r\n{}", framing=TE),
    "a chunk longer than it says": request(b"2\r\n{ }\r\n0\r\n\r\n", framing=TE),
    "no host": request(b"{}").replace(b"Host: localhost\r\n", b""),
    "two hosts": request(b"{}", "Host: other"),
    "HTTP/0.9": b"GET /v2/health/live\r\n\r\n",
    "HTTP/2": request(b"{}", version="2.0"),
    "HTTP/2 at once": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "a method in lower case": request(b"{}", method="post"),
    "no method of HTTP": request(b"{}", method="BREW\0"),
    "a tunnel": request(b"", method="CONNECT", target="test:443"),
    "no target": request(b"{}", target="predict"),
    "a target not in ASCII": request(b"{}", target="/v1/models/é:predict"),
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED)
async def test_what_is_no_request_is_refused_and_the_connection_closed(
    shared: Serving, data: bytes
) -> None:
    async with await shared.connect() as client:
        await client.send(data + request(b"smuggled"))
        answer = await client.answer()
        assert answer.status == 400
        assert json.loads(answer.body)["error"]["code"] == "invalid_input"
        assert answer.headers["connection"] == "close"
        assert await client.is_closed()
    assert not any(call.body == b"smuggled" for call in shared.predictions.opened)


async def test_requests_before_a_malformed_one_are_answered_first(shared: Serving) -> None:
    async with await shared.connect() as client:
        await client.send(request(b"1") + request(b"2") + MALFORMED["two lengths"])
        answers = [await client.answer() for _ in range(3)]
    assert [answer.status for answer in answers] == [200, 200, 400]
    assert [answer.body for answer in answers[:2]] == [b"1", b"2"]


async def test_what_comes_behind_a_malformed_one_is_not_looked_at() -> None:
    async with serving() as fresh, await fresh.connect() as client:
        fresh.predictions.held = True
        await client.send(request(b"first") + MALFORMED["two lengths"])
        call = await fresh.predictions.begun.get()
        await client.send(request(b"smuggled"))
        await asyncio.sleep(0.01)
        call.answer()
        assert [(await client.answer()).status for _ in range(2)] == [200, 400]
        assert await client.is_closed()
        assert fresh.predictions.opened == [call]


class TestPipelining:
    async def test_answers_come_in_the_order_of_the_requests(self, shared: Serving) -> None:
        sent = [request(b"%d" % n) for n in range(300)]
        sent[7] = request(b"x" * 7, target="/echo")
        sent[8] = request(b"", method="GET", target="/echo")
        sent[9] = request(chunked(b"x" * 9), target="/echo", framing=TE)
        async with await shared.connect() as client:
            await client.send(b"".join(sent))
            answers = [await client.answer() for _ in sent]
        expected = [b"%d" % n for n in range(300)]
        assert [a.body for a in answers if b"length" not in a.body] == expected[:7] + expected[10:]
        assert [json.loads(a.body)["length"] for a in answers[7:10]] == [7, 0, 9]

    async def test_nothing_counts_behind_the_last_request(self, shared: Serving) -> None:
        async with await shared.connect() as client:
            await client.send(request(b"1", "Connection: close") + request(b"2"))
            assert (await client.answer()).body == b"1"
            assert await client.is_closed()


class TestMethods:
    @pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"])
    async def test_predict_takes_post(self, shared: Serving, method: str) -> None:
        answer = await shared.ask(request(b"", method=method))
        assert answer.status == 405
        assert answer.headers["allow"] == "POST"
        assert json.loads(answer.body)["error"]["code"] == "not_found"

    async def test_head_has_the_length_of_a_body_that_does_not_come(self, shared: Serving) -> None:
        async with await shared.connect() as client:
            await client.send(request(b"", "Connection: close", method="HEAD"))
            head = await client.raw(12)
            assert head == b"HTTP/1.1 405"
            rest = await client.raw_rest()
        assert b"content-length: " in rest
        assert rest.endswith(b"\r\n\r\n")

    async def test_the_application_answers_what_is_no_prediction(self, shared: Serving) -> None:
        answer = await shared.ask(request(b"12", target="/echo?a=b"))
        assert json.loads(answer.body) == {"length": 2, "query": "a=b"}

    async def test_an_offer_of_another_protocol_is_declined(self, shared: Serving) -> None:
        async with await shared.connect() as client:
            upgrade = ("Connection: Upgrade", "Upgrade: websocket")
            await client.send(request(b"", *upgrade, method="GET", target="/echo"))
            assert (await client.answer()).status == 200
            await client.send(request(b"next"))
            assert (await client.answer()).body == b"next"


class TestHeaders:
    async def test_a_clients_own_id_comes_back(self, shared: Serving) -> None:
        answer = await shared.ask(request(b"{}", "X-Request-Id: mine"))
        assert answer.headers["x-request-id"] == "mine"
        assert answer.headers["content-type"] == "application/json"
        assert "date" in answer.headers

    async def test_an_id_that_is_not_fit_to_be_sent_does_not(self, shared: Serving) -> None:
        answer = await shared.ask(request(b"{}", "X-Request-Id: a b"))
        assert "x-request-id" not in answer.headers

    @pytest.mark.parametrize(
        ("version", "header"), [("1.0", ""), ("1.0", "Connection: keep-alive"), ("1.1", "")]
    )
    async def test_the_connection_lasts_by_the_rules_of_its_version(
        self, shared: Serving, version: str, header: str
    ) -> None:
        async with await shared.connect() as client:
            await client.send(request(b"{}", header, version=version))
            answer = await client.answer()
            assert answer.headers.get("connection") == (None if version == "1.1" else "close")
            assert version == "1.1" or await client.is_closed()

    @pytest.mark.parametrize("target", [PREDICT, "/echo"])
    async def test_who_waits_for_our_word_gets_it(self, shared: Serving, target: str) -> None:
        data = request(b"12", "Expect: 100-continue", target=target)
        async with await shared.connect() as client:
            await client.send(data[:-2])
            assert await client.raw(25) == b"HTTP/1.1 100 Continue\r\n\r\n"
            await client.send(data[-2:])
            assert (await client.answer()).status == 200

    async def test_who_is_refused_is_not_asked_for_the_body(self, shared: Serving) -> None:
        data = request(b"12", "Expect: 100-continue", target="/v1/models/none:predict")
        async with await shared.connect() as client:
            await client.send(data[:-2])
            assert (await client.answer()).status == 404
            assert await client.is_closed()

    @pytest.mark.parametrize("coding", ["gzip", "br", "identity, gzip"])
    async def test_a_body_in_disguise_is_refused(self, shared: Serving, coding: str) -> None:
        answer = await shared.ask(request(b"{}", f"Content-Encoding: {coding}"))
        assert answer.status == 400
        assert json.loads(answer.body)["error"]["field"] == "Content-Encoding"


class TestSizes:
    @pytest.mark.parametrize("target", [PREDICT, "/echo"])
    async def test_a_body_up_to_the_limit_is_read(self, shared: Serving, target: str) -> None:
        body = b"x" * MAX_BODY_BYTES
        assert (await shared.ask(request(body, target=target))).status == 200
        in_chunks = request(chunked(body[1:], b"x"), target=target, framing=TE)
        assert (await shared.ask(in_chunks)).status == 200

    @pytest.mark.parametrize("target", [PREDICT, "/echo"])
    @pytest.mark.parametrize("framing", [None, TE], ids=["length", "chunks"])
    async def test_a_large_body_is_read_as_fast_as_it_is_taken(
        self, target: str, framing: str | None
    ) -> None:
        body = b"x" * 3_000_000
        data = body if framing is None else chunked(*[body[:10_000]] * 300)
        async with serving(max_body_bytes=len(body)) as large, await large.connect() as client:
            sending = asyncio.create_task(
                client.send(request(data, target=target, framing=framing))
            )
            assert (await client.answer()).status == 200
            await sending

    @pytest.mark.parametrize("target", [PREDICT, "/echo"])
    async def test_a_length_over_the_limit_is_refused_without_the_body(
        self, shared: Serving, target: str
    ) -> None:
        head = request(b"", target=target, framing=f"Content-Length: {10**10}")
        answer = await shared.ask(head)
        assert answer.status == 413
        assert json.loads(answer.body)["error"]["code"] == "payload_too_large"

    @pytest.mark.parametrize("target", [PREDICT, "/echo"])
    async def test_an_endless_body_is_refused_and_its_sender_can_read_that(
        self, shared: Serving, target: str
    ) -> None:
        async with await shared.connect() as client:
            await client.send(request(b"", target=target, framing=TE))
            for _ in range(20):
                await client.send(b"1000\r\n" + b"x" * 4096 + b"\r\n")
                await asyncio.sleep(0.001)
            assert (await client.answer()).status == 413
            assert await client.is_closed()

    @pytest.mark.parametrize(
        "line",
        [
            "GET /" + "x" * 70_000,
            "GET / HTTP/1.1\r\nHost: localhost\r\nX: " + "x" * 70_000,
            "GET / HTTP/1.1\r\n" + "X: x\r\n" * 14_000,
            f"POST {PREDICT} HTTP/1.1\r\nHost: localhost\r\n{TE}\r\n\r\n0\r\nX: " + "x" * 70_000,
            f"POST {PREDICT} HTTP/1.1\r\nHost: localhost\r\n{TE}\r\n\r\n2;" + "x" * 70_000,
        ],
        ids=["target", "header", "headers", "trailer", "chunk extension"],
    )
    async def test_a_head_over_the_limit_is_refused(self, shared: Serving, line: str) -> None:
        async with await shared.connect() as client:
            await client.send(line.encode())
            answer = await client.answer()
            assert answer.status == 431
            assert json.loads(answer.body)["error"]["code"] == "payload_too_large"
            assert await client.is_closed()

    async def test_what_is_little_is_thrown_away_for_the_next_request(
        self, shared: Serving
    ) -> None:
        data = request(b"12", target="/v1/models/none:predict")
        async with await shared.connect() as client:
            await client.send(data[:-1])
            assert (await client.answer()).status == 404
            await client.send(data[-1:] + request(b"next"))
            assert (await client.answer()).body == b"next"


async def test_refused_predictions_are_counted_by_model_and_code() -> None:
    async with serving() as fresh:
        await fresh.ask(request(b"", framing=f"Content-Length: {10**10}"))
        await fresh.ask(request(chunked(b"x" * 1001), framing=TE))
        await fresh.ask(request(b"", method="GET"))
        await fresh.ask(request(b"{}", "Content-Encoding: gzip"))
        assert fresh.counted("hikyaku_requests_total") == {
            "m,payload_too_large": 2,
            "m,not_found": 1,
            "m,invalid_input": 1,
        }
