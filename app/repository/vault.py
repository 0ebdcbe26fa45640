"""Private copies of published versions, by the digest of their manifest: the only ones loaded."""

import fcntl
import hashlib
import os
import re
import shutil
import stat
import uuid
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from app.errors import InvalidModel, RepositoryUnavailable
from app.repository import files
from app.repository.layout import require_model_name, require_version
from app.repository.manifest import MANIFEST_FILE, SEAL_FILE, File, Manifest, parse_manifest
from app.repository.signing import TrustedKeys
from app.repository.store import Repository

_STAGING = ".staging-"
_STAGING_AGE_S = 86_400.0
_LOCK = ".lock-"
_DIGEST = re.compile(r"[0-9a-f]{64}")

_Marks: TypeAlias = Mapping[str, tuple[int, ...]]
"""What changes in a file's status, by name, when anybody writes to it or puts another there."""


@dataclass(frozen=True, slots=True)
class VaultedVersion:
    """A version in the vault: every file is the one that its manifest lists."""

    folder: Path
    manifest: Manifest
    sha256: str
    """Of the manifest."""


class Vault:
    """The copies that this machine has, in a folder of its own; several processes may share it.

    `trusted`: a version is taken only when one of these keys has signed its manifest.
    """

    def __init__(
        self, folder: Path, repository: Repository, trusted: TrustedKeys | None = None
    ) -> None:
        self._folder = folder
        self._repository = repository
        self._trusted = trusted
        self._hashed: dict[str, _Marks] = {}

    def take(self, model: str, version: int, sha256: str | None = None) -> VaultedVersion:
        """The copy of a version, made now unless there is one. With the `sha256` of its manifest
        an intact copy is taken without asking the repository.

        An intact copy is hashed once a process and whenever a file of it has changed; a damaged one
        is replaced. Raises `InvalidModel` naming the file that is not what was published or not
        signed, `RepositoryUnavailable` when it cannot be read, or no copy be written, now.
        """
        require_model_name(model)
        require_version(version)
        if sha256 is not None and not _DIGEST.fullmatch(sha256):
            raise InvalidModel(f"{model} version {version}: {sha256[:80]!r} is no sha256")
        with self._writing():
            self._make_folder()
            if sha256 is not None:
                copy = self._intact(model, version, sha256)
                if copy is not None:
                    return copy
            content = self._repository.manifest(model, version)
            digest = hashlib.sha256(content).hexdigest()
            what = self._repository.where(model, version, MANIFEST_FILE)
            if sha256 not in {None, digest}:
                raise InvalidModel(f"{what}: is not the one that was chosen: its sha256 differs")
            with self._alone(digest):
                return self._intact(model, version, digest) or self._copied(
                    model, version, digest, content, what
                )

    def prune(self, keep: Collection[str], unused_s: float = 3600.0) -> None:
        """Remove the copies whose manifest's digest is not in `keep`, and what is beside them with
        their digest in its name. A copy that anybody took or kept less than `unused_s` ago stays:
        another service of this machine may need it."""
        with self._writing():
            self._make_folder()
            for digest in filter(_DIGEST.fullmatch, keep):
                with suppress(FileNotFoundError):
                    os.utime(self._folder / digest)
            now_s = self._now_s()
            files.remove_older_than(self._folder, _STAGING, _STAGING_AGE_S, now_s)
            for digest in self._digests() - set(keep):
                # Whoever holds the lock is making the copy just now.
                with suppress(BlockingIOError), self._alone(digest, wait=False):
                    if not self._taken_since(digest, now_s - unused_s):
                        self._forget(digest)

    def _intact(self, model: str, version: int, digest: str) -> VaultedVersion | None:
        """The copy, or None when there is none that is whole and, where asked for, signed."""
        folder = self._folder / digest
        try:
            with files.open_regular(folder, MANIFEST_FILE) as file:
                content = file.read()
            if hashlib.sha256(content).hexdigest() != digest:
                return None
            if self._trusted is not None:
                self._trusted.require(content, _seal(folder), str(folder / SEAL_FILE))
            manifest = _described(content, model, version, str(folder / MANIFEST_FILE))
            before = _marks(folder)
            if self._hashed.get(digest) != before:
                self._hashed.pop(digest, None)
                if not _is_whole(folder, manifest):
                    return None
                self._hashed[digest] = before
            os.utime(folder)
        except (OSError, InvalidModel):
            return None  # damaged in whatever way: the repository's files say what is wrong there
        return VaultedVersion(folder, manifest, digest)

    def _copied(
        self, model: str, version: int, digest: str, content: bytes, what: str
    ) -> VaultedVersion:
        seal = self._repository.seal(model, version)
        # Before anything of it is read: it may be anybody's.
        if self._trusted is not None:
            self._trusted.require(content, seal, self._repository.where(model, version, SEAL_FILE))
        manifest = _described(content, model, version, what)
        staging = self._folder / f"{_STAGING}{uuid.uuid4().hex}"
        staging.mkdir(mode=0o700)
        try:
            for name, expected in manifest.files.items():
                self._copy(model, version, name, expected, staging / name)
            files.copy_synced(iter((content,)), staging / MANIFEST_FILE)
            if seal is not None:
                files.copy_synced(iter((seal,)), staging / SEAL_FILE)
            _make_private(staging)
            files.sync_folders(staging)
            self._put(staging, self._folder / digest)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        files.sync_folder(self._folder)
        # Of a copy that was hashed while it was written.
        self._hashed[digest] = _marks(self._folder / digest)
        return VaultedVersion(self._folder / digest, manifest, digest)

    def _copy(self, model: str, version: int, name: str, expected: File, to: Path) -> None:
        what = self._repository.where(model, version, name)
        if shutil.disk_usage(self._folder).free < expected.bytes:
            raise RepositoryUnavailable(
                f"{self._folder}: no room for the {expected.bytes:,} bytes of {what}"
            )
        pieces = self._repository.pieces(model, version, name)
        sha256, size = files.copy_synced(_bounded(pieces, expected.bytes), to)
        if (sha256, size) != (expected.sha256, expected.bytes):
            raise InvalidModel(f"{what}: is not the file that was published (sha256 or size)")

    def _put(self, staging: Path, folder: Path) -> None:
        """We have the lock: what is there is damaged, and nobody else replaces it."""
        if os.path.lexists(folder):
            self._remove(folder)
        staging.rename(folder)

    def _digests(self) -> set[str]:
        """Of all copies, and of what is left of copies."""
        names = (name.removeprefix(_LOCK)[:64] for name in os.listdir(self._folder))
        return set(filter(_DIGEST.fullmatch, names))

    def _taken_since(self, digest: str, instant_s: float) -> bool:
        with suppress(FileNotFoundError):
            return (self._folder / digest).stat(follow_symlinks=False).st_mtime > instant_s
        return False

    def _forget(self, digest: str) -> None:
        self._hashed.pop(digest, None)
        for name in os.listdir(self._folder):
            if name.startswith(digest):
                self._remove(self._folder / name)
        (self._folder / f"{_LOCK}{digest}").unlink(missing_ok=True)

    def _remove(self, path: Path) -> None:
        """At once for whoever looks, though it may take a while."""
        aside = self._folder / f"{_STAGING}{uuid.uuid4().hex}"
        path.rename(aside)
        if aside.is_dir() and not aside.is_symlink():
            shutil.rmtree(aside)
        else:
            aside.unlink()

    def _make_folder(self) -> None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = self._folder.stat()
        if status.st_uid != os.geteuid():
            raise RepositoryUnavailable(f"{self._folder}: belongs to another user")
        if stat.S_IMODE(status.st_mode) != 0o700:
            self._folder.chmod(0o700)

    def _now_s(self) -> float:
        """By the clock of the file system, which has stamped the copies."""
        probe = self._folder / f"{_STAGING}{uuid.uuid4().hex}"
        probe.touch()
        try:
            return probe.stat().st_mtime
        finally:
            probe.unlink()

    @contextmanager
    def _alone(self, digest: str, *, wait: bool = True) -> Iterator[None]:
        """No other process makes or removes the copy meanwhile. Raises `BlockingIOError` where one
        does and we do not `wait`."""
        path = self._folder / f"{_LOCK}{digest}"
        while True:
            with path.open("wb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                # It may have been removed, and made again, while we waited for it.
                if _is_at(path, lock.fileno()):
                    yield
                    return

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as exc:
            raise RepositoryUnavailable(
                f"{self._folder}: copies cannot be kept there: {exc.strerror}"
            ) from exc


def _is_at(path: Path, handle: int) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(path.stat(), os.fstat(handle))
    return False


def _described(content: bytes, model: str, version: int, what: str) -> Manifest:
    manifest = parse_manifest(content, what)
    if (manifest.model, manifest.version) != (model, version):
        raise InvalidModel(
            f"{what}: describes version {manifest.version} of {manifest.model!r}; a version is "
            "published, not copied"
        )
    return manifest


def _bounded(pieces: Iterator[bytes], most_bytes: int) -> Iterator[bytes]:
    """The pieces until they are more than so many bytes; one piece too many is among them."""
    size = 0
    for piece in pieces:
        yield piece
        size += len(piece)
        if size > most_bytes:
            return


def _seal(folder: Path) -> bytes | None:
    try:
        with files.open_regular(folder, SEAL_FILE) as file:
            return file.read()
    except FileNotFoundError:
        return None


def _is_whole(folder: Path, manifest: Manifest) -> bool:
    """Whether the folder holds just what the manifest lists, byte for byte."""
    names = {*manifest.files, MANIFEST_FILE, SEAL_FILE}
    if not names.issuperset(files.regular_files(folder)):
        return False
    for name, expected in manifest.files.items():
        with files.open_regular(folder, name) as file:
            digest = hashlib.file_digest(file, "sha256")
            if (digest.hexdigest(), file.tell()) != (expected.sha256, expected.bytes):
                return False
    return True


def _make_private(folder: Path) -> None:
    for path, _, names in os.walk(folder):
        os.chmod(path, 0o700)
        for name in names:
            os.chmod(os.path.join(path, name), 0o400)


def _marks(folder: Path) -> _Marks:
    marks = {}
    for name in files.regular_files(folder):
        status = os.stat(folder / name, follow_symlinks=False)
        marks[name] = (
            status.st_ino,
            status.st_dev,
            status.st_size,
            status.st_mtime_ns,
            status.st_ctime_ns,
        )
    return marks
