"""The verbs of the release state over HTTP: load, roll back, shadow, unload."""

from typing import Annotated, Any

import msgspec
from fastapi import FastAPI, Request
from pydantic import BaseModel, ConfigDict, Field

from app.api.admit import Caller
from app.release.state import ModelReport, StateUnavailable
from app.reload.verbs import Outcome
from app.runtime import Runtime

Version = Annotated[str, Field(pattern=r"^[1-9][0-9]{0,8}$")]


class Verb(BaseModel):
    model_config = ConfigDict(extra="forbid", coerce_numbers_to_str=True)

    generation: Annotated[int, Field(ge=0)] | None = None
    """Only while the release state is of this generation; 409 otherwise."""


class Load(Verb):
    """Which version is to serve; without one, the version that CURRENT names."""

    version: Version | None = None
    despite_quarantine: bool = False
    """Also where a release of it was rolled back."""


class Rollback(Verb):
    """Back to the version that served before. `version` is the one that is to go: 409 where it has
    gone already. `quarantine`: false for a version under release that is not bad."""

    version: Version | None = None
    quarantine: bool = True


class ShowTo(Verb):
    """Which version is to be shown requests, and which share of them; without one, the share that
    model.yaml says."""

    version: Version
    share: Annotated[float, Field(gt=0, le=1)] | None = None


class Unload(Verb):
    """Which version is neither to be kept ready nor to be shown requests any more."""

    version: Version


def add_release(app: FastAPI, runtime: Runtime) -> None:
    """Each verb needs an operator (app/api/admit.py) and answers with what serves then."""

    @app.post("/v1/models/{name}:load", tags=["release"])
    async def load(name: str, request: Request, body: Load | None = None) -> dict[str, Any]:
        """Have a version serve: verified, warm in every worker, then taken over without losing a
        request. The one before it stays ready. 400 with the reason when it must not serve, 409 when
        another change is under way."""
        asked = body or Load()
        version = None if asked.version is None else int(asked.version)
        by = operator_of(request)
        outcome = await runtime.reload.verbs.load(
            name,
            version,
            asked.generation,
            by=by,
            despite_quarantine=asked.despite_quarantine,
        )
        return document_of(outcome)

    @app.post("/v1/models/{name}:rollback", tags=["release"])
    async def rollback(name: str, request: Request, body: Rollback | None = None) -> dict[str, Any]:
        """Have the version serve again that served before, at once; while one is released, that is
        the end of it. 409 when there is none."""
        asked = body or Rollback()
        outcome = await runtime.reload.verbs.rollback(
            name,
            asked.generation,
            by=operator_of(request),
            version=None if asked.version is None else int(asked.version),
            quarantine=asked.quarantine,
        )
        return document_of(outcome)

    @app.post("/v1/models/{name}:shadow", tags=["release"])
    async def shadow(name: str, request: Request, body: ShowTo) -> dict[str, Any]:
        """Show a version what the champion answers, in a process of its own: its answers go to
        nobody and are compared. 400 with the reason when it must not be executed."""
        by = operator_of(request)
        verbs = runtime.reload.verbs
        outcome = await verbs.shadow(name, int(body.version), body.share, body.generation, by=by)
        return document_of(outcome)

    @app.post("/v1/models/{name}:unload", tags=["release"])
    async def unload(name: str, request: Request, body: Unload) -> dict[str, Any]:
        """Free a version that is ready or shown requests; 409 for the one that serves."""
        by = operator_of(request)
        verbs = runtime.reload.verbs
        return document_of(await verbs.unload(name, int(body.version), body.generation, by=by))


async def release_document(runtime: Runtime, name: str) -> dict[str, Any]:
    """What all have agreed on, as far as this worker knows, and how every worker stands with it."""
    state = runtime.reload.followed[name].state
    document: dict[str, Any] = msgspec.to_builtins(state)
    try:
        reports = await runtime.reload.workers()
    except StateUnavailable as exc:
        return {"release": document, "workers": None, "reason": str(exc)}
    workers = {each.worker: _shown(each.models[name]) for each in reports if name in each.models}
    return {"release": document, "workers": workers}


def _shown(report: ModelReport) -> dict[str, Any]:
    """All but how often it is asked, which is another number every time."""
    shown: dict[str, Any] = msgspec.to_builtins(report)
    del shown["per_s"]
    return shown


def document_of(outcome: Outcome) -> dict[str, Any]:
    document: dict[str, Any] = msgspec.to_builtins(outcome)
    return document


def operator_of(request: Request) -> str:
    """Who has asked, as the door has found out."""
    caller: Caller = request.state.caller
    return caller.operator or caller.peer
