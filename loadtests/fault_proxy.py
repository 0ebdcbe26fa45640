"""A TCP proxy before a Redis that misbehaves as it is told, for tests and proofs."""

import asyncio
import contextlib
import random
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeAlias

_CHUNK_BYTES = 65_536
# What upstream may say while we hold it back; then TCP holds it back in our place.
_HELD_CHUNKS = 1024


@dataclass(frozen=True, slots=True)
class Pass:
    """Everything goes through as it comes."""


@dataclass(frozen=True, slots=True)
class Delay:
    """Each reply comes later by `delay_s` and up to `jitter_s` more, in order."""

    delay_s: float
    jitter_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Stall:
    """TCP stays up and new connections are accepted, but no byte goes through in either direction.
    What is held back goes on its way afterwards."""


@dataclass(frozen=True, slots=True)
class Refuse:
    """Connections are reset, and new ones refused: nobody listens."""


@dataclass(frozen=True, slots=True)
class Cut:
    """The connection ends once `after_bytes` more bytes of replies have gone through: it is closed,
    or reset (RST). Happens `times` times."""

    after_bytes: int = 0
    reset: bool = False
    times: int = 1


@dataclass(frozen=True, slots=True)
class Split:
    """Replies arrive in pieces of 1 to `max_bytes` bytes, each in a write of its own."""

    max_bytes: int = 1


@dataclass(frozen=True, slots=True)
class Replace:
    """The replies after the next `skip` ones are exchanged for the bytes `reply`, `times` of them
    (None: all). A plain `+OK` (to AUTH, SELECT) passes and does not count.

    Replies are found by their framing (RESP2): switch it on while no reply is half through.
    """

    reply: bytes
    skip: int = 0
    times: int | None = None


Fault: TypeAlias = Pass | Delay | Stall | Refuse | Cut | Split | Replace


