"""A model repository in a folder: a version appears by one rename."""

import errno
import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from app.errors import InvalidModel, RepositoryUnavailable
from app.repository import files
from app.repository.layout import (
    CONTRACT_FILE,
    CURRENT_FILE,
    is_version,
    require_model_name,
    require_version,
    version_in,
)
from app.repository.manifest import MANIFEST_FILE, SEAL_FILE
from app.repository.store import (
    MAX_CONTRACT_BYTES,
    MAX_CURRENT_BYTES,
    MAX_MANIFEST_BYTES,
    MAX_SEAL_BYTES,
)

STAGING = ".staging-"
STAGING_AGE_S = 86_400.0

_TAKEN = {errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR}
_NO_LOCKS_HERE = {errno.EBADF, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL}


class FolderRepository:
    """The `Shelf` in a folder, which may be reached by symbolic links; one in it is refused."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def models(self) -> Sequence[str]:
        with self._reading(str(self._folder)):
            try:
                with os.scandir(self._folder) as found:
                    entries = sorted(found, key=lambda entry: entry.name)
            except FileNotFoundError as exc:
                raise RepositoryUnavailable(
                    f"{self._folder}: no such folder; MODEL_REPOSITORY names it"
                ) from exc
        return [entry.name for entry in entries if self._is_model(entry)]

    def contract(self, model: str) -> bytes:
        require_model_name(model)
        content = self._content(MAX_CONTRACT_BYTES, model, CONTRACT_FILE)
        if content is None:
            raise RepositoryUnavailable(f"{self.where(model, CONTRACT_FILE)}: no such file")
        return content

    def current(self, model: str) -> int | None:
        require_model_name(model)
        content = self._content(MAX_CURRENT_BYTES, model, CURRENT_FILE)
        if content is not None:
            return version_in(content, self.where(model, CURRENT_FILE))
        self._require_there(model)
        return None

    def versions(self, model: str) -> Sequence[int]:
        folder = self._folder / model
        with self._reading(str(folder)):
            return [n for n in self._numbers(model) if (folder / str(n) / MANIFEST_FILE).is_file()]

    def manifest(self, model: str, version: int) -> bytes:
        require_model_name(model)
        require_version(version)
        content = self._content(MAX_MANIFEST_BYTES, model, version, MANIFEST_FILE)
        if content is None:
            raise self._missing(model, version, MANIFEST_FILE)
        return content

    def seal(self, model: str, version: int) -> bytes | None:
        require_model_name(model)
        require_version(version)
        return self._content(MAX_SEAL_BYTES, model, version, SEAL_FILE)

    def pieces(self, model: str, version: int, name: str) -> Iterator[bytes]:
        require_model_name(model)
        require_version(version)
        what = self.where(model, version, name)
        with self._reading(what):
            try:
                file = files.open_regular(self._folder, f"{model}/{version}/{name}")
            except FileNotFoundError as exc:
                raise self._missing(model, version, name) from exc
            yield from files.pieces(file)

    def where(self, model: str, *parts: object) -> str:
        return str(self._folder.joinpath(model, *map(str, parts)))

    def highest(self, model: str) -> int:
        return max(self._numbers(model), default=0)

    @contextmanager
    def staging(self, model: str) -> Iterator[Path]:
        require_model_name(model)
        folder = self._folder / model
        staging = folder / f"{STAGING}{uuid.uuid4().hex}"
        staging.mkdir()
        try:
            files.remove_older_than(folder, STAGING, STAGING_AGE_S, staging.stat().st_mtime)
            yield staging
        finally:
            # Best effort: what is left is not seen by anybody, and removed in a day.
            shutil.rmtree(staging, ignore_errors=True)

    def add(self, model: str, version: int, staged: Path) -> bool:
        require_version(version)
        files.sync_folders(staged)
        try:
            staged.rename(self._folder / model / str(version))
        except OSError as exc:
            if exc.errno in _TAKEN:
                return False
            raise
        # Before CURRENT names it: a crash must not leave a name without a version.
        files.sync_folder(self._folder / model)
        return True

    def put(self, model: str, name: str, content: bytes) -> None:
        path = self._folder / model / name
        with suppress(FileNotFoundError):
            if path.read_bytes() == content:
                return
        staged = path.with_name(f"{STAGING}{uuid.uuid4().hex}")
        try:
            files.copy_synced(iter((content,)), staged)
            staged.rename(path)
        except BaseException:
            staged.unlink(missing_ok=True)
            raise
        files.sync_folder(path.parent)

    @contextmanager
    def alone(self, model: str) -> Iterator[None]:
        handle = os.open(self._folder / model, os.O_RDONLY | os.O_DIRECTORY)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX)
            except OSError as exc:  # some network file systems lock no folders
                if exc.errno not in _NO_LOCKS_HERE:
                    raise
            yield
        finally:
            os.close(handle)

    def _is_model(self, entry: "os.DirEntry[str]") -> bool:
        with self._reading(entry.path), suppress(FileNotFoundError):
            if not entry.is_dir():
                return False
            os.stat(os.path.join(entry.path, CONTRACT_FILE), follow_symlinks=False)
            if entry.is_symlink():
                raise InvalidModel(f"{entry.path}: a symbolic link, which is not followed")
            require_model_name(entry.name)
            return True
        return False

    def _numbers(self, model: str) -> list[int]:
        require_model_name(model)
        self._require_there(model)
        with self._reading(self.where(model)):
            return sorted(int(n) for n in os.listdir(self._folder / model) if is_version(n))

    def _require_there(self, model: str) -> None:
        """What is missing in a model is missing only while the model itself can be seen."""
        self.contract(model)

    def _missing(self, model: str, *parts: object) -> Exception:
        self._require_there(model)
        return InvalidModel(f"{self.where(model, *parts)}: No such file")

    def _content(self, most_bytes: int, model: str, *parts: object) -> bytes | None:
        """Of a small file; None when it is not there, or when nothing of its folder is."""
        what = self.where(model, *parts)
        with self._reading(what):
            try:
                file = files.open_regular(self._folder, "/".join(map(str, (model, *parts))))
            except FileNotFoundError:
                return None
            with file:
                content = file.read(most_bytes + 1)
        if len(content) > most_bytes:
            raise InvalidModel(f"{what}: larger than {most_bytes:,} bytes")
        return content

    @contextmanager
    def _reading(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as exc:
            if files.is_no_regular_file(exc):
                raise InvalidModel(
                    f"{what}: not a regular file; symbolic links are not followed"
                ) from exc
            raise RepositoryUnavailable(f"{what}: {exc.strerror}") from exc
