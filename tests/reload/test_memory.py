"""What does not fit is refused before it is opened."""

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest

from app.errors import InvalidModel
from app.reload.memory import free_bytes, require_room
from tests.reload.conftest import Service


def test_what_fits_is_let_in() -> None:
    free = free_bytes()
    assert free is not None
    require_room(1, "tiny version 2")


def test_what_does_not_fit_is_refused_with_both_figures_and_a_way_out() -> None:
    with pytest.raises(
        InvalidModel, match=r"tiny version 2 would take [\d,]+ MB and [\d,]+ MB are"
    ):
        require_room(1 << 60, "tiny version 2")
    with pytest.raises(InvalidModel, match="unload a version that does not serve"):
        require_room(1 << 60, "tiny version 2")


_FREES = """
import os
from pathlib import Path
from app.reload.memory import give_back

def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

blocks = [bytes(32 << 10) for _ in range(4_000)]
last = blocks.pop()  # keeps the C library from shrinking its heap by itself
blocks.clear()
kept = resident_bytes()
give_back()
print(kept - resident_bytes())
"""


def test_what_was_freed_is_given_back() -> None:
    # In a process of its own: in this one others have left holes.
    freed = subprocess.run([sys.executable, "-c", _FREES], capture_output=True, check=True)
    assert int(freed.stdout) > 64 << 20


def needing(service: Service, needed_bytes: int) -> None:
    """Have verification remember that what it has found so far takes so much memory."""
    for path in (service.folder / "work" / "versions").glob("*.verified.json"):
        document = json.loads(path.read_text())
        document["verified"]["memory_bytes"] = needed_bytes
        path.write_text(json.dumps(document))


async def test_a_worker_that_takes_the_place_of_another_needs_room_for_itself_only(
    service: Service,
) -> None:
    async with service.worker(HIKYAKU_WORKERS="4") as first:
        free = free_bytes()
        assert free is not None
        needing(service, free // 2)
        async with service.worker(HIKYAKU_WORKERS="4") as second:
            assert [await first.version(), await second.version()] == [1, 1]


def is_ready(described: Mapping[str, Any], version: int) -> bool:
    """In any worker."""
    ready = [chosen for each in described["workers"].values() for chosen in each["ready"]]
    return any(chosen["version"] == version for chosen in ready)


async def test_a_version_is_loaded_only_where_there_is_room_for_it_in_every_worker(
    service: Service,
) -> None:
    await service.publish()
    async with service.worker(HIKYAKU_WORKERS="4"):
        pass  # it has verified the second version
    async with service.worker(HIKYAKU_WORKERS="4") as worker:
        await worker.ask("load", version="1")
        await worker.ask("unload", version="2")
        await worker.until(lambda described: not is_ready(described, 2))
        free = free_bytes()
        assert free is not None
        needing(service, free // 2)
        response = await worker.ask("load", version="2")
        assert response.status_code == 400
        assert "would take" in response.json()["error"]["message"]
        assert await worker.version() == 1
