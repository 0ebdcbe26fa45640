"""Keeps workers serving: starts them, watches their heartbeats, replaces who is stuck or dead.

It imports next to nothing: it stays beside the workers, and none is started before it.
"""

import json
import logging
import os
import signal
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from typing import Literal, NamedTuple, Self, TypeAlias

from app.heartbeat import Board, Heartbeat, Vigil
from app.listener import another
from app.telemetry.logs import configure_logging

log = logging.getLogger(__name__)

Reason: TypeAlias = Literal["stuck", "died"]

_STOP = {signal.SIGTERM, signal.SIGINT}
_SIGNALS = _STOP | {signal.SIGCHLD}
_LOOK_EVERY_S = 1.0
_LOOK_OFTEN_EVERY_S = 0.05
_MOST_LISTENERS = 128
_STACK_WITHIN_S = 1.0
_STACK_PIECES_APART_S = 0.1
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
    place: int
    """Which worker it is, counted from 0."""
    line: int
    """A stream socket to the parent."""
    board: int
    """All workers' heartbeats."""
    tallies: int
    """All workers' metrics."""
    listener: int | None
    """None for the first worker, which knows the settings: it binds the address for all."""
    replaced: Mapping[Reason, int]
    """Workers before this one in its place, by why they were replaced."""

    def as_json(self) -> str:
        return json.dumps(self._asdict())

    @classmethod
    def from_json(cls, text: str) -> Self:
        return cls(**json.loads(text))


class Terms(NamedTuple):
    """What a worker tells its parent of the settings, in one line."""

    workers: int
    stuck_s: float
    drain_s: float
    log_level: str

    def as_line(self) -> bytes:
        return json.dumps(self._asdict()).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> Self:
        return cls(**json.loads(line))


