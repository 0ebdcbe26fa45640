"""A candidate that ends the worker it is executed in, before that has told anything of it."""

import asyncio
import time
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.system.test_serve import Serving, served
from tests.tiny_models import write_model

pytestmark = pytest.mark.system

KILLS = {"instances": [{"a": 400.0, "b": 1.0}]}
MODEL = "/v1/models/m"
WITHIN_S = 60.0

keys = count()


def released(serving: Serving, share: float) -> int:
    """Until it is rolled back; how many requests were lost with their worker."""
    with httpx.Client(base_url=serving.address, timeout=30) as client:

        def told(verb: str, **body: Any) -> None:
            answer = client.post(f"{MODEL}:{verb}", json=body)
            assert answer.status_code == 200, answer.text

        told("release", version=2, expected_per_s=1000, despite_quarantine=True)
        told("promote", share=share)
        lost = 0
        until_s = time.monotonic() + WITHIN_S
        while time.monotonic() < until_s:
            try:
                answered_by(client)
                standing = client.get(f"{MODEL}/release").json()
            except httpx.TransportError:
                lost += 1
                continue
            if standing["rollout"] is None:
                break
        [quarantined] = standing["quarantined"]
        assert quarantined["reason"] == "2 workers have died while they executed it"
        assert {answered_by(client) for _ in range(20)} == {"1"}
        return lost


def answered_by(client: httpx.Client) -> str:
    headers = {"Routing-Key": f"key {next(keys)}"}
    answer = client.post(f"{MODEL}:predict", json=KILLS, headers=headers)
    return str(answer.json()["model_version"])


def test_it_is_rolled_back_when_it_has_ended_two_workers(tmp_path: Path) -> None:
    for kind in ("binary", "deadly"):
        asyncio.run(write_model(tmp_path, "m", kind))
    (tmp_path / "m" / "CURRENT").write_text("1\n")
    with served(tmp_path) as serving:
        assert released(serving, share=0.5) == 2
        # While it is watched all but a few are answered by it.
        assert released(serving, share=1.0) == 2
        assert 'hikyaku_deaths_executing_total{model="m",version="2"} 4.0' in serving.metrics()
