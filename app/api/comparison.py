"""The operation that tells what the candidates of a model would have said."""

import logging
from collections.abc import Callable, Container
from typing import Annotated, Any, Protocol

from fastapi import FastAPI, Query

from app.errors import ModelNotReady, NotFound
from app.release.state import StateUnavailable

log = logging.getLogger(__name__)


class Comparisons(Protocol):
    """What has been counted of every candidate, by all workers of all replicas, and what labels
    have said."""

    async def document(self, model: str) -> dict[str, Any]:
        """Of a served model. Raises `StateUnavailable`."""
        ...


def add_comparison(
    app: FastAPI, models: Container[str], comparisons: Callable[[], Comparisons]
) -> None:
    """Add the operation; `comparisons` is there once the service has started."""

    @app.get("/v1/models/{name}/comparison", tags=["release"])
    async def comparison(
        name: str,
        candidate: Annotated[
            str | None, Query(pattern=r"^[1-9][0-9]{0,8}$", description="Only this version.")
        ] = None,
    ) -> dict[str, Any]:
        """Champion and candidates on the same rows: agreement, differences, segments and, where
        labels have come, who was right. What `hikyaku report` draws."""
        if name not in models:
            raise NotFound(f"no model is named {name[:64]!r}")
        try:
            document = await comparisons().document(name)
        except StateUnavailable as exc:  # its text is for the operator, who can read the log
            log.warning("comparison unavailable", extra={"model": name, "reason": str(exc)})
            raise ModelNotReady("what was counted cannot be read now") from exc
        if candidate is None:
            return document
        chosen = [each for each in document["candidates"] if each["version"] == candidate]
        if not chosen:
            raise NotFound(f"{name} has no candidate of version {candidate}")
        return {**document, "candidates": chosen}
