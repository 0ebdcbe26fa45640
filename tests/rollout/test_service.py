"""Releases of a service: as far as the evidence goes, by itself or as an operator says."""

import asyncio
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from app.rollout.decision_log import decided_anew, decisions
from tests.shadow.conftest import SHOWN_S, Service, serving
from tests.tiny_models import write_model

# So wide that some hundred answers decide.
MARGINS = {"errors": 0.2, "slow": 0.3, "median": 0.3, "loss": 0.2}
RELEASE = {
    "stages": ["shadow", 50, 100],
    "margins": MARGINS,
    "least_answers": 50,
    "least_minutes": 0,
    "control": 0,
    "watch_hours": 0,
}
NAN, FAILS = 150.0, 250.0
"""Values of `a` that the faulty model has no answer for."""

numbers = count()


async def published(folder: Path, *kinds: str, **release: Any) -> None:
    changes = {"release": RELEASE | release, "shadow": {"block_rows": 1, "hold_ms": 0}}
    for kind in kinds:
        await write_model(folder / "models", "m", kind, **changes)
    # The first one serves.
    (folder / "models" / "m" / "CURRENT").write_text("1\n")


async def start(service: Service, version: int = 2, **body: Any) -> dict[str, Any]:
    response = await service.ask("release", version=version, **{"expected_per_s": 10} | body)
    assert response.status_code == 200, response.text
    document: dict[str, Any] = response.json()
    return document


async def standing(service: Service) -> dict[str, Any]:
    response = await service.client.get(f"/v1/models/{service.model}/release")
    assert response.status_code == 200, response.text
    document: dict[str, Any] = response.json()
    return document


async def asked_until(
    service: Service, holds: Callable[[Mapping[str, Any]], bool], a: float = 1.0
) -> dict[str, Any]:
    """How the release stands once that holds of it; meanwhile keys are new all the time."""
    async with asyncio.timeout(SHOWN_S):
        while True:
            for _ in range(20):
                await service.client.post(
                    f"/v1/models/{service.model}:predict",
                    json={"instances": [{"a": a, "b": 2}]},
                    headers={"Routing-Key": f"key-{next(numbers)}"},
                )
            found = await standing(service)
            if holds(found):
                return found
            await asyncio.sleep(0.02)


def is_over(found: Mapping[str, Any]) -> bool:
    return found["rollout"] is None


def stage_of(share: float) -> Callable[[Mapping[str, Any]], bool]:
    return lambda found: (
        found["rollout"] is not None and found["rollout"]["stages"][-1]["stage"]["share"] == share
    )


async def test_a_version_that_is_as_good_takes_over_stage_by_stage(tmp_path: Path) -> None:
    await published(tmp_path, "binary", "binary")
    async with serving(tmp_path, "m") as service:
        begun = await start(service)
        assert (begun["version"], begun["share"]) == ("1", 0.0)
        assert [need["share"] for need in begun["needs"]] == [0.0, 0.5]
        await asked_until(service, stage_of(0.5))
        versions = {(await service.predict({"a": 1, "b": n}))["model_version"] for n in range(50)}
        assert versions == {"1", "2"}
        await asked_until(service, is_over)
        answer = await service.predict({"a": 1, "b": 2})
        assert (answer["model_version"], answer["route"]) == ("2", "champion")


@pytest.mark.parametrize(
    ("a", "reason"), [(NAN, "no finite numbers"), (FAILS, "errors: more than the margin")]
)
async def test_a_version_that_fails_is_rolled_back_and_does_not_come_back_by_itself(
    tmp_path: Path, a: float, reason: str
) -> None:
    await published(tmp_path, "binary", "faulty")
    async with serving(tmp_path, "m") as service:
        await start(service)
        found = await asked_until(service, is_over, a)
        [bad] = found["quarantined"]
        assert (bad["chosen"]["version"], reason in bad["reason"]) == (2, True)
        assert await service.candidates() == []
        for verb in ("release", "load"):
            refused = await service.ask(verb, version=2)
            assert (refused.status_code, "despite_quarantine" in refused.text) == (409, True)
        assert (await start(service, despite_quarantine=True))["share"] == 0.0
        assert (await standing(service))["quarantined"] == []


async def test_a_version_that_fails_those_whom_it_answers_is_rolled_back(tmp_path: Path) -> None:
    await published(tmp_path, "binary", "faulty")
    async with serving(tmp_path, "m") as service:
        await start(service)
        await asked_until(service, stage_of(0.5))
        found = await asked_until(service, is_over, FAILS)
        [bad] = found["quarantined"]
        assert "errors" in bad["reason"]
        for n in range(50):
            answer = await service.predict({"a": FAILS, "b": n}, **{"Routing-Key": f"{n}"})
            assert answer["model_version"] == "1"


async def test_on_silence_nothing_is_promoted(tmp_path: Path) -> None:
    await published(tmp_path, "binary", "binary", least_answers=1)
    async with serving(tmp_path, "m") as service:
        await start(service)
        await asyncio.sleep(2.5)  # the decider looks every second
        found = await standing(service)
        assert found["verdict"]["action"] == "hold"
        assert "0 answers of the candidate in this stage of 1" in found["verdict"]["reasons"]
        assert stage_of(0.0)(found)


