"""The definitions apply as they are, and a training join over them uses what was known."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import pytest
import yaml

from feature_repo import history

if TYPE_CHECKING:
    from feast import FeatureStore

# Feast and ibis use deprecated names of their own dependencies, on import and in every join.
pytestmark = pytest.mark.filterwarnings("ignore")

WriteSlice = Callable[[Path, str, str], Path]
REPOSITORY = Path(history.__file__).parent


@pytest.fixture(scope="module")
def store(
    tmp_path_factory: pytest.TempPathFactory, write_slice: WriteSlice
) -> Iterator[FeatureStore]:
    """The repository with the history of a month, applied by what `feast apply` calls.

    The working directory is the repository's: the duckdb store reads relative paths from there.
    """
    from feast import FeatureStore
    from feast.repo_operations import apply_total

    folder = tmp_path_factory.mktemp("flights")
    repository = folder / "feature_repo"
    repository.mkdir()
    for file in REPOSITORY.glob("*.py"):
        shutil.copy(file, repository)
    config = yaml.safe_load((REPOSITORY / "feature_store.yaml").read_text())
    config["online_store"] = {"type": "sqlite", "path": "data/online.db"}
    (repository / "feature_store.yaml").write_text(yaml.safe_dump(config))
    history.build(write_slice(folder / "csvs", "2013-01-24", "2013-03-01"), repository / "data")

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(repository)
        patch.syspath_prepend(repository)
        store = FeatureStore(repo_path=str(repository))
        apply_total(store.config, repository, skip_source_validation=False)
        yield store


@pytest.fixture(scope="module")
def requests(store: FeatureStore) -> pd.DataFrame:
    """500 flights of February, in no order, some of them without a tail number."""
    log = pd.read_parquet("data/flights.parquet")
    asked = log[log["request_time"] >= "2013-02-01"].sample(500, random_state=5)
    assert asked["tailnum"].isna().any()
    return asked.rename(columns={"request_time": "event_timestamp"})[
        ["event_timestamp", "carrier", "origin", "dest", "tailnum"]
    ].assign(row=range(500))


def test_the_service_holds_every_view_in_the_order_of_the_history(store: FeatureStore) -> None:
    service = store.get_feature_service("flight_delay")
    assert tuple(view.name for view in service.feature_view_projections) == history.VIEWS


@pytest.mark.parametrize("name", history.VIEWS)
def test_a_view_describes_its_file(store: FeatureStore, name: str) -> None:
    view = store.get_feature_view(name)
    columns = pd.read_parquet(f"data/{name}.parquet").dtypes.astype(str).to_dict()
    assert columns.pop("event_timestamp") == "datetime64[us, UTC]"
    described = {field.name: "object" for field in view.entity_columns}
    described |= {field.name: str(field.dtype).lower() for field in view.features}
    assert columns == described
    assert view.online
    assert view.ttl
    assert store.get_data_source(f"{name}_push").name == view.stream_source.name


def test_a_training_join_equals_an_as_of_join(store: FeatureStore, requests: pd.DataFrame) -> None:
    service = store.get_feature_service("flight_delay")
    job = store.get_historical_features(requests, service, full_feature_names=True)
    joined = job.to_df()
    assert len(joined) == len(requests)

    expected = requests.sort_values("event_timestamp")
    for name in history.VIEWS:
        expected = with_latest_values(expected, store, name)
    assert expected.notna().any().all()
    pd.testing.assert_frame_equal(
        joined.sort_values("row", ignore_index=True),
        expected.sort_values("row", ignore_index=True),
        check_exact=True,
        check_dtype=False,  # a count that is missing somewhere comes back as float64
    )


def with_latest_values(requests: pd.DataFrame, store: FeatureStore, name: str) -> pd.DataFrame:
    view = store.get_feature_view(name)
    features = {field.name: f"{name}__{field.name}" for field in view.features}
    return pd.merge_asof(
        requests,
        pd.read_parquet(f"data/{name}.parquet").rename(columns=features),
        on="event_timestamp",
        by=view.join_keys,
        tolerance=pd.Timedelta(view.ttl),
    )


def test_a_value_counts_from_its_own_instant_through_its_ttl(store: FeatureStore) -> None:
    departures = pd.read_parquet("data/origin_departures.parquet").query("origin == 'EWR'")
    quiet = departures["event_timestamp"].diff(-1).abs() > timedelta(hours=3, minutes=1)
    last_of_the_day = departures[quiet].iloc[0]
    ttl, tick = timedelta(hours=3), timedelta(microseconds=1)
    asked = [
        last_of_the_day.event_timestamp + after for after in (-tick, 0 * tick, ttl, ttl + tick)
    ]
    joined = store.get_historical_features(
        pd.DataFrame({"event_timestamp": asked, "origin": "EWR"}),
        ["origin_departures:departures_3h"],
        full_feature_names=True,
    ).to_df()
    before, at, still, gone = joined.sort_values("event_timestamp").iloc[:, -1]
    assert before != at == still == last_of_the_day.departures_3h
    assert pd.isna(gone)
