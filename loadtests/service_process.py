"""A `hikyaku serve` of its own with a repository, its workers, and a connection to operate it."""

import asyncio
import json
import os
import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from app.listener import bind
from app.local.processes import child
from loadtests.memory import workers_of
from loadtests.open_loop import body_of

_START_TIMEOUT_S = 60
_LOOK_EVERY_S = 0.05
_LAG_BUCKET = re.compile(r'hikyaku_loop_lag_seconds_bucket\{le="(.*)"\} (.*)')
_TICKS_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class ServiceProcess:
    """A service that is ready."""

    port: int
    pid: int
    log: Path

    def workers(self) -> list[int]:
        """Process ids, in the order in which they were started."""
        return workers_of(self.pid)

    def workers_by_port(self, ports: Collection[int]) -> dict[int, int]:
        """Which worker has the connection that comes from each of the ports of this machine; of
        those that a living worker has accepted."""
        inodes = {}
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
            fields = line.split()
            local, remote = (int(fields[n].rpartition(":")[2], 16) for n in (1, 2))
            if local == self.port and remote in ports:
                inodes[f"socket:[{fields[9]}]"] = remote
        return {
            inodes[opened]: worker
            for worker in self.workers()
            for opened in _opened(worker)
            if opened in inodes
        }

    def logged(self, event: str) -> Iterator[Mapping[str, Any]]:
        """The lines of the log about such an event."""
        for line in self.log.read_text().splitlines():
            if f'"event": "{event}"' in line:
                yield json.loads(line)

    def cpu_s(self) -> float:
        """Seconds of processor that the workers have used."""
        return sum(map(cpu_s, self.workers()))


def _opened(process: int) -> Iterator[str]:
    with suppress(OSError):  # it has ended
        for entry in Path(f"/proc/{process}/fd").iterdir():
            with suppress(FileNotFoundError):  # closed meanwhile
                yield os.readlink(entry)


def cpu_s(process: int) -> float:
    """Seconds of processor that a process has used."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_S


@contextmanager
def serving(
    folder: Path,
    repository: Path,
    settings: Mapping[str, str],
    *,
    command: Sequence[str] = ("app.cli", "serve"),
) -> Iterator[ServiceProcess]:
    """Run it until it is left. What it keeps is in `folder`, with what it says; `settings` come on
    top of those of an empty environment; `command` is the Python module that is run."""
    with bind("127.0.0.1", 0) as probe:
        port: int = probe.getsockname()[1]
    inherited = {name: v for name, v in os.environ.items() if not name.startswith("HIKYAKU_")}
    environment = inherited | {
        "MODEL_REPOSITORY": str(repository),
        "FEATURE_REDIS_URL": "",
        "STATE_REDIS_URL": "",
        "HIKYAKU_FEATURE_REPO": str(folder / "no feature repository"),
        "HIKYAKU_PORT": str(port),
        "HIKYAKU_WORK_DIR": str(folder / "work"),
        **settings,
    }
    log = folder / "service.log"
    with (
        log.open("w") as output,
        child([sys.executable, "-m", *command], environment, output) as process,
    ):
        service = ServiceProcess(port, process.pid, log)
        until_s = time.monotonic() + _START_TIMEOUT_S
        while not _is_ready(port):
            if process.poll() is not None or time.monotonic() > until_s:
                raise TimeoutError(log.read_text()[-5000:])
            time.sleep(_LOOK_EVERY_S)
        yield service


def worst_lag_s(metrics: str) -> float:
    """The upper bound of the longest delay of an event loop, of what a scrape says."""
    counts: dict[float, float] = {}
    for line in metrics.splitlines():
        found = _LAG_BUCKET.fullmatch(line)
        if found is not None:
            counts[float(found[1])] = float(found[2])
    whole = max(counts.values(), default=0.0)
    return min((bound for bound, count in counts.items() if count == whole), default=0.0)


def _is_ready(port: int) -> bool:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=5).close()
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False
    return True


class Reply(NamedTuple):
    """What came of a call, and when; instants are monotonic."""

    status: int
    document: Any
    asked_s: float
    answered_s: float


class Operator:
    """One connection that stays open, as an async context manager. One call at a time."""

    def __init__(self, port: int) -> None:
        self._server_port = port
        self.port = 0
        """The local one."""

    async def __aenter__(self) -> Self:
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._server_port)
        self.port = self._writer.get_extra_info("sockname")[1]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._writer.close()

    async def worker(self, service: ServiceProcess) -> int:
        """Which of the service's workers has the connection."""
        await self.call("GET", "/v2/health/live")  # it is nobody's until it is accepted
        found = service.workers_by_port({self.port}).get(self.port)
        if found is None:
            raise ConnectionResetError("the worker has just ended")
        return found

    async def call(self, method: str, path: str, document: Any = None) -> Reply:
        """Raises `OSError` or `IncompleteReadError` where no answer comes."""
        body = b"" if document is None else json.dumps(document).encode()
        lines = [
            f"{method} {path} HTTP/1.1",
            "Host: 127.0.0.1",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
        ]
        asked_s = time.monotonic()
        self._writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        head = (await self._reader.readuntil(b"\r\n\r\n")).lower()
        answer = await body_of(self._reader, head)
        answered_s = time.monotonic()
        said = json.loads(answer) if b"application/json" in head else answer.decode()
        return Reply(int(head.split(b" ", 2)[1]), said, asked_s, answered_s)
