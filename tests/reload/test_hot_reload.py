"""Another version takes over while requests run, and all workers agree which one."""

import asyncio
import fcntl
import hashlib
import itertools
import re
import shutil
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path

import pytest

from app.errors import InvalidModel
from app.local.redis_server import own_redis
from loadtests.oracle_model import MODEL, publish_next
from tests.reload.conftest import Service, Worker
from tests.tiny_models import write_model

STANDBY_1 = re.compile('hikyaku_model_info{model="oracle",role="standby",.*version="1"}')


async def two_workers(service: Service, stack: AsyncExitStack) -> tuple[Worker, Worker]:
    first = await stack.enter_async_context(service.worker())
    return first, await stack.enter_async_context(service.worker())


async def test_a_loaded_version_serves_when_the_verb_has_answered(service: Service) -> None:
    async with service.worker() as worker:
        await service.publish()
        assert await worker.version() == 1
        response = await worker.ask("load")
        assert response.status_code == 200
        assert response.json()["version"] == "2"
        assert await worker.version() == 2


async def test_a_version_is_loaded_by_its_number(service: Service) -> None:
    await service.publish()
    async with service.worker() as worker:
        assert await worker.version() == 2
        assert (await worker.ask("load", version="1")).json()["changed"] is True
        assert await worker.version() == 1


async def test_loading_what_serves_changes_nothing(service: Service) -> None:
    async with service.worker() as worker:
        before = (await worker.described())["release"]
        response = await worker.ask("load", version="1")
        assert (response.status_code, response.json()["changed"]) == (200, False)
        assert (await worker.described())["release"] == before


async def test_a_rollback_serves_what_served_before(service: Service) -> None:
    async with service.worker() as worker:
        await service.publish()
        await worker.ask("load")
        assert (await worker.ask("rollback")).json()["version"] == "1"
        assert await worker.version() == 1


async def test_a_second_rollback_does_not_bring_the_bad_version_back(service: Service) -> None:
    async with service.worker() as worker:
        await service.publish()
        await worker.ask("load")
        await worker.ask("rollback")
        response = await worker.ask("rollback")
        assert (response.status_code, response.json()["error"]["code"]) == (409, "conflict")
        assert await worker.version() == 1


async def test_every_worker_serves_it_when_the_verb_has_answered(service: Service) -> None:
    async with AsyncExitStack() as stack:
        first, second = await two_workers(service, stack)
        await service.publish()
        assert (await first.ask("load")).json()["converged"] is True
        assert [await first.version(), await second.version()] == [2, 2]


async def test_a_rollback_reaches_every_worker(service: Service) -> None:
    async with AsyncExitStack() as stack:
        first, second = await two_workers(service, stack)
        await service.publish()
        await first.ask("load")
        await second.ask("rollback")
        assert await second.version() == 1
        await first.until(lambda described: described["version"] == "1")
        assert await first.version() == 1


async def test_a_rollback_is_done_whatever_else_changes_meanwhile(service: Service) -> None:
    async with AsyncExitStack() as stack:
        first, second = await two_workers(service, stack)
        for _ in range(2):
            await service.publish()
        await first.ask("shadow", version="3")

        async def changing() -> None:
            """Without end, but for what is cancelled."""
            for n in itertools.count(1):
                await second.ask("shadow", version="3", share=1 / (1 + n % 9))

        for _ in range(5):
            await first.ask("load", version="2")
            others = asyncio.create_task(changing())
            try:
                answer = await first.ask("rollback")
            finally:
                others.cancel()
                await asyncio.wait({others})
            assert (answer.status_code, answer.json().get("version")) == (200, "1"), answer.text


async def test_a_worker_that_starts_later_serves_what_was_decided(service: Service) -> None:
    await service.publish()
    async with service.worker() as first:
        await first.ask("load", version="1")
        async with service.worker() as later:
            assert await later.version() == 1


async def test_a_worker_that_starts_later_has_the_standby_ready(service: Service) -> None:
    async with service.worker() as first:
        await service.publish()
        await first.ask("load")
        async with service.worker() as later:
            ready = (await first.described())["release"]["previous"]

            def has_it(described: dict[str, object]) -> bool:
                workers = described["workers"]
                assert isinstance(workers, dict)
                return len(workers) == 2 and all(ready in w["ready"] for w in workers.values())

            await later.until(has_it)


