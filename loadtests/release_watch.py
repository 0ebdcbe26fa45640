"""Reads every change of a release state, and holds the version of each answer against it."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
import redis
import redis.asyncio

from app.canary.exposures import lots_of
from app.canary.first_seen import MARKS
from app.release.documents import decode_state
from app.release.state import ReleaseState, Rollout, StateUnavailable
from app.routing_key import Lots

_LOOK_EVERY_S = 0.01
_ANSWER_S = 0.5
_SHOWN = 5


class Seen(NamedTuple):
    """A state, between what instants it came about; monotonic."""

    after_s: float
    seen_s: float
    state: ReleaseState


class StateWatch:
    """An async context manager that watches while it is entered."""

    def __init__(self, url: str, model: str) -> None:
        self.history: list[Seen] = []
        self._redis = redis.asyncio.Redis.from_url(
            url, socket_timeout=_ANSWER_S, socket_connect_timeout=_ANSWER_S
        )
        self._key = f"hikyaku:release:{model}"
        self._changed = asyncio.Event()

    @property
    def state(self) -> ReleaseState:
        """The latest."""
        return self.history[-1].state

    async def until(self, holds: Callable[[ReleaseState], bool], within_s: float) -> bool:
        """Whether that is so of a state within this time, from the present one on."""
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                while not holds(self.state):
                    self._changed.clear()
                    await self._changed.wait()
                return True
        return False

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._watch())
        while not self.history:
            await self._changed.wait()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._task.cancel()
        await asyncio.wait({self._task})
        await self._redis.aclose()

    async def _watch(self) -> None:
        before_s = time.monotonic()
        while True:
            asked_s = time.monotonic()
            # While Redis is away nothing changes.
            with suppress(redis.RedisError, OSError, StateUnavailable):
                content = await self._redis.get(self._key)
                if content is not None:
                    self._enter(decode_state(content, self._key), before_s)
                before_s = asked_s
            await asyncio.sleep(_LOOK_EVERY_S)

    def _enter(self, state: ReleaseState, after_s: float) -> None:
        if not self.history or state.generation > self.state.generation:
            self.history.append(Seen(after_s, time.monotonic(), state))
            self._changed.set()


class Answered(NamedTuple):
    """A request that a version answered. Instants are monotonic."""

    key: str
    sent_s: float
    done_s: float
    version: int
    route: str


@dataclass
class StageKeys:
    """The keys of one stage that were answered, by their marks: what certainly was its, and what
    may have been the next one's; of the candidate's arm and the other one."""

    certain: dict[bool, set[int]] = field(default_factory=lambda: {True: set(), False: set()})
    possible: dict[bool, set[int]] = field(default_factory=lambda: {True: set(), False: set()})


@dataclass
class Audit:
    """What came of it."""

    answers: int = 0
    judged: int = 0
    """Of them, while a candidate had a share of the keys."""
    excused: int = 0
    """By the champion in place of a candidate that a new worker had not open yet."""
    late_s: dict[int, float] = field(default_factory=dict)
    """By generation, how long after it had come about the last request was sent that was answered
    by the state before it; of those that changed who answers."""
    keys: dict[int, StageKeys] = field(default_factory=dict)
    """By the generation in which the stage began."""
    unlawful: Counter[str] = field(default_factory=Counter)
    samples: list[str] = field(default_factory=list)

    def violations(self) -> Iterator[str]:
        for what, count in self.unlawful.items():
            yield f"{count} answers {what}"
        yield from self.samples


class Auditor:
    """Holds answers against the history of the states; a worker may follow a change for
    `within_s`."""

    def __init__(self, model: str, history: Sequence[Seen], within_s: float = 1.0) -> None:
        self._model = model
        self._history = history
        self._seen = np.array([seen.seen_s for seen in history])
        self._from = np.array([seen.after_s for seen in history])
        self._until = np.array([*(seen.seen_s + within_s for seen in history[1:]), np.inf])
        self._lots: dict[int, Lots] = {}

    def audit(
        self, answers: Sequence[Answered], excused: Sequence[tuple[float, float]] = ()
    ) -> Audit:
        """`excused`: times in which a new worker may not have the candidate open."""
        audit = Audit(len(answers))
        for answered in answers:
            self._judge(audit, answered, excused)
        return audit

    def _judge(
        self, audit: Audit, answered: Answered, excused: Sequence[tuple[float, float]]
    ) -> None:
        first = int(np.searchsorted(self._until, answered.sent_s))
        last = int(np.searchsorted(self._from, answered.done_s, side="right"))
        states = [seen.state for seen in self._history[first:last]]
        lawful = [state for state in states if self._agrees(state, answered)]
        shared = [state for state in states if _has_share(state.rollout)]
        audit.judged += bool(shared)
        if not lawful:
            if shared and any(a <= answered.done_s and answered.sent_s <= b for a, b in excused):
                audit.excused += 1
                return
            expected = sorted({self._expected(state, answered.key) for state in states})
            what = f"of version {answered.version} that are to be of {expected}"
            audit.unlawful[what] += 1
            if len(audit.samples) < _SHOWN:
                generations = [state.generation for state in states]
                audit.samples.append(f"{answered}, in generations {generations}")
            return
        self._late(audit, answered)
        self._keys(audit, answered, lawful)

    def _agrees(self, state: ReleaseState, answered: Answered) -> bool:
        return self._expected(state, answered.key) == (answered.version, answered.route)

    def _expected(self, state: ReleaseState, key: str) -> tuple[int, str]:
        assert state.champion is not None
        rollout = state.rollout
        if rollout is None or not _has_share(rollout):
            return state.champion.version, "champion"
        is_candidates = self._draw(rollout, key)[0] < rollout.stages[-1].stage.share
        if is_candidates is rollout.is_watched:
            return state.champion.version, "champion"
        if is_candidates:
            return rollout.candidate.version, "canary"
        return rollout.against.version, "previous"

    def _draw(self, rollout: Rollout, key: str) -> tuple[float, int]:
        lots = self._lots.get(rollout.began)
        if lots is None:
            lots = self._lots[rollout.began] = lots_of(self._model, rollout)
        return lots.draw(key)

    def _late(self, audit: Audit, answered: Answered) -> None:
        """Whether the latest change before it was not yet followed."""
        at = int(np.searchsorted(self._seen, answered.sent_s)) - 1
        if at < 1:
            return
        for number in range(at, 0, -1):
            seen = self._history[number]
            if answered.sent_s - seen.seen_s > 2.0:
                return
            if self._agrees(seen.state, answered):
                return
            late_s = audit.late_s.get(seen.state.generation, 0.0)
            audit.late_s[seen.state.generation] = max(late_s, answered.sent_s - seen.seen_s)

    def _keys(self, audit: Audit, answered: Answered, lawful: Sequence[ReleaseState]) -> None:
        """Into the stages in which it may have been an exposure."""
        stages: dict[int, tuple[bool, int]] = {}
        for state in lawful:
            if state.rollout is not None and _has_share(state.rollout):
                last = state.rollout.stages[-1]
                place, mark = self._draw(state.rollout, answered.key)
                stages[last.began] = place < last.stage.share, mark & (MARKS - 1)
        is_certain = len(stages) == 1 and all(_has_share(state.rollout) for state in lawful)
        for began, (is_candidates, mark) in stages.items():
            keys = audit.keys.setdefault(began, StageKeys())
            keys.possible[is_candidates].add(mark)
            if is_certain:
                keys.certain[is_candidates].add(mark)


def _has_share(rollout: Rollout | None) -> bool:
    return rollout is not None and rollout.stages[-1].stage.share > 0
