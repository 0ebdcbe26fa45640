"""From exec to ready, and the memory that the worker and its parent then hold.

    make bench-start      (BENCH="--runs 5")

Needs a trained flight_delay with its Redis: leave `make run` running beside it.
"""

import argparse
import os
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from loadtests.memory import resident_mb, worker_of

REDIS_URL = Path(".hikyaku/feature-redis-url")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    runs = [start() for _ in range(parser.parse_args().runs)]
    names = ("s to ready", "MB resident in the worker", "MB resident in its parent")
    for name, values in zip(names, zip(*runs, strict=True), strict=True):
        print(f"{statistics.median(values):8.2f} {name} (largest {max(values):.2f})")


def start() -> tuple[float, float, float]:
    """Seconds from exec to ready, and MB resident after a few requests for readiness."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "FEATURE_REDIS_URL": REDIS_URL.read_text(),
        "HIKYAKU_REPLAY_CLOCK": "2013-12-31T00:00:00Z",
        "HIKYAKU_PORT": str(port),
        "HIKYAKU_LOG_LEVEL": "WARNING",
    }
    started_s = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "app.cli", "serve"], env=environment)
    try:
        while True:
            if process.poll() is not None:
                sys.exit("the server did not start; what it said is above")
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=5)
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.01)
        ready_s = time.monotonic() - started_s
        return ready_s, resident_mb(worker_of(process.pid)), resident_mb(process.pid)
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    main()
