"""A Redis that can be killed, stopped and started again at the same address with its data."""

import asyncio
import contextlib
import os
import secrets
import signal
import socket
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from app.local.processes import child
from app.local.redis_server import redis_binary

_START_TIMEOUT_S = 10
_LOOK_EVERY_S = 0.01


class RedisProcess:
    """A Redis on the loopback, its data in `folder` as an append-only file, with a password.

    A context manager that starts it and stops it; `settings` are lines of its redis.conf.
    """

    def __init__(self, folder: Path, *settings: str) -> None:
        self.password = secrets.token_hex(8)
        # Held as long as we live: while the Redis is dead nobody else gets its port.
        self._reserved = socket.socket()
        self._reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._reserved.bind(("127.0.0.1", 0))
        self.port: int = self._reserved.getsockname()[1]
        self._folder = folder
        self._settings = settings
        self._stack = ExitStack()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return self.url_through(self.port)

    def url_through(self, port: int) -> str:
        """Its address behind a proxy on this port."""
        return f"redis://:{self.password}@127.0.0.1:{port}/0"

    def launch(self, *more_settings: str) -> None:
        """Start the process; it does not answer yet."""
        self._folder.mkdir(parents=True, exist_ok=True)
        configuration = self._folder / "redis.conf"
        configuration.touch(mode=0o600)
        lines = [
            "bind 127.0.0.1",
            f"port {self.port}",
            f'dir "{self._folder.resolve()}"',
            f"requirepass {self.password}",
            "appendonly yes",
            'save ""',
            *self._settings,
            *more_settings,
            "",
        ]
        configuration.write_text("\n".join(lines))
        log = self._stack.enter_context((self._folder / "redis.log").open("a"))
        self._process = self._stack.enter_context(
            child([str(redis_binary()), str(configuration.resolve())], output=log)
        )

    async def good_reply(self, command: bytes = b"EXISTS nothing") -> float:
        """The monotonic instant of the first answer to `command` that is no error."""
        while True:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                if await self._answers(command):
                    return time.monotonic()
            await asyncio.sleep(_LOOK_EVERY_S)

    async def _answers(self, command: bytes) -> bool:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(b"AUTH %b\r\n%b\r\n" % (self.password.encode(), command))
            await reader.readuntil(b"\r\n")
            return not (await reader.readuntil(b"\r\n")).startswith(b"-")
        finally:
            writer.close()

    def kill(self) -> None:
        """kill -9, and wait until it is gone."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def pause(self) -> None:
        """SIGSTOP: its TCP stays up, it says nothing."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process is not None
        if self._process.poll() is None:
            os.kill(self._process.pid, signal.SIGCONT)

    def __enter__(self) -> Self:
        self._stack.callback(self._reserved.close)
        self.launch()
        self._wait_until_it_answers()
        return self

    def _wait_until_it_answers(self) -> None:
        until_s = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < until_s:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
                return
            time.sleep(_LOOK_EVERY_S)
        raise TimeoutError((self._folder / "redis.log").read_text())

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.resume()  # what is stopped cannot end
        self._stack.close()
