"""What every door asks about a request before it reads the body."""

import re
from collections.abc import Collection, Mapping

from app.api.admit import Caller, Doorkeeper
from app.api.answers import Reply, refusal
from app.api.body import BodyBudget
from app.api.predictions import PredictOperation, new_request_id, predicted_model
from app.errors import DeadlineExceeded, InvalidInput, NotFound, RequestError
from app.telemetry.metrics import Metrics

_BODIES_BYTES = 64 * 1024 * 1024
_CLIENT_ID = re.compile(rb"[\x21-\x7e]{1,128}")
# Reading so much for nothing costs less than the client's next connection.
_LITTLE_BYTES = 64 * 1024


# Of these the last one must not stand for all: whoever is before us may have read the first.
_SINGLE = frozenset((b"authorization", b"host", b"origin"))


def headers_of(fields: Collection[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    """By lower-case name. Of a repeated one the last counts, except of those that say who asks:
    theirs are joined, which makes them none that is known."""
    headers = dict(fields)
    if len(headers) < len(fields):
        for name in _SINGLE & headers.keys():
            headers[name] = b", ".join(value for each, value in fields if each == name)
    return headers


class HotPaths:
    """Refuses the same at every door; each refusal of a prediction is counted."""

    def __init__(self, doorkeeper: Doorkeeper, predict: PredictOperation, metrics: Metrics) -> None:
        self.max_body_bytes = doorkeeper.max_body_bytes
        self.bodies = BodyBudget(max(_BODIES_BYTES, 4 * doorkeeper.max_body_bytes))
        """Of all doors together."""
        self.predict = predict
        self._doorkeeper = doorkeeper
        self._metrics = metrics

    def admitted(
        self, method: str, path: str, headers: Mapping[bytes, bytes], peer: str
    ) -> Caller | Reply:
        """The caller, or the refusal of one that may not pass, whatever it asks."""
        caller = self._doorkeeper.admit(method, path, headers, peer)
        return self.refusal(caller, path) if isinstance(caller, RequestError) else caller

    def not_understood(
        self, method: str, path: str, headers: Mapping[bytes, bytes]
    ) -> Reply | None:
        """The refusal of a request to a hot path whose body would be of no use."""
        if method != "POST":
            refused = self.refusal(NotFound("predict takes POST"), path, 405)
            return refused._replace(headers={b"allow": b"POST"})
        coding = headers.get(b"content-encoding")
        if coding is not None and coding.lower() != b"identity":
            error = InvalidInput(
                "Content-Encoding: the body is to come as it is", field="Content-Encoding"
            )
            return self.refusal(error, path)
        return None

    def refusal(self, error: RequestError, path: str, status: int | None = None) -> Reply:
        """The reply that says it, counted where the path is hot. `status` replaces the code's."""
        if (name := predicted_model(path)) is not None:
            self._metrics.requests.labels(self.predict.label(name), error.code).inc()
        refused = refusal(error, new_request_id(), path)
        return refused if status is None else refused._replace(status=status)

    def body_refusal(self, error: RequestError, path: str) -> Reply:
        """For a body that was too large, or did not come in time: the client is late, not we."""
        return self.refusal(error, path, 408 if isinstance(error, DeadlineExceeded) else None)


def leaves_little(headers: Mapping[bytes, bytes]) -> bool:
    """Whether an unread body is so small that the connection is worth keeping."""
    length = headers.get(b"content-length", b"0")
    return b"transfer-encoding" not in headers and (
        length.isdigit() and int(length) <= _LITTLE_BYTES
    )


def echoed_id(headers: Mapping[bytes, bytes]) -> bytes | None:
    """The client's own id of its request, where it is fit to be sent back."""
    given = headers.get(b"x-request-id")
    return given if given is not None and _CLIENT_ID.fullmatch(given) else None
