import re
from pathlib import Path

from app.telemetry.metrics import Metrics, PushMetrics

METRICS_PAGE = Path(__file__).parent.parent.parent / "docs" / "metrics.md"


def test_the_metrics_page_lists_every_metric_and_its_labels() -> None:
    rows = re.findall(r"^\| `(hikyaku_\w+)` \| (.*?) \|", METRICS_PAGE.read_text(), re.M)
    listed = dict(rows)
    assert len(listed) == len(rows)
    known = {
        family.name: ", ".join(f"`{label}`" for label in metric._labelnames) or "—"
        for metrics in (Metrics(), PushMetrics())
        for metric in vars(metrics).values()
        if hasattr(metric, "_labelnames")
        for family in metric.describe()
    }
    assert {name.removesuffix("_total"): labels for name, labels in listed.items()} == known