class FaultProxy:
    """Listens on a free port of the loopback and passes bytes on to one upstream.

    An async context manager. `switch` changes what it does, for open connections too. An upstream
    that cannot be reached resets the client.
    """

    def __init__(self, upstream_port: int, seed: int = 0) -> None:
        self.connections_opened = 0
        self.connections_cut = 0
        """Those that a fault has ended."""
        self.random = random.Random(seed)
        self.upstream_port = upstream_port
        """Of connections that are opened from now on."""
        self._fault: Fault = Pass()
        self._seen = 0  # bytes (Cut) or replies (Replace) since the switch
        self._left: int | None = None  # how often the fault will still happen
        self._speaking = asyncio.Event()
        self._speaking.set()
        # Bound but not listening: the port stays ours while connections are refused.
        self._reserved = _bound(0)
        self.port: int = self._reserved.getsockname()[1]
        self._server: asyncio.Server | None = None
        self._links: dict[asyncio.Task[None], _Link] = {}

    @property
    def fault(self) -> Fault:
        return self._fault

    async def switch(self, fault: Fault) -> None:
        self._fault = fault
        self._seen = 0
        self._left = fault.times if isinstance(fault, Cut | Replace) else None
        if isinstance(fault, Stall):
            self._speaking.clear()
        else:
            self._speaking.set()
        if isinstance(fault, Refuse):
            await self._stop_listening()
            self.cut()
        elif self._server is None:
            await self._listen()

    def cut(self, *, reset: bool = True) -> None:
        """End every connection now."""
        for link in list(self._links.values()):
            self.end(link, reset=reset)

    def silence(self) -> None:
        """The connections that are open now stay open and say nothing more, as with a peer that
        vanished; new ones are served."""
        for link in self._links.values():
            link.silent = True

    def end(self, link: "_Link", *, reset: bool) -> None:
        self.connections_cut += 1
        link.close(reset=reset)

    async def not_stalled(self) -> None:
        await self._speaking.wait()

    async def due(self, arrived_s: float) -> None:
        """Return when a reply that arrived at this monotonic instant may go on."""
        if isinstance(self._fault, Delay):
            wait_s = arrived_s + self._fault.delay_s - time.monotonic()
            await asyncio.sleep(wait_s + self.random.uniform(0, self._fault.jitter_s))
        await self._speaking.wait()

    def cut_within(self, fault: Cut, size: int) -> int | None:
        """How many of the next `size` bytes still go through when the cut lies in them."""
        keep = fault.after_bytes - self._seen
        self._seen += size
        if keep >= size:
            return None
        self._seen = 0
        self._happened()
        return keep

    def replaces(self, fault: Replace, reply: bytes) -> bool:
        """Whether it is this reply's turn."""
        if reply == b"+OK\r\n":
            return False
        self._seen += 1
        if self._seen <= fault.skip:
            return False
        self._happened()
        return True

    def _happened(self) -> None:
        if self._left is not None:
            self._left -= 1
            if self._left == 0:
                self._fault = Pass()

    async def _listen(self) -> None:
        listener = _bound(self.port)
        self._server = await asyncio.start_server(self._serve, sock=listener)

    async def _stop_listening(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
            await asyncio.sleep(0)  # a connection that was being accepted is a link by now

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections_opened += 1
        task = asyncio.current_task()
        assert task is not None
        link = self._links[task] = _Link(self, reader, writer)
        try:
            await link.run(self.upstream_port)
        except asyncio.CancelledError:
            pass  # we leave; the link is closed below
        finally:
            del self._links[task]
            link.close(reset=False)

    async def __aenter__(self) -> Self:
        await self._listen()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._stop_listening()
        links = list(self._links)
        for task in links:
            task.cancel()
        await asyncio.gather(*links, return_exceptions=True)
        self._reserved.close()


class _Link:
    """A client's connection and its own one to the upstream."""

    def __init__(
        self, proxy: FaultProxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._proxy = proxy
        self._from_client, self._to_client = reader, writer
        self._to_upstream: asyncio.StreamWriter | None = None
        self._replies: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_HELD_CHUNKS)
        self._half_reply = b""
        self.silent = False

    async def run(self, upstream_port: int) -> None:
        """Until one side closes."""
        await self._proxy.not_stalled()
        try:
            upstream, self._to_upstream = await asyncio.open_connection("127.0.0.1", upstream_port)
        except OSError:
            self.close(reset=True)
            return
        pumps = [
            asyncio.create_task(self._forward_commands(self._to_upstream)),
            asyncio.create_task(self._receive_replies(upstream)),
            asyncio.create_task(self._forward_replies()),
        ]
        try:
            # Who receives ends before what it has received is forwarded.
            await asyncio.wait({pumps[0], pumps[2]}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    def close(self, *, reset: bool) -> None:
        if self._to_upstream is not None:
            self._to_upstream.transport.abort()
        if not reset:
            self._to_client.close()
        elif not self._to_client.is_closing():
            # Without lingering the kernel answers with RST.
            connection = self._to_client.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._to_client.transport.abort()

    async def _forward_commands(self, to_upstream: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await self._from_client.read(_CHUNK_BYTES):
                await self._proxy.not_stalled()
                to_upstream.write(data)
                await to_upstream.drain()

    async def _receive_replies(self, upstream: asyncio.StreamReader) -> None:
        data = b"first"
        while data:
            try:
                data = await upstream.read(_CHUNK_BYTES)
            except ConnectionError:
                data = b""
            await self._replies.put((time.monotonic(), data))

    async def _forward_replies(self) -> None:
        with contextlib.suppress(ConnectionError):
            while True:
                arrived_s, data = await self._replies.get()
                await self._proxy.due(arrived_s)
                if not data or (not self.silent and not await self._say(data)):
                    return

    async def _say(self, data: bytes) -> bool:
        """Whether the connection goes on after these bytes."""
        match self._proxy.fault:
            case Cut() as cut if (keep := self._proxy.cut_within(cut, len(data))) is not None:
                self._to_client.write(data[:keep])
                await self._to_client.drain()
                self._proxy.end(self, reset=cut.reset)
                return False
            case Split(max_bytes):
                await self._say_in_pieces(data, max_bytes)
            case Replace():
                self._half_reply += data
                for reply in self._whole_replies():
                    fault = self._proxy.fault
                    if isinstance(fault, Replace) and self._proxy.replaces(fault, reply):
                        reply = fault.reply
                    self._to_client.write(reply)
            case _:
                self._to_client.write(self._half_reply + data)
                self._half_reply = b""
        await self._to_client.drain()
        return True

    async def _say_in_pieces(self, data: bytes, max_bytes: int) -> None:
        start = 0
        while start < len(data):
            stop = start + self._proxy.random.randint(1, max_bytes)
            self._to_client.write(data[start:stop])
            start = stop
            await asyncio.sleep(0)  # the reader's turn: it sees this piece alone

    def _whole_replies(self) -> Iterator[bytes]:
        data, start = self._half_reply, 0
        while (end := reply_end(data, start)) is not None:
            yield data[start:end]
            start = end
        self._half_reply = data[start:]


def reply_end(data: bytes, start: int) -> int | None:
    """Where the RESP2 reply that starts here ends; None when it is not whole."""
    line_end = data.find(b"\r\n", start)
    if line_end < 0:
        return None
    end = line_end + 2
    kind = data[start : start + 1]
    if kind not in b"$*":
        return end
    length = int(data[start + 1 : line_end])
    if kind == b"$":
        end += length + 2 if length >= 0 else 0
        return end if end <= len(data) else None
    for _ in range(length):
        element_end = reply_end(data, end)
        if element_end is None:
            return None
        end = element_end
    return end


def _bound(port: int) -> socket.socket:
    """A socket on this port of the loopback, 0 for a free one, that shares it with others of us."""
    # asyncio switches Nagle's algorithm off only where the protocol is named.
    bound = socket.socket(proto=socket.IPPROTO_TCP)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind(("127.0.0.1", port))
    return bound
