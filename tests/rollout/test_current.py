"""What CURRENT does while versions are released, and after one was rolled back."""

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app.errors import InvalidModel
from tests.rollout.test_service import (
    asked_until,
    published,
    stage_of,
    standing,
    start,
)
from tests.shadow.conftest import SHOWN_S, Service, serving

LOOKS = {"HIKYAKU_REPOSITORY_POLL_S": "0.05"}


def name_current(folder: Path, version: int) -> None:
    (folder / "models" / "m" / "CURRENT").write_text(f"{version}\n")


async def described_until(
    service: Service, holds: Callable[[dict[str, Any]], bool]
) -> dict[str, Any]:
    """What the service says of the model once that holds."""
    async with asyncio.timeout(SHOWN_S):
        while True:
            described: dict[str, Any] = (
                await service.client.get(f"/v1/models/{service.model}")
            ).json()
            if holds(described):
                return described
            await asyncio.sleep(0.02)


def refused(described: dict[str, Any]) -> str:
    [worker] = described["workers"].values()
    return str(worker["refused"])


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the log has of CURRENT."""
    return [
        str(vars(record)["reason"])
        for record in caplog.records
        if record.getMessage() == "CURRENT names a version that must not serve"
    ]


async def test_a_quarantined_version_that_current_names_is_refused_and_not_opened(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await published(tmp_path, "binary", "faulty")
    async with serving(tmp_path, "m", **LOOKS) as service:
        await start(service)
        assert (await service.ask("rollback")).status_code == 200
        name_current(tmp_path, 2)
        described = await described_until(service, lambda found: bool(refused(found)))
        assert "version 2 was rolled back (by loopback)" in refused(described)
        assert (await service.ask("load", version=2)).status_code == 409
        await asyncio.sleep(0.5)  # some looks
        described = await described_until(service, lambda found: True)
        [worker] = described["workers"].values()
        assert [each["version"] for each in worker["ready"]] == [1]
        assert len(told(caplog)) == 1
        name_current(tmp_path, 1)
        await described_until(service, lambda found: not refused(found))


async def test_current_that_moves_during_a_release_is_followed_when_that_is_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await published(tmp_path, "binary", "binary", "binary")
    async with serving(tmp_path, "m", **LOOKS) as service:
        await start(service)
        name_current(tmp_path, 3)
        described = await described_until(service, lambda found: bool(refused(found)))
        assert refused(described) == "a release is under way, of version 2"
        await asyncio.sleep(0.5)  # some looks
        assert told(caplog) == [refused(described)]
        assert (await service.ask("rollback")).status_code == 200
        described = await described_until(service, lambda found: found["version"] == "3")
        await described_until(service, lambda found: not refused(found))


async def test_of_a_version_that_is_released_the_release_decides_whatever_current_names(
    tmp_path: Path,
) -> None:
    await published(tmp_path, "binary", "binary")
    async with serving(tmp_path, "m", **LOOKS) as service:
        await start(service)
        name_current(tmp_path, 2)
        described = await described_until(
            service, lambda found: found["release"]["current"]["version"] == 2
        )
        assert (described["version"], refused(described)) == ("1", "")
        assert (await standing(service))["rollout"] is not None


async def test_a_quarantined_version_does_not_take_the_place_of_one_that_is_lost(
    tmp_path: Path,
) -> None:
    await published(tmp_path, "binary", "binary", "binary")
    async with serving(tmp_path, "m") as service:
        await start(service)
        assert (await service.ask("rollback")).status_code == 200
    # Neither the repository nor this machine has the champion any more.
    shutil.rmtree(tmp_path / "models" / "m" / "1")
    shutil.rmtree(tmp_path / "work" / "versions")
    name_current(tmp_path, 2)
    with pytest.raises(InvalidModel, match="version 2 was rolled back"):
        async with serving(tmp_path, "m", **LOOKS):
            pass
    name_current(tmp_path, 3)
    async with serving(tmp_path, "m", **LOOKS) as service:
        found = await standing(service)
        assert [bad["chosen"]["version"] for bad in found["quarantined"]] == [2]
        assert (await service.predict({"a": 1, "b": 2}))["model_version"] == "3"


async def test_what_current_names_is_released_where_the_plan_says_so(tmp_path: Path) -> None:
    await published(tmp_path, "binary", "binary", of_current="release")
    async with serving(tmp_path, "m", **LOOKS) as service:
        assert (await service.predict({"a": 1, "b": 2}))["model_version"] == "1"
        name_current(tmp_path, 2)
        await asked_until(service, stage_of(0.0))
        assert (await service.predict({"a": 1, "b": 2}))["model_version"] == "1"
        # Only then nothing but a verb or evidence changes the state.
        await described_until(service, lambda found: found["release"]["current"]["version"] == 2)
        promoted = await service.ask("promote", share=1)
        assert promoted.status_code == 200, promoted.text
        assert (await service.predict({"a": 1, "b": 2}))["model_version"] == "2"


async def test_a_release_of_current_that_was_rolled_back_does_not_begin_again(
    tmp_path: Path,
) -> None:
    await published(tmp_path, "binary", "binary", of_current="release")
    async with serving(tmp_path, "m", **LOOKS) as service:
        await service.predict({"a": 1, "b": 2})
        name_current(tmp_path, 2)
        await asked_until(service, stage_of(0.0))
        assert (await service.ask("rollback")).json()["share"] is None
        described = await described_until(service, lambda found: bool(refused(found)))
        assert "version 2 was rolled back" in refused(described)
        await asyncio.sleep(0.5)  # some looks
        found = await standing(service)
        assert (found["rollout"], len(found["quarantined"])) == (None, 1)
        assert await service.candidates() == []


async def test_a_release_of_current_that_could_not_finish_is_told_and_does_not_begin(
    tmp_path: Path,
) -> None:
    await published(tmp_path, "binary", "binary", of_current="release")
    async with serving(tmp_path, "m", **LOOKS) as service:
        name_current(tmp_path, 2)
        described = await described_until(service, lambda found: bool(refused(found)))
        assert "no requests came lately" in refused(described)
        assert (described["version"], (await standing(service))["rollout"]) == ("1", None)
