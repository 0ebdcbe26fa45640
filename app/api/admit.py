"""Who may pass: the one check that every door runs before anything else."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from app.api.operators import Operators
from app.api.predictions import predicted_model
from app.canary.canary import OVERRIDE
from app.errors import InvalidInput, PayloadTooLarge, RequestError

# Who decided what, and why, is for operators, though it is only looked at. Without a `$` or an end:
# what a router takes for such a path, whatever follows it, is one here.
_OPERATORS_LOOK = re.compile(r"/v1/models/[^/]+/release")
# What only looks. Whatever else there is, or will be, changes something.
_LOOKING = frozenset(("GET", "HEAD", "OPTIONS"))
_ROUTE = OVERRIDE.lower().encode()
_PATHS_AT_MOST = 1024
_PATH_AT_MOST = 256


@dataclass(slots=True)  # made for every request; a frozen one takes longer to make
class Caller:
    """An admitted caller. `peer` is its address as the socket saw it."""

    peer: str
    operator: str | None = None
    """Who it is, where that was asked."""


class Doorkeeper:
    """Refuses before the body is read: over the size limit, or for want of rights.

    Everybody may look and predict; all else is for operators, whatever its path, and so is to say
    which version predicts, and to look at a release under way.
    """

    def __init__(self, max_body_bytes: int, operators: Operators) -> None:
        self.max_body_bytes = max_body_bytes
        self._operators = operators
        self._predictions: set[str] = set()
        """Paths of predictions that were asked before: to tell costs more than all the rest."""

    def admit(
        self, method: str, path: str, headers: Mapping[bytes, bytes], peer: str
    ) -> Caller | RequestError:
        """`headers` are those of `headers_of`, `peer` is the address as the socket saw it."""
        length = headers.get(b"content-length", b"0")
        if not length.isdigit():
            return InvalidInput("content-length: not a number", field="content-length")
        if int(length) > self.max_body_bytes:
            return PayloadTooLarge(f"body: over the limit of {self.max_body_bytes} bytes")
        if (method in _LOOKING and not _OPERATORS_LOOK.search(path)) or (
            (path in self._predictions or self._is_prediction(path)) and _ROUTE not in headers
        ):
            return Caller(peer)
        operator = self._operators.recognise(headers, peer)
        return operator if isinstance(operator, RequestError) else Caller(peer, operator)

    def _is_prediction(self, path: str) -> bool:
        """By the very question that leads a request to the hot operation: what is let pass here
        gets nowhere else."""
        if predicted_model(path) is None:
            return False
        if len(self._predictions) == _PATHS_AT_MOST:
            self._predictions.clear()
        if len(path) <= _PATH_AT_MOST:
            self._predictions.add(path)
        return True
