"""`hikyaku serve` as an operator has it: a parent and its workers, one port, a tiny model."""

import asyncio
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.listener import bind
from tests.tiny_models import write_model

pytestmark = pytest.mark.system

ROOT = Path(__file__).parents[2]
PAIR = {"instances": [{"a": 2.0, "b": 1.0}]}
PREDICT = "/v1/models/binary:predict"
PAIR_JSON = json.dumps(PAIR).encode()


@dataclass(frozen=True)
class Serving:
    process: "subprocess.Popen[str]"
    address: str

    def workers(self) -> list[int]:
        pid = self.process.pid
        return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def worker(self) -> int:
        (worker,) = self.workers()
        return worker

    def ask(self) -> httpx.Response:
        return httpx.post(f"{self.address}{PREDICT}", json=PAIR, timeout=30)

    def metrics(self) -> str:
        return httpx.get(f"{self.address}/metrics").text


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    models = tmp_path_factory.mktemp("serve") / "models"
    asyncio.run(write_model(models, "binary", "binary"))
    return models


def environment(models: Path, port: int) -> dict[str, str]:
    ours = {name: v for name, v in os.environ.items() if not name.startswith("HIKYAKU_")}
    return ours | {
        "MODEL_REPOSITORY": str(models),
        "FEATURE_REDIS_URL": "",
        "STATE_REDIS_URL": "",
        "HIKYAKU_PORT": str(port),
        "HIKYAKU_FEATURE_REPO": str(models / "no feature repository"),
    }


@contextmanager
def served(models: Path, stuck_s: float = 60.0, *arguments: str) -> Iterator[Serving]:
    """Run `hikyaku serve` until it is ready; kill it at the end."""
    with started(models, stuck_s, *arguments) as serving:
        _wait_until_ready(serving)
        yield serving


@contextmanager
def started(models: Path, stuck_s: float = 60.0, *arguments: str) -> Iterator[Serving]:
    """Run `hikyaku serve`; kill it at the end."""
    with closing(bind("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "app.cli", "serve", *arguments],
        cwd=ROOT,
        env=environment(models, port) | {"HIKYAKU_STUCK_S": str(stuck_s)},
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield Serving(process, f"http://127.0.0.1:{port}")
        finally:
            process.kill()


def _wait_until_ready(serving: Serving) -> None:
    until_s = time.monotonic() + 60
    while True:
        try:
            if httpx.get(f"{serving.address}/v2/health/ready", timeout=30).status_code == 200:
                return
        except httpx.ConnectError:
            assert serving.process.poll() is None
        assert time.monotonic() < until_s
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("number", "stuck_s", "reason"),
    [(signal.SIGSTOP, 1.0, "stuck"), (signal.SIGKILL, 60.0, "died")],
)
def test_requests_that_wait_while_the_worker_is_replaced_are_answered(
    repository: Path, number: signal.Signals, stuck_s: float, reason: str
) -> None:
    with served(repository, stuck_s) as serving, ThreadPoolExecutor(4) as callers:
        first = serving.worker()
        os.kill(first, number)
        if number == signal.SIGKILL:
            _wait_until_replaced(serving, first)
        answers = list(callers.map(lambda _: serving.ask(), range(4)))
        assert [answer.status_code for answer in answers] == [200] * 4
        assert serving.worker() != first
        assert f'hikyaku_worker_replacements_total{{reason="{reason}"}} 1.0' in serving.metrics()


def _wait_until_replaced(serving: Serving, worker: int) -> None:
    until_s = time.monotonic() + 30
    while True:
        try:
            if serving.worker() != worker:
                return
        except ValueError:
            pass  # just now there is none
        assert time.monotonic() < until_s
        time.sleep(0.01)


def test_a_loop_that_runs_tells_its_lag(repository: Path) -> None:
    with served(repository) as serving:
        until_s = time.monotonic() + 30
        while "hikyaku_loop_lag_seconds_count 0.0" in serving.metrics():
            assert time.monotonic() < until_s


@pytest.mark.parametrize("told", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop_it_answers_what_is_under_way(repository: Path, told: signal.Signals) -> None:
    with served(repository) as serving, httpx.Client(base_url=serving.address) as caller:
        sent: list[bool] = []

        def body() -> Iterator[bytes]:
            yield b'{"instances": '
            serving.process.send_signal(told)
            _wait_until_refused(serving)
            sent.append(True)
            yield b'[{"a": 2.0, "b": 1.0}]}'

        answer = caller.post(PREDICT, content=body(), timeout=30)
        assert sent
        assert answer.status_code == 200
        assert serving.process.wait(30) == 0


def _wait_until_refused(serving: Serving) -> None:
    until_s = time.monotonic() + 30
    while time.monotonic() < until_s:
        try:
            httpx.get(f"{serving.address}/v2/health/live", timeout=30)
        except httpx.TransportError:
            return
        time.sleep(0.01)
    pytest.fail("it still takes connections")


def test_the_parent_has_loaded_none_of_what_its_worker_needs(repository: Path) -> None:
    with served(repository) as serving:
        heavy = ("numpy", "onnxruntime", "pydantic", "uvloop")
        parent = Path(f"/proc/{serving.process.pid}/maps").read_text()
        worker = Path(f"/proc/{serving.worker()}/maps").read_text()
        assert [name for name in heavy if name in worker] == list(heavy)
        assert [name for name in heavy if name in parent] == []


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"HIKYAKU_PROT": "9000"}, "HIKYAKU_PROT"),
        ({"MODEL_REPOSITORY": "/nowhere"}, "/nowhere"),
        ({"HIKYAKU_HOST": "192.0.2.7"}, "cannot listen on 192.0.2.7"),
        ({"HIKYAKU_WORKERS": "2", "HIKYAKU_HOST": "192.0.2.7"}, "cannot listen on 192.0.2.7"),
        ({"HIKYAKU_HOST": "0.0.0.0"}, "HIKYAKU_OPERATOR_TOKEN"),
        ({"HIKYAKU_OPERATOR_TOKEN": "short"}, "HIKYAKU_OPERATOR_TOKEN: line 1"),
    ],
)
def test_what_stops_the_start_is_one_sentence(
    repository: Path, changed: Mapping[str, Any], word: str
) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "app.cli", "serve"],
        cwd=ROOT,
        env=environment(repository, 0) | changed,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 1
    (sentence,) = ended.stderr.splitlines()
    assert sentence.startswith("hikyaku: ")
    assert word in sentence


