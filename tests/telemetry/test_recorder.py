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
    recorder.lead(None)
    for ages in requests:
        table = np.array(ages, dtype=np.float64).reshape(-1, 2)
        recorder.read(np.zeros(table.shape, dtype=np.uint8), NOW_S - table, NOW_S)
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


def test_what_is_kept_back_is_there_when_the_metrics_are_read() -> None:
    metrics = Metrics()
    recorder = PredictionRecorder(
        metrics,
        "m",
        outputs=["y"],
        views=["v"],
        view_of_feature=[0, 0],
        statuses=["PRESENT", "NULL_VALUE"],
        now_s=lambda: NOW_S,
        max_ahead_s=60.0,
    )

    def seen(name: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(name, {"model": "m"} | labels)

    requests = 0
    for more in (1, 300, 5):
        for _ in range(more):
            recorder.predicted({"y": [0.5, 0.25]})
            recorder.read(np.array([[0, 1], [0, 0]], np.uint8), np.full((2, 1), NOW_S - 7), NOW_S)
            recorder.answered((1.0, 1.5, 2.0, 2.0, 4.0, 5.0))
        requests += more
        assert seen("hikyaku_requests_total", code="ok") == requests
        assert seen("hikyaku_request_duration_seconds_sum") == requests * 4
        assert seen("hikyaku_stage_duration_seconds_sum", stage="execution") == requests * 2
        rows = {"role": "champion", "output": "y", "le": "0.25"}
        assert seen("hikyaku_prediction_bucket", **rows) == requests
        null = {"feature_view": "v", "status": "NULL_VALUE"}
        assert seen("hikyaku_feature_values_total", **null) == requests
        assert seen("hikyaku_feature_age_seconds_sum", feature_view="v") == requests * 2 * 7
