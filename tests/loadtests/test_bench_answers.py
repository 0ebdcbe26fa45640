"""Nobody is measured who answers wrongly, at any row, or not at all."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loadtests.bench.answers import check_answers
from loadtests.bench.contenders import Contender
from loadtests.bench.failure import BenchFailure
from loadtests.bench.workload import Workload, as_numbers, varied_rows

ROWS = varied_rows(100, seed=7)
WORKLOAD = Workload("mlp", Path(), Path("none.onnx"), ROWS, ROWS.sum(axis=1))
"""The model is the sum of the row."""

SUMMER = Contender(
    name="summer",
    title="answers sums",
    peer=None,
    command=lambda python, port: [],
    path=lambda workload: "/sum",
    body=as_numbers,
    prediction=lambda answer: answer["sum"],
)


@contextmanager
def serving(answer: Callable[[list[float]], tuple[int, Any]]) -> Iterator[int]:
    """The port of a server that answers a row with a status and a document."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            row = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, document = answer(row)
            body = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: Any) -> None:
            """Nothing on the terminal."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def test_right_answers_are_accepted() -> None:
    asked = []

    def answer(row: list[float]) -> tuple[int, Any]:
        asked.append(row)
        return 200, {"sum": sum(row)}

    with serving(answer) as port:
        check_answers(SUMMER, WORKLOAD, port)
    assert sorted(asked) == sorted(as_numbers(row) for row in ROWS)


def test_one_wrong_answer_is_refused() -> None:
    wrong = as_numbers(ROWS[63])

    def answer(row: list[float]) -> tuple[int, Any]:
        return 200, {"sum": sum(row) + (0.001 if row == wrong else 0)}

    with serving(answer) as port, pytest.raises(BenchFailure, match="row 63"):
        check_answers(SUMMER, WORKLOAD, port)


def test_an_answer_for_another_row_is_refused() -> None:
    with (
        serving(lambda row: (200, {"sum": float(WORKLOAD.expected[0])})) as port,
        pytest.raises(BenchFailure, match="summer answered"),
    ):
        check_answers(SUMMER, WORKLOAD, port)


def test_a_refusal_is_no_answer() -> None:
    with (
        serving(lambda row: (503, {"error": "too busy"})) as port,
        pytest.raises(BenchFailure, match=r"503.*too busy"),
    ):
        check_answers(SUMMER, WORKLOAD, port)


def test_no_two_rows_are_the_same() -> None:
    rows = varied_rows(2000, seed=1)
    assert len(np.unique(rows, axis=0)) == 2000
    assert np.array_equal(np.array([as_numbers(row) for row in rows], np.float32), rows)
