"""Our histogram says what prometheus_client's says."""

import re
from collections.abc import Sequence

import prometheus_client
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest

from app.telemetry.histogram import Histogram
from app.telemetry.tally import Tallies

# Ours has no series of when it was made.
prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]

VALUES = st.lists(st.floats(-1e6, 1e6) | st.sampled_from([0.0, 1.0, 2.0, -1.0]), max_size=50)
BUCKETS = st.sampled_from([(0, 1, 2), (-1.0, 0.5, 1000), (0.0001, 2.5)])


def both(
    buckets: Sequence[float], labels: Sequence[str] = ("model",)
) -> tuple[CollectorRegistry, prometheus_client.Histogram, CollectorRegistry, Histogram]:
    theirs, ours = CollectorRegistry(), CollectorRegistry()
    return (
        theirs,
        prometheus_client.Histogram("h_s", "What it is.", labels, buckets=buckets, registry=theirs),
        ours,
        Histogram(
            "h_s",
            "What it is.",
            labels,
            buckets=buckets,
            registry=ours,
            tallies=Tallies.private(),
        ),
    )


def exposition(registry: CollectorRegistry) -> tuple[list[str], dict[str, float]]:
    """Every line, the numbers apart: their order of addition may differ."""
    text = generate_latest(registry).decode()
    numbers = re.findall(r"^(h_\S+) (\S+)$", text, re.MULTILINE)
    lines = [re.sub(r"^(h_s_sum\S*) .*", r"\1", line) for line in text.splitlines()]
    return lines, {name: float(number) for name, number in numbers}


@given(VALUES, BUCKETS)
def test_observing_one_by_one(values: list[float], buckets: Sequence[float]) -> None:
    theirs, one, ours, other = both(buckets)
    for value in values:
        one.labels("m").observe(value)
        other.labels("m").observe(value)
    assert exposition(ours) == exposition(theirs)


@given(VALUES, BUCKETS)
def test_observing_all_at_once(values: list[float], buckets: Sequence[float]) -> None:
    theirs, one, ours, many = both(buckets)
    child = one.labels("m")
    for value in values:
        child.observe(value)
    many.labels("m").observe_all(values)
    lines, numbers = exposition(ours)
    expected_lines, expected = exposition(theirs)
    assert lines == expected_lines
    assert numbers == pytest.approx(expected)


@pytest.mark.parametrize("rows", [1, 50])
def test_nan_is_no_value(rows: int) -> None:
    _, _, ours, histogram = both((0, 1))
    histogram.labels("m").observe_all([float("nan"), 0.5] * rows)
    assert exposition(ours)[1] == {
        'h_s_bucket{le="0.0",model="m"}': 0,
        'h_s_bucket{le="1.0",model="m"}': rows,
        'h_s_bucket{le="+Inf",model="m"}': rows,
        'h_s_count{model="m"}': rows,
        'h_s_sum{model="m"}': 0.5 * rows,
    }


def test_without_labels_it_is_there_before_it_is_observed() -> None:
    theirs, one, ours, other = both((0, 1), ())
    assert exposition(ours) == exposition(theirs)
    one.observe(0.5)
    other.observe(0.5)
    assert exposition(ours) == exposition(theirs)


def test_labels_are_looked_up_by_all_their_values() -> None:
    _, _, _, histogram = both((0, 1), ("model", "stage"))
    assert histogram.labels("m", "parse") is histogram.labels("m", "parse")
    with pytest.raises(ValueError, match="h_s"):
        histogram.labels("m")
