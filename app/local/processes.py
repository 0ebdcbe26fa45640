"""Child processes that end when we do."""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO


@contextmanager
def child(
    command: Sequence[str],
    environment: Mapping[str, str] | None = None,
    output: IO[str] | None = None,
    patience_s: float = 15,
) -> Iterator["subprocess.Popen[bytes]"]:
    """Start a process; leaving tells it to stop, and kills it when it does not within `patience_s`.

    It has a session of its own: a Ctrl-C in the terminal is for us, who stop our children in order.
    `output` takes what it writes, errors included; by default it writes where we do.
    """
    process = subprocess.Popen(
        list(command),
        env=None if environment is None else dict(environment),
        stdout=output,
        stderr=None if output is None else subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=_end_with_parent,
    )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(patience_s)
        except subprocess.TimeoutExpired:  # a Redis that cannot save stays, for instance
            process.kill()
            process.wait()


def _end_with_parent() -> None:
    """On Linux the kernel ends the child when we are killed without a chance to stop it."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.getppid() == 1:  # we died before the call
            os.kill(os.getpid(), signal.SIGTERM)
