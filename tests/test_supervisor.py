"""A parent and its workers, as real processes."""

import json
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from app.listener import bind

pytestmark = pytest.mark.system

ROOT = Path(__file__).parent.parent
PATIENCE_S = 30
# Like process 1 of a container, it gets the orphans of what it has started.
PARENT = """
import ctypes, sys
from app.supervisor import supervise
ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
sys.exit(supervise([sys.executable, "-m", "tests.obedient_worker", sys.argv[1]]))
"""


@dataclass
class Parent:
    process: "subprocess.Popen[str]"
    port: int

    def connect(self) -> socket.socket:
        """Refused when nobody has the port."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_S)

    def tell(self, command: str) -> tuple[int, dict[str, int]]:
        """The worker that does it now, and why those before it were replaced; waits for one."""
        with self.connect() as connection:
            return tell(connection, command)

    def who(self) -> tuple[int, dict[str, int]]:
        return self.tell("who")

    def children(self) -> list[int]:
        pid = self.process.pid
        return [
            int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        ]

    def said(self, event: str) -> dict[str, Any]:
        """The next line of the log about this event."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if event in line:
                said: dict[str, Any] = json.loads(line)
                return said
        raise AssertionError(f"never said: {event}")

    def ended(self) -> int:
        return self.process.wait(PATIENCE_S)


def tell(connection: socket.socket, command: str) -> tuple[int, dict[str, int]]:
    connection.sendall(command.encode() + b"\n")
    answer = b""
    while not answer.endswith(b"\n"):
        data = connection.recv(4096)
        assert data, "the worker ended"
        answer += data
    worker, replaced = json.loads(answer)
    return worker, replaced


@contextmanager
def parent(
    at_start: str, *, workers: int = 1, stuck_s: float = 60.0, drain_s: float = 5.0
) -> Iterator[Parent]:
    with closing(bind("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    settings = {
        "PORT": str(port),
        "WORKERS": str(workers),
        "STUCK_S": str(stuck_s),
        "DRAIN_S": str(drain_s),
    }
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT, at_start],
        cwd=ROOT,
        env=settings,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield Parent(process, port)
        finally:
            process.kill()


@contextmanager
def serving(**settings: float) -> Iterator[Parent]:
    with parent("serve", **settings) as started:

        def answers() -> bool:
            try:
                return bool(started.who())
            except ConnectionRefusedError:
                return False

        wait_until(answers)
        yield started


@contextmanager
def two_starting(at_start: str) -> Iterator[Parent]:
    """The first is ready."""
    with parent(at_start, workers=2) as started:
        wait_until(lambda: len(started.children()) == 2)
        yield started


@contextmanager
def two_serving(at_start: str = "serve", **settings: float) -> Iterator[tuple[Parent, int, int]]:
    """The parent, and its workers in the order in which they began."""
    with parent(at_start, workers=2, **settings) as started:
        wait_until(lambda: len(started.children()) == 2)
        first, second = started.children()
        for worker in (first, second):
            reach(started, worker).close()
        yield started, first, second


def reach(started: Parent, worker: int) -> socket.socket:
    """A connection to this one of several workers, which the kernel chooses at random."""
    until_s = time.monotonic() + PATIENCE_S
    while True:
        assert time.monotonic() < until_s
        connection = started.connect()
        try:
            if tell(connection, "stay")[0] == worker:
                return connection
        except ConnectionResetError:
            pass  # the kernel gave it to one that was killed a moment ago
        connection.close()


def wait_until(true: Callable[[], bool]) -> None:
    until_s = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < until_s
        time.sleep(0.02)


