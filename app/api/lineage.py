"""The operations that say which versions there are, and where each came from."""

import hashlib
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar

from fastapi import FastAPI

from app.errors import ModelNotReady, NotFound, Overloaded, RepositoryUnavailable
from app.reload.blocking import BlockingCalls
from app.repository.lineage import lineage
from app.repository.manifest import parse_manifest

log = logging.getLogger(__name__)

_AT_ONCE = 4
_WITHIN_S = 10.0
_VERSION = re.compile(r"[1-9][0-9]{0,8}")

T = TypeVar("T")


class Published(Protocol):
    """What the repository holds of a model. Every call blocks."""

    def current(self, model: str) -> int | None: ...

    def versions(self, model: str) -> Sequence[int]: ...

    def manifest(self, model: str, version: int) -> bytes: ...


def add_lineage(
    app: FastAPI,
    published: Published,
    serving: Callable[[], Mapping[str, int | None]],
    calls: Callable[[], BlockingCalls],
) -> None:
    """Add the operations. `serving` says of every served model which version answers now; `calls`
    are for them alone, since everybody may ask."""

    async def read(work: Callable[[], T]) -> T:
        """Raises `Overloaded` at once when too many have not returned, `ModelNotReady` when the
        repository cannot be read now, or does not answer in time."""
        if calls().under_way >= _AT_ONCE:
            raise Overloaded(
                f"{_AT_ONCE} reads of the model repository are under way", retry_after_s=1.0
            )
        try:
            return await calls().call(work, _WITHIN_S)
        except RepositoryUnavailable as exc:  # its text is for the operator, who can read the log
            log.warning("repository unavailable", extra={"reason": str(exc)})
            raise ModelNotReady("the model repository cannot be read now") from exc

    def known(name: str) -> str:
        if name not in serving():
            raise NotFound(f"no model is named {name[:64]!r}")
        return name

    @app.get("/v1/models/{name}/versions", tags=["models"])
    async def versions(name: str) -> dict[str, Any]:
        """The published versions, which of them answers, and which one CURRENT names."""
        current, numbers = await read(partial(_versions, published, known(name)))
        return {
            "name": name,
            "serving": _text(serving()[name]),
            "current": _text(current),
            "versions": [str(number) for number in numbers],
        }

    @app.get("/v1/models/{name}/versions/{version}", tags=["models"])
    async def version(name: str, version: str) -> dict[str, Any]:
        """Where a version came from: code commit, data, features, hyperparameters, metrics and
        environment. A prediction names its version as `model_version`."""
        document = await read(partial(_document, published, known(name), version))
        if document is None:
            raise NotFound(f"{name} has no version {version[:16]!r}")
        return document


def _versions(published: Published, model: str) -> tuple[int | None, Sequence[int]]:
    return published.current(model), published.versions(model)


def _document(published: Published, model: str, version: str) -> dict[str, Any] | None:
    """None for a version that is not there."""
    if not _VERSION.fullmatch(version) or int(version) not in published.versions(model):
        return None
    content = published.manifest(model, int(version))
    manifest = parse_manifest(content, f"{model} version {version}")
    return lineage(manifest, hashlib.sha256(content).hexdigest())


def _text(version: int | None) -> str | None:
    return None if version is None else str(version)
