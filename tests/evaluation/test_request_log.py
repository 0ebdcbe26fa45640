"""What a recorded log says about each request: its instance, its truth, and when that is known."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from app.contract import Contract
from app.errors import ConfigurationError
from app.evaluation.request_log import NO_HORIZON_US, RequestLog, as_datetime, read_log
from app.features.plan import NO_FEATURES

NOON = datetime(2013, 10, 1, 12, tzinfo=UTC)
ROWS = pd.DataFrame(
    {
        "asked": [NOON + timedelta(days=1), NOON, NOON + timedelta(hours=1)],
        "leaves": ["2013-10-02T10:00:00-04:00", "2013-10-01T10:00:00-04:00", None],
        "late": pd.array([True, False, None], dtype="boolean"),
        "landed": [NOON + timedelta(days=1, hours=5), NOON + timedelta(hours=4), pd.NaT],
    }
)


def read(folder: Path, /, labels: Any = None, **replay: Any) -> RequestLog:
    ROWS.to_parquet(folder / "log.parquet")
    contract = Contract.model_validate(
        {
            "request_fields": {"leaves": "string"},
            "inputs": [{"tensor": "x", "columns": [{"from": "leaves", "as": "text"}]}],
            "outputs": {"y": {"tensor": "y"}},
            "labels": labels,
            "replay": {"requests": "log.parquet", "asked_at": "asked", "label": "late", **replay},
        }
    )
    return read_log(folder, contract, NO_FEATURES, None, None)


def hours_after_noon(instants: Any) -> list[float | None]:
    return [
        None if at_us < 0 else (as_datetime(at_us) - NOON) / timedelta(hours=1)
        for at_us in instants
    ]


def test_requests_come_in_order_of_asking(tmp_path: Path) -> None:
    log = read(tmp_path)
    assert hours_after_noon(log.asked_us) == [0, 1, 24]
    assert [instance["leaves"] for instance in log.instances] == [
        "2013-10-01T10:00:00-04:00",
        None,
        "2013-10-02T10:00:00-04:00",
    ]
    assert log.truth.tolist() == [False, None, True]


def test_without_an_instant_a_truth_is_never_known(tmp_path: Path) -> None:
    assert hours_after_noon(read(tmp_path).known_us) == [None, None, None]


def test_a_truth_is_known_at_its_instant(tmp_path: Path) -> None:
    log = read(tmp_path, label_known_at="landed")
    assert hours_after_noon(log.known_us) == [4, None, 29]


def test_that_there_is_no_truth_is_known_some_time_after_asking(tmp_path: Path) -> None:
    log = read(tmp_path, label_known_at="landed", no_label_after_s=7200)
    assert hours_after_noon(log.known_us) == [4, 3, 29]


def test_the_horizon_is_the_contracts(tmp_path: Path) -> None:
    log = read(tmp_path, labels={"horizon": {"after_s": 3600}})
    assert log.horizon_us is not None
    assert hours_after_noon(log.horizon_us) == [1, 2, 25]


def test_the_horizon_may_be_counted_from_an_instant_of_the_request(tmp_path: Path) -> None:
    log = read(tmp_path, labels={"horizon": {"from": "leaves", "after_s": 3600}})
    assert log.horizon_us is not None
    assert hours_after_noon(log.horizon_us[[0, 2]]) == [3, 27]
    assert log.horizon_us[1] == NO_HORIZON_US


def test_a_column_that_the_log_lacks_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no column touchdown"):
        read(tmp_path, label_known_at="touchdown")