def supervise(command: Sequence[str]) -> int:
    """Run `command` with an `Assignment` as its last argument, HIKYAKU_WORKERS times once the first
    of them is ready, and replace each while we are not told to stop. Returns the exit status of
    this process.

    The listening sockets that the first worker binds stay open here: while a worker is replaced,
    who connects to it waits for the next one. Where that one is started after a pause only, and
    others serve, its socket is closed: new connections go to the others.

    - A worker that ends by itself before it is ready is not replaced: it has told the operator why,
      the others are told to stop, and its exit status is ours. One that is killed before it is
      ready is, four times in a row. Only in a place where one has served before, and while others
      serve, it is tried on.
    - One that cannot be started, for want of memory, processes or descriptors, is tried again after
      a pause, but not the first one of a place; the very first raises `OSError`.
    - One that ends later is replaced, at once after a long life, else after a growing pause.
    - One whose loop has not beaten for HIKYAKU_STUCK_S is killed and replaced; its stack is logged.
    - SIGTERM or SIGINT lets all answer what is under way, for HIKYAKU_DRAIN_S; a second one kills.

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
        self._board = Board.create()
        # The workers know how much they need.
        self._tallies = os.memfd_create("tallies")
        self._terms = Terms(workers=1, stuck_s=0.0, drain_s=0.0, log_level="INFO")  # until told
        configure_logging(self._terms.log_level)
        self._places = [_Place(0)]
        self._stopping = False
        self._kill_at_s = float("inf")
        self._exit_status = 0

    def run(self) -> int:
        while True:
            for place in self._places:
                if self._lacks(place):
                    self._fill(place)
            if self._stopping and not any(place.worker for place in self._places):
                return self._exit_status
            received = _next_signal(self._look_within_s())
            if received in _STOP:
                self._told_to_stop()
            ended = _reaped()
            for place in tuple(self._places):
                if place.worker is not None:
                    self._look_at(place, place.worker, ended)
            if time.monotonic() > self._kill_at_s:
                self._send_all(signal.SIGKILL)

    def _look_within_s(self) -> float:
        within_s = _LOOK_OFTEN_EVERY_S if self._awaits_news() else _LOOK_EVERY_S
        due_s = [
            place.start_at_s - time.monotonic() for place in self._places if self._lacks(place)
        ]
        return max(0.0, min([within_s, *due_s]))

    def _awaits_news(self) -> bool:
        """Whether a worker is about to tell something, of which no signal tells us."""
        workers = [place.worker for place in self._places if place.worker is not None]
        asked = any(worker.reason == "stuck" for worker in workers)
        return asked or not self._places[0].has_served

    def _lacks(self, place: "_Place") -> bool:
        """Whether a worker is to be started there, once its pause is over."""
        if self._stopping or place.worker is not None:
            return False
        # What stops the start is told once, by the first.
        return place.number == 0 or self._places[0].has_served

    def _fill(self, place: "_Place") -> None:
        if time.monotonic() >= place.start_at_s:
            self._start(place)
        elif place.listener is not None and self._others_serve(place):
            place.listener.close()
            place.listener = None

    def _others_serve(self, place: "_Place") -> bool:
        return any(other.serves for other in self._places if other is not place)

    def _start(self, place: "_Place") -> None:
        try:
            if place.listener is None:
                place.listener = self._another_listener()
            place.worker = _Worker(self._command, place, self._board, self._tallies)
            place.vigil = Vigil(_LOOK_EVERY_S, time.monotonic())
        except OSError as exc:
            if place.is_new and place.number == 0:
                raise
            place.pause(lived_s=0.0)
            log.error(
                "no worker can be started",
                extra=place.named() | {"error": str(exc), "pause_s": place.pause_s},
            )
            if place.is_new:
                self._end(1)

    def _another_listener(self) -> socket.socket | None:
        """None before the first worker has bound the address."""
        bound = [place.listener for place in self._places if place.listener is not None]
        return another(bound[0]) if bound else None

    def _look_at(self, place: "_Place", worker: "_Worker", ended: Mapping[int, int]) -> None:
        self._listen_to(worker)
        place.has_served |= worker.was_ready
        status = ended.get(worker.process_id)
        if status is not None:
            self._ended(place, worker, status)
            return
        if worker.reason == "stuck":
            if worker.has_told_stack():
                worker.send(signal.SIGKILL)
            return
        stuck = place.vigil.is_stuck(worker.last_beat_s, self._terms.stuck_s, time.monotonic())
        if stuck and not self._stopping:
            worker.reason = "stuck"
            worker.ask_for_stack()

    def _ended(self, place: "_Place", worker: "_Worker", status: int) -> None:
        """`status`: its exit status, or less than 0 the signal that killed it."""
        place.worker = None
        with closing(worker):
            if self._stopping and not worker.was_ready and status != -signal.SIGKILL:
                return  # it had nothing under way, and no handler of the signal yet
            if self._stopping or self._is_last(place, worker, status):
                self._end(status if status >= 0 else 128 - status)  # as a shell would tell it
                return
            place.replaced[worker.reason] += 1
            place.pause(worker.age_s())
            _report(place, worker, status)

    def _is_last(self, place: "_Place", worker: "_Worker", status: int) -> bool:
        """Whether another one would fare no better, and nobody serves without it."""
        if worker.was_ready:
            place.killed_starts = 0
            return False
        if place.has_served and self._others_serve(place):
            return False
        if status >= 0:
            return True
        place.killed_starts += 1
        if place.killed_starts < _KILLED_STARTS:
            return False
        log.error("no worker became ready", extra=place.named() | {"starts": place.killed_starts})
        return True

    def _told_to_stop(self) -> None:
        if self._stopping:
            self._send_all(signal.SIGKILL)
        else:
            self._end(0)

    def _end(self, exit_status: int) -> None:
        """Have the workers end. Once they have closed their listeners, too, new connections are
        refused."""
        self._exit_status = self._exit_status or exit_status
        if self._stopping:
            return
        self._stopping = True
        self._kill_at_s = time.monotonic() + self._terms.drain_s + _CLOSE_WITHIN_S
        self._close_listeners()
        self._send_all(signal.SIGTERM)

    def _send_all(self, number: signal.Signals) -> None:
        for place in self._places:
            if place.worker is not None:
                place.worker.send(number)

    def _listen_to(self, worker: "_Worker") -> None:
        worker.listen()
        if worker.terms is not None and worker.terms != self._terms:
            self._terms = worker.terms
            configure_logging(self._terms.log_level)
        if worker.listeners:
            self._places += [_Place(number) for number in range(1, len(worker.listeners))]
            for place, listener in zip(self._places, worker.take_listeners(), strict=True):
                place.listener = listener
        if self._stopping:
            self._close_listeners()

    def _close_listeners(self) -> None:
        for place in self._places:
            if place.listener is not None:
                place.listener.close()
                place.listener = None


class _Place:
    """One of the workers that there should be, whichever process it is just now."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.listener: socket.socket | None = None
        self.worker: _Worker | None = None
        self.vigil = Vigil(_LOOK_EVERY_S, time.monotonic())
        self.replaced: dict[Reason, int] = {"stuck": 0, "died": 0}
        self.has_served = False
        self.killed_starts = 0
        self.pause_s = 0.0
        self.start_at_s = 0.0
        self._pauses = _Pauses()

    @property
    def is_new(self) -> bool:
        return not any(self.replaced.values())

    @property
    def serves(self) -> bool:
        return self.worker is not None and self.worker.was_ready

    def pause(self, lived_s: float) -> None:
        """Before the next one is started."""
        self.pause_s = self._pauses.after(lived_s)
        self.start_at_s = time.monotonic() + self.pause_s

    def named(self) -> dict[str, object]:
        """For the log."""
        return {"worker": self.number + 1}


