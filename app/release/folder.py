"""The release state in a folder of this machine: a file a model, changed under a lock."""

import fcntl
import logging
import os
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from app.release.documents import decode_state, encode_state
from app.release.state import ReleaseState, StateUnavailable

log = logging.getLogger(__name__)

FOLDER = "release"
"""Of the folder in which this machine works: what its files say is so."""
KNOWN_FOLDER = "known"
"""What a Redis said last. Apart, since whoever uses the files would believe and change it."""

_LOCK_S = 0.8


class ReleaseFolder:
    """Every call blocks, and raises `StateUnavailable` with the path at fault."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, model: str) -> ReleaseState:
        """Generation 0 where nothing was ever written."""
        path = self._path(model)
        content = read_file(path)
        return ReleaseState() if content is None else decode_state(content, str(path))

    def known(self, models: Sequence[str]) -> Mapping[str, ReleaseState]:
        """Of those models of which something was decided. What cannot be read is logged, and left
        out."""
        states = {}
        for model in models:
            try:
                states[model] = self.read(model)
            except StateUnavailable as exc:
                log.warning("a release state is left out", extra={"model": model}, exc_info=exc)
        return {model: state for model, state in states.items() if state.generation}

    def write(self, model: str, state: ReleaseState) -> None:
        """Under the lock. Who is killed meanwhile leaves the old file or the new one."""
        write_file(self._path(model), encode_state(state), lasting=True)

    def keep(self, states: Mapping[str, ReleaseState]) -> None:
        """Write them, where they are not there already."""
        with self.locked():
            for model, state in states.items():
                path = self._path(model)
                if read_file(path) != (encode_state(state) if state.generation else None):
                    self.write(model, state)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Alone among the processes that use the folder."""
        path = self.folder / "lock"
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as exc:
            raise _unavailable(path, exc) from exc
        try:
            _take(lock, path)
            yield
        finally:
            os.close(lock)

    def _path(self, model: str) -> Path:
        return self.folder / f"{model}.json"


def read_file(path: Path) -> bytes | None:
    """None where there is no such file. Raises `StateUnavailable`."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise _unavailable(path, exc) from exc


def write_file(path: Path, content: bytes, *, lasting: bool) -> None:
    """Replace the file at once, for whoever reads it; `lasting`: a power cut does not undo it.

    Only one may write it at a time. Raises `StateUnavailable`."""
    draft = path.with_name(path.name + ".new")
    try:
        handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            if lasting:
                file.flush()
                os.fsync(handle)
        draft.replace(path)
        if lasting:
            _sync(path.parent)
    except OSError as exc:
        raise _unavailable(path, exc) from exc


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _take(lock: int, path: Path) -> None:
    # Not a lock that waits: who holds it may have been stopped.
    until_s = time.monotonic() + _LOCK_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > until_s:
                raise StateUnavailable(f"{path}: another process holds it") from None
        except OSError as exc:
            raise _unavailable(path, exc) from exc
        time.sleep(random.uniform(0.001, 0.004))


def _unavailable(path: Path, exc: OSError) -> StateUnavailable:
    return StateUnavailable(f"{path}: {exc.strerror or exc}")
