"""The place of a key: exact shares, the same everywhere, and growing with the share."""

import subprocess
import sys

import numpy as np
import pytest

from app.instances import Instances
from app.routing_key import Lots, agree, key_of

# Of a chi-square with one degree of freedom: beyond it lies a share of 1e-3.
_CHI_SQUARE = 10.83
# With nine degrees.
_CHI_SQUARE_OF_TENTHS = 27.88


@pytest.fixture(scope="module")
def places() -> np.ndarray:
    lots = Lots("canary", "m", "abc", "7")
    return np.array([lots.draw(f"user-{n}")[0] for n in range(200_000)])


@pytest.mark.parametrize("share", [0.01, 0.05, 0.1, 0.5])
def test_a_share_of_the_keys_is_that_share(places: np.ndarray, share: float) -> None:
    for first in (places[:100_000], places):
        expected = share * len(first)
        excess = (first < share).sum() - expected
        assert excess**2 / (expected * (1 - share)) < _CHI_SQUARE


def test_places_are_even(places: np.ndarray) -> None:
    counts, _ = np.histogram(places, bins=10, range=(0, 1))
    expected = len(places) / 10
    assert ((counts - expected) ** 2 / expected).sum() < _CHI_SQUARE_OF_TENTHS


def test_a_mark_says_nothing_of_the_place() -> None:
    lots = Lots("s")
    drawn = [lots.draw(str(n)) for n in range(20_000)]
    low = sum(mark & 1 for place, mark in drawn if place < 0.5)
    assert low == pytest.approx(5_000, abs=250)


def test_another_process_draws_the_same() -> None:
    code = "from app.routing_key import Lots; print(Lots('m', 'é').draw('key \\udcff')[0])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert float(said.stdout) == Lots("m", "é").draw("key \udcff")[0]


def test_another_salt_draws_anew_and_its_words_are_told_apart() -> None:
    keys = [str(n) for n in range(2_000)]
    of = {
        salt: {key for key in keys if Lots(*salt).draw(key)[0] < 0.1}
        for salt in [("a", "b"), ("a", "c"), ("ab",)]
    }
    one, *others = of.values()
    assert all(0 < len(one & other) < 60 for other in others)


def instances(*values: object) -> Instances:
    return Instances([(0, value) for value in values], {"a": 0, "user": 1}, {}, verbose=False)


@pytest.mark.parametrize(
    ("given", "values", "key"),
    [
        ("header", [7], "header"),
        (None, [7, 8], "7"),
        ("", ["x"], "x"),
        (None, [None], None),
        (None, [""], None),
    ],
)
def test_the_key_is_what_the_request_says_else_the_first_instances_field(
    given: str | None, values: list[object], key: str | None
) -> None:
    assert key_of(given, "user", instances(*values)) == key


def test_without_a_field_there_is_no_key() -> None:
    assert key_of(None, None, instances(7)) is None
    assert key_of(None, "unknown", instances(7)) is None


def test_instances_agree_or_not() -> None:
    assert agree("user", instances(7, 7, 7))
    assert not agree("user", instances(7, 7, 8))
    assert agree(None, instances(7, 8))
