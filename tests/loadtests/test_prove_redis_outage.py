"""The proof tells a right answer from one that only looks right."""

import json
from collections.abc import Sequence
from typing import Any

import pytest

from loadtests.open_loop import Asked
from loadtests.prove_redis_outage import outcome_of, percentile
from loadtests.telltale import value_of
from tests.tiny_models import stored

BODY = b'{"instances": [{"driver_id": 7, "city": "city3", "distance": 5}]}'
RATING, TRIPS, DEMAND = value_of(0, 7), value_of(1, 7), value_of(2, 3)
FULL = stored(RATING, TRIPS, DEMAND, 5)
WITHOUT_DRIVER = stored(None, None, DEMAND, 5)
WITHOUT_BOTH = stored(None, None, None, 5)


def answered(score: float, missing: Sequence[str] = (), status: str = "UNAVAILABLE") -> Asked:
    reasons = [{"feature_view": v, "status": status, "instances": [0]} for v in missing]
    content: dict[str, Any] = {
        "predictions": [{"score": score, "decision": True}],
        "degraded": bool(missing),
        "degraded_reasons": reasons,
    }
    return Asked(BODY, 0.0, status=200, answer=json.dumps(content).encode())


@pytest.mark.parametrize(
    ("asked", "outcome"),
    [
        (answered(FULL), "fresh"),
        (answered(WITHOUT_BOTH, ["driver", "city"]), "flagged"),
        (answered(WITHOUT_DRIVER, ["driver"]), "flagged"),
        (answered(WITHOUT_BOTH), "SILENT"),
        (answered(FULL + 1), "SILENT"),
        (answered(FULL, ["driver", "city"]), "WRONG"),
        (answered(WITHOUT_BOTH, ["driver"]), "WRONG"),
        (answered(WITHOUT_BOTH, ["driver", "city"], "NOT_FOUND"), "WRONG"),
        (Asked(BODY, 0.0), "LOST"),
        (
            Asked(BODY, 0.0, status=503, answer=b'{"error": {"code": "overloaded"}}'),
            "overloaded",
        ),
    ],
)
def test_an_answer_is_held_against_what_is_stored(asked: Asked, outcome: str) -> None:
    assert outcome_of(asked) == outcome


def test_percentiles_are_values_that_occurred() -> None:
    values = [float(number) for number in range(100, 0, -1)]
    assert [percentile(values, p) for p in (0, 50, 99, 100)] == [1, 51, 100, 100]
    assert percentile([], 99) == 0
