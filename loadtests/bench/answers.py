"""Holds a contender's answers against direct ONNX Runtime, before anything is measured."""

import http.client
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from loadtests.bench.contenders import Contender
from loadtests.bench.failure import BenchFailure
from loadtests.bench.workload import Workload

CALLERS = 16  # several at once, so that a batch that mixes rows up is found out
_TOLERANCE = 1e-5
_TIMEOUT_S = 30


def check_answers(contender: Contender, workload: Workload, port: int) -> None:
    """Ask about every row, several at once. Raises `BenchFailure` on the first answer that is no
    200 or holds another prediction than ONNX Runtime's own."""
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


def body_of(contender: Contender, workload: Workload, row: int) -> str:
    """What the contender is sent for a row, on one line."""
    return json.dumps(contender.body(workload.rows[row]), separators=(",", ":"))


def _check(contender: Contender, workload: Workload, port: int, share: Sequence[int]) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT_S)
    try:
        for row in share:
            status, body = _ask(connection, contender, workload, row)
            if status != 200:
                raise BenchFailure(f"{contender.name} answered {status}: {body.decode()[:500]}")
            if contender.prediction is not None:
                _hold(contender, json.loads(body), row, float(workload.expected[row]))
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


def _hold(contender: Contender, answer: Any, row: int, expected: float) -> None:
    assert contender.prediction is not None
    given = contender.prediction(answer)
    if not np.isclose(given, expected, rtol=0, atol=_TOLERANCE):
        raise BenchFailure(
            f"{contender.name} answered {given} for row {row}, ONNX Runtime says {expected}"
        )
