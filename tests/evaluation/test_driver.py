"""What happens to a service while recorded time is replayed to it."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pandas as pd
import pytest

from app.errors import HikyakuError
from app.evaluation.driver import Replayed, drive
from app.evaluation.request_log import RequestLog
from app.evaluation.service_client import ServiceClient

HOUR_US = 3_600_000_000
NEVER = -1
REFUSED = {"error": {"code": "overloaded", "message": "queued", "retryable": True}}
WRONG = {"error": {"code": "invalid_input", "message": "no", "retryable": False}}


class RecordingService:
    """Answers as the service does and notes what it is asked, and what is pushed; the first
    predictions get the `refusals` instead."""

    def __init__(self, *refusals: tuple[int, dict[str, Any]]) -> None:
        self.events: list[Any] = []
        self.refusals = list(refusals)
        self._lock = threading.Lock()
        self._given = 0

    def push_until(self, until_us: int) -> None:
        self.events.append(("push", until_us / HOUR_US))

    def answer(self, path: str, body: Any) -> tuple[int, Any]:
        with self._lock:
            match path.rpartition(":")[2]:
                case "predict" if self.refusals:
                    return self.refusals.pop(0)
                case "predict":
                    self._given += 1
                    self.events.append(("predict", body["instances"][0]["flight"]))
                    return 200, {
                        "request_id": f"id of {body['instances'][0]['flight']}",
                        "model_version": "1",
                        "predictions": [{"probability": 0.5}],
                        "degraded": False,
                    }
                case "feedback":
                    told = [(each["request_id"], each["label"]) for each in body["labels"]]
                    self.events.append(("labels", told))
                    return 200, {"results": [{"status": "accepted"} for _ in told]}
            self.events.append(("clock", pd.Timestamp(body["now"]).timestamp() / 3600))
            return 200, {}

    @contextmanager
    def listening(self) -> Iterator[str]:
        service = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                status, document = service.answer(self.path, json.loads(body))
                content = json.dumps(document).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_PUT = do_POST

            def log_message(self, format: str, *args: Any) -> None:
                """Nothing to the test's output."""

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
            yield f"http://127.0.0.1:{server.server_port}"
            server.shutdown()


def log(*flights: tuple[str, int, Any, int]) -> RequestLog:
    """Of name, hour of asking, truth and hour at which it is known."""
    names, asked, truth, known = zip(*flights, strict=True)
    known_us = [NEVER if hour == NEVER else hour * HOUR_US for hour in known]
    return RequestLog(
        instances=[{"flight": name} for name in names],
        asked_us=np.array(asked, dtype=np.int64) * HOUR_US,
        truth=np.array(truth, dtype=object),
        known_us=np.array(known_us, dtype=np.int64),
        horizon_us=None,
        entities=pd.DataFrame(),
    )


def replayed(service: RecordingService, requests: RequestLog, until: int) -> Replayed:
    with (
        service.listening() as address,
        ServiceClient(address, "m", token=None, timeout_ms=1_000) as client,
    ):
        return drive(
            requests,
            service,
            client,
            start_us=0,
            until_us=until * HOUR_US,
            with_labels=True,
        )


def test_everything_happens_in_the_order_of_time() -> None:
    service = RecordingService()
    requests = log(("a", 1, True, 4), ("b", 3, False, 4), ("c", 4, True, 9))
    replayed(service, requests, until=6)
    assert service.events == [
        ("clock", 0),
        *[("push", 1), ("clock", 1), ("predict", "a")],
        *[("push", 3), ("clock", 3), ("predict", "b")],
        *[("push", 4), ("clock", 4), ("predict", "c")],
        ("labels", [("id of a", True), ("id of b", False)]),
        ("clock", 6),
    ]


def test_what_is_known_after_the_end_or_never_is_not_told() -> None:
    service = RecordingService()
    requests = log(
        ("cancelled", 1, None, 2), ("landed later", 1, True, 9), ("lost", 1, None, NEVER)
    )
    outcome = replayed(service, requests, until=6)
    assert [event for event in service.events if event[0] == "labels"] == [
        ("labels", [("id of cancelled", None)])
    ]
    assert outcome.told == ["accepted", None, None]
    assert outcome.statuses() == {"accepted": 1}


def test_answers_come_in_the_order_of_the_requests() -> None:
    names = [f"flight {number}" for number in range(50)]
    outcome = replayed(RecordingService(), log(*((name, 1, True, 2) for name in names)), until=1)
    assert [answer.request_id for answer in outcome.answers] == [f"id of {name}" for name in names]


def test_a_refusal_that_may_pass_is_asked_again() -> None:
    service = RecordingService((503, REFUSED), (503, REFUSED))
    outcome = replayed(service, log(("a", 1, True, 2)), until=2)
    assert (len(outcome.answers), outcome.retried) == (1, 2)


def test_a_refusal_that_will_not_pass_ends_the_replay_with_what_was_said() -> None:
    with pytest.raises(HikyakuError, match=r"/v1/models/m:predict: 400: .*invalid_input"):
        replayed(RecordingService((400, WRONG)), log(("a", 1, True, 2)), until=2)