def test_modules_of_the_working_directory_are_not_imported(
    repository: Path, tmp_path: Path
) -> None:
    """Started by its console script, neither process has it on its path."""
    script = tmp_path / "bin" / "hikyaku"
    script.parent.mkdir()
    script.write_text("from app.cli import main\nmain()\n")
    (tmp_path / "pydantic.py").write_text("raise SystemExit('hijacked')")
    ended = subprocess.run(
        [sys.executable, str(script), "serve"],
        cwd=tmp_path,
        env=environment(repository, 0) | {"PYTHONPATH": str(ROOT), "MODEL_REPOSITORY": "/nowhere"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.stderr.startswith("hikyaku: /nowhere")


class Callers:
    """Connections that stay, and how many answers came over all that there ever were."""

    def __init__(self, serving: Serving, stack: ExitStack) -> None:
        self._port = int(serving.address.rpartition(":")[2])
        self._stack = stack
        self.answered = 0
        self.connections: list[http.client.HTTPConnection] = []

    def connect(self, count: int) -> None:
        for _ in range(count):
            connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)
            self.connections.append(self._stack.enter_context(closing(connection)))

    def ask(self) -> None:
        """Over each of them; those of a worker that is gone are dropped, unanswered."""
        for connection in self.connections.copy():
            try:
                connection.request("POST", PREDICT, PAIR_JSON)
                answer = connection.getresponse()
                answer.read()
            except ConnectionError:
                self.connections.remove(connection)
            else:
                assert answer.status == 200
                self.answered += 1

    def counted(self) -> list[tuple[float, float]]:
        """Requests and durations by /metrics, over each of the connections."""
        seen = []
        for connection in self.connections:
            connection.request("GET", "/metrics")
            seen.append(counts(connection.getresponse().read().decode()))
        return seen

    def wait_until_counted(self) -> None:
        """What the other worker has kept back is there within a second."""
        until_s = time.monotonic() + 30
        while any(seen != (self.answered,) * 2 for seen in self.counted()):
            assert time.monotonic() < until_s


def counts(metrics: str) -> tuple[float, float]:
    requests = re.search(r'hikyaku_requests_total{code="ok",model="binary"} (\S+)', metrics)
    durations = re.search(r'hikyaku_request_duration_seconds_count{model="binary"} (\S+)', metrics)
    assert requests
    assert durations
    return float(requests[1]), float(durations[1])


def test_nothing_that_was_counted_is_lost_with_a_worker(repository: Path) -> None:
    with served(repository, 60.0, "--workers", "2") as serving, ExitStack() as stack:
        callers = Callers(serving, stack)
        callers.connect(16)  # so many that both workers have some
        for _ in range(3):
            callers.ask()
        callers.wait_until_counted()

        first, second = serving.workers()
        os.kill(second, signal.SIGKILL)
        callers.ask()
        assert 0 < len(callers.connections) < 16
        while len(serving.workers()) < 2:
            callers.ask()
            assert set(callers.counted()) == {(callers.answered,) * 2}
        assert first in serving.workers()
        assert second not in serving.workers()

        callers.connect(16)  # some of them wait for the replacement
        callers.ask()
        callers.wait_until_counted()
        assert 'hikyaku_worker_replacements_total{reason="died"} 1.0' in serving.metrics()


def test_a_worker_that_still_starts_gets_no_connections(repository: Path) -> None:
    with started(repository, 60.0, "--workers", "2") as serving:
        while len(serving.workers()) < 2:
            time.sleep(0.01)
        os.kill(serving.workers()[1], signal.SIGSTOP)
        answers = [httpx.get(f"{serving.address}/v2/health/ready") for _ in range(12)]
        assert {answer.status_code for answer in answers} == {503}


def test_told_to_stop_each_worker_answers_what_is_under_way(repository: Path) -> None:
    with served(repository, 60.0, "--workers", "2") as serving, ExitStack() as stack:
        under_way = Callers(serving, stack)
        under_way.connect(12)
        for connection in under_way.connections:
            connection.putrequest("POST", PREDICT)
            connection.putheader("Request-Timeout-Ms", "30000")
            connection.putheader("Content-Length", str(len(PAIR_JSON)))
            connection.endheaders(PAIR_JSON[:10])
        later = Callers(serving, stack)
        later.connect(12)
        later.ask()  # who answers them has read the others

        serving.process.terminate()
        _wait_until_refused(serving)
        for connection in under_way.connections:
            connection.send(PAIR_JSON[10:])
        answers = [connection.getresponse().status for connection in under_way.connections]
        assert answers == [200] * 12
        assert serving.process.wait(30) == 0