async def test_a_worker_that_is_replaced_while_the_repository_is_away_serves_what_served(
    service: Service,
) -> None:
    async with service.worker() as worker:
        await service.publish()
        assert (await worker.ask("load", version="2")).status_code == 200
    service.repository.rename(service.folder / "away")
    async with service.worker() as worker:
        assert await worker.version() == 2
        assert (await worker.ask("load")).status_code == 503


async def test_a_version_that_one_replica_refuses_serves_nowhere(
    service: Service, tmp_path: Path
) -> None:
    with own_redis(tmp_path / "redis") as redis_url:
        async with service.worker(STATE_REDIS_URL=redis_url) as first:
            await service.publish()
            # Another machine, on whose disk the file is damaged.
            elsewhere = tmp_path / "elsewhere"
            shutil.copytree(service.repository, elsewhere / "models")
            damaged = elsewhere / "models" / MODEL / "2" / "model.onnx"
            damaged.chmod(0o600)
            damaged.write_bytes(damaged.read_bytes()[:-1])
            async with service.worker(
                STATE_REDIS_URL=redis_url,
                MODEL_REPOSITORY=str(elsewhere / "models"),
                HIKYAKU_WORK_DIR=str(elsewhere / "work"),
            ) as second:
                response = await first.ask("load")
                assert response.status_code == 400
                assert "one of the workers" in response.json()["error"]["message"]
                assert [await first.version(), await second.version()] == [1, 1]
                assert (await first.described())["release"]["preparing"] is None


async def test_another_repository_does_not_get_what_was_decided_on_the_first(
    service: Service, tmp_path: Path
) -> None:
    await service.publish()
    async with service.worker() as worker:
        await worker.ask("load", version="1")
    shutil.copytree(service.repository, tmp_path / "other")
    async with service.worker(MODEL_REPOSITORY=str(tmp_path / "other")) as worker:
        assert await worker.version() == 2


async def test_a_version_published_anew_under_its_number_is_a_newer_word(
    service: Service,
) -> None:
    async with service.worker(HIKYAKU_REPOSITORY_POLL_S="60") as worker:
        before = (await worker.described())["sha256"]
    shutil.rmtree(service.model_dir / "1")
    (service.model_dir / "CURRENT").unlink()
    await asyncio.sleep(1)  # the manifest says the second at which it was published
    await publish_next(service.repository, 1)
    async with service.worker(HIKYAKU_REPOSITORY_POLL_S="60") as worker:
        assert (await worker.described())["sha256"] != before


async def test_of_two_loads_at_once_one_is_a_conflict(service: Service) -> None:
    await service.publish()
    await service.publish()
    async with AsyncExitStack() as stack:
        first, second = await two_workers(service, stack)
        responses = await asyncio.gather(
            first.ask("load", version="1"), second.ask("load", version="2")
        )
        assert sorted(response.status_code for response in responses) == [200, 409]
        served = {await first.version(), await second.version()}
        assert len(served) == 1


async def test_a_load_survives_an_unload_and_tells_what_it_has_done_itself(
    service: Service,
) -> None:
    await service.publish()
    await service.publish()
    async with AsyncExitStack() as stack:
        first, second = await two_workers(service, stack)
        assert (await first.ask("load", version="1")).status_code == 200
        loading = asyncio.create_task(first.ask("load", version="2"))
        await second.until(lambda described: described["release"]["preparing"] is not None)
        assert (await second.ask("unload", version="3")).status_code == 200
        loaded = await loading
        assert loaded.status_code == 200
        assert loaded.json()["version"] == "2"
        # Nothing that was left behind keeps the other one from loading.
        assert (await second.ask("load", version="3")).status_code == 200


async def test_a_verb_may_name_the_generation_that_it_changes(service: Service) -> None:
    await service.publish()
    async with service.worker() as worker:
        generation = (await worker.described())["release"]["generation"]
        response = await worker.ask("load", version="1", generation=generation + 1)
        assert response.status_code == 409
        assert await worker.version() == 2
        response = await worker.ask("load", version="1", generation=generation)
        assert response.status_code == 200


async def test_the_serving_version_is_not_unloaded(service: Service) -> None:
    async with service.worker() as worker:
        response = await worker.ask("unload", version="1")
        assert (response.status_code, response.json()["error"]["code"]) == (409, "conflict")
        assert await worker.version() == 1