def runs(process_id: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{process_id}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_worker_whose_loop_is_blocked_is_replaced_and_its_stack_is_logged() -> None:
    with serving(stuck_s=1.0) as started:
        first, _ = started.who()
        started.tell("block")
        second, replaced = started.who()  # waits in the backlog meanwhile
        assert second != first
        assert not runs(first)
        assert replaced == {"stuck": 1, "died": 0}
        said = started.said("stuck")
        assert (said["pid"], said["ended_by"]) == (first, "SIGKILL")
        assert "in stand_still" in said["stack"]


def test_a_worker_that_is_stopped_is_replaced_though_it_cannot_tell_its_stack() -> None:
    with serving(stuck_s=1.0) as started:
        first, _ = started.who()
        subprocess.run(["kill", "-STOP", str(first)], check=True)
        second, replaced = started.who()
        assert second != first
        assert replaced == {"stuck": 1, "died": 0}
        assert started.said("stuck")["stack"] == ""


def test_without_patience_a_blocked_worker_stays() -> None:
    with serving(stuck_s=0) as started:
        first, _ = started.who()
        started.tell("block")
        with started.connect() as connection:
            connection.settimeout(3)
            with pytest.raises(TimeoutError):
                tell(connection, "who")
        assert started.children() == [first]


def test_a_worker_that_crashes_is_replaced_and_its_stack_is_logged() -> None:
    with serving() as started:
        first, _ = started.who()
        started.tell("crash")
        said = started.said("died")
        assert (said["pid"], said["ended_by"]) == (first, "SIGSEGV")
        assert "in obey" in said["stack"]
        second, replaced = started.who()
        assert second != first
        assert replaced == {"stuck": 0, "died": 1}


def test_the_port_is_never_refused_while_workers_are_killed() -> None:
    with serving() as started:
        workers = [started.who()[0]]
        for _ in range(3):
            subprocess.run(["kill", "-KILL", str(workers[-1])], check=True)
            with started.connect() as one, started.connect() as another:
                answered = {tell(one, "who")[0], tell(another, "who")[0]}
            assert len(answered) == 1
            workers += answered
        assert len(set(workers)) == 4


def test_without_room_for_another_worker_the_parent_tries_until_there_is() -> None:
    with serving() as started:
        subprocess.run(["kill", "-KILL", str(started.who()[0])], check=True)
        second, _ = started.who()  # the parent holds the listener from now on
        few, most = resource.prlimit(started.process.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(started.process.pid, resource.RLIMIT_NOFILE, (0, most))
        subprocess.run(["kill", "-KILL", str(second)], check=True)
        pauses = [started.said("no worker can be started")["pause_s"] for _ in range(2)]
        assert 0 < pauses[0] < pauses[1]
        resource.prlimit(started.process.pid, resource.RLIMIT_NOFILE, (few, most))
        third, replaced = started.who()
        assert third != second
        assert replaced == {"stuck": 0, "died": 2}


def test_told_to_stop_without_room_for_a_worker_the_parent_ends() -> None:
    with serving() as started:
        first, _ = started.who()
        resource.prlimit(started.process.pid, resource.RLIMIT_NOFILE, (0, 4096))
        subprocess.run(["kill", "-KILL", str(first)], check=True)
        started.said("no worker can be started")
        started.process.terminate()
        assert started.ended() == 0


def test_a_worker_that_ends_at_its_start_is_not_replaced() -> None:
    with parent("ends") as started:
        _, said = started.process.communicate(timeout=PATIENCE_S)
        assert started.process.returncode == 3
        assert said == "there is no model\n"


def test_workers_that_are_killed_at_their_start_again_and_again_end_the_parent() -> None:
    with parent("killed") as started:
        assert started.said("no worker became ready")["starts"] == 5
        assert started.ended() == 128 + signal.SIGKILL


@pytest.mark.parametrize("told", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop_it_ends_when_its_worker_has(told: signal.Signals) -> None:
    with serving() as started:
        worker, _ = started.who()
        started.process.send_signal(told)
        assert started.ended() == 0
        assert not runs(worker)
        assert _refused(started)


def test_told_twice_it_kills_a_worker_that_does_not_end() -> None:
    with serving(drain_s=3600) as started:
        worker, _ = started.who()
        started.tell("defy")
        started.process.terminate()
        wait_until(lambda: _refused(started))  # the first one has come
        assert runs(worker)
        started.process.terminate()
        assert started.ended() == 128 + signal.SIGKILL
        assert not runs(worker)


def test_a_worker_that_has_not_ended_when_its_time_to_drain_is_over_is_killed() -> None:
    with serving(drain_s=0, stuck_s=0) as started:
        worker, _ = started.who()
        started.tell("block")
        started.process.terminate()
        assert started.ended() == 128 + signal.SIGKILL
        assert not runs(worker)


@pytest.mark.parametrize("state", ["serve", "block"])
def test_a_parent_that_is_killed_leaves_nobody_behind(state: str) -> None:
    with serving() as started:
        worker, _ = started.who()
        started.tell(state)
        started.process.kill()
        wait_until(lambda: not runs(worker))
        wait_until(lambda: _refused(started))


def test_the_orphans_of_others_are_reaped() -> None:
    with serving() as started:
        worker, _ = started.who()
        started.tell("orphan")
        wait_until(lambda: len(started.children()) == 2)
        wait_until(lambda: started.children() == [worker])


class TestSeveralWorkers:
    def test_one_that_is_killed_is_replaced_alone(self) -> None:
        with two_serving() as (started, first, second), reach(started, first) as kept:
            subprocess.run(["kill", "-KILL", str(second)], check=True)
            assert started.said("died")["worker"] == 2
            assert tell(kept, "stay") == (first, {"stuck": 0, "died": 0})
            wait_until(lambda: len(started.children()) == 2)
            (third,) = set(started.children()) - {first}
            with reach(started, third) as replacement:
                assert tell(replacement, "stay") == (third, {"stuck": 0, "died": 1})
            assert tell(kept, "stay")[0] == first

    def test_one_that_is_stuck_is_replaced_alone(self) -> None:
        with two_serving(stuck_s=1.0) as (started, first, second), reach(started, first) as kept:
            with reach(started, second) as blocked:
                tell(blocked, "block")
            said = started.said("stuck")
            assert (said["worker"], said["pid"], said["ended_by"]) == (2, second, "SIGKILL")
            assert tell(kept, "stay")[0] == first
            # Who connects to its socket meanwhile waits for the next one.
            answered = {started.who()[0] for _ in range(12)}
            assert first in answered
            assert len(answered) == 2
            assert second not in answered

    def test_told_to_stop_all_of_them_end(self) -> None:
        with two_serving() as (started, first, second):
            started.process.terminate()
            assert started.ended() == 0
            assert not runs(first)
            assert not runs(second)
            assert _refused(started)

    def test_told_to_stop_before_all_are_ready_it_has_not_failed(self) -> None:
        with two_starting("second blocks") as started:
            started.process.terminate()
            assert started.ended() == 0

    def test_one_that_ends_at_its_first_start_ends_the_service(self) -> None:
        with parent("second ends", workers=2) as started:
            _, said = started.process.communicate(timeout=PATIENCE_S)
            assert started.process.returncode == 3
            assert said == "there is no model\n"

    def test_while_another_serves_one_that_cannot_be_replaced_is_tried_again(self) -> None:
        with two_serving("second ends once replaced") as (started, first, second):
            with reach(started, first) as kept:
                subprocess.run(["kill", "-KILL", str(second)], check=True)
                ended_by = [started.said("died")["ended_by"] for _ in range(3)]
                assert ended_by == ["SIGKILL", 3, 3]
                assert tell(kept, "stay")[0] == first
            started.process.terminate()
            assert started.ended() == 0

    def test_those_that_are_stuck_together_are_replaced_together(self) -> None:
        with serving(workers=4, stuck_s=1.0) as started:
            wait_until(lambda: len(started.children()) == 4)
            workers = started.children()
            for worker in workers:
                reach(started, worker).close()
            subprocess.run(["kill", "-STOP", *map(str, workers)], check=True)
            told_s = []
            for _ in workers:
                said = started.said("stuck")
                assert said["pid"] in workers
                told_s.append(time.monotonic())
            # One by one they would take a second each to say nothing.
            assert told_s[-1] - told_s[0] < 2

    def test_only_who_serves_gets_connections_while_the_others_start(self) -> None:
        with two_starting("second blocks") as started:
            first, _ = started.children()
            assert {started.who()[0] for _ in range(12)} == {first}

    def test_one_that_cannot_be_replaced_gets_no_connections(self) -> None:
        with two_serving("second ends once replaced") as (started, first, second):
            subprocess.run(["kill", "-KILL", str(second)], check=True)
            for _ in range(3):  # the first is replaced at once, and the next pauses for the first
                started.said("died")
            assert {started.who()[0] for _ in range(12)} == {first}

    def test_one_that_is_replaced_after_a_pause_gets_connections_again(self) -> None:
        with two_serving() as (started, first, worker):
            replaced = {"stuck": 0, "died": 0}
            while replaced["died"] < 3:
                subprocess.run(["kill", "-KILL", str(worker)], check=True)
                replaced["died"] += 1
                wait_until(lambda gone=worker: not runs(gone))
                wait_until(lambda: len(started.children()) == 2)
                (worker,) = set(started.children()) - {first}
                with reach(started, worker) as replacement:
                    assert tell(replacement, "stay") == (worker, replaced)


def _refused(started: Parent) -> bool:
    try:
        started.connect().close()
    except ConnectionRefusedError:
        return True
    return False
