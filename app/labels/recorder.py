"""What one model's labels report, in metrics."""

from collections.abc import Mapping
from typing import NamedTuple

from app.telemetry.metrics import Metrics


class LiveQuality(NamedTuple):
    """Of the version that predicted last in its role: rows judged, and each of its figures by
    name, of which there are none that are not known."""

    rows: int
    figures: Mapping[str, float]


class LabelRecorder:
    def __init__(self, metrics: Metrics, model: str) -> None:
        self._metrics = metrics
        self._model = model
        self._delay = metrics.label_delay.labels(model)
        self._bytes = metrics.label_bytes.labels(model)
        self._limit = metrics.label_limit.labels(model)

    def kept(self, outcome: str, rows: int) -> None:
        """Predictions: `kept`, or the reason why not."""
        if rows:
            self._metrics.label_predictions.labels(self._model, outcome).inc(rows)

    def told(self, outcome: str, labels: int) -> None:
        self._metrics.labels.labels(self._model, outcome).inc(labels)

    def delayed(self, delay_s: float) -> None:
        """A label that was accepted came so long after its prediction, by feature time."""
        self._delay.observe(delay_s)

    def filled(self, bytes_: int, limit: int) -> None:
        """How much the waiting predictions count for, and may."""
        self._bytes.set(bytes_)
        self._limit.set(limit)

    def quality(self, coverage: float | None, roles: Mapping[str, LiveQuality]) -> None:
        """By role, of those that there are; `coverage` is that of the champion."""
        if coverage is not None:
            self._metrics.quality_coverage.labels(self._model).set(coverage)
        for role, quality in roles.items():
            self._metrics.quality_rows.labels(self._model, role).set(quality.rows)
            for name, value in quality.figures.items():
                self._metrics.quality.labels(self._model, role, name).set(value)
