"""The history holds what was known at each instant, and nothing that was not."""

import math
import random
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from feature_repo import flight_views, history

WriteSlice = Callable[[Path, str, str], Path]

KEYS = {
    "origin_departures": ["origin"],
    "carrier_arrivals": ["carrier"],
    "destination_arrivals": ["dest"],
    "route_arrivals": ["origin", "dest"],
    "aircraft_departures": ["tailnum"],
    "aircraft_arrivals": ["tailnum"],
    "origin_weather": ["origin"],
}


@pytest.fixture(scope="module")
def year(raw_flights: pd.DataFrame, airports: pd.DataFrame) -> pd.DataFrame:
    return flight_views.with_instants(raw_flights, airports)


@pytest.fixture(scope="module")
def some_raw_flights(raw_flights: pd.DataFrame) -> pd.DataFrame:
    """Weeks on both sides of the end of daylight saving time, two fifths of their flights."""
    weeks = raw_flights["time_hour"].between("2013-10-25", "2013-11-15")
    return raw_flights[weeks].sample(frac=0.4, random_state=13)


@pytest.fixture(scope="module")
def some_flights(some_raw_flights: pd.DataFrame, airports: pd.DataFrame) -> pd.DataFrame:
    return flight_views.with_instants(some_raw_flights, airports)


@pytest.fixture(scope="module")
def some_weather(raw_weather: pd.DataFrame) -> pd.DataFrame:
    return raw_weather[raw_weather["time_hour"].between("2013-10-25", "2013-11-15")]


@pytest.fixture(scope="module")
def views(some_flights: pd.DataFrame, some_weather: pd.DataFrame) -> dict[str, pd.DataFrame]:
    return views_of(some_flights, some_weather)


def views_of(flights: pd.DataFrame, weather: pd.DataFrame) -> dict[str, pd.DataFrame]:
    return {name: make() for name, make in flight_views.feature_history(flights, weather)}


class TestInstants:
    def test_a_departure_is_when_the_clock_in_new_york_showed_dep_time(
        self, year: pd.DataFrame
    ) -> None:
        left = year[year["departed_at"].notna()]
        assert (
            minute_of_day(left["departed_at"], "America/New_York")
            == minutes_of_clock(left["dep_time"])
        ).all()

    def test_no_flight_lands_before_its_departure_and_air_time(self, year: pd.DataFrame) -> None:
        landed = year[year["landed_at"].notna()]
        in_the_air = pd.to_timedelta(landed["air_time"], unit="min")
        assert len(landed) == 327_346
        assert (landed["landed_at"] >= landed["departed_at"] + in_the_air).all()

    def test_a_landing_is_as_late_as_the_flight_was(self, year: pd.DataFrame) -> None:
        landed = year[year["landed_at"].notna()]
        scheduled_clock = minutes_of_clock(landed["sched_arr_time"])
        arrived_clock = minutes_of_clock(landed["arr_time"])
        assert ((arrived_clock - scheduled_clock - landed["arr_delay"]) % 1440 == 0).all()

    def test_a_landing_is_when_the_clock_there_showed_arr_time(
        self, year: pd.DataFrame, airports: pd.DataFrame
    ) -> None:
        zones = dict(zip(airports["faa"], airports["tzone"], strict=True))
        zones |= dict.fromkeys(("SJU", "BQN", "PSE", "STT"), "America/Puerto_Rico")
        landed = year[year["landed_at"].notna()]
        wrong = 0
        for zone, flights in landed.groupby(landed["dest"].map(zones)):
            shown = minute_of_day(flights["landed_at"], str(zone))
            wrong += int((shown != minutes_of_clock(flights["arr_time"])).sum())
        # one flight is down as arriving at 2:03 in the night when that hour was skipped
        assert wrong == 1


