"""The operations that FastAPI routes: health, models, metrics, replay clock, documentation."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi_offline import FastAPIOffline
from pydantic import AwareDatetime, BaseModel
from starlette.exceptions import HTTPException

from app import __version__
from app.api.answers import Reply, as_request_error, refusal
from app.api.comparison import add_comparison
from app.api.feedback import add_feedback
from app.api.lineage import add_lineage
from app.api.openapi import describe_predictions
from app.api.predictions import new_request_id
from app.api.release import add_release, release_document
from app.api.rollout import add_rollout
from app.clock import ReplayClock, as_rfc3339
from app.errors import InvalidInput, NotFound, RequestError
from app.repository.store import open_repository
from app.runtime import Runtime


class ReplayInstant(BaseModel):
    """An instant of the replay clock."""

    now: AwareDatetime


def create_service(runtime: Runtime) -> FastAPI:
    """The application behind the hot operations; its lifespan opens and closes the runtime."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with runtime:
            yield

    # /docs with assets of its own: operators' networks are closed more often than not.
    app = FastAPIOffline(
        title="Hikyaku",
        version=__version__,
        description="Model serving with online features.",
        lifespan=lifespan,
        # A redirect would follow whatever Host the caller sent.
        redirect_slashes=False,
    )
    _add_refusals(app)
    _add_health(app, runtime)
    _add_models(app, runtime)
    add_release(app, runtime)
    add_rollout(app, runtime)
    add_feedback(app, runtime.models, lambda: runtime.labels)
    add_comparison(app, runtime.models, lambda: runtime.comparisons)
    repository = open_repository(runtime.settings.model_repository)
    add_lineage(app, repository, runtime.serving, lambda: runtime.reads)
    if isinstance(runtime.clock, ReplayClock):
        _add_replay_clock(app, runtime.clock)
    describe_predictions(app, runtime.models)
    return app


def _add_health(app: FastAPI, runtime: Runtime) -> None:
    @app.get("/v2/health/live", tags=["health"])
    async def live() -> dict[str, bool]:
        """This process runs its event loop."""
        return {"live": True}

    @app.get("/v2/health/ready", tags=["health"])
    async def ready() -> JSONResponse:
        """Every model is warm and the feature store answers; 503 with the reasons otherwise.

        A plan that the registry no longer matches is told, and serves on.
        """
        reasons = await runtime.unready()
        body: dict[str, Any] = {"ready": not reasons, "reasons": reasons}
        body["feature_time"] = as_rfc3339(runtime.clock.now_s())
        body["plan_outdated"] = dict(runtime.registry.outdated)
        body["registry_check"] = runtime.registry.state
        body["release_state"] = runtime.reload.trouble() or "read"
        body["replay_clock"] = isinstance(runtime.clock, ReplayClock)
        return JSONResponse(body, 503 if reasons else 200)

    @app.get("/metrics", tags=["health"])
    async def metrics() -> Response:
        """Prometheus exposition format."""
        return Response(await runtime.metrics.render(), media_type="text/plain; version=0.0.4")


def _add_models(app: FastAPI, runtime: Runtime) -> None:
    @app.get("/v1/models", tags=["models"])
    async def models() -> dict[str, list[str]]:
        """The names of the served models."""
        return {"models": sorted(runtime.models)}

    @app.get("/v1/models/{name}", tags=["models"])
    async def model(name: str) -> dict[str, Any]:
        """Which version answers, which could at once, and how every worker stands."""
        if name not in runtime.models:
            raise NotFound(f"no model is named {name[:64]!r}")
        served = runtime.models[name]
        if served is None:
            return {"name": name, "ready": False}
        return {
            "name": name,
            "ready": True,
            "version": str(served.id.version),
            "sha256": served.id.sha256,
            "feature_service": served.source.plan.feature_service or None,
            "description": served.contract.description,
            **await release_document(runtime, name),
        }


def _add_replay_clock(app: FastAPI, clock: ReplayClock) -> None:
    @app.get("/v1/replay-clock", tags=["replay"])
    async def now() -> dict[str, str]:
        """The instant by which feature values age in this process."""
        return {"now": as_rfc3339(clock.now_s())}

    @app.put("/v1/replay-clock", tags=["replay"])
    async def advance(instant: ReplayInstant) -> dict[str, str]:
        """Move the clock forward; 409 when the instant lies behind it."""
        clock.advance(instant.now)
        return {"now": as_rfc3339(clock.now_s())}


def _add_refusals(app: FastAPI) -> None:
    """Whatever goes wrong in FastAPI has the same body as everywhere else, and never the input."""

    async def refused(request: Request, exc: Exception) -> Response:
        request_id = new_request_id()
        error = as_request_error(_translated(exc), request_id)
        return _response(refusal(error, request_id, request.url.path), exc)

    for kind in (RequestError, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, refused)


def _translated(exc: Exception) -> Exception:
    if isinstance(exc, RequestValidationError):
        fault = exc.errors()[0]
        field = ".".join(map(str, fault["loc"]))
        return InvalidInput(f"{field}: {fault['msg']}", field=field)
    if isinstance(exc, HTTPException) and exc.status_code < 500:
        return NotFound("no such path, or not with this method")
    return exc


def _response(reply: Reply, exc: Exception) -> Response:
    headers: Mapping[str, str] = {
        name.decode(): value.decode() for name, value in reply.headers.items()
    }
    status = reply.status
    if isinstance(exc, HTTPException) and exc.status_code == 405:
        status, headers = 405, {**headers, **(exc.headers or {})}
    return Response(reply.body, status, headers, media_type="application/json")
