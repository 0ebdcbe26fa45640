import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from app.telemetry.metrics import Metrics, PushMetrics, observe_all

METRICS_PAGE = Path(__file__).parent.parent.parent / "docs" / "metrics.md"


@given(st.lists(st.floats(-1e6, 1e6) | st.sampled_from([0.0, 1.0, 2.0]), max_size=50))
def test_observing_all_at_once_is_observing_each(values: list[float]) -> None:
    registries = CollectorRegistry(), CollectorRegistry()
    one, many = (Histogram("h", "h", buckets=(0, 1, 2), registry=r) for r in registries)
    for value in values:
        one.observe(value)
    observe_all(many, np.array(values))
    expected, got = (
        dict(re.findall(r"^(h_\S+) (\S+)$", generate_latest(r).decode(), re.MULTILINE))
        for r in registries
    )
    assert float(got.pop("h_sum")) == pytest.approx(float(expected.pop("h_sum")))
    assert got == expected


def test_the_metrics_page_lists_every_metric_and_its_labels() -> None:
    listed = dict(re.findall(r"^\| `(hikyaku_\w+)` \| (.*?) \|", METRICS_PAGE.read_text(), re.M))
    known = {
        family.name: ", ".join(f"`{label}`" for label in metric._labelnames) or "—"
        for metrics in (Metrics(), PushMetrics())
        for metric in vars(metrics).values()
        if hasattr(metric, "_labelnames")
        for family in metric.describe()
    }
    assert {name.removesuffix("_total"): labels for name, labels in listed.items()} == known