class TestViews:
    def test_a_value_uses_what_was_known_at_its_instant_and_nothing_else(
        self, views: dict[str, pd.DataFrame], some_flights: pd.DataFrame
    ) -> None:
        flights: list[Any] = list(some_flights.itertuples(index=False))
        draw = random.Random(7)
        for _ in range(240):
            name = draw.choice([name for name in views if name != "origin_weather"])
            row: dict[Any, Any] = views[name].iloc[draw.randrange(len(views[name]))].to_dict()
            stored = {f: v for f, v in row.items() if f not in ("event_timestamp", *KEYS[name])}
            assert stored == recomputed(name, row, flights), (name, row)

    def test_the_weather_is_known_an_hour_after_it_was_observed(
        self, views: dict[str, pd.DataFrame], some_weather: pd.DataFrame
    ) -> None:
        observed: dict[Any, Any] = {
            (o.origin, o.time_hour): (
                *(o.temp, o.dewp, o.humid, o.wind_dir, o.wind_speed),
                *(o.wind_gust, o.precip, o.pressure, o.visib),
            )
            for o in some_weather.itertuples(index=False)
        }
        rows: list[Any] = list(views["origin_weather"].itertuples(index=False))
        assert len(rows) == len(observed)
        for known_at, origin, *values in rows:
            hour = (known_at - timedelta(hours=1)).strftime("%Y-%m-%dT%H:%M:%SZ")
            np.testing.assert_array_equal(values, np.array(observed[origin, hour], np.float32))

    def test_what_happens_later_changes_nothing_known_before(
        self,
        views: dict[str, pd.DataFrame],
        some_raw_flights: pd.DataFrame,
        some_flights: pd.DataFrame,
        some_weather: pd.DataFrame,
        airports: pd.DataFrame,
    ) -> None:
        for now in pd.to_datetime(["2013-10-30T17:20Z", "2013-11-03T06:30Z", "2013-11-09T22:00Z"]):
            other_flights = with_another_future(some_raw_flights, some_flights, now)
            other_weather = some_weather.copy()
            unknown = pd.to_datetime(other_weather["time_hour"]) + timedelta(hours=1) > now
            other_weather.loc[unknown, "temp"] += 10
            others = views_of(flight_views.with_instants(other_flights, airports), other_weather)
            for name, view in views.items():
                known = view[view["event_timestamp"] <= now]
                other = others[name]
                assert len(known) > 100
                pd.testing.assert_frame_equal(known, other[other["event_timestamp"] <= now])
                assert not view.equals(other), f"{name}: the other future made no difference"

    def test_of_two_landings_at_one_instant_the_last_is_the_one_scheduled_later(
        self, year: pd.DataFrame, some_weather: pd.DataFrame
    ) -> None:
        # 11:45 to Seattle, 64 minutes late, and 13:00 to Los Angeles, 20 minutes early
        aircraft = year[year["tailnum"] == "N710TW"]
        arrivals = views_of(aircraft, some_weather)["aircraft_arrivals"]
        at = arrivals["event_timestamp"] == pd.Timestamp("2013-04-18T19:04Z")
        assert arrivals[at]["last_arrival_delay"].tolist() == [-20]

    @pytest.mark.parametrize("name", KEYS)
    def test_there_is_one_row_per_keys_and_instant_in_order(
        self, name: str, views: dict[str, pd.DataFrame]
    ) -> None:
        view = views[name]
        assert list(view.columns[: 1 + len(KEYS[name])]) == ["event_timestamp", *KEYS[name]]
        assert not view.duplicated(["event_timestamp", *KEYS[name]]).any()
        assert not view[["event_timestamp", *KEYS[name]]].isna().any(axis=None)
        assert view["event_timestamp"].is_monotonic_increasing
        assert view["event_timestamp"].dtype == "datetime64[us, UTC]"


class TestRequestLog:
    def test_only_a_flight_that_arrived_has_a_label(self, some_flights: pd.DataFrame) -> None:
        requests = flight_views.request_log(some_flights)
        arrived = some_flights["arr_delay"].notna().sum()
        late = (some_flights["arr_delay"] >= 15).sum()
        assert 0 < arrived < len(requests) == len(some_flights)
        assert requests["late"].notna().equals(requests["landed_at"].notna())
        assert (requests["late"].count(), requests["late"].sum()) == (arrived, late)

    def test_a_request_comes_two_hours_before_the_departure_it_names(
        self, some_flights: pd.DataFrame
    ) -> None:
        requests = flight_views.request_log(some_flights)
        assert requests["request_time"].is_monotonic_increasing
        offsets = set()
        for request in requests.itertuples(index=False):
            departure = datetime.fromisoformat(str(request.scheduled_departure))
            assert request.request_time == departure - timedelta(hours=2)
            offsets.add(departure.utcoffset())
        assert offsets == {timedelta(hours=-4), timedelta(hours=-5)}


