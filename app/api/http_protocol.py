"""HTTP/1.1 below ASGI: predictions straight to their operation, the rest to the application."""

import asyncio
import time
from enum import IntEnum
from typing import Any, cast

from uvicorn.config import Config
from uvicorn.protocols.utils import get_local_addr, get_remote_addr, is_ssl
from uvicorn.server import ServerState

from app.api.answers import Reply, refusal
from app.api.hot_paths import leaves_little
from app.api.http_cold import ColdRequest
from app.api.http_door import HttpDoor
from app.api.http_head import Head
from app.api.http_messages import Message, MessageParser, Unreadable
from app.api.predictions import Call, new_request_id
from app.errors import DeadlineExceeded

_FED_AT_ONCE = 4096
_AHEAD_BYTES = 16 * 1024
# Then everybody else has a turn: one client may have sent megabytes of refused requests.
_STEPS_AT_ONCE = 32
_JSON = b"application/json"


class Phase(IntEnum):
    """Where a connection stands."""

    IDLE = 0
    """Between requests: nothing of one is here."""
    RECEIVING = 1
    """A request has begun and is not answered; what is still to come of it may be thrown away."""
    PREDICTING = 2
    APPLICATION = 3
    """The ASGI application has the request, perhaps not all of its body."""
    PAUSED = 4
    """The client sends ahead while it is refused."""
    LINGERING = 5
    """The last answer is written; what the client still sends is thrown away."""


# Compared for every request: the members of an enumeration are looked up slowly.
_IDLE, _RECEIVING, _PREDICTING = Phase.IDLE, Phase.RECEIVING, Phase.PREDICTING


