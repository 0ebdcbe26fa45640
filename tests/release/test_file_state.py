"""The release state in files: processes that share them, and that are killed."""

import asyncio
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from app.release.file_state import FileState
from app.release.state import Chosen, ReleaseState, StateUnavailable, WorkerReport

ME = WorkerReport("w", {})
WRITER = """
import asyncio, sys
from pathlib import Path
from app.release.file_state import FileState
from app.release.state import ReleaseState, WorkerReport

async def main():
    store = FileState(Path(sys.argv[1]))
    report = WorkerReport(sys.argv[2], {})
    while True:
        state = (await store.exchange(report, ["m"]))["m"]
        if await store.compare_and_set("m", state.generation, ReleaseState(state.generation + 1)):
            print(state.generation + 1, flush=True)

asyncio.run(main())
"""


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[FileState]:
    store = FileState(tmp_path)
    yield store
    await store.close()


def writer(folder: Path, name: str) -> "subprocess.Popen[str]":
    """Puts one state after the other, and says which."""
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder), name], stdout=subprocess.PIPE, text=True
    )


def lock_holder(lock: Path) -> "subprocess.Popen[str]":
    """Says when it has the lock."""
    program = (
        "import fcntl, sys\nlock = open(sys.argv[1], 'w')\nfcntl.flock(lock, fcntl.LOCK_EX)\n"
        "print('held', flush=True)\nsys.stdin.read()"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program, str(lock)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


async def test_processes_take_turns_and_one_that_is_killed_leaves_a_state(
    store: FileState, tmp_path: Path
) -> None:
    """Each is killed at some moment of its writing, and the others go on."""
    rng = random.Random(5)
    said: list[int] = []
    for _ in range(3):
        both = [writer(tmp_path, name) for name in ("a", "b")]
        for each in both:
            assert each.stdout is not None
            said.append(int(await asyncio.to_thread(each.stdout.readline)))
        for each in both:
            await asyncio.sleep(rng.uniform(0, 0.05))
            each.kill()
            rest, _ = await asyncio.to_thread(each.communicate)
            said += [int(line) for line in rest.split()]
        state = (await store.exchange(ME, ["m"]))["m"]
        assert state.generation >= max(said)
    assert len(said) == len(set(said)), "two have won one generation"
    assert await store.compare_and_set("m", state.generation, ReleaseState(state.generation + 1))


async def test_a_stopped_process_that_holds_the_lock_holds_nobody_up(
    store: FileState, tmp_path: Path
) -> None:
    await store.exchange(ME, ["m"])  # which makes the folder
    holder = lock_holder(tmp_path / "release" / "lock")
    try:
        assert holder.stdout is not None
        await asyncio.to_thread(holder.stdout.readline)
        os.kill(holder.pid, signal.SIGSTOP)
        with pytest.raises(StateUnavailable, match="another process holds it"):
            async with asyncio.timeout(5):
                await store.compare_and_set("m", 0, ReleaseState(1))
        assert (await store.exchange(ME, ["m"]))["m"] == ReleaseState()
    finally:
        holder.kill()
        holder.communicate()
    assert await store.compare_and_set("m", 0, ReleaseState(1))


async def test_what_a_killed_writer_left_half_done_is_no_state(
    store: FileState, tmp_path: Path
) -> None:
    state = ReleaseState(1, Chosen(1, "aa"))
    assert await store.compare_and_set("m", 0, state)
    (tmp_path / "release" / "m.json.new").write_bytes(b'{"form":1,"sta')
    assert (await store.exchange(ME, ["m"]))["m"] == state
    assert await store.compare_and_set("m", 1, ReleaseState(2))


@pytest.mark.parametrize("content", [b"", b"\0" * 200, b'{"form":9}'])
async def test_what_cannot_be_read_is_named_and_never_overwritten(
    store: FileState, tmp_path: Path, content: bytes
) -> None:
    await store.exchange(ME, ["m"])
    (tmp_path / "release" / "m.json").write_bytes(content)
    with pytest.raises(StateUnavailable, match=r"m\.json"):
        await store.exchange(ME, ["m"])
    with pytest.raises(StateUnavailable, match=r"m\.json"):
        await store.compare_and_set("m", 0, ReleaseState(1))
    assert await store.last_known(["m"]) == {}
    assert (tmp_path / "release" / "m.json").read_bytes() == content


async def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    store = FileState(tmp_path / "file")
    for call in (store.exchange(ME, ["m"]), store.compare_and_set("m", 0, ReleaseState(1))):
        with pytest.raises(StateUnavailable, match="release"):
            await call
    await store.close()


async def test_who_told_before_the_machine_started_anew_does_not_live(
    store: FileState, tmp_path: Path
) -> None:
    await store.exchange(WorkerReport("old", {}), [])
    path = tmp_path / "release" / "workers" / "old.json"
    path.write_text(path.read_text().replace('"boot":"', '"boot":"another'))
    await store.exchange(ME, [])
    assert await store.workers() == [ME]
    assert not path.exists()


async def test_what_is_left_of_a_worker_by_a_power_cut_is_no_worker(
    store: FileState, tmp_path: Path
) -> None:
    await store.exchange(ME, [])
    path = tmp_path / "release" / "workers" / "old.json"
    path.touch()
    with pytest.raises(StateUnavailable, match=r"old\.json"):
        await store.workers()  # as far as is known it may live
    os.utime(path, (path.stat().st_mtime - 120,) * 2)
    assert await store.workers() == [ME]


@pytest.mark.parametrize("left", [None, ReleaseState(1)])
async def test_a_state_that_is_lost_under_the_service_is_put_back(
    store: FileState, tmp_path: Path, left: ReleaseState | None
) -> None:
    state = ReleaseState(2, Chosen(1, "aa"))
    assert await store.compare_and_set("m", 0, ReleaseState(1))
    assert await store.compare_and_set("m", 1, state)
    shutil.rmtree(tmp_path / "release")
    if left is not None:
        other = FileState(tmp_path)
        assert await other.compare_and_set("m", 0, left)
        await other.close()
    assert (await store.exchange(ME, ["m"]))["m"] == state
    assert await store.compare_and_set("m", 2, ReleaseState(3))
