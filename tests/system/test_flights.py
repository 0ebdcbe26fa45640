"""From history to answers on real flights, through real processes, a real Redis and real Feast."""

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from tests.system.conftest import Workspace

pytestmark = pytest.mark.system

FLIGHT = {
    "carrier": "UA",
    "origin": "EWR",
    "dest": "ORD",
    "tailnum": "N37437",
    "scheduled_departure": "2013-09-05T22:00:00-04:00",
    "distance": 719.0,
}


@pytest.fixture(scope="module")
def first_run(workspace: Workspace) -> dict[str, Any]:
    """What the first `hikyaku up` said, and what came of the request that it printed."""
    with workspace.up() as running:
        command = re.search(r"^curl .*?^$", running.said, re.MULTILINE | re.DOTALL)
        assert command is not None
        pasted = subprocess.run(
            ["bash", "-c", command[0]], capture_output=True, text=True, check=True
        )
        return {"said": running.said, "answer": json.loads(pasted.stdout)}


def test_the_first_run_prepares_everything_and_answers(first_run: dict[str, Any]) -> None:
    assert "load the latest values into Redis" in first_run["said"]
    assert "train and publish" in first_run["said"]
    answer = first_run["answer"]
    assert 0 < answer["predictions"][0]["probability"] < 1
    assert (answer["model_name"], answer["model_version"]) == ("flight_delay", "1")
    assert answer["degraded"] is False


def test_leaving_stops_everything_that_was_started(
    first_run: dict[str, Any], workspace: Workspace
) -> None:
    assert workspace.processes() == []


REQUESTS: dict[str, dict[str, Any]] = {
    "many": {"json": {"instances": [FLIGHT] * 500}},
    "new aircraft": {"json": {"instances": [FLIGHT | {"tailnum": "N00000"}]}},
    "no aircraft": {"json": {"instances": [FLIGHT | {"tailnum": None}]}},
    "new carrier": {"json": {"instances": [FLIGHT | {"carrier": "ZZ"}], "verbose": True}},
    "bad": {"json": {"instances": [FLIGHT | {"distance": "far"}]}},
    "broken": {"content": b'{"instances": [{"distance": NaN}]}'},
}


# What `hikyaku serve` runs in its loop, and then which libraries it has loaded.
LOADED_BY_SERVING = """
import asyncio, json, sys
import app.server
from app.config import load_settings
from app.main import create_application

async def main():
    async with create_application(load_settings()).lifespan():
        return [name for name in ("feast", "pandas", "sklearn", "redis") if name in sys.modules]

print(json.dumps(asyncio.run(main())))
"""


@dataclass(frozen=True)
class SecondRun:
    said: str
    answers: dict[str, httpx.Response]
    loaded: list[str]


@pytest.fixture(scope="module")
def second_run(first_run: dict[str, Any], workspace: Workspace) -> SecondRun:
    """What the second `hikyaku up` said, and its answers to REQUESTS."""
    with workspace.up() as running:
        url = f"{running.address}/v1/models/flight_delay:predict"
        answers = {name: httpx.post(url, **request) for name, request in REQUESTS.items()}
        redis_url = (workspace.folder / ".hikyaku" / "feature-redis-url").read_text()
        loaded = subprocess.run(
            [sys.executable, "-c", LOADED_BY_SERVING],
            cwd=workspace.folder,
            env=workspace.environment() | {"FEATURE_REDIS_URL": redis_url},
            capture_output=True,
            text=True,
            check=True,
        )
    return SecondRun(running.said, answers, json.loads(loaded.stdout))


class TestSecondRun:
    def test_nothing_that_is_up_to_date_is_done_again(self, second_run: SecondRun) -> None:
        assert "features are up to date" in second_run.said
        assert "flight_delay: version 1 is up to date" in second_run.said
        assert "train and publish" not in second_run.said

    def test_a_process_that_serves_has_not_imported_feast(self, second_run: SecondRun) -> None:
        assert second_run.loaded == []

    def test_the_same_flight_gets_the_same_answer_in_every_row(self, second_run: SecondRun) -> None:
        predictions = second_run.answers["many"].json()["predictions"]
        assert len(predictions) == 500
        assert len({prediction["probability"] for prediction in predictions}) == 1

    @pytest.mark.parametrize("name", ["new aircraft", "no aircraft"])
    def test_an_aircraft_that_was_never_seen_is_an_answer_that_says_so(
        self, second_run: SecondRun, name: str
    ) -> None:
        answer = second_run.answers[name].json()
        assert answer["degraded"] is True
        assert answer["degraded_reasons"] == [
            {"feature_view": view, "status": "NOT_FOUND", "instances": [0]}
            for view in ("aircraft_departures", "aircraft_arrivals")
        ]

    def test_a_carrier_that_was_never_seen_is_an_answer_too(self, second_run: SecondRun) -> None:
        answer = second_run.answers["new carrier"].json()
        features = answer["features"][0]
        assert features["carrier_arrivals:mean_arrival_delay_3h"]["status"] == "NOT_FOUND"
        assert features["origin_departures:departures_3h"]["status"] == "PRESENT"

    @pytest.mark.parametrize(
        ("name", "field"), [("bad", "instances[0].distance"), ("broken", "distance")]
    )
    def test_bad_input_is_refused_by_name(
        self, second_run: SecondRun, name: str, field: str
    ) -> None:
        assert second_run.answers[name].status_code == 400
        assert second_run.answers[name].json()["error"]["field"] == field


def test_answers_over_http_equal_offline_predictions(
    first_run: dict[str, Any], workspace: Workspace
) -> None:
    report_file = workspace.folder / "report.json"
    finished = workspace.hikyaku(
        *("evaluate", "flight_delay", "--json", str(report_file)),
        *("--start", "2013-09-04T09:00:00-04:00", "--end", "2013-09-04T18:00:00-04:00"),
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    report = json.loads(report_file.read_text())
    assert report["skew"]["rows"] > 300
    assert report["skew"]["rows_over_tolerance"] == 0
    assert report["scores"]["rows"] == report["skew"]["rows"]
    assert report["scores"]["auc"] > 0.5