async def test_an_unloaded_standby_is_freed_and_cannot_be_rolled_back_to(
    service: Service,
) -> None:
    async with service.worker() as worker:
        await service.publish()
        await worker.ask("load")
        assert STANDBY_1.search(await worker.metrics())
        assert (await worker.ask("unload", version="1")).status_code == 200
        assert not STANDBY_1.search(await worker.metrics())
        assert (await worker.ask("rollback")).status_code == 409


@pytest.mark.parametrize("version", ["99", "01", "latest", "1.0", " 1", "٣", "-1", "../1"])
async def test_a_version_that_is_none_is_refused_by_name(service: Service, version: str) -> None:
    async with service.worker() as worker:
        response = await worker.ask("load", version=version)
        assert response.status_code == 400
        assert "version" in response.json()["error"]["field"]
        assert await worker.version() == 1


async def test_a_damaged_version_is_refused_with_the_file_and_the_old_one_serves(
    service: Service,
) -> None:
    async with service.worker() as worker:
        await service.publish()
        path = service.model_dir / "2" / "model.onnx"
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.chmod(0o600)
        path.write_bytes(content)
        response = await worker.ask("load")
        assert response.status_code == 400
        error = response.json()["error"]
        assert "model.onnx" in error["message"]
        assert error["field"] == "version"
        assert await worker.version() == 1
        assert 'hikyaku_loads_total{model="oracle",outcome="refused"} 1.0' in await worker.metrics()


async def test_current_that_moves_is_followed(service: Service) -> None:
    async with service.worker(HIKYAKU_REPOSITORY_POLL_S="0.05") as worker:
        await service.publish()
        await worker.until(lambda described: described["version"] == "2")
        assert await worker.version() == 2


async def test_current_does_not_undo_a_rollback(service: Service) -> None:
    async with service.worker(HIKYAKU_REPOSITORY_POLL_S="0.05") as worker:
        await service.publish()
        await worker.until(lambda described: described["version"] == "2")
        await worker.ask("rollback")
        await service.publish()
        await worker.until(lambda described: described["version"] == "3")
        # It went from 1 to 3: what CURRENT had named before was not loaded again in between.
        assert (await worker.described())["release"]["previous"]["version"] == 1


