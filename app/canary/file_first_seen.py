"""The keys that the workers of one machine have counted, as bits in files."""

import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

from app.canary.first_seen import KEPT_S
from app.release.beside import Beside
from app.release.folder import ReleaseFolder
from app.release.state import StateUnavailable

_Result = TypeVar("_Result")

FOLDER = "seen"
_SUFFIX = ".bits"


class FileFirstSeen:
    """A `FirstSeen` below `folder`, which must be on a disk of this machine: a file of bits a name.
    Whoever claims holds the lock."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / FOLDER
        self._lock = ReleaseFolder(self._folder)
        self._beside = Beside()

    async def claim(self, name: str, marks: Sequence[int], ours: bytearray) -> Sequence[bool]:
        return await self._run(partial(self._claim, name, marks))

    async def forget(self, name: str) -> None:
        await self._run(partial(self._forget, name))

    async def close(self) -> None:
        self._beside.close()

    async def _run(self, call: Callable[[], _Result]) -> _Result:
        try:
            return await self._beside.run(call)
        except OSError as exc:
            raise StateUnavailable(f"{exc.filename}: {exc.strerror}") from exc

    def _claim(self, name: str, marks: Sequence[int]) -> Sequence[bool]:
        with self._lock.locked():
            path = self._path(name)
            if not path.exists():
                self._remove_old()
            # Not mapped into memory: a full disk would kill who writes there.
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                return [_claimed(file, mark) for mark in marks]
            finally:
                os.close(file)

    def _forget(self, name: str) -> None:
        with self._lock.locked():
            self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self._folder / (quote(name, safe="") + _SUFFIX)

    def _remove_old(self) -> None:
        """Of stages that ended long ago."""
        for path in self._folder.glob(f"*{_SUFFIX}"):
            if time.time() - path.stat().st_mtime > KEPT_S:
                path.unlink()


def _claimed(file: int, mark: int) -> bool:
    """Whether it was not claimed before; what is behind the end of the file never was."""
    at, bit = mark >> 3, 0x80 >> (mark & 7)
    before = int.from_bytes(os.pread(file, 1, at))
    if before & bit:
        return False
    os.pwrite(file, bytes([before | bit]), at)
    return True
