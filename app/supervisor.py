"""Keeps one worker serving: starts it, watches its heartbeat, replaces it when stuck or dead.

It imports next to nothing: it stays beside every worker, and a worker is started only after it.
"""

import json
import logging
import os
import select
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from typing import Literal, NamedTuple, Self, TypeAlias

from app.heartbeat import Heartbeat, Vigil
from app.telemetry.logs import configure_logging

log = logging.getLogger(__name__)

Reason: TypeAlias = Literal["stuck", "died"]

_STOP = {signal.SIGTERM, signal.SIGINT}
_SIGNALS = _STOP | {signal.SIGCHLD}
_LOOK_EVERY_S = 1.0
_STACK_WITHIN_S = 1.0
# Beyond HIKYAKU_DRAIN_S, for the models to be closed; compose and Kubernetes wait a little longer.
_CLOSE_WITHIN_S = 3.0
_KILLED_STARTS = 5
_LONG_LIFE_S = 60.0
_FIRST_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 10.0


class Assignment(NamedTuple):
    """What a worker gets from its parent, as its argument; the numbers are open descriptors."""

    parent: int
    """Process id."""
    line: int
    """A stream socket to the parent."""
    heartbeat: int
    listener: int | None
    """None for the first worker, which knows the settings: it binds the address itself."""
    replaced: Mapping[Reason, int]
    """Workers before this one, by why they were replaced."""

    def as_json(self) -> str:
        return json.dumps(self._asdict())

    @classmethod
    def from_json(cls, text: str) -> Self:
        return cls(**json.loads(text))


class Terms(NamedTuple):
    """What a worker tells its parent of the settings, in one line."""

    stuck_s: float
    drain_s: float
    log_level: str

    def as_line(self) -> bytes:
        return json.dumps(self._asdict()).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> Self:
        return cls(**json.loads(line))


def supervise(command: Sequence[str]) -> int:
    """Run `command` with an `Assignment` as its last argument, and replace it while we are not told
    to stop. Returns the exit status of this process.

    The listening socket that the first worker binds stays open here: while a worker is replaced,
    who connects waits for the next one.

    - A worker that ends by itself before it is ready is not replaced: it has told the operator why,
      and its exit status is ours. One that is killed before it is ready is, four times in a row.
    - One that cannot be started, for want of memory, processes or descriptors, is tried again after
      a pause; the first one raises `OSError`.
    - One that ends later is replaced, at once after a long life, else after a growing pause.
    - One whose loop has not beaten for HIKYAKU_STUCK_S is killed and replaced; its stack is logged.
    - SIGTERM or SIGINT lets it answer what is under way, for HIKYAKU_DRAIN_S; a second one kills.

    Signals stay blocked in the calling thread, and every child of the process is reaped: nothing
    else may run in it.
    """
    # Who starts us may ignore it; then the kernel would reap our children itself.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    return _Supervisor(command).run()


