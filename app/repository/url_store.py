"""A model repository on an object store: a version appears with its manifest, which comes last."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
from fsspec.asyn import sync

from app.errors import ConfigurationError, InvalidModel, RepositoryUnavailable
from app.repository import files
from app.repository.layout import (
    CONTRACT_FILE,
    CURRENT_FILE,
    is_file_name,
    is_version,
    require_model_name,
    require_version,
    version_in,
)
from app.repository.manifest import (
    MANIFEST_FILE,
    MAX_FILES,
    MAX_VERSION_BYTES,
    PLAN_FILE,
    SEAL_FILE,
)
from app.repository.store import (
    MAX_CONTRACT_BYTES,
    MAX_CURRENT_BYTES,
    MAX_MANIFEST_BYTES,
    MAX_SEAL_BYTES,
)

_READ_WITHIN_S = 30.0
_PIECE_BYTES = 8 << 20
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}


class UrlRepository:
    """The `Shelf` at a URL of a file system that fsspec knows.

    Raises `ConfigurationError` for a URL that cannot be used. A publisher needs a store that can
    refuse to replace an object (S3, Google Cloud Storage).
    """

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        self._files, self._root = open_url(self._url)

    def models(self) -> Sequence[str]:
        names = self._folders(self._root)
        models = [name for name in names if self._size(name, CONTRACT_FILE) is not None]
        for name in models:
            require_model_name(name)
        return models

    def contract(self, model: str) -> bytes:
        require_model_name(model)
        content = self._content(MAX_CONTRACT_BYTES, model, CONTRACT_FILE)
        if content is None:
            raise RepositoryUnavailable(f"{self.where(model, CONTRACT_FILE)}: no such object")
        return content

    def current(self, model: str) -> int | None:
        require_model_name(model)
        content = self._content(MAX_CURRENT_BYTES, model, CURRENT_FILE)
        if content is not None:
            return version_in(content, self.where(model, CURRENT_FILE))
        self._require_there(model)
        return None

    def versions(self, model: str) -> Sequence[int]:
        numbers = self._numbers(model)
        return [n for n in numbers if self._size(model, n, MANIFEST_FILE) is not None]

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
        size = self._size(model, version, name)
        if size is None:
            raise self._missing(model, version, name)
        for start in range(0, size, _PIECE_BYTES):
            piece = self._part(start, min(size, start + _PIECE_BYTES), model, version, name)
            if piece is None:
                raise self._missing(model, version, name)
            yield piece

    def where(self, model: str, *parts: object) -> str:
        return "/".join((self._url, model, *map(str, parts)))

    def highest(self, model: str) -> int:
        return max(self._numbers(model), default=0)

    @contextmanager
    def staging(self, model: str) -> Iterator[Path]:
        require_model_name(model)
        with tempfile.TemporaryDirectory(prefix="hikyaku-") as folder:
            yield Path(folder)

    def add(self, model: str, version: int, staged: Path) -> bool:
        require_version(version)
        # Whoever creates the plan has the number: nobody else writes anything under it.
        if not self._create((staged / PLAN_FILE).read_bytes(), model, version, PLAN_FILE):
            return False
        names = files.regular_files(staged)
        for name in (n for n in names if n not in {PLAN_FILE, MANIFEST_FILE}):
            path = self._path(model, version, name)
            self._ask(path, "put_file", str(staged / name), path)
        manifest = (staged / MANIFEST_FILE).read_bytes()
        if self._create(manifest, model, version, MANIFEST_FILE):
            return True
        # Where an answer is lost the client asks again, and is told of its own object.
        return self._content(MAX_MANIFEST_BYTES, model, version, MANIFEST_FILE) == manifest

    def put(self, model: str, name: str, content: bytes) -> None:
        there = self._size(model, name) == len(content)
        if there and self._part(0, len(content), model, name) == content:
            return
        path = self._path(model, name)
        self._ask(path, "pipe_file", path, content)

    def alone(self, model: str) -> nullcontext[None]:
        return nullcontext()  # an object store has no locks

    def _create(self, content: bytes, *parts: object) -> bool:
        """Write an object that is not there yet; False when it is there and of somebody else."""
        path = self._path(*parts)
        if self._size(*parts) is not None:
            return False
        try:
            self._ask(path, "pipe_file", path, content, mode="create")
        except FileExistsError:
            return False
        return True

    def _numbers(self, model: str) -> list[int]:
        require_model_name(model)
        self._require_there(model)
        return sorted(int(name) for name in self._folders(self._path(model)) if is_version(name))

    def _require_there(self, model: str) -> None:
        """What is missing in a model is missing only while the model itself can be seen."""
        self.contract(model)

    def _missing(self, model: str, *parts: object) -> Exception:
        self._require_there(model)
        return InvalidModel(f"{self.where(model, *parts)}: No such file")

    def _folders(self, path: str) -> list[str]:
        try:
            entries: Sequence[Mapping[str, Any]] = self._ask(path, "ls", path, detail=True)
        except FileNotFoundError as exc:
            raise RepositoryUnavailable(f"{path}: nothing is there: {exc}") from exc
        folders = (entry["name"] for entry in entries if entry["type"] == "directory")
        return sorted(PurePosixPath(name).name for name in folders)

    def _size(self, *parts: object) -> int | None:
        """Of an object, None when it is not there."""
        path = self._path(*parts)
        try:
            info: Mapping[str, Any] = self._ask(path, "info", path)
        except FileNotFoundError:
            return None
        return int(info["size"]) if info["type"] == "file" else None

    def _part(self, start: int, end: int, *parts: object) -> bytes | None:
        path = self._path(*parts)
        with suppress(FileNotFoundError):
            content: bytes = self._ask(path, "cat_file", path, start=start, end=end)
            return content
        return None

    def _content(self, most_bytes: int, *parts: object) -> bytes | None:
        size = self._size(*parts)
        if size is None:
            return None
        if size > most_bytes:
            raise InvalidModel(f"{self._path(*parts)}: larger than {most_bytes:,} bytes")
        # A store refuses to read a part of nothing.
        return self._part(0, size, *parts) if size else b""

    def _path(self, *parts: object) -> str:
        return "/".join((self._root, *map(str, parts)))

    def _ask(self, path: str, method: str, *arguments: Any, **options: Any) -> Any:
        return ask(self._files, path, method, *arguments, **options)


def open_url(url: str) -> tuple[Any, str]:
    """The file system of a URL and the path in it. Raises `ConfigurationError`."""
    try:
        # Every question is asked anew: what others publish must be seen.
        filesystem, path = fsspec.core.url_to_fs(
            url, use_listings_cache=False, skip_instance_cache=True
        )
    except ImportError as exc:
        protocol = url.partition("://")[0]
        extra = _EXTRAS.get(protocol)
        need = f"the extra `{extra}` of hikyaku" if extra else str(exc)
        raise ConfigurationError(f"{url}: {protocol}:// needs {need}") from exc
    except ValueError as exc:
        raise ConfigurationError(f"{url}: {exc}") from exc
    return filesystem, str(path).rstrip("/")


def ask(filesystem: Any, path: str, method: str, *arguments: Any, **options: Any) -> Any:
    """Call a method of a file system; reads get `_READ_WITHIN_S`.

    Raises `FileNotFoundError`, `FileExistsError`, and `RepositoryUnavailable` for everything else.
    """
    try:
        if not filesystem.async_impl:
            return getattr(filesystem, method)(*arguments, **options)
        within_s = None if method in {"put_file", "get_file"} else _READ_WITHIN_S
        call = getattr(filesystem, f"_{method}")
        return sync(filesystem.loop, call, *arguments, timeout=within_s, **options)
    except (FileNotFoundError, FileExistsError):
        raise
    except Exception as exc:  # each file system has errors of its own, and not all are OSErrors
        reason = str(exc) or type(exc).__name__
        raise RepositoryUnavailable(f"{path}: {reason}") from exc


def download(url: str, to: Path) -> None:
    """Copy every file below a URL into a folder.

    Raises `InvalidModel` for names and sizes that a version cannot have, `RepositoryUnavailable`
    when not all of it can be read now.
    """
    filesystem, root = open_url(url)
    sizes = dict(_below(filesystem, root, ""))
    if len(sizes) > MAX_FILES or sum(sizes.values()) > MAX_VERSION_BYTES:
        raise InvalidModel(f"{url}: more than {MAX_FILES:,} files or {MAX_VERSION_BYTES:,} bytes")
    for name in sizes:
        if not is_file_name(name):
            raise InvalidModel(f"{url}/{name}: a version cannot hold a file of this name")
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        ask(filesystem, f"{url}/{name}", "get_file", f"{root}/{name}", str(to / name))


def _below(filesystem: Any, root: str, folder: str) -> Iterator[tuple[str, int]]:
    """Name and size of each file. By listing folder by folder: a walk leaves out what it cannot
    list."""
    path = f"{root}/{folder}".rstrip("/")
    try:
        entries: Sequence[Mapping[str, Any]] = ask(filesystem, path, "ls", path, detail=True)
    except FileNotFoundError as exc:
        raise InvalidModel(f"{path}: nothing is there") from exc
    for entry in entries:
        name = f"{folder}{entry['name'].rstrip('/').rpartition('/')[2]}"
        if entry["type"] == "directory":
            yield from _below(filesystem, root, f"{name}/")
        elif entry["name"].rstrip("/") != path:  # S3 lists the mark of an empty folder
            yield name, int(entry["size"])
