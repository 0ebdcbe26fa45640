"""Which keys have been counted in a stage already, over all workers."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Protocol

MARKS = 1 << 25
"""Two keys of the same mark count once. Of a million keys that leaves out 1.5 %, by nothing but
chance, and takes 4 MB, here and where all workers share it."""
KEPT_S = 30 * 86_400.0
"""Where nobody says that the stage is over: longer than any lasts."""


class FirstSeen(Protocol):
    """What all workers share."""

    async def claim(self, name: str, marks: Sequence[int], ours: bytearray) -> Sequence[bool]:
        """Of each of these marks, which differ, whether nobody had claimed it under this name; from
        now on it is claimed. `ours`: the bits of all that this worker has claimed, these included:
        what was lost is put back.

        Raises `StateUnavailable`: then nothing is known of any of them."""
        ...

    async def forget(self, name: str) -> None:
        """The stage is over in every worker. Raises `StateUnavailable`: then it is forgotten when
        it has not been asked for long enough."""
        ...

    async def close(self) -> None: ...


class SeenHere:
    """The marks that this worker has seen in one stage."""

    __slots__ = ("bits",)

    def __init__(self) -> None:
        # The system gives memory only for what is written.
        self.bits = bytearray(MARKS >> 3)

    def is_new(self, mark: int) -> bool:
        """Once of each."""
        index, bit = mark >> 3, 0x80 >> (mark & 7)
        if self.bits[index] & bit:
            return False
        self.bits[index] |= bit
        return True


@asynccontextmanager
async def open_first_seen(
    redis_url: str | None, folder: Path, worker: str
) -> AsyncIterator[FirstSeen]:
    """Of this `worker`, where the release state is; nothing is asked yet."""
    from app.canary.file_first_seen import FileFirstSeen
    from app.canary.redis_first_seen import RedisFirstSeen

    if redis_url is None:
        store: FirstSeen = FileFirstSeen(folder)
    else:
        store = RedisFirstSeen(redis_url, worker)
    try:
        yield store
    finally:
        await store.close()
