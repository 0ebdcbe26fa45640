"""What a worker starts with when not all is as it was."""

import shutil
from typing import Any

import pytest

from app.errors import InvalidModel
from tests.reload.conftest import Service


def lose(service: Service, version: int) -> None:
    """Neither the repository nor this machine has it any more."""
    shutil.rmtree(service.model_dir / str(version))
    shutil.rmtree(service.folder / "work" / "versions")


def told(described: dict[str, Any]) -> bool:
    """Whether others can know that it serves."""
    workers = described["workers"].values()
    return bool(workers) and all(worker["serves"] for worker in workers)


async def test_a_champion_that_cannot_serve_any_more_makes_way_for_what_current_names(
    service: Service,
) -> None:
    async with service.worker():
        pass
    await service.publish()
    lose(service, 1)
    async with service.worker(HIKYAKU_REPOSITORY_POLL_S="60") as worker:
        assert await worker.version() == 2
        assert (await worker.described())["release"]["champion"]["version"] == 2


async def test_a_champion_that_others_serve_is_not_replaced_by_a_worker_that_cannot(
    service: Service,
) -> None:
    async with service.worker() as first:
        await first.until(told)
        await service.publish()
        lose(service, 1)
        with pytest.raises(InvalidModel, match="oracle"):
            async with service.worker(HIKYAKU_REPOSITORY_POLL_S="60"):
                pass
        assert await first.version() == 1


async def test_a_new_model_of_which_nothing_is_published_yet_does_not_keep_a_worker_from_starting(
    service: Service,
) -> None:
    async with service.worker():
        pass
    new = service.repository / "new"
    new.mkdir()
    shutil.copy(service.model_dir / "model.yaml", new)
    async with service.worker() as worker:
        assert await worker.version() == 1
        assert (await worker.client.get("/v2/health/ready")).status_code == 200


async def test_a_new_model_that_cannot_serve_does_not_keep_a_worker_from_joining_others(
    service: Service,
) -> None:
    async with service.worker() as first:
        await first.until(told)
        shutil.copytree(service.model_dir, service.repository / "new")  # copied, not published
        async with service.worker() as second:
            assert [await first.version(), await second.version()] == [1, 1]


async def test_a_first_start_says_which_model_cannot_serve(service: Service) -> None:
    shutil.copytree(service.model_dir, service.repository / "new")
    with pytest.raises(InvalidModel, match="a version is published, not copied"):
        async with service.worker():
            pass
