"""A contender that runs, from its start to its end."""

import contextlib
import http.client
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from app.local.processes import child
from loadtests.bench.answers import ask, body_of, check_answers, check_together
from loadtests.bench.contenders import Contender, environment, free_port
from loadtests.bench.failure import BenchFailure
from loadtests.bench.paced import Paced, paced
from loadtests.bench.process_tree import ProcessTree
from loadtests.bench.reading import Reading
from loadtests.bench.rows import ROWS
from loadtests.bench.workload import Workload
from loadtests.bench.wrk import load

_START_TIMEOUT_S = 120
_STOP_TIMEOUT_S = 10
_LOOK_EVERY_S = 0.05
_WAKE_S = 0.2  # every timer of a server that was stopped is overdue
_SETTLE_S = 0.1
_SETTLE_TIMEOUT_S = 5
_BEGIN_TIMEOUT_S = 30  # what some do once, after they have started: ours looks into the registry
_IDLE_SHARE = 0.2  # the kernel counts processor time by hundredths of a second


class Server:
    """A contender that answers rightly on `port`; wrk sends it the bodies of a file."""

    def __init__(
        self, contender: Contender, workload: Workload, port: int, bodies: Path, tree: ProcessTree
    ) -> None:
        self.contender = contender
        self._workload = workload
        self._port = port
        self._bodies = bodies
        self._tree = tree

    def measure(self, connections: int, seconds: int) -> Reading:
        """Raises `BenchFailure` when a request was refused or lost: such a rate says nothing."""
        with self._awake():
            before_s, redis_before_s = self._tree.cpu_s(), self._redis_cpu_s()
            seen = load(self._url, self._bodies, connections, seconds)
            used_s = self._tree.cpu_s() - before_s
            redis_used_s = self._redis_cpu_s() - redis_before_s
        if seen.refused or seen.lost or not seen.requests:
            raise BenchFailure(
                f"{self.contender.name} at {connections} connections: {seen.requests} answers, "
                f"{seen.refused} of them refusals, {seen.lost} requests lost"
            )
        return Reading(
            requests_s=seen.requests / seen.duration_s,
            p50_us=seen.p50_us,
            p99_us=seen.p99_us,
            cpu_us=used_s / seen.requests * 1e6,
            resident_mib=self._tree.resident_mib(),
            redis_us=redis_used_s / seen.requests * 1e6,
        )

    def check(self) -> int:
        """Ask about every row over `TOGETHER` connections and look at each answer. Returns their
        number; raises `BenchFailure` when one is wrong."""
        with self._awake():
            return check_together(self.contender, self._workload, self._port)

    def paced(self, per_s: float, seconds: float) -> Paced:
        """At a steady rate, whatever it answers."""
        with self._awake():
            return paced(self.contender, self._workload, self._port, per_s, seconds)

    @property
    def _url(self) -> str:
        return f"http://127.0.0.1:{self._port}{self.contender.path(self._workload)}"

    def _redis_cpu_s(self) -> float:
        return 0.0 if self._workload.store is None else self._workload.store.cpu_s()

    def rest(self, patience_s: float = _SETTLE_TIMEOUT_S) -> None:
        """Stop its processes until it is measured: some use the processor when nobody asks.

        First let it finish what wrk left behind, which would seem to have waited all the while.
        """
        until_s = time.monotonic() + patience_s
        while time.monotonic() < until_s:
            before_s = self._tree.cpu_s()
            time.sleep(_SETTLE_S)
            if self._tree.cpu_s() - before_s < _SETTLE_S * _IDLE_SHARE:
                break
        self._tree.signal(signal.SIGSTOP)

    @contextmanager
    def _awake(self) -> Iterator[None]:
        self._tree.signal(signal.SIGCONT)
        time.sleep(_WAKE_S)
        try:
            yield
        finally:
            self.rest()


_T = TypeVar("_T")


def turns(servers: Sequence[_T], number: int) -> list[_T]:
    """The order of a round: each begins with another server, every other one goes backwards."""
    first = number % len(servers)
    order = [*servers[first:], *servers[:first]]
    return order if number % 2 == 0 else order[::-1]


def log_of(contender: Contender, workload: Workload) -> Path:
    """The file of what it writes."""
    return workload.folder / f"{contender.name}.log"


@contextmanager
def running(contender: Contender, python: Path, workload: Workload) -> Iterator[Server]:
    """Start it with the interpreter of its environment, wait until it answers, and hold its answers
    against ONNX Runtime's.

    Leaving ends all of its processes. Raises `BenchFailure` when it does not start or answers
    wrongly; what it writes is in `log_of`.
    """
    bodies = workload.folder / f"{contender.name}.bodies"
    bodies.write_text("".join(f"{body_of(contender, workload, row)}\n" for row in range(ROWS)))
    port = free_port()
    command = contender.command(python, port, workload)
    with (
        log_of(contender, workload).open("w") as output,
        child(command, environment(workload, port), output) as process,
    ):
        tree = ProcessTree(process.pid)
        try:
            _wait_until_it_answers(contender, workload, port, process)
            check_answers(contender, workload, port)
            server = Server(contender, workload, port, bodies, tree)
            server.rest(_BEGIN_TIMEOUT_S)
            yield server
        finally:
            _end(process, tree)


def _wait_until_it_answers(
    contender: Contender, workload: Workload, port: int, process: "subprocess.Popen[bytes]"
) -> None:
    until_s = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < until_s and process.poll() is None:
        with contextlib.suppress(OSError, http.client.HTTPException):
            if ask(contender, workload, port, 0)[0] == 200:
                return
        time.sleep(_LOOK_EVERY_S)
    raise BenchFailure(f"{contender.name} did not start; {log_of(contender, workload)} says why")


def _end(process: "subprocess.Popen[bytes]", tree: ProcessTree) -> None:
    """Ask the server to stop, then kill what is left of it."""
    family = tree.members()
    tree.signal(signal.SIGCONT)  # what is stopped cannot end
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_TIMEOUT_S)
    tree.kill(family)
