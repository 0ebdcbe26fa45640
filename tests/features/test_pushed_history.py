"""Pushing a history again: each time what became known since, and nothing under a later value."""

from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import pytest

from app.errors import HikyakuError
from tests.features.pushed_repository import Pushed

if TYPE_CHECKING:
    from app.evaluation.pushes import PushedHistory

NOON = pd.Timestamp("2013-06-01T12:00:00Z")


def at(hour: int) -> int:
    return (NOON + pd.Timedelta(hours=hour)).value // 1_000


def history(pushed: Pushed, folder: Path, driver_id: int) -> "PushedHistory":
    """A driver's stars from noon on: 1 at 12 h, 2 at 13 h and so on, until 16 h."""
    from app.evaluation.pushes import PushedHistory

    rows = pd.DataFrame(
        {
            "driver_id": driver_id,
            "known_at": [NOON + pd.Timedelta(hours=hour) for hour in range(5)],
            "stars": [1.0, 2.0, 3.0, 4.0, 5.0],
            "trips": 7,
            "plate": "",
            "active": True,
        }
    )
    rows.to_parquet(folder / "history.parquet")
    target = pushed.target("tracked")
    return PushedHistory(target, "known_at", folder / "history.parquet", at(4))


def test_the_newest_that_is_known_by_then_is_stored(
    pushed: Pushed, driver_id: int, tmp_path: Path
) -> None:
    replayed = history(pushed, tmp_path, driver_id)
    stars = []
    for hour in (1, 1, 3):
        replayed.push_until(at(hour))
        stars += pushed.online("ratings:rating", driver_id=driver_id)
    assert stars == [2.0, 2.0, 4.0]


def test_a_store_that_knows_the_future_is_refused(
    pushed: Pushed, driver_id: int, tmp_path: Path
) -> None:
    history(pushed, tmp_path, driver_id).push_until(at(4))
    again = history(pushed, tmp_path, driver_id)
    again.push_until(at(0))
    with pytest.raises(HikyakuError, match="begin with an empty one"):
        again.push_until(at(1))


def test_a_replay_may_go_on_where_another_has_ended(
    pushed: Pushed, driver_id: int, tmp_path: Path
) -> None:
    history(pushed, tmp_path, driver_id).push_until(at(2))
    again = history(pushed, tmp_path, driver_id)
    again.push_until(at(2))
    again.push_until(at(3))
    assert pushed.online("ratings:rating", driver_id=driver_id) == [4.0]
