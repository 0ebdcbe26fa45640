"""The oracle tells versions apart, and its models say exactly what it says."""

import json
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import onnxruntime
import pytest

from loadtests.oracle_model import INPUTS, MOST_VERSIONS, Oracle, Row, Size, judge

ROWS: Sequence[Row] = ((0, 0), (999, 999), (17, 4), (999, 0), (3, 998))


@pytest.mark.parametrize(("version", "size"), [(1, "small"), (999, "small"), (999, "large")])
def test_the_model_says_what_the_oracle_says_in_any_batch(version: int, size: Size) -> None:
    oracle = Oracle(version, size)
    session = onnxruntime.InferenceSession(
        oracle.model().SerializeToString(), providers=["CPUExecutionProvider"]
    )
    for rows in (ROWS, ROWS[::-1], ROWS[:1]):
        said = session.run(["sum", "check"], {"x": np.array(rows, np.float32)})
        assert np.hstack(said).tolist() == [list(oracle.answer(row)) for row in rows]


def test_no_two_versions_say_the_same() -> None:
    corners = [(0, 0), (0, INPUTS - 1), (INPUTS - 1, 0), (INPUTS - 1, INPUTS - 1)]
    versions = range(1, MOST_VERSIONS + 1)
    spans = sorted(
        (min(sums), max(sums))
        for sums in ([Oracle(v).answer(row)[0] for row in corners] for v in versions)
    )
    assert all(high < low for (_, high), (low, _) in pairwise(spans))
    assert spans[-1][1] < 2**24


def answer(version: int, said: Sequence[tuple[int, int]]) -> bytes:
    predictions = [{"sum": float(one), "check": float(two)} for one, two in said]
    return json.dumps({"predictions": predictions, "model_version": str(version)}).encode()


def test_an_answer_is_judged_by_the_version_that_it_names() -> None:
    right = [Oracle(3).answer(row) for row in ROWS]
    other = Oracle(4).answer(ROWS[-1])
    assert judge(answer(3, right), ROWS, "small") == (3, "")
    assert judge(answer(4, right), ROWS, "small") == (4, "mixed")
    assert judge(answer(3, [*right[:-1], other]), ROWS, "small") == (3, "mixed")
    assert judge(answer(3, right[::-1]), ROWS, "small") == (3, "wrong")
    assert judge(answer(3, right[1:]), ROWS, "small") == (3, "wrong")
