"""What the HTTP connections of a server share: limits, known heads, one look at them all."""

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from app.api.answers import Reply
from app.api.body import MAX_BODY_S, body_too_large, body_too_slow
from app.api.hot_paths import HotPaths
from app.api.http_head import Head
from app.api.http_replies import ReplyWriter
from app.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from app.api.http_protocol import HttpConnection

_KNOWN_HEADS = 1024
_SEEN_HEADS = 8192
_KNOWN_HEAD_BYTES = 1024


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """How long and how much a connection may take. Durations hold to `look_every_s`."""

    head_s: float = 10
    """From the first byte of a request to the end of its head; also from the start of a connection
    to its first byte."""
    body_s: float = MAX_BODY_S
    """From the end of a head to the end of its body."""
    keep_alive_s: float = 75
    """Between requests. Load balancers keep idle connections for 60 s: who closes first loses the
    next request."""
    write_s: float = 30
    """For a client to take what fills the write buffer."""
    linger_s: float = 1
    """For a client to read a refusal while it still sends."""
    linger_bytes: int = 256 * 1024
    """What is read and thrown away meanwhile."""
    drain_s: float = 1
    """How long idle connections are still answered when the server is told to stop."""
    pause_s: float = 0.05
    """For a client that sends requests ahead while they are refused, before the next one."""
    head_bytes: int = 64 * 1024
    look_every_s: float = 0.5


class HttpDoor:
    """Of one server. Its connections are what uvicorn is given as its protocol."""

    def __init__(
        self, hot_paths: HotPaths, metrics: Metrics, limits: HttpLimits | None = None
    ) -> None:
        self.hot_paths = hot_paths
        self.limits = limits or HttpLimits()
        self.replies = ReplyWriter()
        self.known_heads: dict[bytes, Head] = {}
        """Heads of predictions that clients repeat: the same bytes at the start of a request mean
        the same, so that they need not be parsed again."""
        self._seen_once: set[int] = set()
        """Hashes of heads that came."""
        self._connections: set[HttpConnection] = set()
        self._closed = metrics.closed_connections
        self._open = metrics.open_connections
        self._timer: asyncio.TimerHandle | None = None

    def learn(self, data: bytes, head: Head) -> None:
        """`data` are the bytes of this head, complete and by themselves. They are kept when they
        come again: heads with an id of their own never do."""
        mark = hash(data)
        if mark not in self._seen_once:
            if len(self._seen_once) == _SEEN_HEADS:
                self._seen_once.clear()
            self._seen_once.add(mark)
        elif len(data) <= _KNOWN_HEAD_BYTES:
            if len(self.known_heads) == _KNOWN_HEADS:
                self.known_heads.clear()
            self.known_heads[data] = head

    def opened(self, connection: "HttpConnection") -> None:
        self._connections.add(connection)
        self._open.inc()
        if self._timer is None:
            self._look_later()

    def lost(self, connection: "HttpConnection") -> None:
        self._connections.discard(connection)
        self._open.dec()

    def count(self, reason: str) -> None:
        """A connection is closed for this reason."""
        self._closed.labels(reason).inc()

    def body_too_large(self, path: str) -> Reply:
        error = body_too_large(self.hot_paths.max_body_bytes)
        return self.hot_paths.body_refusal(error, path)

    def body_too_slow(self, path: str) -> Reply:
        return self.hot_paths.body_refusal(body_too_slow(self.limits.body_s), path)

    def _look_later(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self.limits.look_every_s, self._look)

    def _look(self) -> None:
        self._timer = None
        now_s = time.monotonic()
        for connection in tuple(self._connections):
            connection.look(now_s)
        if self._connections:
            self._look_later()
