"""Throughput, processor time and memory with several workers, and how even their connections are.

    make bench-workers      (BENCH="--workers 1 2 --rounds 5 --connections 64")

wrk shares the cores with the workers: where these are more than half of the cores, look at the
processor time a request rather than at the requests a second.
"""

import argparse
import json
import os
import socket
import statistics
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from app.listener import bind, one_each
from app.local.processes import child
from loadtests.bench.workload import Workload, tensor_workload
from loadtests.bench.wrk import load
from loadtests.memory import proportional_mb, workers_of

_WORK = Path(".hikyaku/bench")  # what `make bench` has built there serves, too
_TICKS_S = os.sysconf("SC_CLK_TCK")
_START_TIMEOUT_S = 60
_DEALS = 200


@dataclass(frozen=True)
class Reading:
    """One round with so many workers."""

    requests_s: float
    p99_ms: float
    cpu_us: float
    """Of the workers, user and system, a request."""
    evenness: float
    """The busiest worker's processor time as a multiple of the mean."""
    worker_mb: float
    """Of one, what it shares with others by its share."""


class Server:
    """A service that is ready, with its workers."""

    def __init__(self, parent: int, port: int, bodies: Path, model: str) -> None:
        self._workers = workers_of(parent)
        self._url = f"http://127.0.0.1:{port}/v1/models/{model}:predict"
        self._bodies = bodies

    def measure(self, connections: int, seconds: int) -> Reading:
        before_s = [_cpu_s(worker) for worker in self._workers]
        seen = load(self._url, self._bodies, connections, seconds)
        used_s = [
            _cpu_s(worker) - before for worker, before in zip(self._workers, before_s, strict=True)
        ]
        if seen.refused or seen.lost or not seen.requests:
            sys.exit(f"{seen.requests} answers, {seen.refused} refusals, {seen.lost} lost")
        return Reading(
            seen.requests / seen.duration_s,
            seen.p99_us / 1000,
            sum(used_s) / seen.requests * 1e6,
            max(used_s) / statistics.mean(used_s),
            statistics.mean(map(proportional_mb, self._workers)),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], metavar="N")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=4)
    parser.add_argument("--connections", type=int, default=64)
    options = parser.parse_args()

    print(f"Evenness of {options.connections} connections: the most a worker has, over the mean")
    for workers in (2, 4, 16):
        dealt = sorted(_dealt(workers, options.connections) for _ in range(_DEALS))
        print(f"  {workers:3} workers: median {dealt[_DEALS // 2]:.2f}, one in ten", end=" ")
        print(f"{dealt[_DEALS * 9 // 10]:.2f} or more")

    rounds: dict[int, list[Reading]] = {workers: [] for workers in options.workers}
    with ExitStack() as stack:
        workload = stack.enter_context(tensor_workload("mlp", _WORK))
        servers = {n: stack.enter_context(_running(workload, n)) for n in options.workers}
        for server in servers.values():
            server.measure(options.connections, 1)  # warm
        for _ in range(options.rounds):
            for workers, server in servers.items():
                rounds[workers].append(server.measure(options.connections, options.seconds))
    _tell(rounds, options.connections)


def _tell(rounds: dict[int, list[Reading]], connections: int) -> None:
    print(
        f"\n{connections} connections, {os.cpu_count()} cores, wrk on the same; medians of rounds"
    )
    print("workers  requests/s  p99 ms  CPU µs/request  busiest/mean  MB/worker")
    for workers, readings in rounds.items():
        rate, p99, cpu, evenness, memory = (
            statistics.median(getattr(reading, name) for reading in readings)
            for name in Reading.__dataclass_fields__
        )
        print(
            f"{workers:7}  {rate:10,.0f}  {p99:6.1f}  {cpu:14.1f}  {evenness:12.2f}  {memory:9.0f}"
        )


def _dealt(workers: int, connections: int) -> float:
    """Deal connections to so many listeners: the most that one of them gets, over the mean."""
    with ExitStack() as stack:
        listeners = [stack.enter_context(each) for each in one_each(bind("127.0.0.1", 0), workers)]
        for listener in listeners:
            listener.listen(connections)
            listener.setblocking(False)
        for _ in range(connections):
            stack.enter_context(socket.create_connection(listeners[0].getsockname()))
        return max(map(_accepted, listeners)) * workers / connections


def _accepted(listener: socket.socket) -> int:
    count = 0
    while True:
        try:
            listener.accept()[0].close()
        except BlockingIOError:
            return count
        count += 1


@contextmanager
def _running(workload: Workload, workers: int) -> Iterator[Server]:
    bodies = workload.folder / "workers.bodies"
    lines = (json.dumps({"instances": [instance]}) for instance in workload.instances)
    bodies.write_text("".join(f"{line}\n" for line in lines))
    with bind("127.0.0.1", 0) as probe:
        port = probe.getsockname()[1]
    environment = os.environ | {
        "MODEL_REPOSITORY": str(workload.repository),
        "HIKYAKU_PORT": str(port),
        "HIKYAKU_LOG_LEVEL": "WARNING",
    }
    command = [sys.executable, "-m", "app.cli", "serve", "--workers", str(workers)]
    with child(command, environment) as process:
        until_s = time.monotonic() + _START_TIMEOUT_S
        while not _is_ready(port):
            if process.poll() is not None or time.monotonic() > until_s:
                sys.exit("the server did not become ready; what it said is above")
            time.sleep(0.05)
        yield Server(process.pid, port, bodies, workload.name)


def _is_ready(port: int) -> bool:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=5)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False
    return True


def _cpu_s(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_S


if __name__ == "__main__":
    main()
