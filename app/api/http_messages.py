"""Takes the bytes of one connection apart into requests, with llhttp at its strictest."""

import time
from collections import deque

import httptools

from app.api.http_head import CHUNKED, Head
from app.errors import InvalidInput, PayloadTooLarge, RequestError

_CHUNK_FRAME_BYTES = 32
"""What the framing of a chunk may take; an honest client's takes six to twelve."""


class Unreadable(Exception):
    """What came is no request, or none that will be read; nothing behind it can be found."""

    def __init__(self, error: RequestError, status: int, reason: str) -> None:
        super().__init__(str(error))
        self.error = error
        self.status = status
        self.reason = reason


class Message:
    """A request as far as it has come."""

    __slots__ = ("asked", "body", "complete", "head", "held", "kept", "since_s", "size")

    def __init__(self) -> None:
        self.head: Head | None = None
        self.body: bytes | bytearray = b""
        """What is here of it and not passed on. One piece: a client may send it in millions."""
        self.size = 0
        """Bytes of the body so far, whether kept or not."""
        self.held = 0
        """Bytes of it that count in the budget of all bodies."""
        self.kept = True
        """Whether the body is wanted."""
        self.complete = False
        self.asked = False
        """Whether it may pass was asked, and it may."""
        self.since_s = 0.0
        """When it was first looked at; once there is a head, when that was complete."""

    def whole(self) -> bytes:
        """Its body, as far as it is here."""
        return bytes(self.body)

    def append(self, body: bytes) -> None:
        """More of its body."""
        if not self.body:
            self.body = body
        elif isinstance(self.body, bytearray):
            self.body += body
        else:
            self.body = bytearray(self.body) + body


class MessageParser:
    """Of one connection. `messages` has the requests in their order, the last one perhaps not
    complete; whoever serves them takes them out."""

    def __init__(self, max_head_bytes: int) -> None:
        self.messages: deque[Message] = deque()
        self._max_head_bytes = max_head_bytes
        self._parser = httptools.HttpRequestParser(self)
        self._message: Message | None = None
        """The one that is being received."""
        self._url = b""
        self._fields: list[tuple[bytes, bytes]] = []
        self._framing = 0
        """Bytes of the message that are not its body, less what its chunks may take."""
        self._fault: InvalidInput | None = None
        self._upgrade = False
        """The message offers another protocol."""
        self._again = False
        """The message is parsed for a second time."""
        self._last = False
        """The connection ends with the message, or with the one before."""

    def feed(self, data: bytes | memoryview) -> None:
        """Raises `Unreadable`; the complete messages before the fault are in `messages`."""
        if self._last:
            return
        before = 0 if self._message is None else self._message.size
        try:
            self._parse(data)
        except httptools.HttpParserError as exc:
            if not self._last:  # what comes after the last request counts for nothing
                raise self._unreadable(exc) from None
        message = self._message
        if message is None:
            return
        # What was saved with some chunks is not there for others, nor for trailers.
        self._framing = max(0, self._framing + len(data) - (message.size - before))
        if self._framing > self._max_head_bytes:
            error = PayloadTooLarge(f"head: over the limit of {self._max_head_bytes} bytes")
            raise Unreadable(error, 431, "head_too_large")

    def wanted(self, at_most: int) -> int:
        """How much to feed at once: no more than the body under way, or `at_most`, so that few
        requests are taken apart before it is their turn."""
        message = self._message
        if message is None or message.head is None or message.head.length == CHUNKED:
            return at_most
        return max(1, message.head.length - message.size)

    def close(self) -> None:
        """The parser holds us, and we hold the parser."""
        del self._parser

    def _unreadable(self, exc: httptools.HttpParserError) -> Unreadable:
        if self._fault is not None:
            return Unreadable(self._fault, 400, "malformed")
        if isinstance(exc, httptools.HttpParserCallbackError):
            raise exc  # a defect of ours
        return Unreadable(InvalidInput(f"request: {exc}"), 400, "malformed")

    def _parse(self, data: bytes | memoryview) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as exc:
            self._upgrade = False
            self._refuse_upgrade()
            self._parse(data[exc.args[0] :])

    def _refuse_upgrade(self) -> None:
        """Read on as if the client had not offered another protocol, as RFC 9110 allows (7.8):
        llhttp would take the body for the new protocol's."""
        version = self._parser.get_http_version().encode()
        lines = [b"%b %b HTTP/%b\r\n" % (self._parser.get_method(), self._url, version)]
        lines += [b"%b: %b\r\n" % field for field in self._fields if field[0] != b"upgrade"]
        self._parser = httptools.HttpRequestParser(self)
        self._again = True
        self._parser.feed_data(b"".join(lines) + b"\r\n")

    # What httptools calls. An exception in here would end as one of its own.

    def on_message_begin(self) -> None:
        self._url = b""
        self._fields = []
        if self._again:
            self._again = False
            return
        self._framing = 0
        self._message = Message()
        self.messages.append(self._message)

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._fields.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        parser, message = self._parser, self._message
        assert message is not None
        method = parser.get_method().decode()
        if parser.should_upgrade():
            if method == "CONNECT":
                self._fault = InvalidInput("request line: CONNECT is for proxies")
                raise self._fault
            self._upgrade = True
            return
        try:
            message.head = Head(
                method,
                self._url,
                parser.get_http_version(),
                self._fields,
                parser.should_keep_alive(),
            )
        except InvalidInput as exc:
            self._fault = exc
            raise
        self._fields = []  # for trailers, which nobody reads
        message.since_s = time.monotonic()

    def on_body(self, body: bytes) -> None:
        message = self._message
        assert message is not None
        message.size += len(body)
        self._framing -= _CHUNK_FRAME_BYTES
        if message.kept:
            message.append(body)

    def on_message_complete(self) -> None:
        message = self._message
        if self._upgrade or message is None or message.head is None:
            return
        message.complete = True
        self._last = not message.head.keep_alive
        self._message = None
