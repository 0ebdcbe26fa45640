"""Load of real flights: the request log's last days, asked about aircraft by aircraft.

    locust --locustfile loadtests/locustfile.py                                  # web UI on :8089
    locust --locustfile loadtests/locustfile.py --headless --users 20 --run-time 60s

Needs the service with the model flight_delay, and feature_repo/data, which `make run` builds.
"""

import json
import math
import random
from collections.abc import Mapping, Sequence
from datetime import timedelta
from itertools import accumulate
from pathlib import Path
from typing import Any

import gevent
import pyarrow.compute as pc
import pyarrow.parquet as pq
from locust import FastHttpUser, constant_throughput, task
from locust.contrib.fasthttp import ResponseContextManager

FLIGHTS = Path(__file__).parent.parent / "feature_repo" / "data" / "flights.parquet"
LAST_DAYS = 2
MODEL = "flight_delay"
REQUESTS_PER_SECOND_OF_A_USER = 20
SEED = 2013
# A few real entities are most of the traffic: the k-th aircraft is asked about 1/k as often.
ZIPF_EXPONENT = 1.0

Instance = Mapping[str, Any]


class Aircraft:
    """The flights of each aircraft, and how popular it is."""

    def __init__(self, flights: Sequence[Instance], seed: int) -> None:
        by_tailnum: dict[str | None, list[Instance]] = {}
        for flight in flights:
            by_tailnum.setdefault(flight["tailnum"], []).append(flight)
        self._flights = list(by_tailnum.values())
        self._random = random.Random(seed)
        # Not those with most flights first: popularity with callers is another thing.
        self._random.shuffle(self._flights)
        ranks = range(1, len(self._flights) + 1)
        self._weights = list(accumulate(rank**-ZIPF_EXPONENT for rank in ranks))

    def draw(self, count: int) -> list[Instance]:
        """Flights of `count` aircraft, each drawn by its popularity."""
        drawn = self._random.choices(self._flights, cum_weights=self._weights, k=count)
        return [self._random.choice(flights) for flights in drawn]


def last_flights(path: Path, days: int) -> list[Instance]:
    """What was asked in the last `days` days of the request log."""
    fields = ["carrier", "origin", "dest", "tailnum", "scheduled_departure", "distance"]
    log = pq.read_table(path, columns=[*fields, "request_time"])
    since = pc.max(log["request_time"]).as_py() - timedelta(days=days)
    flights: list[Instance] = (
        log.filter(pc.greater(log["request_time"], since)).select(fields).to_pylist()
    )
    return flights


AIRCRAFT = Aircraft(last_flights(FLIGHTS, LAST_DAYS), SEED)
# Timers count from a clock that stood still while this file loaded: --run-time would end early.
gevent.get_hub().loop.update_now()


class Caller(FastHttpUser):
    """Asks mostly about one flight; waits for each answer, so a slow service gets less load."""

    host = "http://127.0.0.1:8000"
    wait_time = constant_throughput(REQUESTS_PER_SECOND_OF_A_USER)

    @task(90)
    def ask_about_one_flight(self) -> None:
        self._ask(1)

    @task(8)
    def ask_about_8_flights(self) -> None:
        self._ask(8)

    @task(2)
    def ask_about_64_flights(self) -> None:
        self._ask(64)

    def _ask(self, count: int) -> None:
        with self.client.post(
            f"/v1/models/{MODEL}:predict",
            json={"instances": AIRCRAFT.draw(count)},
            name=f"predict {count:2}",
            catch_response=True,
        ) as response:
            fault = fault_of(response, count)
            if fault:
                response.failure(fault)


def fault_of(response: ResponseContextManager, count: int) -> str | None:
    """What is wrong with an answer to `count` instances; few texts, as Locust groups by them."""
    if response.status_code == 0:
        return f"no answer: {type(getattr(response, 'error', None)).__name__}"
    try:
        answer = json.loads(response.text or "")
    except ValueError:
        return f"{response.status_code}: the body is not JSON"
    if response.status_code != 200:
        return f"{response.status_code} {answer['error']['code']}"
    if not answer["model_version"]:
        return "200 without a model_version"
    if len(answer["predictions"]) != count:
        return f"200 with {len(answer['predictions'])} predictions for {count} instances"
    if not all(is_probability(prediction["probability"]) for prediction in answer["predictions"]):
        return "200 with a probability outside [0, 1]"
    return None


def is_probability(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value) and 0 <= value <= 1
