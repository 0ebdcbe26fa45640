"""The head of an HTTP request: what it asks, and how its body is framed."""

from collections.abc import Mapping
from urllib.parse import unquote

import httptools

from app.api.hot_paths import echoed_id, headers_of
from app.api.predictions import predicted_model
from app.errors import InvalidInput

CHUNKED = -1
"""The length of a body that says itself where it ends."""
_URLS_AT_MOST = 1024


class Head:
    """The head of one request; its headers as in `headers_of`."""

    __slots__ = (
        *("echo", "expects", "fields", "headers", "keep_alive", "length", "method", "model"),
        *("path", "url", "version"),
    )

    def __init__(
        self,
        method: str,
        url: bytes,
        version: str,
        fields: list[tuple[bytes, bytes]],
        keep_alive: bool,
    ) -> None:
        """Raises `InvalidInput` for what the parser lets pass and we do not."""
        self.method = method
        self.url = url
        self.version = version
        self.fields = fields
        self.keep_alive = keep_alive and version != "1.0"
        headers = self.headers = headers_of(fields)
        self.path, self.model = _known_urls.get(url) or _looked_up(url)
        """`model` is that of a prediction, None for any other request."""
        if method != "POST":
            self.model = None
        self.length = _length(version, headers, fields)
        expected = headers.get(b"expect")
        self.expects = (
            expected is not None and version == "1.1" and expected.lower() == b"100-continue"
        )
        """Whether the client waits for our word before it sends the body."""
        self.echo = b""
        """What the answer repeats, as a line of its head."""
        if b"x-request-id" in headers and (client_id := echoed_id(headers)) is not None:
            self.echo = b"x-request-id: %b\r\n" % client_id


def query(url: bytes) -> bytes:
    """Between the `?` and the `#` of a request's target."""
    return httptools.parse_url(url).query or b""


def raw_path(url: bytes) -> bytes:
    """As it was sent, with its escapes."""
    return httptools.parse_url(url).path or b"/"


_known_urls: dict[bytes, tuple[str, str | None]] = {}
"""Path and model of the targets that were asked before."""


def _looked_up(url: bytes) -> tuple[str, str | None]:
    try:
        path = unquote(raw_path(url).decode("ascii"))
    except (httptools.HttpParserInvalidURLError, UnicodeDecodeError):
        raise InvalidInput("request line: no valid target") from None
    if len(_known_urls) == _URLS_AT_MOST:
        _known_urls.clear()
    if len(url) <= 256:
        _known_urls[url] = (path, predicted_model(path))
    return path, predicted_model(path)


def _length(version: str, headers: Mapping[bytes, bytes], fields: list[tuple[bytes, bytes]]) -> int:
    """Bytes of the body, or `CHUNKED`. Any doubt is refused: who stands before us may read the
    request otherwise (request smuggling)."""
    if version not in ("1.1", "1.0"):
        raise InvalidInput(f"request line: HTTP/{version} is not spoken here")
    hosts = sum(name == b"host" for name, _ in fields) if len(headers) < len(fields) else 1
    if hosts > 1 or (version == "1.1" and b"host" not in headers):
        raise InvalidInput("Host: exactly one", field="Host")
    coding = headers.get(b"transfer-encoding")
    if coding is None:
        return int(headers.get(b"content-length", b"0"))
    if version == "1.0" or coding.lower() != b"chunked":
        raise InvalidInput("Transfer-Encoding: chunked alone", field="Transfer-Encoding")
    return CHUNKED
