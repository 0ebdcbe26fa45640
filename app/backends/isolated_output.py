"""What an isolated process writes, as lines of the server's log: bounded, whatever it writes."""

import asyncio
import logging
import os
import time

from app.errors import printable

log = logging.getLogger(__name__)

_READ_EVERY_S = 0.05  # a process that writes without end waits for us instead of keeping us busy
_READ_BYTES = 16_384
_LINE_BYTES = 500
_LINES_A_MINUTE = 60


class ForwardedOutput:
    """Reads `pipe`, which it owns and which does not block, until `close()`."""

    def __init__(self, pipe: int, model: str, pid: int) -> None:
        self._pipe = pipe
        self._said = {"model": model, "pid": pid}
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._rest = b""
        self._minute = 0.0
        self._lines = 0
        self._last = ""
        self._listen()

    @property
    def last_line(self) -> str:
        """The last one that says anything."""
        return self._last

    def close(self) -> None:
        """Forward what is still in the pipe, up to a bound."""
        if self._timer is not None:
            self._timer.cancel()
        self._loop.remove_reader(self._pipe)
        self._forward()
        os.close(self._pipe)

    def _listen(self) -> None:
        self._timer = None
        self._loop.add_reader(self._pipe, self._readable)

    def _readable(self) -> None:
        self._loop.remove_reader(self._pipe)
        if self._forward():
            self._timer = self._loop.call_later(_READ_EVERY_S, self._listen)

    def _forward(self) -> bool:
        """False at the end of the pipe."""
        try:
            received = os.read(self._pipe, _READ_BYTES)
        except BlockingIOError:
            return True
        *lines, self._rest = (self._rest + received).split(b"\n")
        if len(self._rest) > _LINE_BYTES or not received:
            lines.append(self._rest)
            self._rest = b""
        for line in filter(None, map(bytes.strip, lines)):
            self._say(line[:_LINE_BYTES].decode(errors="replace"))
        return bool(received)

    def _say(self, line: str) -> None:
        line = printable(line)
        self._last = line
        minute = time.monotonic() // 60
        if minute != self._minute:
            self._minute, self._lines = minute, 0
        self._lines += 1
        if self._lines <= _LINES_A_MINUTE:
            log.warning("an isolated process says", extra=self._said | {"line": line})
        elif self._lines == _LINES_A_MINUTE + 1:
            log.warning("an isolated process says more than is shown", extra=self._said)
