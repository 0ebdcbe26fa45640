"""The port to a model repository: a folder, or a URL of an object store."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

MAX_MANIFEST_BYTES = 16 << 20
MAX_CONTRACT_BYTES = 1 << 20
MAX_CURRENT_BYTES = 64
MAX_SEAL_BYTES = 1 << 10


class Repository(Protocol):
    """What was published, as its readers see it. Every call blocks, and asks anew.

    Raises `RepositoryUnavailable` when it cannot be read now, `InvalidModel` when what was asked
    for is not there or is not what it must be. A model that cannot be found at all may be one whose
    folder is not mounted: that is `RepositoryUnavailable` too, as nobody publishes such a change.
    """

    def models(self) -> Sequence[str]:
        """Names of the models, each of which has a model.yaml, sorted."""

    def contract(self, model: str) -> bytes:
        """The model.yaml."""

    def current(self, model: str) -> int | None:
        """The version that CURRENT names, None before the first one is published."""

    def versions(self, model: str) -> Sequence[int]:
        """The published versions, in ascending order; CURRENT may name any of them."""

    def manifest(self, model: str, version: int) -> bytes:
        """The manifest.json of a version."""

    def seal(self, model: str, version: int) -> bytes | None:
        """The manifest.sig of a version, None where it was not signed."""

    def pieces(self, model: str, version: int, name: str) -> Iterator[bytes]:
        """The content of a version's file. Of any length: the caller stops when it is too long."""

    def where(self, model: str, *parts: object) -> str:
        """What people call it: a path or a URL."""


class Shelf(Repository, Protocol):
    """A repository that versions are published to."""

    def highest(self, model: str) -> int:
        """The highest number that a version has, finished or not; 0 when there is none."""

    def staging(self, model: str) -> AbstractContextManager[Path]:
        """A folder on this machine for a version in the making; afterwards it is gone. What a
        publisher that was killed left behind long ago is removed."""

    def add(self, model: str, version: int, staged: Path) -> bool:
        """Make the staged files that version, the manifest last. False when the number is taken,
        by whomever: then nothing has changed."""

    def put(self, model: str, name: str, content: bytes) -> None:
        """Write or replace a small file beside the versions: it is the old one or the new, and left
        alone where it is the new one already."""

    def alone(self, model: str) -> AbstractContextManager[None]:
        """No other publisher of the model meanwhile, where the repository can promise that."""


def open_repository(location: str) -> Shelf:
    """The repository at a path, or at the URL of a file system that fsspec knows.

    Raises `ConfigurationError` for a URL that cannot be used, for lack of an extra for instance.
    Nothing is read yet.
    """
    if location.startswith("file://"):
        location = location.removeprefix("file://")
    if is_url(location):
        # fsspec takes a while to import, and few need it.
        from app.repository.url_store import UrlRepository

        return UrlRepository(location)
    from app.repository.folder_store import FolderRepository

    return FolderRepository(Path(location))


def is_url(location: str) -> bool:
    """Whether it is no path."""
    return "://" in location
