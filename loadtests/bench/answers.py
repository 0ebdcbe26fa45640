"""Holds a contender's answers against direct ONNX Runtime, before anything is measured."""

import asyncio
import http.client
import json
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from loadtests.bench.contenders import Contender
from loadtests.bench.failure import BenchFailure
from loadtests.bench.workload import Workload

CALLERS = 16  # several at once, so that a batch that mixes rows up is found out
TOGETHER = 64  # as many as in the load that is measured
_TOLERANCE = 1e-5
_TIMEOUT_S = 30


def check_answers(contender: Contender, workload: Workload, port: int) -> None:
    """Ask about every row, several at once. Raises `BenchFailure` on the first answer that is no
    200 or not what `hold` asks for."""
    with ThreadPoolExecutor(CALLERS) as pool:
        shares = [range(caller, len(workload.rows), CALLERS) for caller in range(CALLERS)]
        for _ in pool.map(lambda share: _check(contender, workload, port, share), shares):
            pass


def ask(contender: Contender, workload: Workload, port: int, row: int) -> tuple[int, bytes]:
    """Status and body of one answer. Raises `OSError` or `HTTPException` where none comes."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT_S)
    try:
        return _ask(connection, contender, workload, row)
    finally:
        connection.close()


def check_together(contender: Contender, workload: Workload, port: int) -> int:
    """As `check_answers`, over `TOGETHER` connections from one thread: what comes back together is
    asked together again, so that requests meet as they do under load. The rows are in an order
    that differs from call to call. Returns the number of answers, all of them right."""
    order = list(range(len(workload.rows)))
    random.shuffle(order)
    asyncio.run(_ask_together(contender, workload, port, order))
    return len(order)


def body_of(contender: Contender, workload: Workload, row: int) -> str:
    """What the contender is sent for a row, on one line."""
    return json.dumps(contender.body(workload, row), separators=(",", ":"))


def hold(contender: Contender, workload: Workload, row: int, body: bytes) -> None:
    """Raises `BenchFailure` where the answer holds another prediction than ONNX Runtime's own for
    the row, or other features than were written. A floor's answer is not looked into."""
    if contender.prediction is not None:
        given = contender.prediction(json.loads(body))
        expected = float(workload.expected[row])
        if not np.isclose(given, expected, rtol=0, atol=_TOLERANCE):
            raise BenchFailure(
                f"{contender.name} answered {given} for row {row}, ONNX Runtime says {expected}"
            )
    if contender.features is not None:
        values = np.array(contender.features(json.loads(body)), np.float32)
        if not np.array_equal(values, workload.rows[row]):
            raise BenchFailure(f"{contender.name} answered {values} for row {row}")


def _check(contender: Contender, workload: Workload, port: int, share: Sequence[int]) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT_S)
    try:
        for row in share:
            status, body = _ask(connection, contender, workload, row)
            if status != 200:
                raise BenchFailure(f"{contender.name} answered {status}: {body.decode()[:500]}")
            hold(contender, workload, row, body)
    finally:
        connection.close()


def _ask(
    connection: http.client.HTTPConnection, contender: Contender, workload: Workload, row: int
) -> tuple[int, bytes]:
    headers = {"Content-Type": "application/json"}
    body = body_of(contender, workload, row)
    connection.request("POST", contender.path(workload), body, headers)
    response = connection.getresponse()
    return response.status, response.read()


async def _ask_together(
    contender: Contender, workload: Workload, port: int, order: Sequence[int]
) -> None:
    left = iter(order)
    head = (
        f"POST {contender.path(workload)} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
        "Content-Type: application/json\r\nContent-Length: "
    )

    async def caller() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            for row in left:
                body = body_of(contender, workload, row)
                writer.write(f"{head}{len(body)}\r\n\r\n{body}".encode())
                status, answer = await _answer(reader)
                if status != 200:
                    raise BenchFailure(f"{contender.name} answered {status}: {answer.decode()}")
                hold(contender, workload, row, answer)
        finally:
            writer.close()

    try:
        async with asyncio.timeout(_TIMEOUT_S):
            await asyncio.gather(*(caller() for _ in range(TOGETHER)))
    except (OSError, asyncio.IncompleteReadError) as exc:
        raise BenchFailure(f"{contender.name} lost a request: {exc!r}") from exc


async def _answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """Status and body of the next answer; its length must be said."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(head.split(b"\r\ncontent-length:", 1)[1].split(b"\r\n", 1)[0])
    return int(head.split(b" ", 2)[1]), await reader.readexactly(length)
