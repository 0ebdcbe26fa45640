"""Publishers that are killed before the nth system call of a kind; strace kills them.

A process under strace imports everything and then forks a publisher a command, so that a run takes
a fraction of a second. strace kills whoever makes a call of a kind for the `_KILLED_AT`th time,
counted by process: a publisher that shall die at its nth makes the others before, in vain.
"""

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

# A publisher imports it only when it needs it, which would be in each one that is forked.
import onnxruntime  # noqa: F401 - as said

from app.errors import HikyakuError
from app.features.plan import NO_FEATURES
from app.repository.publish import publish
from app.repository.signing import SigningKey

_KILLED_AT = 150
_NOBODY = 9_999  # no open file has this number

IN_VAIN: Mapping[str, Callable[[], object]] = {
    "write": lambda: os.write(_NOBODY, b""),
    "fsync": lambda: os.fsync(_NOBODY),
    "rename": lambda: os.rename("", ""),
    "mkdir": lambda: os.mkdir(""),
    "unlink": lambda: os.unlink(""),
    "unlinkat": lambda: os.unlink("", dir_fd=_NOBODY),
    "rmdir": lambda: os.rmdir(""),
}
"""The system calls that a publisher may change files with, and how to make each without effect."""


@dataclass(frozen=True)
class Publication:
    """One publisher's task: `model` is a folder or a URL. With `call` it is killed before its `nth`
    call of that kind."""

    model: str
    artifact: str
    call: str | None = None
    nth: int = 0
    key: str | None = None
    keep_current: bool = False


class Publishers:
    """Forks publishers and waits for them, as a context manager.

    With `killing` under strace; without it they may publish to a URL, and have no `call`. Raises
    `FileNotFoundError` where there is no strace.
    """

    def __init__(self, *, killing: bool) -> None:
        self._killing = killing
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        # Over a socket, because `write` is one of the calls that are counted.
        ours, theirs = socket.socketpair()
        self._socket = self._stack.enter_context(ours)
        self._answers = self._stack.enter_context(ours.makefile("r"))
        with theirs:
            program = [sys.executable, "-m", __name__, str(theirs.fileno())]
            program.append("killing" if self._killing else "at a URL")
            command = [*(_strace() if self._killing else ()), *program]
            process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        self._stack.callback(process.wait)
        self._stack.callback(ours.shutdown, socket.SHUT_RDWR)
        return self

    def __exit__(self, *of_the_block: object) -> None:
        self._stack.close()

    def start(self, *publications: Publication) -> list[int]:
        """Their process ids; all of them start at the same time."""
        pids: list[int] = self._ask([asdict(publication) for publication in publications])
        return pids

    def wait(self) -> list[int]:
        """How each of those started last has ended: 0 published, 1 failed, -9 was killed."""
        ended: list[int] = self._ask(None)
        return ended

    def run(self, *publications: Publication) -> list[int]:
        self.start(*publications)
        return self.wait()

    def _ask(self, command: object) -> Any:
        self._socket.sendall(json.dumps(command).encode() + b"\n")
        return json.loads(self._answers.readline())


def _strace() -> list[str]:
    # Without --seccomp-bpf, with which strace 6.1 kills nobody. A call that this machine's Linux
    # does not know (rename on arm64) kills nobody either, which the proof tells.
    kinds = ",".join(f"?{kind}" for kind in IN_VAIN)
    injected = f"inject={kinds}:signal=SIGKILL:when={_KILLED_AT}"
    return ["strace", "-f", "-qq", "-o", os.devnull, "-e", f"trace={kinds}", "-e", injected]


def _serve(connection: socket.socket, *, killing: bool) -> None:
    """Read commands and answer them, until there are no more."""
    if not killing:  # for those that publish to a URL: as above
        import s3fs  # noqa: F401

        import app.repository.url_store  # noqa: F401

    running: Sequence[int] = ()
    for line in connection.makefile("r"):
        command = json.loads(line)
        if command is not None:
            running = [_forked(Publication(**fields)) for fields in command]
            answer = list(running)
        else:
            answer = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in running]
        connection.sendall(json.dumps(answer).encode() + b"\n")


def _forked(publication: Publication) -> int:
    pid = os.fork()
    if pid:
        return pid
    ended = 1
    try:
        if publication.call is not None:
            for _ in range(_KILLED_AT - publication.nth):
                with suppress(OSError):
                    IN_VAIN[publication.call]()
        publish_one(publication)
        ended = 0
    finally:
        os._exit(ended)  # not back into the loop of the process that we are a copy of


def publish_one(publication: Publication) -> None:
    """In this process. Raises `HikyakuError`, which is also printed."""
    model = publication.model if "://" in publication.model else Path(publication.model)
    key = None if publication.key is None else SigningKey(Path(publication.key))
    try:
        asyncio.run(
            publish(
                model,
                Path(publication.artifact),
                NO_FEATURES,
                "proof",
                isolated=False,
                keep_current=publication.keep_current,
                signing_key=key,
            )
        )
    except HikyakuError as exc:
        print(f"a publisher failed: {exc}", file=sys.stderr)
        raise


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])), killing=sys.argv[2] == "killing")
