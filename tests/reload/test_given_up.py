"""A load of which nothing comes leaves nothing behind."""

import asyncio
import fcntl
import hashlib
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis

from app.local.redis_server import own_redis
from loadtests.oracle_model import MODEL
from tests.reload.conftest import Service, Worker


class Elsewhere:
    """Another machine, with a copy of the repository."""

    def __init__(self, service: Service, folder: Path, redis_url: str) -> None:
        self._service = service
        self._redis_url = redis_url
        self.models = folder / "models"
        self.work = folder / "work"

    def version(self, version: int) -> Path:
        return self.models / MODEL / str(version)

    def copy(self) -> None:
        shutil.copytree(self._service.repository, self.models, dirs_exist_ok=True)

    @asynccontextmanager
    async def worker(self) -> AsyncIterator[Worker]:
        self.copy()
        async with self._service.worker(
            STATE_REDIS_URL=self._redis_url,
            MODEL_REPOSITORY=str(self.models),
            HIKYAKU_WORK_DIR=str(self.work),
        ) as worker:
            yield worker

    @contextmanager
    def verifying(self, version: int) -> Iterator[None]:
        """Somebody else is verifying the version there just now."""
        sha256 = hashlib.sha256((self.version(version) / "manifest.json").read_bytes()).hexdigest()
        with (self.work / "versions" / f"{sha256}.verifying.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


@pytest.fixture
def redis_url(tmp_path: Path) -> Iterator[str]:
    with own_redis(tmp_path / "redis") as url:
        yield url


def preparing(described: dict[str, Any]) -> bool:
    return described["release"]["preparing"] is not None


def ready(described: dict[str, Any]) -> list[set[int]]:
    return [{chosen["version"] for chosen in w["ready"]} for w in described["workers"].values()]


async def test_a_load_whose_last_change_fails_does_not_keep_others_from_loading(
    service: Service, tmp_path: Path, redis_url: str
) -> None:
    elsewhere = Elsewhere(service, tmp_path / "elsewhere", redis_url)
    with redis.Redis.from_url(redis_url) as administrator:
        async with service.worker(STATE_REDIS_URL=redis_url) as first, elsewhere.worker() as second:
            await service.publish()
            elsewhere.copy()
            with elsewhere.verifying(2):
                loading = asyncio.create_task(first.ask("load"))
                await first.until(preparing)
                administrator.execute_command("ACL", "SETUSER", "default", "-exec")
            assert (await loading).status_code == 503
            administrator.execute_command("ACL", "SETUSER", "default", "+exec")
            await second.until(lambda described: not preparing(described))
            assert (await second.ask("load")).status_code == 200
            assert [await first.version(), await second.version()] == [2, 2]


async def test_a_refused_version_is_ready_nowhere(
    service: Service, tmp_path: Path, redis_url: str
) -> None:
    elsewhere = Elsewhere(service, tmp_path / "elsewhere", redis_url)
    async with service.worker(STATE_REDIS_URL=redis_url) as first, elsewhere.worker():
        await service.publish()
        elsewhere.copy()
        (elsewhere.version(2) / "model.onnx").unlink()
        assert (await first.ask("load")).status_code == 400
        await first.until(lambda described: ready(described) == [{1}, {1}])


async def test_a_version_that_was_refused_is_loaded_once_what_was_wrong_is_put_right(
    service: Service, tmp_path: Path, redis_url: str
) -> None:
    elsewhere = Elsewhere(service, tmp_path / "elsewhere", redis_url)
    async with service.worker(STATE_REDIS_URL=redis_url) as first, elsewhere.worker():
        await service.publish()
        elsewhere.copy()
        (elsewhere.version(2) / "model.onnx").unlink()
        assert (await first.ask("load")).status_code == 400
        elsewhere.copy()
        response = await first.ask("load")
        assert response.status_code == 200, response.text


async def test_a_contract_that_one_worker_refuses_takes_effect_nowhere(
    service: Service, tmp_path: Path, redis_url: str
) -> None:
    elsewhere = Elsewhere(service, tmp_path / "elsewhere", redis_url)
    async with service.worker(STATE_REDIS_URL=redis_url) as first, elsewhere.worker() as second:
        contract = service.model_dir / "model.yaml"
        contract.write_text(contract.read_text() + "description: changed\n")
        (elsewhere.models / MODEL / "model.yaml").write_text("outputs: none\n")
        assert (await first.ask("load", version="1")).status_code == 400
        assert [(await each.described())["description"] for each in (first, second)] == ["", ""]
        elsewhere.copy()
        assert (await first.ask("load", version="1")).json()["converged"] is True
        described = [(await each.described())["description"] for each in (first, second)]
        assert described == ["changed", "changed"]
