"""The real flights, whole and as small slices on disk."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from feature_repo import history

WriteSlice = Callable[[Path, str, str], Path]


@pytest.fixture(scope="session")
def raw_flights() -> pd.DataFrame:
    return pd.read_csv(history.csv_folder() / "flights.csv.zip")


@pytest.fixture(scope="session")
def raw_weather() -> pd.DataFrame:
    return pd.read_csv(history.csv_folder() / "weather.csv")


@pytest.fixture(scope="session")
def airports() -> pd.DataFrame:
    return pd.read_csv(history.csv_folder() / "airports.csv")


@pytest.fixture(scope="session")
def write_slice(
    raw_flights: pd.DataFrame, raw_weather: pd.DataFrame, airports: pd.DataFrame
) -> WriteSlice:
    """Write the CSVs of the hours from first up to last (as time_hour spells them) to a folder."""

    def write(folder: Path, first: str, last: str) -> Path:
        folder.mkdir()
        for frame, name in ((raw_flights, "flights.csv.zip"), (raw_weather, "weather.csv")):
            hours = frame["time_hour"].between(first, last, inclusive="left")
            frame[hours].to_csv(folder / name, index=False)
        airports.to_csv(folder / "airports.csv", index=False)
        return folder

    return write