class TestBuild:
    def test_a_second_build_does_nothing(
        self, tmp_path: Path, write_slice: WriteSlice, capsys: pytest.CaptureFixture[str]
    ) -> None:
        csvs, data = write_slice(tmp_path / "csvs", "2013-02-01", "2013-02-04"), tmp_path / "data"
        history.build(csvs, data)
        assert "origin_departures: " in capsys.readouterr().out
        before = {file.name: file.stat().st_mtime_ns for file in data.iterdir()}
        assert set(before) == {f"{name}.parquet" for name in (*KEYS, "flights")} | {"history.json"}

        history.build(csvs, data)
        assert capsys.readouterr().out == "history is up to date\n"
        assert {file.name: file.stat().st_mtime_ns for file in data.iterdir()} == before

    def test_a_build_follows_its_inputs_and_restores_what_is_missing(
        self, tmp_path: Path, write_slice: WriteSlice, capsys: pytest.CaptureFixture[str]
    ) -> None:
        csvs, data = write_slice(tmp_path / "csvs", "2013-02-01", "2013-02-03"), tmp_path / "data"
        history.build(csvs, data)
        (data / "carrier_arrivals.parquet").unlink()
        history.build(csvs, data)
        assert (data / "carrier_arrivals.parquet").is_file()

        write_slice(tmp_path / "more", "2013-02-01", "2013-02-04")
        history.build(tmp_path / "more", data)
        assert "up to date" not in capsys.readouterr().out

    def test_what_prevents_a_build_is_said_in_one_sentence(
        self, tmp_path: Path, write_slice: WriteSlice, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(history.HistoryError, match=r"^cannot read .*flights\.csv\.zip: No su"):
            history.build(tmp_path / "nowhere", tmp_path / "data")

        (tmp_path / "file").touch()
        assert history.main(tmp_path / "file" / "data") == 1
        assert capsys.readouterr().err.count("\n") == 1


def recomputed(name: str, row: dict[str, Any], flights: list[Any]) -> dict[str, Any]:
    """Work out a row's features from the flights, one by one."""
    now = row["event_timestamp"]
    is_departure = name.endswith("_departures")
    known = []
    for flight in flights:
        at = flight.departed_at if is_departure else flight.landed_at
        same = all(getattr(flight, key) == row[key] for key in KEYS[name])
        if same and at <= now:  # never true of NaT
            known.append((at, flight.scheduled_at, flight))

    if name.startswith("aircraft"):
        last = max(known, key=lambda event: event[:2])[2]
        if is_departure:
            return {"last_departure_delay": last.dep_delay}
        return {
            "last_arrival_delay": last.arr_delay,
            "last_arrived_flight_departure_delay": last.dep_delay,
        }

    def within(hours: int) -> list[float]:
        since = now - timedelta(hours=hours)
        return [f.dep_delay if is_departure else f.arr_delay for at, _, f in known if at > since]

    def mean(values: list[float]) -> np.float32:
        return np.float32(math.fsum(values) / len(values))

    def delay(hours: int) -> np.float32:
        least = -20 if is_departure else -60
        return mean([min(max(value, least), 180) for value in within(hours)])

    def late(hours: int) -> np.float32:
        return mean([float(value >= 15) for value in within(hours)])

    if name == "origin_departures":
        return {
            "mean_departure_delay_1h": delay(1),
            "mean_departure_delay_3h": delay(3),
            "departures_3h": len(within(3)),
            "late_departure_share_3h": late(3),
        }
    if name == "route_arrivals":
        return {
            "mean_arrival_delay_7d": delay(168),
            "late_arrival_share_7d": late(168),
            "arrivals_7d": len(within(168)),
        }
    return {
        "mean_arrival_delay_3h": delay(3),
        "mean_arrival_delay_24h": delay(24),
        "late_arrival_share_24h": late(24),
    }


def with_another_future(
    raw: pd.DataFrame, flights: pd.DataFrame, now: pd.Timestamp
) -> pd.DataFrame:
    """Delay by various minutes, or cancel, whatever had not yet left or landed by now."""
    other = raw.copy()
    more = pd.Series(np.random.default_rng(3).integers(1, 100, len(raw)), index=raw.index)
    has_not_left = ~(flights["departed_at"] <= now)
    has_not_landed = ~(flights["landed_at"] <= now)
    other.loc[has_not_left, "dep_delay"] += more
    other.loc[has_not_landed, "arr_delay"] += more
    other.loc[has_not_landed, "arr_time"] = clock_plus(other["arr_time"], more)
    outcomes = ["dep_delay", "arr_delay", "arr_time", "air_time"]
    other.loc[has_not_left & (more % 7 == 0), outcomes] = np.nan
    return other


def clock_plus(clock: pd.Series, minutes: pd.Series) -> pd.Series:
    total = minutes_of_clock(clock) + minutes
    shown: pd.Series = total // 60 % 24 * 100 + total % 60
    return shown


def minutes_of_clock(clock: pd.Series) -> pd.Series:
    minutes: pd.Series = clock % 2400 // 100 * 60 + clock % 100
    return minutes


def minute_of_day(instants: pd.Series, zone: str) -> pd.Series:
    local = instants.dt.tz_convert(zone)
    minutes: pd.Series = local.dt.hour * 60 + local.dt.minute
    return minutes


def test_every_view_is_there(views: dict[str, pd.DataFrame]) -> None:
    assert tuple(views) == tuple(KEYS) == history.VIEWS
