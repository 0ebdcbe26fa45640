"""Turns flights and weather into feature rows, each at the instant its values became known."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

LATE_FROM_MINUTES = 15
# Microseconds everywhere: one operand in nanoseconds, pandas' default, makes the result so, and
# DuckDB's type for those compares with no other.
REQUESTED_BEFORE_DEPARTURE = pd.Timedelta(hours=2).as_unit("us")

# A mean over one hour of one airport must not be the story of one flight that left a day late.
DEPARTURE_DELAY_RANGE_MINUTES = (-20, 180)
ARRIVAL_DELAY_RANGE_MINUTES = (-60, 180)

# The airports report at about 51 past the hour: what stands under hour h is public by h + 1.
WEATHER_KNOWN_AFTER = pd.Timedelta(hours=1).as_unit("us")

# airports.csv lacks these four.
ZONES_MISSING_FROM_AIRPORTS = {
    "BQN": "America/Puerto_Rico",
    "PSE": "America/Puerto_Rico",
    "SJU": "America/Puerto_Rico",
    "STT": "America/St_Thomas",
}

TYPICAL_TAXI = pd.Timedelta(minutes=25).as_unit("us")
MINUTES_A_DAY = 24 * 60

# the CSV's column → the feature
WEATHER_FEATURES = {
    "temp": "temperature",
    "dewp": "dew_point",
    "humid": "humidity",
    "wind_dir": "wind_direction",
    "wind_speed": "wind_speed",
    "wind_gust": "wind_gust",
    "precip": "precipitation",
    "pressure": "pressure",
    "visib": "visibility",
}

KnownAt = Literal["departed_at", "landed_at"]
Values = NDArray[Any]


@dataclass(frozen=True)
class Trailing:
    """One feature: the mean of a column, or the count of its events, over (t - hours, t]."""

    feature: str
    column: str
    hours: int
    how: Literal["mean", "count"] = "mean"


@dataclass(frozen=True)
class TrailingView:
    """A view whose row at t sums up the events of its keys that were known by t."""

    keys: tuple[str, ...]
    known_at: KnownAt
    features: tuple[Trailing, ...]


@dataclass(frozen=True)
class LatestView:
    """A view whose row at t is the event of its keys known last by t: source column → feature."""

    keys: tuple[str, ...]
    known_at: KnownAt
    features: dict[str, str]


_RECENT_ARRIVALS = (
    Trailing("mean_arrival_delay_3h", "arrival_delay", 3),
    Trailing("mean_arrival_delay_24h", "arrival_delay", 24),
    Trailing("late_arrival_share_24h", "arrived_late", 24),
)

FLIGHT_VIEWS: dict[str, TrailingView | LatestView] = {
    "origin_departures": TrailingView(
        ("origin",),
        "departed_at",
        (
            Trailing("mean_departure_delay_1h", "departure_delay", 1),
            Trailing("mean_departure_delay_3h", "departure_delay", 3),
            Trailing("departures_3h", "departure_delay", 3, "count"),
            Trailing("late_departure_share_3h", "departed_late", 3),
        ),
    ),
    "carrier_arrivals": TrailingView(("carrier",), "landed_at", _RECENT_ARRIVALS),
    "destination_arrivals": TrailingView(("dest",), "landed_at", _RECENT_ARRIVALS),
    "route_arrivals": TrailingView(
        ("origin", "dest"),
        "landed_at",
        (
            Trailing("mean_arrival_delay_7d", "arrival_delay", 7 * 24),
            Trailing("late_arrival_share_7d", "arrived_late", 7 * 24),
            Trailing("arrivals_7d", "arrival_delay", 7 * 24, "count"),
        ),
    ),
    "aircraft_departures": LatestView(
        ("tailnum",), "departed_at", {"dep_delay": "last_departure_delay"}
    ),
    "aircraft_arrivals": LatestView(
        ("tailnum",),
        "landed_at",
        {
            "arr_delay": "last_arrival_delay",
            "dep_delay": "last_arrived_flight_departure_delay",
        },
    ),
}


def feature_history(
    flights: pd.DataFrame, weather: pd.DataFrame
) -> Iterator[tuple[str, Callable[[], pd.DataFrame]]]:
    """Yield every view's name and what makes its rows.

    `flights` come from `with_instants`. A view's rows have event_timestamp, its keys and its
    features; they are sorted by event_timestamp, with one row per keys and event_timestamp.
    """
    for name, view in FLIGHT_VIEWS.items():
        yield name, partial(_flight_rows, flights, view)
    yield "origin_weather", partial(weather_rows, weather)


def with_instants(flights: pd.DataFrame, airports: pd.DataFrame) -> pd.DataFrame:
    """Return the flights with scheduled_at, departed_at and landed_at, in UTC, null where none."""
    hour = pd.to_datetime(flights["time_hour"], utc=True).astype("datetime64[us, UTC]")
    scheduled_at = hour + _minutes(flights["sched_dep_time"] % 100)
    departed_at = scheduled_at + _minutes(flights["dep_delay"])
    landed_at = _landed_at(flights, departed_at, _zones(flights["dest"], airports))
    return flights.assign(scheduled_at=scheduled_at, departed_at=departed_at, landed_at=landed_at)


def request_log(flights: pd.DataFrame) -> pd.DataFrame:
    """Return what is asked about each flight two hours before it, and what came of it."""
    landed = flights["landed_at"].notna()
    late = (flights["arr_delay"] >= LATE_FROM_MINUTES).astype("boolean").where(landed)
    requests = pd.DataFrame(
        {
            "request_time": flights["scheduled_at"] - REQUESTED_BEFORE_DEPARTURE,
            "carrier": flights["carrier"],
            "origin": flights["origin"],
            "dest": flights["dest"],
            "tailnum": flights["tailnum"],
            "scheduled_departure": _new_york_rfc3339(flights["scheduled_at"]),
            "distance": flights["distance"].astype("float64"),
            "late": late,
            "landed_at": flights["landed_at"],
        }
    )
    return requests.sort_values("request_time", kind="stable", ignore_index=True)


def weather_rows(weather: pd.DataFrame) -> pd.DataFrame:
    """Return each airport's hourly observations at the instant they were public."""
    observed_at = pd.to_datetime(weather["time_hour"], utc=True).astype("datetime64[us, UTC]")
    rows = weather[["origin"]].copy()
    rows.insert(0, "event_timestamp", observed_at + WEATHER_KNOWN_AFTER)
    for column, feature in WEATHER_FEATURES.items():
        rows[feature] = weather[column].astype("float32")
    return rows.sort_values(["event_timestamp", "origin"], kind="stable", ignore_index=True)