class _Worker:
    """One process, from its start until its end is told by `_reaped`. Raises `OSError`."""

    def __init__(self, command: Sequence[str], place: _Place, board: Board, tallies: int) -> None:
        self.terms: Terms | None = None
        """What it told, once it has."""
        self.listeners: list[socket.socket] = []
        """Those that it has bound, until they are taken."""
        self.said = b""
        """Its stack, when it was asked for it or crashed."""
        self.reason: Reason = "died"
        """Why it will have ended."""
        self._asked_s = self._heard_s = time.monotonic()
        """When it was asked for its stack, and when something came from it last."""
        self._heartbeat: Heartbeat = board.heartbeat(place.number)
        self._heartbeat.forget()
        self._line, theirs = socket.socketpair()
        with closing(theirs), ExitStack() as on_failure:
            on_failure.callback(self._line.close)
            self._line.setblocking(False)
            listener = None if place.listener is None else place.listener.fileno()
            assignment = Assignment(
                parent=os.getpid(),
                place=place.number,
                line=theirs.fileno(),
                board=board.descriptor,
                tallies=tallies,
                listener=listener,
                replaced=place.replaced,
            )
            given = [assignment.line, board.descriptor, tallies]
            self._started_s = time.monotonic()
            with _inheritable(given if listener is None else [*given, listener]):
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

    def take_listeners(self) -> list[socket.socket]:
        """One for each place, once."""
        listeners, self.listeners = self.listeners, []
        return listeners

    def listen(self) -> None:
        """Take in what has come from it."""
        while True:
            try:
                data, descriptors, _, _ = socket.recv_fds(self._line, 65536, _MOST_LISTENERS)
            except (BlockingIOError, ConnectionResetError):
                return
            for descriptor in descriptors:
                os.set_inheritable(descriptor, False)  # what arrives is
                self.listeners.append(socket.socket(fileno=descriptor))
            if not data:
                return
            self._heard_s = time.monotonic()
            self.said += data
            if self.terms is None and b"\n" in self.said:
                line, _, self.said = self.said.partition(b"\n")
                self.terms = Terms.from_line(line)

    def ask_for_stack(self) -> None:
        """Have it tell what its threads do; `said` holds that once it `has_told_stack`."""
        self._asked_s = time.monotonic()
        self.send(signal.SIGUSR1)

    def has_told_stack(self) -> bool:
        """Or will not any more: one that is stopped tells nothing."""
        now_s = time.monotonic()
        # It comes in pieces, without an end.
        is_whole = self._heard_s > self._asked_s and now_s - self._heard_s > _STACK_PIECES_APART_S
        return is_whole or now_s - self._asked_s > _STACK_WITHIN_S

    def close(self) -> None:
        self._line.close()


class _Pauses:
    """Before a worker is replaced: none after a long life, else each twice as long as the last."""

    def __init__(self) -> None:
        self._next_s = 0.0

    def after(self, lived_s: float) -> float:
        pause_s = 0.0 if lived_s >= _LONG_LIFE_S else self._next_s
        self._next_s = min(max(_FIRST_PAUSE_S, 2 * pause_s), _LONGEST_PAUSE_S)
        return pause_s


def _report(place: _Place, worker: _Worker, status: int) -> None:
    died = worker.reason == "died"
    log.error(
        "the worker died and is replaced" if died else "the worker is stuck: replaced",
        extra=place.named()
        | {
            "pid": worker.process_id,
            "ended_by": signal.Signals(-status).name if status < 0 else status,
            "lived_s": round(worker.age_s(), 1),
            "pause_s": place.pause_s,
            "stack": worker.said.decode(errors="replace"),
        },
    )


@contextmanager
def _inheritable(descriptors: Sequence[int]) -> Iterator[None]:
    """Only meanwhile: a listener that another worker held, too, would outlive its own worker."""
    for descriptor in descriptors:
        os.set_inheritable(descriptor, True)
    try:
        yield
    finally:
        for descriptor in descriptors:
            os.set_inheritable(descriptor, False)


def _next_signal(within_s: float) -> int | None:
    received = signal.sigtimedwait(_SIGNALS, within_s)
    return None if received is None else received.si_signo


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
