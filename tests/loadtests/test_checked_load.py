"""The checked load accounts for every request that it sent."""

import asyncio
import time

from loadtests.checked_load import LOST, REFUSED, WRONG, CheckedLoad

BODIES = [b"%d" % number for number in range(100)]


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answers a number with itself; divisible by 10 with 503, by 7 not at all, by 3 wrongly."""
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            number = int(await reader.readexactly(int(head.rpartition("Content-Length: ")[2])))
            if number % 7 == 0:
                return
            body = b"%d" % (number if number % 3 else number + 1)
            status = b"200 OK" if number % 10 else b"503 Service Unavailable"
            writer.write(b"HTTP/1.1 %b\r\nContent-Length: %d\r\n\r\n" % (status, len(body)))
            await asyncio.sleep(0)
            writer.write(body)
    except asyncio.IncompleteReadError:
        return
    finally:
        writer.close()


def judge(body: bytes, question: int) -> tuple[int, str]:
    return question, "" if body == BODIES[question] else "wrong"


async def test_every_request_has_its_own_outcome() -> None:
    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with CheckedLoad(port, "/ask", BODIES, judge, connections=4) as load:
            until_s = time.monotonic() + 0.3
            await load.open_loop(2000, lambda: time.monotonic() > until_s)
            assert await load.closed_loop(0.1) > 100
            await load.ask_each()
    asked = [*load.ledger.in_order_of_sending()]
    assert len(asked) > 100
    assert {LOST, REFUSED, WRONG} < {each.version for each in asked}
    right = {each.version for each in asked if each.version >= 0}
    assert right == {n for n in right if n % 10 and n % 7 and n % 3}
    assert load.ledger.faults.keys() == {"lost", "status 503", "wrong answer"}
    assert all(each.intended_s <= each.sent_s <= each.done_s for each in asked)