async def test_a_paused_release_is_not_promoted_until_it_is_resumed(tmp_path: Path) -> None:
    await published(tmp_path, "binary", "binary")
    async with serving(tmp_path, "m") as service:
        await start(service)
        assert (await service.ask("pause")).json()["changed"] is True
        assert (await service.ask("pause")).json()["changed"] is False
        waits = ["paused by loopback"]
        found = await asked_until(service, lambda found: found["verdict"]["reasons"] == waits)
        assert stage_of(0.0)(found)
        assert (await service.ask("resume")).json()["changed"] is True
        await asked_until(service, stage_of(0.5))


async def test_a_stage_that_began_before_answers_were_timed_begins_again_when_they_are(
    tmp_path: Path,
) -> None:
    await published(tmp_path, "binary", "binary", least_answers=100_000)
    async with serving(tmp_path, "m") as service:
        await start(service)
        assert (await service.ask("promote")).json()["share"] == 0.5
        found = await asked_until(
            service, lambda found: found["rollout"]["stages"][-1]["stage"]["slow_s"] is not None
        )
        assert [each["stage"]["share"] for each in found["rollout"]["stages"]] == [0.0, 0.5, 0.5]


async def test_an_operator_promotes_and_rolls_back_whatever_the_evidence_says(
    tmp_path: Path,
) -> None:
    await published(tmp_path, "binary", "binary", "binary")
    async with serving(tmp_path, "m") as service:
        await start(service)
        assert (await service.ask("promote")).json()["share"] == 0.5
        assert (await service.ask("load", version=3)).status_code == 409
        assert (await service.ask("unload", version=2)).status_code == 409
        assert (await service.ask("release", version=3)).status_code == 409
        assert (await service.ask("rollback")).json()["share"] is None
        [bad] = (await standing(service))["quarantined"]
        assert bad["reason"] == "by loopback"
        again = await service.ask("rollback")
        assert (again.status_code, "just now" in again.text) == (409, True)
        assert (await service.ask("rollback", version=2)).status_code == 409
        await start(service, 3)
        promoted = (await service.ask("promote", share=1)).json()
        assert (promoted["version"], promoted["share"]) == ("3", None)
        assert (await service.predict({"a": 1, "b": 2}))["model_version"] == "3"
        assert (await service.ask("promote")).status_code == 409


async def test_a_version_that_took_over_is_watched_and_can_be_rolled_back(tmp_path: Path) -> None:
    await published(tmp_path, "binary", "faulty", control=0.3, watch_hours=1)
    async with serving(tmp_path, "m") as service:
        await start(service)
        assert (await service.ask("promote", share=1)).json()["version"] == "2"
        found = await standing(service)
        assert found["rollout"]["stages"][-1]["stage"]["share"] == 0.7
        routes = {
            (await service.predict({"a": 1, "b": 2}, **{"Routing-Key": f"{n}"}))["route"]
            for n in range(50)
        }
        assert routes == {"champion", "previous"}
        found = await asked_until(service, is_over, FAILS)
        assert [bad["chosen"]["version"] for bad in found["quarantined"]] == [2]
        assert (await service.predict({"a": FAILS, "b": 2}))["model_version"] == "1"


async def test_a_watch_is_ended_by_a_promotion_and_a_release_without_a_quarantine(
    tmp_path: Path,
) -> None:
    await published(tmp_path, "binary", "binary", control=0.3, watch_hours=1)
    async with serving(tmp_path, "m") as service:
        await start(service)
        ended = await service.ask("rollback", quarantine=False)
        assert (ended.json()["version"], ended.json()["share"]) == ("1", None)
        assert (await standing(service))["quarantined"] == []
        await start(service)
        await service.ask("promote", share=1)
        assert (await standing(service))["rollout"]["watched_since_s"] is not None
        assert (await service.ask("promote")).json()["version"] == "2"
        assert (await standing(service))["rollout"] is None
        assert {(await service.predict({"a": 1, "b": n}))["route"] for n in range(20)} == {
            "champion"
        }


@pytest.mark.parametrize(
    ("body", "status", "named"),
    [
        ({"version": 9}, 400, "version"),
        ({"version": "latest"}, 400, "version"),
        ({"version": 1}, 409, "serves already"),
        ({"version": 2, "generation": 7}, 409, "generation"),
        ({"version": 2, "expected_per_s": 0}, 400, "expected_per_s"),
        ({"version": 2, "expected_per_s": 0.001}, 400, "most_hours"),
        ({"version": 2, "expected_per_s": None}, 400, "say how many are expected"),
    ],
)
async def test_what_cannot_be_released_is_refused_by_name(
    tmp_path: Path, body: dict[str, Any], status: int, named: str
) -> None:
    await published(tmp_path, "binary", "binary")
    async with serving(tmp_path, "m") as service:
        refused = await service.ask("release", **{"expected_per_s": 10} | body)
        assert (refused.status_code, named in refused.text) == (status, True), refused.text
        assert (await standing(service))["rollout"] is None


async def test_what_was_decided_is_decided_so_again(tmp_path: Path) -> None:
    await published(tmp_path, "binary", "faulty")
    async with serving(tmp_path, "m") as service:
        await start(service)
        await asked_until(service, is_over, FAILS)
    log = tmp_path / "work" / "decisions" / "m.jsonl"
    *_, last = decisions(log)
    assert last.did == "rolled back"
    assert all(decided_anew(decision) == decision.verdict for decision in decisions(log))
    log.write_text(log.read_text().replace('"errors":0.2', '"errors":0.999'))
    *_, last = decisions(log)
    assert decided_anew(last).action != "rollback"
