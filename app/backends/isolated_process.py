"""The server's side of one isolated process: started, sent to, listened to, ended."""

import asyncio
import math
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import app
from app.backends.isolated_link import Link
from app.backends.isolated_output import ForwardedOutput
from app.backends.isolated_wire import Frame, Message
from app.priority import put_behind, put_session_behind

_PROGRAM = "app.backends.isolated_child"
_AGAIN_S = 0.15
# By name: people keep secrets in others that begin so (NVIDIA_API_KEY).
_PASSED_ON = (
    "LD_LIBRARY_PATH",
    *("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"),
    *("NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES", "NVIDIA_TF32_OVERRIDE"),
)


class IsolatedProcess:
    """A running `isolated_child`. `on_frame` gets what it says, in order; a `WireError` that it
    raises ends the process, as does anything the process says that is no frame.

    Start it in the main thread: the kernel kills the process when the thread that started it ends.
    """

    def __init__(
        self,
        model: Path,
        max_payload: Callable[[], int],
        on_frame: Callable[[Frame], None],
    ) -> None:
        self._why: str | None = None
        self._closed = asyncio.Event()
        self._again: asyncio.TimerHandle | None = None
        ours, theirs = socket.socketpair()
        output, theirs_output = os.pipe()
        try:
            self._process = _spawn(theirs, theirs_output)
        except BaseException:
            ours.close()
            os.close(output)
            raise
        finally:
            theirs.close()
            os.close(theirs_output)
        os.set_blocking(output, False)
        self._output = ForwardedOutput(output, str(model), self._process.pid)
        self._link = Link(ours, max_payload, on_frame, self._on_end)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        """False from the moment at which nothing can be sent to it any more."""
        return self._link.open

    def private_bytes(self) -> int:
        """What counts against its memory limit; 0 where the system does not say."""
        try:
            pages = Path(f"/proc/{self.pid}/statm").read_text().split()[5]
        except OSError:
            return 0
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def computing(self) -> "Computing":
        """How much it has computed."""
        return Computing.of(self.pid)

    def peak_bytes(self) -> int:
        """The most memory of the machine that it ever held; 0 where the system does not say."""
        try:
            lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        except OSError:
            return 0
        found = (line.split() for line in lines if line.startswith("VmHWM:"))
        return next((int(words[1]) << 10 for words in found), 0)

    @property
    def sent_bytes(self) -> int:
        """What of all that was sent has left this process."""
        return self._link.sent_bytes

    def send(self, message: Message, tensors: Sequence[memoryview] = ()) -> int:
        """Never blocks; the tensors must stay as they are until they are answered. Returns what
        `sent_bytes` is when all of it has left this process."""
        return self._link.send(message, tensors)

    def put_behind(self, nice: int, *, idle: bool) -> None:
        """By so much behind this process; with `idle` behind everybody else."""
        put_behind(self.pid, nice, idle=idle)
        if self._again is not None:
            self._again.cancel()
        self._put_session_behind(nice)

    def kill(self, why: str) -> None:
        """`why` is told as its end, where it had not ended already."""
        self._link.end(why)

    def finish(self) -> None:
        """Let it end by itself: it does when it sees that the server has nothing more to say."""
        self._link.finish()

    async def ended(self) -> str:
        """Wait for its end, and say what it was."""
        await self._closed.wait()
        # It is killed: this takes as long as the kernel needs to free its memory.
        status = await asyncio.to_thread(self._process.wait)
        self._output.close()
        if self._why is not None:
            return self._why
        last = f": {self._output.last_line}" if self._output.last_line else ""
        return f"{_described(status)}{last}"

    def _put_session_behind(self, nice: int) -> None:
        self._again = None
        if not put_session_behind(self.pid, nice):
            loop = asyncio.get_running_loop()
            self._again = loop.call_later(_AGAIN_S, self._put_session_behind, nice)

    def _on_end(self, why: str | None) -> None:
        self._why = why
        if self._again is not None:
            self._again.cancel()
        self._process.kill()
        self._closed.set()


@dataclass(frozen=True, slots=True)
class Computing:
    """What a process has computed, over all its threads."""

    cpu_s: float
    """Infinite where the system does not say."""
    waits_for_cpu: bool
    """Whether a thread would compute now if it were let."""

    @classmethod
    def of(cls, pid: int) -> "Computing":
        ticks, waits = 0, False
        try:
            for task in Path(f"/proc/{pid}/task").iterdir():
                state, *fields = (task / "stat").read_text().rpartition(")")[2].split()
                waits = waits or state == "R"
                ticks += int(fields[10]) + int(fields[11])  # user and system time
        except OSError:  # it, or a thread of it, has just ended; or there is no /proc
            return cls(math.inf, waits_for_cpu=False)
        return cls(ticks / os.sysconf("SC_CLK_TCK"), waits)


def _spawn(connection: socket.socket, output: int) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [
            sys.executable,
            *("-P", "-s", "-B", "-X", "utf8", "-X", "faulthandler"),
            *("-m", _PROGRAM, str(connection.fileno())),
        ],
        env=_environment(),
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        pass_fds=[connection.fileno()],
        start_new_session=True,
    )


def _environment() -> dict[str, str]:
    """Where Python finds itself and this package and which GPUs there are, and nothing else that
    the server was told."""
    found = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    here = str(Path(app.__file__).parent.parent)
    path = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
    # A thread of OpenBLAS would be one too many to enter a namespace.
    return found | {"PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"}


def _described(status: int) -> str:
    if status >= 0:
        return f"it ended with status {status}"
    try:
        return f"it was killed by {signal.Signals(-status).name}"
    except ValueError:  # a real-time signal has no name
        return f"it was killed by signal {-status}"
