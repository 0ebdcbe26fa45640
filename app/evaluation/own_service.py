"""A service of our own with a replay clock, on the published models of this machine."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime

import httpx

from app.errors import HikyakuError
from app.listener import bind
from app.local.processes import child

_READY_TIMEOUT_S = 120


@contextmanager
def own_service(
    feature_redis: str, state_redis: str, clock: datetime, settings: Mapping[str, str] | None = None
) -> Iterator[str]:
    """Yields its address once it is ready; leaving stops it. An empty `state_redis` is none.
    `settings` come on top of those of our environment.

    Raises `HikyakuError` when it does not become ready.
    """
    listener = bind("127.0.0.1", 0)
    port = listener.getsockname()[1]
    listener.close()
    # Importing Feast has switched on prometheus_client's multiprocess mode for our children.
    inherited = {
        name: v for name, v in os.environ.items() if not name.startswith("PROMETHEUS_MULTI")
    }
    with tempfile.TemporaryDirectory() as work:
        environment = {
            **inherited,
            "FEATURE_REDIS_URL": feature_redis,
            "STATE_REDIS_URL": state_redis,
            "HIKYAKU_WORK_DIR": work,
            "HIKYAKU_HOST": "127.0.0.1",
            "HIKYAKU_PORT": str(port),
            "HIKYAKU_OPERATOR_TOKEN": "",  # we move its clock
            "HIKYAKU_OPERATOR_TOKEN_FILE": "",
            "HIKYAKU_REPLAY_CLOCK": clock.isoformat(),
            "HIKYAKU_LOG_LEVEL": "WARNING",
            "HIKYAKU_REGISTRY_CHECK_S": "0",
            **(settings or {}),
        }
        with child([sys.executable, "-m", "app.cli", "serve"], environment) as process:
            address = f"http://127.0.0.1:{port}"
            _wait_until_ready(process, address)
            yield address


def _wait_until_ready(process: "subprocess.Popen[bytes]", address: str) -> None:
    until_s = time.monotonic() + _READY_TIMEOUT_S
    while process.poll() is None and time.monotonic() < until_s:
        try:
            if httpx.get(f"{address}/v2/health/ready", timeout=5, trust_env=False).is_success:
                return
        except httpx.TransportError:
            pass  # not listening yet
        time.sleep(0.1)
    raise HikyakuError("the server did not become ready; what it said is above")
