"""Takes a running service through recorded time: pushes features, moves its clock, asks, tells the
truth."""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from app.evaluation.request_log import RequestLog, as_datetime
from app.evaluation.service_client import Answer, Label, ServiceClient

MAX_SPEED = float("inf")
_CLOCK_EVERY_S = 1.0
_SAY_EVERY_S = 10.0
_LABELS_AT_ONCE = 1_000


class Pushes(Protocol):
    """app/evaluation/pushes.py, which takes Feast to import."""

    def push_until(self, until_us: int) -> None:
        """Write what became known since the last call."""
        ...


@dataclass
class Replayed:
    """What came of it. `answers` are those to the log's requests, in their order; `told` says for
    each request what became of its label, None where none was sent."""

    answers: list[Answer] = field(default_factory=list)
    told: list[str | None] = field(default_factory=list)
    retried: int = 0
    took_s: float = 0.0

    def statuses(self) -> Mapping[str, int]:
        return Counter(status for status in self.told if status is not None)


def drive(
    log: RequestLog,
    pushes: Pushes,
    client: ServiceClient,
    *,
    start_us: int,
    until_us: int,
    speed: float = MAX_SPEED,
    with_labels: bool = False,
    watch: Callable[[int, Replayed], None] | None = None,
) -> Replayed:
    """Every event of `[start_us, until_us]` in the order in which it happened, and at each instant:
    what became known is pushed, the clock moves, requests are asked, truths are told.

    At the end the clock stands at `until_us`; a truth that is known later is not told. `speed` is
    seconds of the clock a second. `watch` is told of each instant when all of it has happened; by
    default it prints a line now and then.
    """
    replayed = Replayed(told=[None] * len(log))
    pace = _Pace(client, start_us, speed)
    truths = _Truths(log, until_us if with_labels else -1)
    told = watch or progress()
    started_s = time.monotonic()
    asked = 0
    for at_us in np.unique([start_us, *log.asked_us, *truths.instants_us, until_us]).tolist():
        until = int(log.asked_us.searchsorted(at_us, side="right"))
        pace.reach(at_us)
        if until > asked:
            pushes.push_until(at_us)
        client.advance_clock(as_datetime(at_us).isoformat())
        replayed.answers += client.predict(log.instances[asked:until])
        asked = until
        rows = truths.known_at(at_us)
        for first in range(0, len(rows), _LABELS_AT_ONCE):
            _tell(client, log, replayed, rows[first : first + _LABELS_AT_ONCE])
        told(at_us, replayed)
    replayed.took_s = time.monotonic() - started_s
    replayed.retried = client.retried
    return replayed


def progress() -> Callable[[int, Replayed], None]:
    """Prints a line now and then."""
    started_s = said_s = time.monotonic()

    def say(at_us: int, replayed: Replayed) -> None:
        nonlocal said_s
        now_s = time.monotonic()
        if now_s - said_s < _SAY_EVERY_S:
            return
        said_s = now_s
        asked, requests = len(replayed.answers), len(replayed.told)
        labels = requests - replayed.told.count(None)
        print(
            f"  {asked / requests:4.0%} {as_datetime(at_us):%Y-%m-%d %H:%M} UTC  {asked:,} asked, "
            f"{labels:,} labels  {now_s - started_s:.0f} s",
            flush=True,
        )

    return say


def _tell(client: ServiceClient, log: RequestLog, replayed: Replayed, rows: Sequence[int]) -> None:
    labels = [Label(replayed.answers[row].request_id, log.truth[row]) for row in rows]
    for row, status in zip(rows, client.tell(labels), strict=True):
        replayed.told[row] = status


class _Truths:
    """Rows by the instant at which their truth is known, of those known by an instant."""

    def __init__(self, log: RequestLog, until_us: int) -> None:
        known_us = log.known_us
        due = np.flatnonzero((known_us >= 0) & (known_us <= until_us))
        self._rows = due[np.argsort(known_us[due], kind="stable")]
        self.instants_us: NDArray[np.int64] = known_us[self._rows]

    def known_at(self, at_us: int) -> Sequence[int]:
        """Every instant is asked for once."""
        first, end = (self.instants_us.searchsorted(at_us, side=side) for side in ("left", "right"))
        rows: Sequence[int] = self._rows[first:end].tolist()
        return rows


class _Pace:
    """Waits until an instant is due, moving the service's clock along meanwhile."""

    def __init__(self, client: ServiceClient, start_us: int, speed: float) -> None:
        self._client = client
        self._start_us = start_us
        self._speed = speed
        self._started_s = time.monotonic()

    def reach(self, at_us: int) -> None:
        while True:
            elapsed_s = time.monotonic() - self._started_s
            left_s = (at_us - self._start_us) / 1e6 / self._speed - elapsed_s
            if left_s <= _CLOCK_EVERY_S:
                time.sleep(max(0.0, left_s))
                return
            time.sleep(_CLOCK_EVERY_S)
            passed_us = round((time.monotonic() - self._started_s) * self._speed * 1e6)
            now_us = min(self._start_us + passed_us, at_us)
            self._client.advance_clock(as_datetime(now_us).isoformat())
