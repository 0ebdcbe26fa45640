import json
import logging

from app.telemetry.logs import JsonFormatter


def record(message: str, **extra: object) -> dict[str, object]:
    made = logging.makeLogRecord({"name": "app.x", "levelname": "WARNING", "msg": message} | extra)
    line = JsonFormatter().format(made)
    assert "\n" not in line
    parsed: dict[str, object] = json.loads(line)
    return parsed


def test_an_event_is_one_line_with_its_fields() -> None:
    line = record("candidate failed", model="flights", rows=3)
    assert (line["event"], line["level"], line["model"], line["rows"]) == (
        "candidate failed",
        "warning",
        "flights",
        3,
    )


def test_nothing_that_a_caller_sends_can_forge_a_line() -> None:
    hostile = 'x"}\n{"event": "forged"} \x1b[31m \u2028'
    assert record(hostile, model=hostile)["event"] == hostile


def test_a_traceback_stays_in_its_line() -> None:
    try:
        raise ValueError("boom")
    except ValueError as exc:
        line = record("defect", exc_info=(ValueError, exc, exc.__traceback__))
    assert "ValueError: boom" in str(line["traceback"])
