"""One end of the socket between a server and its isolated process: it never blocks."""

import asyncio
import socket
from collections import deque
from collections.abc import Callable, Sequence

from app.backends.isolated_wire import Frame, FrameReader, Message, WireError, frame

_BUFFER_BYTES = 1 << 20
_MOST_PARTS = 512  # of one sendmsg; the kernel takes 1024


class Link:
    """Owns a connected socket until it ends.

    `on_frame` gets what the other end says, in order. `on_end` is called once, when nothing can be
    received any more, with what was wrong; None when the other end closed or died. A `WireError`
    from `on_frame` ends the link too.
    """

    def __init__(
        self,
        connection: socket.socket,
        max_payload: Callable[[], int],
        on_frame: Callable[[Frame], None],
        on_end: Callable[[str | None], None],
    ) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
        self._socket = connection
        self._number = connection.fileno()
        self._reader = FrameReader(max_payload)
        self._on_frame = on_frame
        self._on_end = on_end
        self._unsent: deque[memoryview] = deque()
        self._given_bytes = 0
        self._sent_bytes = 0
        self._open = True
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._number, self._readable)

    @property
    def open(self) -> bool:
        return self._open

    @property
    def sent_bytes(self) -> int:
        """What the socket has taken since the beginning."""
        return self._sent_bytes

    def send(self, message: Message, tensors: Sequence[memoryview] = ()) -> int:
        """What the socket does not take now is kept, not copied, and sent later. Nothing is sent
        once the link has ended. Returns what `sent_bytes` is when the socket has all of it."""
        parts = frame(message, tensors)
        self._given_bytes += sum(part.nbytes for part in parts)
        if not self._open:
            return self._given_bytes
        waiting = bool(self._unsent)
        self._unsent.extend(parts)
        if not waiting:
            self._send_unsent()
            if self._unsent:
                self._loop.add_writer(self._number, self._writable)
        return self._given_bytes

    def finish(self) -> None:
        """Say that nothing more will be sent; what the other end says is still received."""
        if self._open:
            self._drop_unsent()
            self._socket.shutdown(socket.SHUT_WR)

    def end(self, why: str | None) -> None:
        if not self._open:
            return
        self._open = False
        self._loop.remove_reader(self._number)
        self._drop_unsent()
        self._socket.close()
        self._on_end(why)

    def _readable(self) -> None:
        try:
            count = self._socket.recv_into(self._reader.space())
        except BlockingIOError:
            return
        except ConnectionError:  # it ended with something of ours unread
            count = 0
        if count == 0:
            self.end(None)
            return
        try:
            for received in self._reader.received(count):
                self._on_frame(received)
        except WireError as exc:
            self.end(f"it said what it must not say: {exc}")

    def _writable(self) -> None:
        self._send_unsent()
        if not self._unsent:
            self._loop.remove_writer(self._number)

    def _send_unsent(self) -> None:
        parts = list(self._unsent)[:_MOST_PARTS]
        try:
            sent = self._socket.sendmsg(parts)
        except BlockingIOError:
            return
        except ConnectionError:  # what it said last can still be read; then it has ended
            self._unsent.clear()
            return
        self._sent_bytes += sent
        while self._unsent and sent >= self._unsent[0].nbytes:
            sent -= self._unsent.popleft().nbytes
        if sent:
            self._unsent[0] = self._unsent[0][sent:]

    def _drop_unsent(self) -> None:
        if self._unsent:
            self._unsent.clear()
            self._loop.remove_writer(self._number)
