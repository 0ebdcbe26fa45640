"""Candidates that are opened in this process and freed again, whatever comes between."""

import asyncio
import fcntl
import hashlib
import json
import os
import shutil
import signal
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from app.clock import WallClock
from app.deadline import DeadlineSweep
from app.features.static_source import StaticSource
from app.local.redis_server import own_redis
from app.release.state import Chosen, ShadowState
from app.reload.blocking import BlockingCalls
from app.reload.candidates import Candidates
from app.reload.memory import free_bytes
from app.reload.residents import VersionSource
from app.repository.load import VersionOpener
from app.repository.store import open_repository
from app.repository.vault import Vault
from app.shadow.pair_log import NoPairLog
from app.shadow.shadow import Shadow
from app.shadow.trial import Records
from app.telemetry.metrics import Metrics
from loadtests.memory import isolated_of
from tests.shadow.conftest import SHOWN_S, Service, serving
from tests.tiny_models import contract, write_contract, write_model


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(SHOWN_S):
        # No event is set by the end of a process.
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def processes() -> int:
    """That execute candidates of ours: other tests may have started others."""
    return sum(map(is_isolated, isolated_of(os.getpid())))


def is_isolated(process: int) -> bool:
    try:
        return b"isolated_child" in Path(f"/proc/{process}/cmdline").read_bytes()
    except FileNotFoundError:  # it ends meanwhile
        return False


class Nobody:
    """Has no labels."""

    def compared(self, *about: Any) -> None: ...


@asynccontextmanager
async def followed(folder: Path) -> AsyncIterator[Candidates]:
    """The candidates of the model in `folder/models`."""
    metrics = Metrics()
    repository = open_repository(str(folder / "models"))
    async with DeadlineSweep() as sweep:
        opener = VersionOpener(StaticSource, sweep, metrics, WallClock(), drain_s=1.0, workers=1)
        calls = BlockingCalls(2)
        vault = Vault(folder / "vault", repository)
        source = VersionSource(repository, vault, opener, calls, asyncio.Lock(), isolated=False)
        shadow = Shadow(Records(metrics, NoPairLog(), Nobody()), WallClock().now_s)
        candidates = Candidates("m", shadow, source, metrics)
        try:
            yield candidates
        finally:
            await candidates.close()
            await calls.close()


@pytest.fixture
async def shown(tmp_path: Path) -> ShadowState:
    """Version 1 of the model in `tmp_path/models`."""
    await write_model(tmp_path / "models", "m", "binary")
    return ShadowState(Chosen(1, digest(tmp_path / "models" / "m", 1)), share=1.0, began=1)


def digest(model_dir: Path, version: int) -> str:
    manifest = (model_dir / str(version) / "manifest.json").read_bytes()
    return hashlib.sha256(manifest).hexdigest()


async def test_a_candidate_that_was_opened_by_another_model_yaml_is_freed(
    tmp_path: Path, shown: ShadowState
) -> None:
    async with followed(tmp_path) as candidates:
        async with candidates.prepared(shown.chosen):
            changed = contract("binary", shadow={"hold_ms": 1})
            write_contract(tmp_path / "models" / "m", changed)
            candidates.follow((shown,), 1)
        await until(lambda: candidates.report() == {shown.chosen.sha256: ""})
        assert processes() == 1
    assert processes() == 0


async def test_a_death_of_its_process_is_told_until_it_is_shown_no_more(
    tmp_path: Path, shown: ShadowState
) -> None:
    sha256 = shown.chosen.sha256
    async with followed(tmp_path) as candidates:
        async with candidates.prepared(shown.chosen):
            candidates.follow((shown,), 1)
        await until(lambda: candidates.report() == {sha256: ""})
        [process] = filter(is_isolated, isolated_of(os.getpid()))
        os.kill(process, signal.SIGKILL)
        await until(lambda: candidates.ended() == {sha256: 1})
        assert candidates.tripped() == {}
        candidates.follow((), 2)
        assert candidates.ended() == {}


async def test_a_candidate_that_is_unloaded_before_it_is_shown_anything_is_freed(
    tmp_path: Path, shown: ShadowState
) -> None:
    async with followed(tmp_path) as candidates:
        async with candidates.prepared(shown.chosen):
            candidates.follow((shown,), 1)
        candidates.follow((), 1)
        await until(lambda: processes() == 0)


async def test_a_candidate_of_which_nothing_comes_is_freed(
    tmp_path: Path, shown: ShadowState
) -> None:
    async with followed(tmp_path) as candidates:
        async with candidates.prepared(shown.chosen):
            assert processes() == 1
        assert processes() == 0