class _Supervisor:
    def __init__(self, command: Sequence[str]) -> None:
        self._command = command
        self._listener: socket.socket | None = None
        self._terms = Terms(stuck_s=0.0, drain_s=0.0, log_level="INFO")  # until we are told
        configure_logging(self._terms.log_level)
        self._replaced: dict[Reason, int] = {"stuck": 0, "died": 0}
        self._pauses = _Pauses()
        self._killed_starts = 0
        self._stopping = False

    def run(self) -> int:
        while True:
            worker = self._started()
            if worker is None:
                return 0
            with closing(worker):
                reason, status = self._until_ended(worker)
                if self._stopping or self._is_last(worker, status):
                    return _exit_status(status)
                self._replaced[reason] += 1
                pause_s = self._pauses.after(worker.age_s())
                _report(worker, reason, status, pause_s)
            if _told_to_stop_within(pause_s):
                return 0

    def _started(self) -> "_Worker | None":
        """None when told to stop before one could be started."""
        while True:
            try:
                return _Worker(self._command, self._listener, self._replaced)
            except OSError as exc:
                if not any(self._replaced.values()):
                    raise
                pause_s = self._pauses.after(lived_s=0.0)
                log.error("no worker can be started", extra={"error": str(exc), "pause_s": pause_s})
            if _told_to_stop_within(pause_s):
                return None

    def _is_last(self, worker: "_Worker", status: int) -> bool:
        """Whether another one would fare no better."""
        if worker.was_ready:
            self._killed_starts = 0
            return False
        if status >= 0:
            return True
        self._killed_starts += 1
        if self._killed_starts < _KILLED_STARTS:
            return False
        log.error("no worker became ready", extra={"starts": self._killed_starts})
        return True

    def _until_ended(self, worker: "_Worker") -> tuple[Reason, int]:
        """Why it ended, and how: its exit status, or less than 0 the signal that killed it."""
        vigil = Vigil(_LOOK_EVERY_S, time.monotonic())
        kill_at_s = float("inf")
        reason: Reason = "died"
        while True:
            received = _next_signal(_LOOK_EVERY_S)
            status = _reaped().get(worker.process_id)
            self._listen_to(worker)
            if status is not None:
                self._stopping |= received in _STOP
                return reason, status
            now_s = time.monotonic()
            stuck = vigil.is_stuck(worker.last_beat_s, self._terms.stuck_s, now_s)
            if received in _STOP and not self._stopping:
                self._stop(worker)
                kill_at_s = now_s + self._terms.drain_s + _CLOSE_WITHIN_S
            elif received in _STOP or now_s > kill_at_s:
                worker.send(signal.SIGKILL)
            elif stuck and not self._stopping and reason != "stuck":
                reason = "stuck"
                worker.ask_for_stack()
                worker.send(signal.SIGKILL)

    def _stop(self, worker: "_Worker") -> None:
        """Once the worker has closed its own, too, new connections are refused."""
        self._stopping = True
        self._close_listener()
        worker.send(signal.SIGTERM)

    def _listen_to(self, worker: "_Worker") -> None:
        worker.listen()
        if worker.terms is not None and worker.terms != self._terms:
            self._terms = worker.terms
            configure_logging(self._terms.log_level)
        if self._listener is None:
            self._listener = worker.take_listener()
        if self._stopping:
            self._close_listener()

    def _close_listener(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None


class _Worker:
    """One process, from its start until its end is told by `_reaped`. Raises `OSError`."""

    def __init__(
        self,
        command: Sequence[str],
        listener: socket.socket | None,
        replaced: Mapping[Reason, int],
    ) -> None:
        self.terms: Terms | None = None
        """What it told, once it has."""
        self.said = b""
        """Its stack, when it was asked for it or crashed."""
        self._listener: socket.socket | None = None
        self._line, theirs = socket.socketpair()
        with ExitStack() as in_any_case, ExitStack() as on_failure:
            in_any_case.callback(theirs.close)
            on_failure.callback(self._line.close)
            self._line.setblocking(False)
            self._heartbeat = Heartbeat.create()
            in_any_case.callback(os.close, self._heartbeat.descriptor)
            on_failure.callback(self._heartbeat.close)
            given = [theirs.fileno(), self._heartbeat.descriptor]
            if listener is not None:
                given.append(listener.fileno())
            assignment = Assignment(
                parent=os.getpid(),
                line=theirs.fileno(),
                heartbeat=self._heartbeat.descriptor,
                listener=None if listener is None else listener.fileno(),
                replaced=replaced,
            )
            for descriptor in given:
                os.set_inheritable(descriptor, True)
            self._started_s = time.monotonic()
            # A group of its own: a Ctrl-C in the terminal is for us, who pass it on in order.
            self.process_id = os.posix_spawn(
                command[0],
                [*command, assignment.as_json()],
                os.environ,
                setpgroup=0,
                setsigmask=(),
            )
            on_failure.pop_all()

    @property
    def last_beat_s(self) -> float | None:
        return self._heartbeat.last_s

    @property
    def was_ready(self) -> bool:
        """It beats from then on."""
        return self._heartbeat.last_s is not None

    def age_s(self) -> float:
        return time.monotonic() - self._started_s

    def send(self, number: signal.Signals) -> None:
        os.kill(self.process_id, number)

    def take_listener(self) -> socket.socket | None:
        """The socket that it has bound, once."""
        listener, self._listener = self._listener, None
        return listener

    def listen(self) -> bool:
        """Take in what has come from it; whether there was anything."""
        heard = False
        while True:
            try:
                data, descriptors, _, _ = socket.recv_fds(self._line, 65536, 1)
            except (BlockingIOError, ConnectionResetError):
                return heard
            for descriptor in descriptors:
                self._listener = socket.socket(fileno=descriptor)
            if not data:
                return heard
            heard = True
            self.said += data
            if self.terms is None and b"\n" in self.said:
                line, _, self.said = self.said.partition(b"\n")
                self.terms = Terms.from_line(line)

    def ask_for_stack(self) -> None:
        """Have `said` hold what its threads do; nothing within a second when it is stopped."""
        self.send(signal.SIGUSR1)
        until_s = time.monotonic() + _STACK_WITHIN_S
        within_s = _STACK_WITHIN_S
        while select.select([self._line], [], [], max(0.0, within_s))[0] and self.listen():
            # It comes in pieces, without an end.
            within_s = min(0.1, until_s - time.monotonic())

    def close(self) -> None:
        self._line.close()
        self._heartbeat.close()


class _Pauses:
    """Before a worker is replaced: none after a long life, else each twice as long as the last."""

    def __init__(self) -> None:
        self._next_s = 0.0

    def after(self, lived_s: float) -> float:
        pause_s = 0.0 if lived_s >= _LONG_LIFE_S else self._next_s
        self._next_s = min(max(_FIRST_PAUSE_S, 2 * pause_s), _LONGEST_PAUSE_S)
        return pause_s


def _report(worker: _Worker, reason: Reason, status: int, pause_s: float) -> None:
    log.error(
        "the worker died and is replaced" if reason == "died" else "the worker is stuck: replaced",
        extra={
            "worker": worker.process_id,
            "ended_by": signal.Signals(-status).name if status < 0 else status,
            "lived_s": round(worker.age_s(), 1),
            "pause_s": pause_s,
            "stack": worker.said.decode(errors="replace"),
        },
    )


def _next_signal(within_s: float) -> int | None:
    received = signal.sigtimedwait(_SIGNALS, within_s)
    return None if received is None else received.si_signo


def _told_to_stop_within(duration_s: float) -> bool:
    until_s = time.monotonic() + duration_s
    while (left_s := until_s - time.monotonic()) > 0:
        if _next_signal(left_s) in _STOP:
            return True
        _reaped()
    return False


def _reaped() -> dict[int, int]:
    """Every child that has ended: its exit status, or less than 0 the signal that killed it. In a
    container we are process 1, to which the orphans of others come."""
    ended: dict[int, int] = {}
    while True:
        try:
            process_id, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if process_id == 0:
            return ended
        ended[process_id] = os.waitstatus_to_exitcode(status)


def _exit_status(status: int) -> int:
    """As a shell would tell it."""
    return status if status >= 0 else 128 - status
