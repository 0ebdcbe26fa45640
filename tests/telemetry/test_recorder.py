"""What a version reports of the rows it read."""

import numpy as np
import pytest

from app.telemetry.metrics import Metrics
from app.telemetry.recorder import PredictionRecorder

NOW_S = 1000.0


def newest_ages(*requests: list[list[float]]) -> list[float | None]:
    """The newest age by view after these requests, `[rows][views]` of ages each."""
    metrics = Metrics()
    views = ["one", "two"]
    recorder = PredictionRecorder(
        metrics,
        "m",
        outputs=[],
        views=views,
        view_of_feature=[0, 1],
        statuses=["PRESENT"],
        now_s=lambda: NOW_S,
        max_ahead_s=60.0,
    )
    for ages in requests:
        table = np.array(ages, dtype=np.float64).reshape(-1, 2)
        recorder.record(np.zeros(table.shape, dtype=np.uint8), table, {})
    return [
        metrics.registry.get_sample_value(
            "hikyaku_feature_newest_age_seconds", {"model": "m", "feature_view": view}
        )
        for view in views
    ]


NAN = float("nan")


@pytest.mark.parametrize(
    ("requests", "expected"),
    [
        ([], [NAN, NAN]),
        ([[[30, 40], [20, 50]]], [20, 40]),
        ([[[30, NAN], [NAN, NAN]]], [30, NAN]),
        ([[[30, 40]], [[NAN, 10]], [[500, 500]]], [30, 10]),
        ([[[-30, -61]], [[50, 40]]], [-30, 40]),  # clocks differ; far ahead is not known yet
        ([[]], [NAN, NAN]),
    ],
)
def test_the_newest_row_of_all_requests_counts(
    requests: list[list[list[float]]], expected: list[float]
) -> None:
    assert newest_ages(*requests) == pytest.approx(expected, nan_ok=True)