async def test_an_end_while_candidates_are_freed_leaves_none_behind(
    tmp_path: Path, shown: ShadowState
) -> None:
    async with followed(tmp_path) as candidates:
        async with candidates.prepared(shown.chosen):
            candidates.follow((shown,), 1)
        await until(lambda: candidates.report() == {shown.chosen.sha256: ""})
        candidates.follow((), 1)
        await until(lambda: is_freeing() or processes() == 0)
    assert processes() == 0


def is_freeing() -> bool:
    return any(task.get_name() == "free a candidate" for task in asyncio.all_tasks())


@contextmanager
def copying(folder: Path, version: int) -> Iterator[None]:
    """The copy of the version is gone, and somebody else makes it just now."""
    vault, sha256 = folder / "work" / "versions", digest(folder / "models" / "m", version)
    shutil.rmtree(vault / sha256)
    with (vault / f".lock-{sha256}").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


async def told(service: Service) -> Mapping[str, str]:
    """By version, what keeps a candidate from being shown requests by the only worker."""
    document = (await service.client.get("/v1/models/m")).json()
    reasons = {
        sha256: reason
        for worker in document["workers"].values()
        for sha256, reason in worker["candidates"].items()
    }
    chosen = [each["chosen"] for each in document["release"]["shadows"]]
    return {str(each["version"]): reasons.get(each["sha256"], "?") for each in chosen}


async def test_no_candidate_waits_for_another_one(tmp_path: Path) -> None:
    for _ in range(3):
        await write_model(tmp_path / "models", "m", "binary")
    async with serving(tmp_path, "m") as service:
        await service.shadow(1)
        await service.shadow(2)
    with copying(tmp_path, 1):
        async with serving(tmp_path, "m") as service:
            async with asyncio.timeout(SHOWN_S):
                # No event is set by another process.
                while await told(service) != {"1": "it is being opened", "2": ""}:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
            assert (await service.ask("unload", version=2)).status_code == 200
            await until(lambda: processes() == 0)


async def test_a_candidate_can_be_unloaded_while_model_yaml_cannot_be_read(tmp_path: Path) -> None:
    for _ in range(2):
        await write_model(tmp_path / "models", "m", "binary")
    async with serving(tmp_path, "m") as service:
        await service.shadow(1)
        await service.shadow(2)
        assert processes() == 2
        (tmp_path / "models" / "m" / "model.yaml").write_text("inputs: [")
        assert (await service.ask("unload", version=1)).status_code == 200
        await until(lambda: processes() == 1)


async def test_every_worker_needs_room_for_its_own_process_only(tmp_path: Path) -> None:
    for _ in range(2):
        await write_model(tmp_path / "models", "m", "binary")
    async with serving(tmp_path, "m", HIKYAKU_WORKERS="4") as service:
        await service.shadow(1)
        free = free_bytes()
        assert free is not None
        for path in (tmp_path / "work" / "versions").glob("*.verified.json"):
            document = json.loads(path.read_text())
            document["verified"]["memory_bytes"] = free // 2
            path.write_text(json.dumps(document))
        async with serving(tmp_path, "m", HIKYAKU_WORKERS="4") as another:
            await another.until_shown(2)


async def test_what_a_worker_cannot_show_has_not_converged(tmp_path: Path) -> None:
    for _ in range(2):
        await write_model(tmp_path / "models", "m", "binary")
    with own_redis(tmp_path / "redis") as redis_url:
        async with serving(tmp_path, "m", STATE_REDIS_URL=redis_url) as service:
            await service.shadow(1)
            elsewhere = tmp_path / "elsewhere"
            shutil.copytree(tmp_path / "models", elsewhere / "models")
            shutil.rmtree(elsewhere / "models" / "m" / "1")
            async with serving(elsewhere, "m", STATE_REDIS_URL=redis_url):
                outcome = await service.shadow(1)
                assert (outcome["changed"], outcome["converged"]) == (False, False)
            outcome = await service.shadow(1)
            assert (outcome["changed"], outcome["converged"]) == (False, True)


async def test_a_candidate_that_is_rolled_back_to_is_no_candidate_any_more(tmp_path: Path) -> None:
    for _ in range(2):
        await write_model(tmp_path / "models", "m", "binary")
    async with serving(tmp_path, "m") as service:
        await service.ask("load", version=1)
        await service.shadow(2)
        outcome = (await service.ask("rollback")).json()
        assert (outcome["version"], outcome["shadows"]) == ("2", [])
