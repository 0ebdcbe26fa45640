"""Writes replies as HTTP/1.1."""

import http
from collections.abc import Sequence

from app.api.answers import Reply
from app.api.http_head import Head

_JSON = b"application/json"
_STATUS_LINES = {
    status.value: b"HTTP/1.1 %d %b\r\n" % (status.value, status.phrase.encode())
    for status in http.HTTPStatus
}

DefaultHeaders = Sequence[tuple[bytes, bytes]]
"""What uvicorn has every answer say, the date among them. It makes a new list once a second."""


class ReplyWriter:
    """Keeps the head of the answers of a second, up to the length of their body."""

    def __init__(self) -> None:
        self._defaults: DefaultHeaders | None = None
        self._heads: dict[int, bytes] = {}

    def plain(self, reply: Reply, defaults: DefaultHeaders) -> bytes:
        """A JSON reply without headers of its own, on a connection that goes on."""
        if defaults is not self._defaults:
            self._defaults = defaults
            self._heads.clear()
        body = reply.body
        head = self._heads.get(reply.status)
        if head is None:
            head = self._heads[reply.status] = self._head(reply.status, _JSON, defaults)
        return b"%b%d\r\n\r\n%b" % (head, len(body), body)

    def full(
        self, reply: Reply, head: Head | None, defaults: DefaultHeaders, *, closing: bool
    ) -> bytes:
        """Any reply; `head` is that of its request, None where there is none to speak of."""
        lines = [
            self._head(reply.status, reply.content_type, defaults),
            b"%d\r\n" % len(reply.body),
            *(b"%b: %b\r\n" % header for header in reply.headers.items()),
            b"" if head is None else head.echo,
            b"connection: close\r\n" if closing else b"",
            b"\r\n",
            reply.body,
        ]
        return b"".join(lines)

    def _head(self, status: int, content_type: bytes, defaults: DefaultHeaders) -> bytes:
        lines = [b"%b: %b\r\n" % header for header in defaults]
        return b"%b%bcontent-type: %b\r\ncontent-length: " % (
            _STATUS_LINES[status],
            b"".join(lines),
            content_type,
        )
