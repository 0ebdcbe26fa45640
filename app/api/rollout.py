"""The verbs of a release under way over HTTP: release, pause, resume, promote; how it stands."""

import logging
from typing import Annotated, Any

import msgspec
from fastapi import FastAPI, Request
from pydantic import Field

from app.api.release import Verb, Version, document_of, operator_of
from app.errors import ModelNotReady, NotFound
from app.release.state import StateUnavailable
from app.runtime import Runtime

log = logging.getLogger(__name__)


class Start(Verb):
    """Which version is to be released by the plan of model.yaml, and how many requests a second are
    expected; without that, those of the last half minute."""

    version: Version
    expected_per_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    despite_quarantine: bool = False
    """Also where a release of it was rolled back."""


class Promote(Verb):
    """To which share of the routing keys; without one, to that of the next stage."""

    share: Annotated[float, Field(ge=0.001, le=1)] | None = None


class Pause(Verb):
    """No stage is promoted until it is resumed."""


class Resume(Verb):
    """The end of a pause."""


def add_rollout(app: FastAPI, runtime: Runtime) -> None:
    """Each verb needs an operator and answers with what serves then."""

    @app.post("/v1/models/{name}:release", tags=["release"])
    async def release(name: str, request: Request, body: Start) -> dict[str, Any]:
        """Release a version stage by stage, as far as the evidence goes: first it is shown
        requests, then it answers more and more of them. 400 when the plan could not finish with so
        many requests, or the version must not serve; 409 when it was rolled back before."""
        verbs = runtime.rollout_verbs
        started = await verbs.start(
            name,
            int(body.version),
            body.expected_per_s,
            body.generation,
            by=operator_of(request),
            despite_quarantine=body.despite_quarantine,
        )
        return document_of(started.outcome) | {"needs": msgspec.to_builtins(started.needs)}

    @app.post("/v1/models/{name}:pause", tags=["release"])
    async def pause(name: str, request: Request, body: Pause | None = None) -> dict[str, Any]:
        """No stage is promoted until it is resumed; what is bad is rolled back all the same."""
        asked = body or Pause()
        by = operator_of(request)
        return document_of(await runtime.rollout_verbs.pause(name, asked.generation, by=by))

    @app.post("/v1/models/{name}:resume", tags=["release"])
    async def resume(name: str, request: Request, body: Resume | None = None) -> dict[str, Any]:
        """The end of a pause."""
        asked = body or Resume()
        by = operator_of(request)
        return document_of(await runtime.rollout_verbs.resume(name, asked.generation, by=by))

    @app.post("/v1/models/{name}:promote", tags=["release"])
    async def promote(name: str, request: Request, body: Promote | None = None) -> dict[str, Any]:
        """On to the next stage, or to a share of the routing keys, whatever the evidence says; at 1
        the version is the champion."""
        asked = body or Promote()
        by = operator_of(request)
        verbs = runtime.rollout_verbs
        return document_of(await verbs.promote(name, asked.share, asked.generation, by=by))

    @app.get("/v1/models/{name}/release", tags=["release"])
    async def status(name: str) -> dict[str, Any]:
        """The release under way, what is decided by the counts of now and why; 404 for a model that
        is not served, 503 while the counts cannot be read."""
        if name not in runtime.models:
            raise NotFound(f"no model is named {name[:64]!r}")
        try:
            return await _rollout_document(runtime, name)
        except StateUnavailable as exc:  # its text is for the operator, who can read the log
            log.warning("release unavailable", extra={"model": name, "reason": str(exc)})
            raise ModelNotReady("what was counted cannot be read now") from exc


async def _rollout_document(runtime: Runtime, name: str) -> dict[str, Any]:
    model = runtime.reload.followed[name]
    state = model.state
    quarantined = msgspec.to_builtins(state.quarantined)
    document = {"model": name, "generation": state.generation, "quarantined": quarantined}
    if state.rollout is None:
        return document | {"rollout": None, "verdict": None, "counts": None}
    judged = await runtime.decider.verdict(model, state)
    return document | {
        "rollout": msgspec.to_builtins(state.rollout),
        "verdict": msgspec.to_builtins(judged.verdict),
        "counts": msgspec.to_builtins(judged.counts),
    }
