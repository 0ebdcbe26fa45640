"""Which versions there are and where they came from, over HTTP."""

import asyncio
import hashlib
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from app.api.lineage import add_lineage
from app.errors import ModelNotReady, Overloaded, RepositoryUnavailable
from app.reload.blocking import BlockingCalls
from tests.api.conftest import Serve
from tests.tiny_models import write_model


async def test_the_version_of_a_prediction_leads_to_its_lineage(
    serve: Serve, tmp_path: Path
) -> None:
    async with serve("binary") as client:
        body = {"instances": [{"a": 2.0, "b": 1.0}]}
        answer = (await client.post("/v1/models/binary:predict", json=body)).json()
        path = f"/v1/models/{answer['model_name']}/versions/{answer['model_version']}"
        found = (await client.get(path)).json()
        served = (await client.get("/v1/models/binary")).json()
    manifest = (tmp_path / "models" / "binary" / "1" / "manifest.json").read_bytes()
    assert found["sha256"] == served["sha256"] == hashlib.sha256(manifest).hexdigest()
    assert found["hyperparameters"] == {"kind": "binary"}


async def test_the_versions_say_which_serves_and_which_is_current(
    serve: Serve, tmp_path: Path
) -> None:
    async with serve("binary") as client:
        await write_model(tmp_path / "models", "binary", "binary")
        found = (await client.get("/v1/models/binary/versions")).json()
        other = (await client.get("/v1/models/binary/versions/2")).json()
    assert found["versions"] == ["1", "2"]
    assert (found["name"], found["serving"], found["current"]) == ("binary", "1", "2")
    assert other["version"] == "2"


@pytest.mark.parametrize(
    "path", ["binary/versions/2", "binary/versions/01", "binary/versions/x", "other/versions"]
)
async def test_what_is_not_there_is_not_found(serve: Serve, path: str) -> None:
    async with serve("binary") as client:
        answer = await client.get(f"/v1/models/{path}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


class Held:
    """A repository that answers once it is let go."""

    def __init__(self) -> None:
        self.answer = threading.Event()
        self.asked = threading.Semaphore(0)

    def current(self, model: str) -> int | None:
        self.asked.release()
        self.answer.wait()
        return 1

    def versions(self, model: str) -> Sequence[int]:
        return [1]

    def manifest(self, model: str, version: int) -> bytes:
        raise RepositoryUnavailable("/secret/place: no such host")


@contextmanager
def held() -> Iterator[Held]:
    repository = Held()
    try:
        yield repository
    finally:
        repository.answer.set()


@asynccontextmanager
async def client_of(repository: Held) -> AsyncIterator[httpx.AsyncClient]:
    app, calls = FastAPI(), BlockingCalls(4)
    add_lineage(app, repository, lambda: {"tiny": 1}, lambda: calls)
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://test"
    ) as made:
        yield made
    await calls.close()


async def test_a_repository_that_hangs_keeps_a_few_threads_and_refuses_the_rest() -> None:
    with held() as repository:
        async with client_of(repository) as client, asyncio.TaskGroup() as waiting:
            path = "/v1/models/tiny/versions"
            first = [waiting.create_task(client.get(path)) for _ in range(4)]
            for _ in first:
                await asyncio.to_thread(repository.asked.acquire)
            with pytest.raises(Overloaded):
                await client.get(path)
            repository.answer.set()
        assert [task.result().json()["current"] for task in first] == ["1"] * 4


async def test_a_repository_that_cannot_be_read_is_not_named_to_callers() -> None:
    with held() as repository:
        async with client_of(repository) as client:
            with pytest.raises(ModelNotReady, match="cannot be read now") as refused:
                await client.get("/v1/models/tiny/versions/1")
    assert "secret" not in str(refused.value)


def test_a_repository_that_hangs_does_not_keep_the_process_from_ending() -> None:
    with held() as repository:

        async def ask_and_leave() -> None:
            async with client_of(repository) as client:
                asking = asyncio.create_task(client.get("/v1/models/tiny/versions"))
                await asyncio.to_thread(repository.asked.acquire)
                asking.cancel()
                await asyncio.wait({asking})

        worker = threading.Thread(target=asyncio.run, args=(ask_and_leave(),), daemon=True)
        worker.start()
        worker.join(20)
        assert not worker.is_alive()
