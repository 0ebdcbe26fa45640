"""Which version may answer when: holds answers against a sequence of changes of the version."""

import heapq
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from loadtests.checked_load import Asked

CONVERGES_WITHIN_S = 1.0


@dataclass(frozen=True)
class Change:
    """From `asked_s` on `new` may answer. From `answered_s` on the version before it may not: not
    at the worker that carried the change out, nor, a second later, at another. Monotonic instants.
    """

    new: int
    asked_s: float
    answered_s: float
    worker: int | None = None
    """None where nobody was asked: then `answered_s` holds for all workers."""


@dataclass
class Verdict:
    """What is wrong with answers, by its kind, and how long each change took to be everywhere."""

    unlawful: Counter[str] = field(default_factory=Counter)
    samples: list[str] = field(default_factory=list)
    late_s: dict[int, float] = field(default_factory=dict)
    """By the number of a change, the latest sending after its answer to a worker that answered with
    the version before it."""


@dataclass(frozen=True)
class _Spell:
    """A version's time in charge."""

    version: int
    from_s: float
    until_s: float
    ended_by: int | None
    """The worker that carried out the change to the next one."""

    def allows(self, asked: Asked, worker: int | None) -> bool:
        grace_s = CONVERGES_WITHIN_S if worker != self.ended_by and self.ended_by else 0.0
        begun, not_over = self.from_s <= asked.done_s, asked.sent_s <= self.until_s + grace_s
        return asked.version == self.version and begun and not_over


def judge(
    answers: Iterable[Asked],
    first: int,
    changes: Sequence[Change],
    workers: Mapping[int, int],
) -> Verdict:
    """Hold each answer that names a version, in the order of sending, against the changes, in their
    order, after `first`.

    `workers` says whose each connection is. Unlawful are versions that could not serve while the
    request was under way, and a worker that goes back: a request sent after another one was
    answered with a newer version is not answered with an older one.
    """
    verdict = Verdict()
    spells = _spells(first, changes)
    begins = [spell.from_s for spell in spells]
    reached: dict[int, int] = {}
    under_way: dict[int, list[tuple[float, int]]] = {}
    for asked in answers:
        if asked.version <= 0:
            continue
        worker = workers.get(asked.connection)
        place = worker or 0
        done = under_way.setdefault(place, [])
        while done and done[0][0] < asked.sent_s:
            reached[place] = max(reached.get(place, 0), heapq.heappop(done)[1])
        lawful = [
            number
            for number in _possible(spells, begins, asked)
            if spells[number].allows(asked, worker)
        ]
        if not lawful:
            _complain(verdict, "of a version that could not serve", asked, spells)
            continue
        # The earliest that it can have been: nothing is held against a worker that need not be.
        spell = min((n for n in lawful if n >= reached.get(place, 0)), default=None)
        if spell is None:
            _complain(verdict, "older than one before, of the same worker", asked, spells)
            continue
        heapq.heappush(done, (asked.done_s, spell))
        late_s = asked.sent_s - spells[spell].until_s
        if late_s > 0 and len(lawful) == 1:  # else it may have been of a later time of the version
            verdict.late_s[spell] = max(late_s, verdict.late_s.get(spell, 0.0))
    return verdict


def _spells(first: int, changes: Sequence[Change]) -> Sequence[_Spell]:
    versions = [first, *(change.new for change in changes)]
    begins = [float("-inf"), *(change.asked_s for change in changes)]
    ends = [*(change.answered_s for change in changes), float("inf")]
    ended_by = [*(change.worker for change in changes), None]
    return [_Spell(*spell) for spell in zip(versions, begins, ends, ended_by, strict=True)]


def _possible(spells: Sequence[_Spell], begins: Sequence[float], asked: Asked) -> Iterable[int]:
    """Those that may have lasted while the request was under way, the latest first."""
    for number in range(bisect_right(begins, asked.done_s) - 1, -1, -1):
        if spells[number].until_s + CONVERGES_WITHIN_S < asked.sent_s:
            return
        yield number


def _complain(verdict: Verdict, what: str, asked: Asked, spells: Sequence[_Spell]) -> None:
    verdict.unlawful[what] += 1
    if len(verdict.samples) < 5:
        at = [f"{s.version} from {s.from_s:.3f} until {s.until_s:.3f}" for s in spells]
        near = at[max(0, bisect_right([s.from_s for s in spells], asked.done_s) - 3) :][:4]
        verdict.samples.append(
            f"version {asked.version} sent {asked.sent_s:.3f}, answered {asked.done_s:.3f}, "
            f"{what}; in charge were {', '.join(near)}"
        )