async def test_current_does_not_undo_a_rollback_that_overtook_it(service: Service) -> None:
    await service.publish()
    await service.publish()
    current = service.model_dir / "CURRENT"
    current.write_text("1\n")
    vault = service.folder / "work" / "versions"
    manifest = (service.model_dir / "3" / "manifest.json").read_bytes()
    third = vault / hashlib.sha256(manifest).hexdigest()
    async with service.worker(HIKYAKU_REPOSITORY_POLL_S="0.05") as worker:
        await worker.ask("load", version="2")
        with third.with_name(f"{third.name}.verifying.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            current.write_text("3\n")
            async with asyncio.timeout(20):
                while not third.exists():  # noqa: ASYNC110  (nor by the vault)
                    await asyncio.sleep(0.02)
            assert (await worker.ask("rollback")).json()["version"] == "1"
        await worker.until(lambda described: described["release"]["current"]["version"] == 3)
        assert await worker.version() == 1


async def test_current_that_names_a_bad_version_is_told_and_changes_nothing(
    service: Service,
) -> None:
    async with service.worker(HIKYAKU_REPOSITORY_POLL_S="0.05") as worker:
        await service.publish()
        (service.model_dir / "2" / "manifest.json").unlink()
        (service.model_dir / "CURRENT").write_text("2\n")

        def refused(described: dict[str, object]) -> bool:
            workers = described["workers"]
            assert isinstance(workers, dict)
            return any("manifest.json" in each["refused"] for each in workers.values())

        await worker.until(refused)
        assert await worker.version() == 1


async def test_a_model_that_is_new_is_served_without_a_restart(service: Service) -> None:
    async with service.worker(HIKYAKU_REPOSITORY_POLL_S="0.05") as worker:
        await write_model(service.repository, "binary", "binary")
        predict = "/v1/models/binary:predict"
        body = {"instances": [{"a": 2.0, "b": 1.0}]}
        async with asyncio.timeout(20):
            # No event is set by who watches the repository.
            while (await worker.client.post(predict, json=body)).status_code == 404:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        assert (await worker.client.post(predict, json=body)).status_code == 200


async def test_nothing_is_unloaded_of_a_model_that_does_not_serve_yet(service: Service) -> None:
    async with service.worker(HIKYAKU_REPOSITORY_POLL_S="0.05") as worker:
        new = service.repository / "new"
        new.mkdir()
        shutil.copy(service.model_dir / "model.yaml", new)
        async with asyncio.timeout(20):
            while (  # noqa: ASYNC110  (no event is set by who watches the repository)
                response := await worker.client.post("/v1/models/new:unload", json={"version": "1"})
            ).status_code == 404:
                await asyncio.sleep(0.02)
        assert (response.status_code, response.json()["error"]["code"]) == (409, "conflict")


@pytest.mark.parametrize("damage", [b"two\n", None])
async def test_one_model_whose_current_is_damaged_does_not_keep_others_from_being_followed(
    service: Service, damage: bytes | None
) -> None:
    await write_model(service.repository, "binary", "binary")
    async with service.worker(HIKYAKU_REPOSITORY_POLL_S="0.05") as worker:
        current = service.repository / "binary" / "CURRENT"
        current.unlink()
        if damage is None:
            current.mkdir()  # which cannot be read as a file
        else:
            current.write_bytes(damage)
        await service.publish()
        await worker.until(lambda described: described["version"] == "2")


async def test_a_damaged_current_does_not_keep_a_version_from_being_loaded_by_its_number(
    service: Service,
) -> None:
    async with service.worker() as worker:
        await service.publish()
        (service.model_dir / "CURRENT").write_text("two\n")
        assert (await worker.ask("load")).status_code == 400
        assert (await worker.ask("load", version="2")).status_code == 200
        assert await worker.version() == 2


async def test_a_changed_contract_takes_effect_with_the_next_load(service: Service) -> None:
    async with service.worker() as worker:
        path = service.model_dir / "model.yaml"
        path.write_text(path.read_text() + "description: changed\n")
        assert (await worker.described())["description"] == ""
        assert (await worker.ask("load", version="1")).json()["changed"] is True
        assert (await worker.described())["description"] == "changed"
        assert await worker.version() == 1


async def test_a_model_that_was_never_published_says_how_to(service: Service) -> None:
    (service.model_dir / "CURRENT").unlink()
    with pytest.raises(InvalidModel, match="oracle: nothing is published yet; `hikyaku publish`"):
        async with service.worker():
            pass


async def test_a_worker_that_cannot_read_the_state_keeps_what_it_serves(
    service: Service, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        redis_url = stack.enter_context(own_redis(tmp_path / "redis"))
        async with service.worker(STATE_REDIS_URL=redis_url) as worker:
            await service.publish()
            stack.close()
            response = await worker.ask("load")
            assert (response.status_code, response.json()["error"]["retryable"]) == (503, True)
            assert "release state" in response.json()["error"]["message"]
            assert await worker.version() == 1
            ready = await worker.client.get("/v2/health/ready")
            assert ready.status_code == 200
            assert ready.json()["release_state"] != "read"


async def test_a_worker_starts_by_what_it_last_knew_of_a_state_that_is_not_to_be_had(
    service: Service, tmp_path: Path
) -> None:
    await service.publish()
    with own_redis(tmp_path / "redis") as redis_url:
        async with service.worker(STATE_REDIS_URL=redis_url) as worker:
            await worker.ask("load", version="1")
    async with service.worker(STATE_REDIS_URL=redis_url) as worker:
        assert await worker.version() == 1


async def test_a_copy_that_takes_long_keeps_no_other_model_from_being_loaded(
    service: Service,
) -> None:
    await write_model(service.repository, "binary", "binary")
    await write_model(service.repository, "binary", "binary")
    async with service.worker() as worker:
        await service.publish()
        manifest = (service.model_dir / "2" / "manifest.json").read_bytes()
        lock_name = f".lock-{hashlib.sha256(manifest).hexdigest()}"
        with (service.folder / "work" / "versions" / lock_name).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            copying = asyncio.create_task(worker.ask("load"))
            async with asyncio.timeout(20):
                load = "/v1/models/binary:load"
                response = await worker.client.post(load, json={"version": "1"})
            assert response.status_code == 200
        assert (await copying).status_code == 200
