"""Declares the predict operation of each loaded model in /docs, with its own fields."""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from app.served_model import ServedModel, VersionId

_ANSWER = {
    "type": "object",
    "required": [
        *("predictions", "model_name", "model_version", "request_id", "route"),
        *("degraded", "degraded_reasons"),
    ],
    "properties": {
        "predictions": {"type": "array", "items": {"type": "object"}},
        "model_name": {"type": "string"},
        "model_version": {"type": "string"},
        "request_id": {"type": "string"},
        "route": {"type": "string", "enum": ["champion", "canary", "previous"]},
        "degraded": {"type": "boolean"},
        "degraded_reasons": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "feature_view": {"type": "string"},
                    "output": {"type": "string"},
                    "status": {
                        "type": "string",
                        "enum": ["NOT_FOUND", "OUTSIDE_MAX_AGE", "UNAVAILABLE", "NOT_FINITE"],
                    },
                    "instances": {"type": "array", "items": {"type": "integer"}},
                },
            },
        },
        "features": {"type": "array", "items": {"type": "object"}},
    },
}
_REFUSAL = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "code": {"type": "string"},
                "message": {"type": "string"},
                "retryable": {"type": "boolean"},
                "field": {"type": "string"},
            },
        },
        "request_id": {"type": "string"},
    },
}
_OPERATOR = {
    "type": "http",
    "scheme": "bearer",
    "description": "A token of HIKYAKU_OPERATOR_TOKEN. Where none is set, programs on the machine "
    "of the service need none.",
}
_REFUSED = {"application/json": {"schema": {"$ref": "#/components/schemas/Refusal"}}}
_WITHOUT_RIGHTS = {
    "401": {"description": "Nobody said who calls.", "content": _REFUSED},
    "403": {"description": "Who calls is no operator.", "content": _REFUSED},
}


def describe_predictions(app: FastAPI, models: Mapping[str, ServedModel | None]) -> None:
    """The hot operations are not FastAPI routes, so the schema is completed when asked for, and
    again when another version serves."""
    described: list[VersionId] = []

    def openapi() -> dict[str, Any]:
        served = [model.id for model in models.values() if model is not None]
        if app.openapi_schema is None or served != described:
            described[:] = served
            schema = get_openapi(
                title=app.title,
                version=app.version,
                description=app.description,
                routes=app.routes,
            )
            components = schema.setdefault("components", {}).setdefault("schemas", {})
            components |= {"Answer": _ANSWER, "Refusal": _REFUSAL}
            _add_rights(schema)
            for name, model in models.items():
                if model is not None:
                    schema["paths"][f"/v1/models/{name}:predict"] = _operation(model, components)
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI documents this way of extending it


def _add_rights(schema: dict[str, Any]) -> None:
    """What is not only looked at is for operators, as `Doorkeeper` has it."""
    schema["components"]["securitySchemes"] = {"operator": _OPERATOR}
    for path in schema["paths"].values():
        for method, operation in path.items():
            if method not in {"get", "head", "options"}:
                operation["security"] = [{"operator": []}]
                operation["responses"] |= _WITHOUT_RIGHTS


def _operation(model: ServedModel, components: dict[str, Any]) -> dict[str, Any]:
    request, parts = model.decoder.schema(f"{model.id.model}.")
    components.update(parts)
    refusal = {"content": _REFUSED}
    return {
        "post": {
            "tags": ["models"],
            "summary": f"Predict with {model.id.model}",
            "description": model.contract.description,
            "operationId": f"predict_{model.id.model}",
            "parameters": [
                {
                    "name": "Request-Timeout-Ms",
                    "in": "header",
                    "required": False,
                    "schema": {"type": "integer", "minimum": 1},
                    "description": "Answer by then or not at all; capped by model.yaml.",
                },
                {
                    "name": "Request-Priority",
                    "in": "header",
                    "required": False,
                    "schema": {"type": "string", "enum": ["live", "bulk"]},
                    "description": "`bulk` can wait while others are in a hurry.",
                },
                {
                    "name": "Routing-Key",
                    "in": "header",
                    "required": False,
                    "schema": {"type": "string"},
                    "description": "Requests of the same key are answered by the same version "
                    "while another one is being released.",
                },
                {
                    "name": "Hikyaku-Route",
                    "in": "header",
                    "required": False,
                    "schema": {"type": "string", "enum": ["champion", "canary"]},
                    "description": "For operators: which version answers, whatever the key.",
                },
            ],
            "requestBody": {
                "required": True,
                "content": {
                    "application/json": {
                        "schema": request,
                        "example": {"instances": [model.example]},
                    }
                },
            },
            "responses": {
                "200": {
                    "description": "One prediction an instance, in order.",
                    "content": {
                        "application/json": {"schema": {"$ref": "#/components/schemas/Answer"}}
                    },
                },
                "4XX": {"description": "The request cannot be answered as it is."} | refusal,
                "5XX": {"description": "`retryable` says whether a retry can help."} | refusal,
            },
        }
    }