def _flight_rows(flights: pd.DataFrame, view: TrailingView | LatestView) -> pd.DataFrame:
    known = flights[[view.known_at, *view.keys]].notna().all(axis=1)
    # The last of an instant is then the one scheduled last, whatever order the file has.
    events = flights[known].sort_values([view.known_at, "scheduled_at", "flight"], kind="stable")
    if isinstance(view, LatestView):
        rows = _latest_rows(events, view)
    else:
        rows = _trailing_rows(events, view)
    return rows.sort_values(["event_timestamp", *view.keys], kind="stable", ignore_index=True)


def _latest_rows(events: pd.DataFrame, view: LatestView) -> pd.DataFrame:
    last = events.drop_duplicates([*view.keys, view.known_at], keep="last")
    rows = last[[view.known_at, *view.keys]].rename(columns={view.known_at: "event_timestamp"})
    for column, feature in view.features.items():
        rows[feature] = last[column].astype("float32")
    return rows


def _trailing_rows(events: pd.DataFrame, view: TrailingView) -> pd.DataFrame:
    minute = _whole_minutes(events[view.known_at])
    span = int(minute.max() - minute.min()) + 1
    longest = max(feature.hours for feature in view.features) * 60
    key = events.groupby(list(view.keys)).ngroup().to_numpy(np.int64)

    # One line of minutes, a stretch per key, so far apart that no window reaches the one before.
    place = key * (span + longest) + (minute - minute.min())
    order = np.argsort(place, kind="stable")
    place = place[order]
    last_of_instant = np.flatnonzero(np.append(np.diff(place) != 0, True))

    ends = events.iloc[order[last_of_instant]]
    rows = ends[[view.known_at, *view.keys]].rename(columns={view.known_at: "event_timestamp"})
    for feature in view.features:
        values = _COLUMNS[feature.column](events).to_numpy(np.int64)[order]
        rows[feature.feature] = _over_window(feature, place, values, last_of_instant)
    return rows


