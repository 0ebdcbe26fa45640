"""The benchmark's ratios are those of one round, and its goals say what they rest on."""

import pytest

from loadtests.bench.figures import (
    GOALS,
    Goal,
    Rounds,
    cpu_us,
    document,
    ratio,
    requests_s,
    resident_mib,
    spread,
    table,
)
from loadtests.bench.paced import Paced, paced_table
from loadtests.bench.reading import Reading
from loadtests.bench.server import turns


def reading(requests_s: float, cpu_us: float = 50.0) -> Reading:
    return Reading(requests_s, p50_us=100.0, p99_us=900.0, cpu_us=cpu_us, resident_mib=64.0)


# The machine slows down fourfold in the second round; ours keeps half of the echo's rate.
ROUNDS: Rounds = {
    ("echo", 64): [reading(8000, 25), reading(2000, 100), reading(8000, 25)],
    ("ours", 64): [reading(4000, 50), reading(1000, 200), reading(4400, 50)],
}


def test_a_spread_is_the_median_and_the_range() -> None:
    seen = spread([3.0, 1.0, 2.0, 10.0])
    assert (seen.median, seen.lowest, seen.highest) == (2.5, 1.0, 10.0)


def test_ratios_are_taken_within_a_round() -> None:
    seen = ratio(ROUNDS, requests_s, "ours", "echo", 64)
    assert (seen.median, seen.lowest, seen.highest) == (0.5, 0.5, 0.55)


@pytest.mark.parametrize(
    ("goal", "verdict"),
    [
        (Goal("tensor", "rate", requests_s, "ours", "echo", 64, "at least", 0.5), "PASS"),
        (Goal("tensor", "rate", requests_s, "ours", "echo", 64, "at least", 0.51), "FAIL"),
        (Goal("tensor", "processor", cpu_us, "ours", "echo", 64, "at most", 2.0), "PASS"),
        (Goal("tensor", "processor", cpu_us, "ours", "echo", 64, "at most", 1.9), "FAIL"),
        (Goal("tensor", "memory", resident_mib, "ours", None, 64, "at most", 64), "PASS"),
        (Goal("tensor", "memory", resident_mib, "ours", None, 64, "at most", 63), "FAIL"),
    ],
)
def test_a_goal_is_held_against_the_median(goal: Goal, verdict: str) -> None:
    assert goal.line(ROUNDS).startswith(verdict)
    assert goal.met(ROUNDS) == (verdict == "PASS")


def test_what_was_not_measured_is_neither_passed_nor_failed() -> None:
    goal = Goal("tensor", "rate", requests_s, "ours", "litserve", 64, "at least", 15)
    assert "not measured" in goal.line(ROUNDS)
    assert goal.met(ROUNDS)


def test_goals_speak_of_contenders_that_exist() -> None:
    from loadtests.bench.contenders import CONTENDERS

    for goal in GOALS:
        for name in (goal.contender, goal.other or "echo"):
            assert goal.kind in CONTENDERS[name].kinds


def test_the_document_has_ratios_and_every_reading() -> None:
    echo, ours = document(ROUNDS, {"echo": "the echo", "ours": "Hikyaku"})
    assert (ours["title"], ours["connections"]) == ("Hikyaku", 64)
    assert ours["ratios"]["requests_s"] == {"median": 0.5, "lowest": 0.5, "highest": 0.55}
    assert echo["ratios"]["cpu_us"]["median"] == 1
    assert ours["medians"]["cpu_us"] == 50
    assert [reading["requests_s"] for reading in ours["rounds"]] == [4000, 1000, 4400]


def test_latencies_at_a_steady_rate_are_ratios_within_a_round_too() -> None:
    seen = {
        "echo": [Paced(100, 200, 0), Paced(400, 800, 0)],
        "ours": [Paced(200, 600, 0), Paced(800, 2400, 3)],
    }
    lines = paced_table(seen, {"echo": "the echo", "ours": "Hikyaku"}).splitlines()
    assert lines[3] == "| Hikyaku | 500 | 2 [2-2] | 1,500 | 3 [3-3] | 3 |"


def test_over_the_rounds_everybody_is_measured_at_every_place() -> None:
    orders = [turns(("a", "b", "c"), number) for number in range(6)]
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    for name in "abc":
        assert {order.index(name) for order in orders} == {0, 1, 2}


def test_the_table_has_a_line_for_each_contender_and_number_of_connections() -> None:
    lines = table(ROUNDS, {"echo": "the echo", "ours": "Hikyaku"}).splitlines()
    assert len(lines) == 2 + len(ROUNDS)
    assert lines[3].startswith("| Hikyaku | 64 | 4,000 | 0.5 [0.5-0.55] | 100 | 1 [1-1] | 900 |")
