"""A repository of which the models and their contracts are known also while it is away."""

import logging
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from app.errors import RepositoryUnavailable
from app.repository import files
from app.repository.layout import is_model_name
from app.repository.store import Repository

log = logging.getLogger(__name__)

_SUFFIX = ".yaml"


class LastKnown:
    """The `Repository`, whose `models` and `contract` answer with what this machine has read last
    when they cannot be read now: a worker that is replaced meanwhile can open from the vault what
    served before. `folder` is a private one; several processes may share it.

    Nothing else is remembered: what CURRENT names and what is published is asked for anew.
    """

    def __init__(self, repository: Repository, folder: Path) -> None:
        self._repository = repository
        self._folder = folder

    def models(self) -> Sequence[str]:
        try:
            names = self._repository.models()
        except RepositoryUnavailable as exc:
            known = self._remembered()
            if not known:
                raise
            log.warning("models as they were known last", extra={"reason": str(exc)})
            return known
        for name in set(self._remembered()) - set(names):
            self._path(name).unlink(missing_ok=True)
        return names

    def contract(self, model: str) -> bytes:
        try:
            content = self._repository.contract(model)
        except RepositoryUnavailable as exc:
            with suppress(FileNotFoundError):
                content = self._path(model).read_bytes()
                log.warning(
                    "a model.yaml as it was read last", extra={"model": model, "reason": str(exc)}
                )
                return content
            raise
        self._remember(model, content)
        return content

    def current(self, model: str) -> int | None:
        return self._repository.current(model)

    def versions(self, model: str) -> Sequence[int]:
        return self._repository.versions(model)

    def manifest(self, model: str, version: int) -> bytes:
        return self._repository.manifest(model, version)

    def seal(self, model: str, version: int) -> bytes | None:
        return self._repository.seal(model, version)

    def pieces(self, model: str, version: int, name: str) -> Iterator[bytes]:
        return self._repository.pieces(model, version, name)

    def where(self, model: str, *parts: object) -> str:
        return self._repository.where(model, *parts)

    def _path(self, model: str) -> Path:
        return self._folder / f"{model}{_SUFFIX}"

    def _remembered(self) -> list[str]:
        with suppress(FileNotFoundError):
            found = (name.removesuffix(_SUFFIX) for name in os.listdir(self._folder))
            return sorted(filter(is_model_name, found))
        return []

    def _remember(self, model: str, content: bytes) -> None:
        path = self._path(model)
        with suppress(FileNotFoundError):
            if path.read_bytes() == content:
                return
        # No model's name begins with a dot.
        staged = self._folder / f".{uuid.uuid4().hex}"
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            files.copy_synced(iter((content,)), staged)
            staged.rename(path)
        except OSError as exc:
            raise RepositoryUnavailable(f"{path}: cannot be written: {exc.strerror}") from exc
