"""What goes back over HTTP: the reply, the status of each refusal, the shapes of its body."""

import logging
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import orjson

from app.errors import Internal, InvalidInput, Overloaded, RequestError, Unauthorized

log = logging.getLogger(__name__)

STATUS_OF: Mapping[str, int] = {
    "invalid_input": 400,
    "unauthorized": 401,
    "forbidden": 403,
    "not_found": 404,
    "conflict": 409,
    "payload_too_large": 413,
    "rate_limited": 429,
    "backend_error": 500,
    "internal": 500,
    "overloaded": 503,
    "features_unavailable": 503,
    "model_not_ready": 503,
    "shutting_down": 503,
    "deadline_exceeded": 504,
}
"""HTTP status of each code of the error tree."""

_NO_HEADERS: Mapping[bytes, bytes] = MappingProxyType({})


# Made for every request: a frozen dataclass takes 1 µs longer to make.
class Reply(NamedTuple):
    """One HTTP answer. Header names are lower case; the content length is added when it is sent."""

    status: int
    body: bytes
    headers: Mapping[bytes, bytes] = _NO_HEADERS
    content_type: bytes = b"application/json"


def refusal(error: RequestError, request_id: str, path: str) -> Reply:
    """The reply for a refused request, in the shape that the path's protocol asks for."""
    headers: dict[bytes, bytes] = {}
    if isinstance(error, Overloaded):
        headers[b"retry-after"] = str(max(1, round(error.retry_after_s))).encode()
    if isinstance(error, Unauthorized):
        headers[b"www-authenticate"] = b"Bearer"
    if path.startswith("/v2/"):  # the Open Inference Protocol's clients read a text
        return Reply(STATUS_OF[error.code], orjson.dumps({"error": str(error)}), headers)
    detail: dict[str, object] = {
        "code": error.code,
        "message": str(error),
        "retryable": error.retryable,
    }
    if isinstance(error, InvalidInput) and error.field is not None:
        detail["field"] = error.field
    body = orjson.dumps({"error": detail, "request_id": request_id})
    return Reply(STATUS_OF[error.code], body, headers)


def as_request_error(exc: Exception, request_id: str) -> RequestError:
    """What the caller is told of any exception; a defect is logged here, with its traceback."""
    if isinstance(exc, RequestError):
        return exc
    log.error("defect", extra={"request_id": request_id}, exc_info=exc)
    return Internal(f"a defect of this service; its log has it under request id {request_id}")
