"""Candidates of a service: shown requests by a verb, in processes of their own."""

import asyncio
from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.shadow.conftest import serving
from tests.tiny_models import contract, write_contract, write_model

# A busy machine must not have a row dropped: it is asked about once.
PATIENT = {"timeout_ms": 60_000, "isolation": {"nice": 0, "idle": False}}


async def published(folder: Path, versions: int = 2, **changes: Any) -> None:
    for _ in range(versions):
        await write_model(folder / "models", "m", "binary", **({"shadow": PATIENT} | changes))


async def test_a_candidate_is_shown_what_is_answered_and_compared(tmp_path: Path) -> None:
    await published(tmp_path)
    async with serving(tmp_path, "m") as service:
        outcome = await service.shadow(1)
        assert (outcome["version"], outcome["converged"]) == ("2", True)
        for n in range(5):
            answer = await service.predict({"a": n, "b": 2}, {"a": 0, "b": n})
            assert answer["model_version"] == "2"
        found = await service.compared(lambda comparison: comparison["rows"] == 10)
        assert found["dropped"] == {}
        [candidate] = await service.candidates()
        assert (candidate["version"], candidate["share"]) == ("1", 1.0)
        metrics = await service.metrics()
        assert 'hikyaku_shadow_rows_total{model="m",outcome="compared"} 10.0' in metrics


async def test_what_is_counted_outlives_the_process(tmp_path: Path) -> None:
    await published(tmp_path)
    async with serving(tmp_path, "m") as service:
        await service.shadow(1)
        await service.predict({"a": 1, "b": 2}, {"a": 0, "b": 2})
        await service.compared(lambda comparison: comparison["rows"] == 2)
    async with serving(tmp_path, "m") as service:
        assert (await service.compared(lambda comparison: True))["rows"] == 2
        await service.until_shown()
        await service.predict({"a": 1, "b": 2})
        await service.compared(lambda comparison: comparison["rows"] == 3)


async def test_workers_add_up(tmp_path: Path) -> None:
    await published(tmp_path)
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(serving(tmp_path, "m"))
        second = await stack.enter_async_context(serving(tmp_path, "m"))
        await first.shadow(1)
        await first.until_shown(by=2)
        for n, worker in enumerate((first, second, second)):
            await worker.predict({"a": n, "b": 2})
        for worker in (first, second):
            await worker.compared(lambda comparison: comparison["rows"] == 3)


async def test_an_unloaded_candidate_is_shown_nothing_more(tmp_path: Path) -> None:
    await published(tmp_path)
    async with serving(tmp_path, "m") as service:
        await service.shadow(1)
        assert (await service.ask("unload", version=1)).json()["shadows"] == []
        assert await service.candidates() == []
        await service.predict({"a": 1, "b": 2})
        assert "hikyaku_shadow_rows_total{" not in await service.metrics()


async def test_another_share_goes_on_with_the_same_trial(tmp_path: Path) -> None:
    await published(tmp_path)
    async with serving(tmp_path, "m") as service:
        await service.shadow(1)
        await service.predict({"a": 1, "b": 2})
        await service.compared(lambda comparison: comparison["rows"] == 1)
        [before] = await service.candidates()
        assert (await service.shadow(1, share=0.5))["changed"] is True
        [after] = await service.candidates()
        assert (after["share"], after["trial"]) == (0.5, before["trial"])
        assert (await service.shadow(1, share=0.5))["changed"] is False


async def test_a_candidate_that_is_loaded_is_the_champion_and_no_candidate(tmp_path: Path) -> None:
    await published(tmp_path)
    async with serving(tmp_path, "m") as service:
        await service.shadow(1)
        assert (await service.ask("load", version=1)).status_code == 200
        assert await service.candidates() == []
        assert (await service.predict({"a": 1, "b": 2}))["model_version"] == "1"


async def test_another_champion_is_another_trial(tmp_path: Path) -> None:
    await published(tmp_path, 3)
    async with serving(tmp_path, "m") as service:
        await service.shadow(1)
        await service.predict({"a": 1, "b": 2})
        await service.compared(lambda comparison: comparison["rows"] == 1)
        await service.ask("load", version=2)
        assert [each["comparison"] for each in await service.candidates()] == [None]
        await service.predict({"a": 1, "b": 2}, {"a": 2, "b": 2})
        await service.compared(lambda comparison: comparison["rows"] == 2)


async def test_several_candidates_see_the_same_requests_and_a_fifth_is_refused(
    tmp_path: Path,
) -> None:
    await published(tmp_path, 5)
    async with serving(tmp_path, "m") as service:
        for version in (1, 2, 3, 5):  # the last one is the champion itself
            await service.shadow(version)
        await service.predict({"a": 1, "b": 2}, {"a": 2, "b": 2})
        async with asyncio.timeout(20):
            # No event is set by another process.
            while {rows(each) for each in await service.candidates()} != {2}:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        assert [each["version"] for each in await service.candidates()] == ["1", "2", "3", "5"]
        response = await service.ask("shadow", version=4)
        assert (response.status_code, "unload one" in response.text) == (409, True)


def rows(candidate: Mapping[str, Any]) -> int | None:
    return None if candidate["comparison"] is None else candidate["comparison"]["rows"]


@pytest.mark.parametrize(
    ("body", "status", "named"),
    [
        ({"version": "9"}, 400, "version"),
        ({"version": "latest"}, 400, "version"),
        ({"version": "1", "share": 0}, 400, "share"),
        ({"version": "1", "share": 1.5}, 400, "share"),
        ({"version": "1", "shares": 1}, 400, "shares"),
        ({}, 400, "version"),
        ({"version": "1", "generation": 7}, 409, "generation"),
    ],
)
async def test_what_cannot_be_shown_is_refused(
    tmp_path: Path, body: dict[str, Any], status: int, named: str
) -> None:
    await published(tmp_path)
    async with serving(tmp_path, "m") as service:
        response = await service.ask("shadow", **body)
        assert response.status_code == status
        assert named in response.text
        assert await service.candidates() == []


async def test_segments_that_no_instance_has_are_refused_when_a_candidate_is_asked_for(
    tmp_path: Path,
) -> None:
    await published(tmp_path)
    async with serving(tmp_path, "m") as service:
        changed = contract("binary", segments={"city": {"values": ["kyoto"]}})
        write_contract(tmp_path / "models" / "m", changed)
        response = await service.ask("shadow", version=1)
        assert (response.status_code, "segments.city" in response.text) == (400, True)
