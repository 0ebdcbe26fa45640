"""The load: wrk, a closed loop over keep-alive connections, every request with another row."""

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from loadtests.bench.failure import BenchFailure

_SCRIPT = Path(__file__).with_name("rows.lua")
_LOST_AFTER_S = 20
_HANGS_AFTER_S = 60


@dataclass(frozen=True)
class Load:
    """What wrk saw. Latencies are those of answered requests, whatever the status."""

    requests: int
    duration_s: float
    p50_us: float
    p99_us: float
    refused: int
    """Answers that were no 2xx or 3xx."""
    lost: int
    """Connections refused or broken, and requests without an answer for `_LOST_AFTER_S`."""


def find_wrk() -> str:
    """The program. Raises `BenchFailure` where there is none."""
    found = shutil.which("wrk")
    if found is None:
        raise BenchFailure("the load comes from wrk: on Debian and Ubuntu, apt-get install wrk")
    return found


def load(url: str, bodies: Path, connections: int, seconds: int) -> Load:
    """POST the lines of `bodies` in turn for `seconds`, one request in flight a connection."""
    amount = ["-t1", f"-c{connections}", f"-d{seconds}s", f"--timeout={_LOST_AFTER_S}s"]
    finished = subprocess.run(
        [find_wrk(), *amount, "-s", str(_SCRIPT), url, "--", str(bodies)],
        capture_output=True,
        text=True,
        timeout=seconds + _HANGS_AFTER_S,
        check=False,
    )
    if finished.returncode != 0:
        raise BenchFailure(f"wrk ended with status {finished.returncode}: {finished.stderr}")
    return Load(**json.loads(finished.stdout.splitlines()[-1]))