def _over_window(feature: Trailing, place: Values, values: Values, last: Values) -> Values:
    first = np.searchsorted(place, place[last] - feature.hours * 60, side="right")
    count = last + 1 - first
    if feature.how == "count":
        return count.astype(np.int64)
    # Whole minutes add up exactly: a row does not depend on what came before its window.
    total = np.concatenate([[0], np.cumsum(values)])
    mean: Values = (total[last + 1] - total[first]) / count
    return mean.astype(np.float32)


_COLUMNS: dict[str, Callable[[pd.DataFrame], pd.Series]] = {
    "departure_delay": lambda f: f["dep_delay"].clip(*DEPARTURE_DELAY_RANGE_MINUTES),
    "departed_late": lambda f: f["dep_delay"] >= LATE_FROM_MINUTES,
    "arrival_delay": lambda f: f["arr_delay"].clip(*ARRIVAL_DELAY_RANGE_MINUTES),
    "arrived_late": lambda f: f["arr_delay"] >= LATE_FROM_MINUTES,
}


def _landed_at(flights: pd.DataFrame, departed_at: pd.Series, zones: pd.Series) -> pd.Series:
    """Find the instant near departure + air time at which the clock at the gate showed arr_time."""
    expected = (departed_at + _minutes(flights["air_time"]) + TYPICAL_TAXI).dropna()
    shown = flights["arr_time"].loc[expected.index]
    clock = shown // 100 * 60 + shown % 100
    expected_clock = pd.Series(0, index=expected.index)
    for zone, at in expected.groupby(zones.loc[expected.index]):
        local = at.dt.tz_convert(str(zone))
        expected_clock.loc[at.index] = local.dt.hour * 60 + local.dt.minute

    # The nearest such instant: no flight is half a day from its expectation.
    half_a_day = MINUTES_A_DAY // 2
    off = (clock - expected_clock + half_a_day) % MINUTES_A_DAY - half_a_day
    return (expected + _minutes(off)).reindex(flights.index)


def _zones(dest: pd.Series, airports: pd.DataFrame) -> pd.Series:
    known = dict(zip(airports["faa"], airports["tzone"], strict=True))
    zones = dest.map(known | ZONES_MISSING_FROM_AIRPORTS)
    if zones.isna().any():
        raise ValueError(f"no time zone for {sorted(dest[zones.isna()].unique())}")
    return zones


def _new_york_rfc3339(instants: pd.Series) -> pd.Series:
    local = instants.dt.tz_convert("America/New_York").dt.tz_localize(None)
    offset_hours = (local - instants.dt.tz_localize(None)) // pd.Timedelta(hours=1)
    offset = offset_hours.map({-4: "-04:00", -5: "-05:00"})
    text = np.datetime_as_string(local.to_numpy("datetime64[s]"), unit="s")
    rfc3339: pd.Series = pd.Series(text, index=instants.index).str.cat(offset)
    return rfc3339


def _minutes(count: pd.Series) -> pd.Series:
    # pandas 2.3 rounds uninitialised memory where a count is missing, and may warn of an overflow.
    known = count.notna().to_numpy()
    minutes = np.full(len(count), np.timedelta64("NaT", "us"))
    minutes[known] = count.to_numpy()[known].astype("timedelta64[m]")
    return pd.Series(minutes, index=count.index)


def _whole_minutes(instants: pd.Series) -> Values:
    return instants.to_numpy("datetime64[m]").astype(np.int64)