class HttpConnection(asyncio.Protocol):
    """One connection. Its requests are served one at a time, in order; while one is, reading
    pauses as soon as more than a little has come."""

    __slots__ = (
        *(
            "_addresses",
            "_advances_later",
            "_app_state",
            "_call",
            "_clear",
            "_cold",
            "_config",
            "_discarded",
            "_door",
        ),
        *("_draining", "_fault", "_head", "_hot_paths", "_idle_s", "_keep_alive_s"),
        *("_known_heads", "_max_body_bytes", "_message", "_parser"),
        *("_peer", "_phase", "_plain", "_reading", "_refused_ahead", "_since_s"),
        *("_state", "_stuck_since_s", "_transport", "_unfed"),
    )

    def __init__(
        self, door: HttpDoor, config: Config, state: ServerState, app_state: dict[str, Any]
    ) -> None:
        self._door = door
        self._hot_paths = door.hot_paths
        self._max_body_bytes = door.hot_paths.max_body_bytes
        self._known_heads = door.known_heads
        self._plain = door.replies.plain
        self._keep_alive_s = door.limits.keep_alive_s
        self._config = config
        self._state = state
        self._app_state = app_state
        self._parser = MessageParser(door.limits.head_bytes)
        self._transport: asyncio.Transport = cast(asyncio.Transport, None)  # until it is made
        self._addresses: tuple[Any, Any, str] = (None, None, "http")
        self._peer = ""
        self._phase = _IDLE
        self._since_s = time.monotonic()
        """When the phase began, of those that may last too long."""
        self._idle_s = door.limits.head_s
        self._head: Head | None = None
        """Of the prediction that is being answered, or was last."""
        self._call: Call | None = None
        self._message: Message | None = None
        """What is being served, where it had to be parsed."""
        self._cold: ColdRequest | None = None
        self._unfed = memoryview(b"")
        """What came and is not parsed yet."""
        self._fault: Unreadable | None = None
        """What is wrong behind the messages that the parser has."""
        self._clear = True
        """Nothing came that waits for its turn, and the client takes what we write."""
        self._reading = True
        self._stuck_since_s = 0.0
        """Since when the client does not take what we write; 0 while it does."""
        self._draining = False
        self._refused_ahead = False
        self._advances_later = False
        self._discarded = 0

    # What the event loop and uvicorn call.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        client = get_remote_addr(self._transport)
        scheme = "https" if is_ssl(self._transport) else "http"
        self._addresses = (get_local_addr(self._transport), client, scheme)
        self._peer = client[0] if client else ""
        # uvicorn knows its own protocols only; it asks of them what we have.
        self._state.connections.add(self)  # type: ignore[arg-type]
        self._door.opened(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._state.connections.discard(self)
        self._door.lost(self)
        if self._call is not None:
            self._call.leave()
            self._call = None
        if self._cold is not None:
            self._cold.leave()
            self._cold = None
        if self._message is not None:
            self._release(self._message)
        self._phase = Phase.LINGERING
        self._parser.close()

    def eof_received(self) -> None:
        """Who ends its side is gone: it looks the same as a client that was closed, for whom
        nothing must be executed. The loop closes the connection."""

    def data_received(self, data: bytes) -> None:
        if self._phase is not _IDLE:
            self._take(data)
            return
        end = data.find(b"\r\n\r\n") + 4
        head_bytes = data[:end]
        head = self._known_heads.get(head_bytes)
        if head is not None and end + head.length == len(data):
            self._predict(head, data[end:], time.monotonic())
            return
        self._head = None
        if len(data) <= _FED_AT_ONCE:
            self._feed(data)
            self._serve_one()
        else:
            self._take(data)
        head = self._head
        if head is None or self._message is not None or not data.startswith(b"POST "):
            return
        # It is complete, and all that is behind the first head is its body: it is the first one's.
        if head.length == len(data) - end:
            self._door.learn(head_bytes, head)

    def pause_writing(self) -> None:
        self._stuck_since_s = time.monotonic()
        if self._cold is not None:
            self._cold.flow.pause_writing()
        self._adjust_reading()

    def resume_writing(self) -> None:
        self._stuck_since_s = 0.0
        if self._cold is not None:
            self._cold.flow.resume_writing()
        self._advance()

    def shutdown(self) -> None:
        """uvicorn stops: the answers from now on are the last of their connections. An idle client
        may have sent a request already, or be about to; it gets a moment."""
        self._draining = True
        if self._cold is not None:
            self._cold.close_after()
        loop = asyncio.get_running_loop()
        loop.call_later(self._door.limits.drain_s, self._close_idle)

    # What the door and the application call.

    def look(self, now_s: float) -> None:
        """End what lasts too long."""
        limits = self._door.limits
        waited_s = now_s - self._since_s
        if self._phase is Phase.LINGERING:
            unread = self._transport.get_write_buffer_size() > 0
            if waited_s > limits.linger_s + (limits.write_s if unread else 0):
                self._transport.abort()
        elif self._stuck_since_s and now_s - self._stuck_since_s > limits.write_s:
            self._door.count("slow_reader")
            self._transport.abort()
        elif self._phase is _IDLE and waited_s > self._idle_s:
            self._close("idle")
        elif self._phase is _RECEIVING and self._message is not None:
            self._look_at(self._message, now_s)

    def write(self, data: bytes) -> None:
        self._transport.write(data)

    def is_closing(self) -> bool:
        return self._phase is Phase.LINGERING or self._transport.is_closing()

    def close(self) -> None:
        """The application has answered for the last time."""
        self._end()

    def pause_reading(self) -> None:
        """The application has enough of a body for now: `_may_go_on` sees it by itself, and
        `resume_reading` is called only after this."""

    def resume_reading(self) -> None:
        """The application has taken what it got of a body."""
        self._advance_later()

    # Requests, in order.

    def _take(self, data: bytes) -> None:
        if self._phase is Phase.LINGERING:
            self._discarded += len(data)
            self._adjust_reading()
            return
        self._unfed = memoryview(bytes(self._unfed) + data if self._unfed else data)
        self._advance()

    def _advance(self) -> None:
        """Serve what is there, one request after the other, as far as it goes."""
        steps = 0
        while self._may_go_on():
            steps += 1
            if steps > _STEPS_AT_ONCE:
                self._advance_later()
                break
            if self._message is None and self._parser.messages:
                self._message = self._parser.messages.popleft()
                if not self._message.complete:  # until now it was we who were slow
                    self._message.since_s = time.monotonic()
            if self._message is not None:
                self._serve(self._message)
                if self._message is None or not self._may_go_on():
                    continue
            if self._fault is not None:
                self._turn_away(self._fault)
            elif self._unfed:
                part = self._unfed[: self._parser.wanted(_FED_AT_ONCE)]
                self._unfed = self._unfed[len(part) :]
                self._feed(part)
            else:
                break
        if self._phase <= _RECEIVING:
            waits = self._message is None and not self._is_left and not self._stuck_since_s
            self._phase = _IDLE if waits else _RECEIVING
        self._adjust_reading()

    def _advance_later(self) -> None:
        if not self._advances_later:
            self._advances_later = True
            asyncio.get_running_loop().call_soon(self._advance_now)

    def _advance_now(self) -> None:
        self._advances_later = False
        self._advance()

    @property
    def _is_left(self) -> bool:
        """Whether something came that is not looked at yet."""
        return bool(self._unfed or self._parser.messages) or self._fault is not None

    def _may_go_on(self) -> bool:
        if self._stuck_since_s:
            return False
        if self._cold is not None and self._message is not None:
            return (
                self._phase is Phase.APPLICATION
                and not self._message.complete
                and self._cold.has_room
            )
        return self._phase <= _RECEIVING

    def _serve_one(self) -> None:
        """Most often what came is one prediction, and all of it."""
        messages = self._parser.messages
        if len(messages) == 1 and messages[0].complete and self._fault is None:
            message = messages[0]
            head = message.head
            if head is not None and head.model is not None and message.size <= self._max_body_bytes:
                messages.clear()
                self._predict(head, message.whole(), message.since_s)
                return
        self._advance()

    def _feed(self, part: bytes | memoryview) -> None:
        try:
            self._parser.feed(part)
        except Unreadable as exc:
            self._fault = exc
            self._unfed = memoryview(b"")
        if self._cold is not None and self._message is not None:
            self._pass_on(self._cold, self._message)

    def _adjust_reading(self) -> None:
        """Read a little ahead, or the end of a connection is not seen behind it. What is more stays
        in the kernel, where it slows the client down."""
        if self._phase is Phase.LINGERING:
            reads = self._discarded < self._door.limits.linger_bytes
        else:
            takes = not self._stuck_since_s and self._phase is not Phase.PAUSED
            self._clear = takes and not self._is_left
            reads = takes and len(self._unfed) <= _AHEAD_BYTES
        if reads is self._reading or self._transport.is_closing():
            return
        self._reading = reads
        if reads:
            self._transport.resume_reading()
        else:
            self._transport.pause_reading()

    def _serve(self, message: Message) -> None:
        """Do what its present state allows; `_message` is None when it is out of the way."""
        head = message.head
        if head is None:
            self._phase = _RECEIVING
        elif self._cold is not None:
            return
        elif not message.kept:  # it was answered
            if message.complete:
                self._message = None
                self._phase = _IDLE
        elif head.model is None:
            self._ask_application(message, head)
        else:
            self._phase = _RECEIVING
            self._serve_prediction(message, head)

    # Predictions.

    def _predict(self, head: Head, body: bytes, received_s: float) -> None:
        """Answer a request that is all here."""
        self._head = head
        self._phase = _PREDICTING
        call = self._call = self._open(head, received_s)
        if call is not None:
            call.begin(body)

    def _serve_prediction(self, message: Message, head: Head) -> None:
        too_large = message.size > self._max_body_bytes
        if not message.asked:
            if message.complete and not too_large:
                self._message = None
                self._predict(head, message.whole(), message.since_s)
                return
            message.asked = True
            self._head = head
            self._call = self._open(head, message.since_s)
            if self._call is not None and head.expects and not message.size:
                self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if self._call is None:
            return
        if too_large:
            self._refuse(message, head, self._door.body_too_large(head.path))
        elif message.complete:
            self._release(message)
            self._message = None
            self._phase = _PREDICTING
            self._call.begin(message.whole())
        else:
            more, message.held = message.size - message.held, message.size
            no_room = self._hot_paths.bodies.hold(more)
            if no_room is not None:
                refused = self._hot_paths.body_refusal(no_room, head.path)
                self._refuse(message, head, refused)

    def _release(self, message: Message) -> None:
        """Its body is complete, or not wanted any more."""
        self._hot_paths.bodies.release(message.held)
        message.held = 0

    def _open(self, head: Head, received_s: float) -> Call | None:
        """The prediction that `_head` asks for; None when it is refused, and answered."""
        path, headers = head.path, head.headers
        hot_paths = self._hot_paths
        admitted = hot_paths.admitted("POST", path, headers, self._peer)
        if isinstance(admitted, Reply):
            self._reply(admitted)
            return None
        refused = hot_paths.not_understood("POST", path, headers)
        if refused is not None:
            self._reply(refused)
            return None
        return hot_paths.predict.open(
            cast(str, head.model), headers, received_s, self._peer, self._reply
        )

    def _reply(self, reply: Reply) -> None:
        """Answer the request of `_head`."""
        head = cast(Head, self._head)
        if self._phase is not _PREDICTING:
            self._refuse(cast(Message, self._message), head, reply)
            return
        self._call = None
        if (
            self._clear
            and head.keep_alive
            and not self._draining
            and not head.echo
            and reply.status != 503
            and not reply.headers
            and reply.content_type == _JSON
        ):
            self._transport.write(self._plain(reply, self._state.default_headers))
            self._answered()
        else:
            self._reply_in_full(reply, head)

    def _reply_in_full(self, reply: Reply, head: Head) -> None:
        # A request that was sent ahead waits.
        ahead = bool(self._unfed or self._parser.messages)
        refused_ahead = ahead and reply.status == 503
        closing = not head.keep_alive or self._draining or (refused_ahead and self._refused_ahead)
        self._write_reply(reply, head, closing=closing)
        if closing:
            self._state.total_requests += 1
            if refused_ahead:
                self._door.count("refused_ahead")
            self._end()
            return
        self._answered()
        self._refused_ahead = refused_ahead
        if refused_ahead:
            # Later requests of this client would only grow stale in a queue that nobody sees.
            self._phase = Phase.PAUSED
            asyncio.get_running_loop().call_later(self._door.limits.pause_s, self._pause_over)

    def _write_reply(self, reply: Reply, head: Head | None, *, closing: bool) -> None:
        defaults = self._state.default_headers
        self._transport.write(self._door.replies.full(reply, head, defaults, closing=closing))

    def _answered(self) -> None:
        self._state.total_requests += 1
        self._since_s = time.monotonic()
        self._idle_s = self._keep_alive_s
        if self._clear:
            self._phase = _IDLE
        else:  # something is left to do, which comes before what may still be read
            self._phase = _RECEIVING
            self._advance_later()

    def _pause_over(self) -> None:
        if self._phase is Phase.PAUSED:
            self._phase = _IDLE
            self._advance()

    def _refuse(self, message: Message, head: Head, reply: Reply) -> None:
        """Answer without the body; what is still to come of it is thrown away, where that
        is little, so that the connection can carry the next request."""
        self._call = None
        message.kept = False
        self._release(message)
        message.body = b""
        goes_on = message.complete or (leaves_little(head.headers) and not head.expects)
        closing = not goes_on or not head.keep_alive or self._draining
        self._write_reply(reply, head, closing=closing)
        self._answered()
        if closing:
            self._end()
        elif message.complete:
            self._message = None
        else:
            self._phase = _RECEIVING

    # Everything else.

    def _ask_application(self, message: Message, head: Head) -> None:
        self._phase = Phase.APPLICATION
        self._cold = ColdRequest(
            head,
            self,
            self._addresses,
            self._config,
            self._state,
            self._app_state,
            self._application_answered,
        )
        if self._draining:
            self._cold.close_after()
        self._pass_on(self._cold, message)

    def _pass_on(self, cold: ColdRequest, message: Message) -> None:
        if message.body or message.complete:
            cold.receive(message.whole(), message.complete)
            message.body = b""

    def _application_answered(self) -> None:
        self._cold = None
        message = self._message
        if self._phase is not Phase.APPLICATION or message is None:
            return  # the connection has ended with it
        self._answered()
        if message.complete:
            self._message = None
        else:
            message.kept = False
            self._phase = _RECEIVING

    # The end.

    def _turn_away(self, fault: Unreadable) -> None:
        """Answer what is no request, or none that will be read."""
        self._fault = None
        if self._cold is not None:
            if self._cold.answering:
                self._close(fault.reason)
                return
            self._cold.leave()
            self._cold = None
        self._door.count(fault.reason)
        reply = refusal(fault.error, new_request_id(), "/v1/")._replace(status=fault.status)
        self._say_last(reply)

    def _look_at(self, message: Message, now_s: float) -> None:
        limits = self._door.limits
        waited_s = now_s - message.since_s
        if message.head is None:
            if waited_s > limits.head_s:
                self._door.count("head_timeout")
                error = DeadlineExceeded(f"head: not complete within {limits.head_s} s")
                self._say_last(refusal(error, new_request_id(), "/v1/")._replace(status=408))
        elif waited_s > limits.body_s:
            if message.kept:
                self._door.count("body_timeout")
                self._say_last(self._door.body_too_slow(message.head.path))
            else:  # it was answered long ago
                self._close("body_timeout")

    def _say_last(self, reply: Reply) -> None:
        head = None if self._message is None else self._message.head
        self._write_reply(reply, head, closing=True)
        self._state.total_requests += 1
        self._end()

    def _end(self) -> None:
        """The last answer is written. While more may come from the client, go on reading it for
        nothing: closing then would reset the connection, and the answer be lost."""
        received = self._message is None or self._message.complete
        expects_more = self._draining or not received or not self._clear
        self._unfed = memoryview(b"")
        self._fault = None
        self._parser.messages.clear()
        self._phase = Phase.LINGERING
        self._since_s = time.monotonic()
        if expects_more and self._transport.can_write_eof():
            self._transport.write_eof()
            self._adjust_reading()
        else:
            self._transport.close()

    def _close_idle(self) -> None:
        if self._phase is _IDLE or (
            self._phase is _RECEIVING and self._message is not None and self._message.head is None
        ):
            self._close("drained")

    def _close(self, reason: str) -> None:
        self._door.count(reason)
        self._phase = Phase.LINGERING
        self._since_s = time.monotonic()
        self._transport.close()


def protocol_of(door: HttpDoor) -> type[asyncio.Protocol]:
    """What uvicorn takes for its `http`."""

    def connect(
        config: Config, server_state: ServerState, app_state: dict[str, Any], _loop: None = None
    ) -> HttpConnection:
        return HttpConnection(door, config, server_state, app_state)

    return cast("type[asyncio.Protocol]", connect)  # it is only called
