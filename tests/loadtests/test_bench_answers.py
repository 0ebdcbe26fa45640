"""Nobody is measured who answers wrongly, at any row, or not at all."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest

from loadtests.bench.answers import check_answers, check_together
from loadtests.bench.contenders import Contender
from loadtests.bench.failure import BenchFailure
from loadtests.bench.rows import ROWS as ALL_ROWS
from loadtests.bench.rows import as_fields, as_numbers, entities_of, varied_rows
from loadtests.bench.workload import Workload

ROWS = varied_rows(100, seed=7)
FIELDS = [as_fields(row) for row in ROWS]
WORKLOAD = Workload("tensor", "mlp", Path(), Path("none.onnx"), ROWS, ROWS.sum(axis=1), FIELDS)
"""The model is the sum of the row."""

SUMMER = Contender(
    name="summer",
    title="answers sums",
    kinds=("tensor",),
    command=lambda python, port, workload: [],
    path=lambda workload: "/sum",
    body=lambda workload, row: as_numbers(workload.rows[row]),
    prediction=lambda answer: answer["sum"],
)

FEATURES = replace(SUMMER, prediction=None, features=lambda answer: answer["features"])
"""Answers the features that it has for what it is asked about."""


Check: TypeAlias = Callable[[Contender, Workload, int], object]


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


@pytest.mark.parametrize("check", [check_answers, check_together])
def test_right_answers_are_accepted(check: Check) -> None:
    asked = []

    def answer(row: list[float]) -> tuple[int, Any]:
        asked.append(row)
        return 200, {"sum": sum(row)}

    with serving(answer) as port:
        check(SUMMER, WORKLOAD, port)
    assert sorted(asked) == sorted(as_numbers(row) for row in ROWS)


@pytest.mark.parametrize("check", [check_answers, check_together])
def test_one_wrong_answer_is_refused(check: Check) -> None:
    wrong = as_numbers(ROWS[63])

    def answer(row: list[float]) -> tuple[int, Any]:
        return 200, {"sum": sum(row) + (0.001 if row == wrong else 0)}

    with serving(answer) as port, pytest.raises(BenchFailure, match="row 63"):
        check(SUMMER, WORKLOAD, port)


def test_an_answer_for_another_row_is_refused() -> None:
    with (
        serving(lambda row: (200, {"sum": float(WORKLOAD.expected[0])})) as port,
        pytest.raises(BenchFailure, match="summer answered"),
    ):
        check_answers(SUMMER, WORKLOAD, port)


@pytest.mark.parametrize("check", [check_answers, check_together])
def test_a_refusal_is_no_answer(check: Check) -> None:
    with (
        serving(lambda row: (503, {"error": "too busy"})) as port,
        pytest.raises(BenchFailure, match=r"503.*too busy"),
    ):
        check(SUMMER, WORKLOAD, port)


def test_features_of_another_entity_are_refused() -> None:
    with serving(lambda row: (200, {"features": row})) as port:
        check_answers(FEATURES, WORKLOAD, port)
    swapped = as_numbers(ROWS[5])
    with (
        serving(lambda row: (200, {"features": swapped})) as port,
        pytest.raises(BenchFailure, match="summer answered"),
    ):
        check_answers(FEATURES, WORKLOAD, port)


def test_each_entity_belongs_to_one_row() -> None:
    entities = [entities_of(row) for row in range(ALL_ROWS)]
    for key in ("driver_id", "customer_id"):
        assert len({one[key] for one in entities}) == ALL_ROWS


def test_no_two_rows_are_the_same() -> None:
    rows = varied_rows(2000, seed=1)
    assert len(np.unique(rows, axis=0)) == 2000
    assert np.array_equal(np.array([as_numbers(row) for row in rows], np.float32), rows)
