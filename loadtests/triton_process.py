"""A real Triton that can be killed, stopped and started again at the same addresses."""

import contextlib
import http.client
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from app.local.processes import child
from loadtests.triton_environment import triton_environment

ENVIRONMENT = Path(__file__).parent.parent / ".venv-triton"
_MODEL_PY = Path(__file__).with_name("triton_model.py")
_MARKERS = Path(__file__).with_name("triton_markers.py")
_START_TIMEOUT_S = 60
_LOOK_EVERY_S = 0.01
_SHARED_MEMORY = Path("/dev/shm")


class TritonProcess:
    """A Triton on the loopback with the models that were put into it.

    A context manager that starts it and stops it. Raises `Unusable` where it cannot be had.
    """

    def __init__(self, folder: Path) -> None:
        self._environment = triton_environment(ENVIRONMENT)
        self._folder = folder
        self._models = folder / "models"
        self._models.mkdir(parents=True)
        # Held as long as we live: while it is dead nobody else gets its ports.
        self._reserved = [_reserved() for _ in range(3)]
        self.http_port, self.grpc_port, self._metrics_port = (
            port.getsockname()[1] for port in self._reserved
        )
        self._region = f"hikyaku_{secrets.token_hex(6)}"
        self._stack = ExitStack()
        self._process: subprocess.Popen[bytes] | None = None

    def endpoint(self, protocol: str) -> str:
        return f"127.0.0.1:{self.grpc_port if protocol == 'grpc' else self.http_port}"

    def put(
        self,
        name: str,
        model: bytes,
        *,
        version: int = 1,
        max_batch_size: int = 2_000_000,
        more: str = "",
    ) -> None:
        """Write a version of a model, an ONNX file; what runs takes it at its next `load`."""
        folder = self._models / name / str(version)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model.onnx").write_bytes(model)
        shutil.copy(_MODEL_PY, folder / "model.py")
        shutil.copy(_MARKERS, folder)
        (folder.parent / "config.pbtxt").write_text(
            f'name: "{name}"\nbackend: "python"\nmax_batch_size: {max_batch_size}\n{more}\n'
        )

    def load(self, name: str) -> None:
        """Load the model, or what is new of it, and wait until it is ready."""
        self._post(f"/v2/repository/models/{name}/load")

    def unload(self, name: str) -> None:
        """It is not ready from now on; Triton frees it in the background."""
        self._post(f"/v2/repository/models/{name}/unload")

    def executed(self, name: str) -> int:
        """Requests for the model that succeeded."""
        stats = json.loads(self._request("GET", f"/v2/models/{name}/stats"))
        return sum(int(v["inference_stats"]["success"]["count"]) for v in stats["model_stats"])

    def launch(self) -> None:
        """Start the process with all models; it does not answer yet."""
        environment = self._environment
        log = self._stack.enter_context((self._folder / "triton.log").open("a"))
        self._process = self._stack.enter_context(
            child(
                [
                    str(environment.server / "bin" / "tritonserver"),
                    f"--model-repository={self._models}",
                    f"--backend-directory={environment.server / 'backends'}",
                    "--model-control-mode=explicit",
                    "--load-model=*",
                    "--exit-on-error=false",
                    "--exit-timeout-secs=3",
                    f"--backend-config=python,shm-region-prefix-name={self._region}",
                    "--http-address=127.0.0.1",
                    f"--http-port={self.http_port}",
                    "--http-thread-count=4",
                    "--grpc-address=127.0.0.1",
                    f"--grpc-port={self.grpc_port}",
                    "--metrics-address=127.0.0.1",
                    f"--metrics-port={self._metrics_port}",
                ],
                os.environ | environment.variables(),
                log,
            )
        )

    def ready(self) -> float:
        """The monotonic instant at which it says that it is ready."""
        until_s = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < until_s:
            assert self._process is not None
            if self._process.poll() is not None:
                break
            with contextlib.suppress(OSError, http.client.HTTPException):
                self._request("GET", "/v2/health/ready")
                return time.monotonic()
            time.sleep(_LOOK_EVERY_S)
        raise TimeoutError((self._folder / "triton.log").read_text())

    @property
    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """kill -9 of it and of the processes of its models, and wait until it is gone."""
        assert self._process is not None
        self._signal(signal.SIGKILL)
        self._process.wait()
        self._forget_shared_memory()

    def pause(self) -> None:
        """SIGSTOP: its TCP stays up, it says nothing. Not the processes of its models: their shared
        locks time out after 10 s, and a Triton that wakes up with them ends of it."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        while not _is_stopped(self._process.pid):
            time.sleep(0.001)

    def resume(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)

    def __enter__(self) -> Self:
        for port in self._reserved:
            self._stack.callback(port.close)
        self.launch()
        try:
            self.ready()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.is_alive:
            self.kill()
        self._stack.close()
        self._forget_shared_memory()

    def _forget_shared_memory(self) -> None:
        """Which a Triton leaves behind that had no time to."""
        for region in _SHARED_MEMORY.glob(f"{self._region}*"):
            region.unlink()

    def _signal(self, number: signal.Signals) -> None:
        """It leads a process group of its own, which its models' processes belong to."""
        assert self._process is not None
        if self._process.poll() is None:
            os.killpg(self._process.pid, number)

    def _post(self, path: str) -> None:
        self._request("POST", path)

    def _request(self, method: str, path: str) -> bytes:
        connection = http.client.HTTPConnection("127.0.0.1", self.http_port, timeout=30)
        try:
            connection.request(method, path, b"{}" if method == "POST" else None)
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        if answer.status != 200:
            raise http.client.HTTPException(f"{path}: {answer.status} {content!r}")
        return content


def _reserved() -> socket.socket:
    port = socket.socket()
    port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    port.bind(("127.0.0.1", 0))
    return port


def _is_stopped(process: int) -> bool:
    """All threads: on a busy machine some go on for a while."""
    tasks = Path(f"/proc/{process}/task").iterdir()
    return all((task / "stat").read_text().rpartition(")")[2].split()[0] == "T" for task in tasks)
