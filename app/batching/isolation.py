"""Finding the rows that make a batch fail: how it is split, and what that may cost."""

import math
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from itertools import pairwise
from typing import NamedTuple, TypeAlias

from app.batching.waiting import Entry
from app.errors import BackendError

# So many parts in a row, and none that succeeds: then two requests by themselves decide whether it
# is the backend.
_HOPELESS = 4
_MOST_RUNS = 32.0


class Refused(NamedTuple):
    """Entries that stay without an answer: one that fails by itself, or some of which nobody knows
    which it is."""

    entries: list[Entry]
    error: BackendError


Run: TypeAlias = Callable[[list[Entry]], Awaitable[BackendError | None]]
"""Executes entries and answers them, or says why they failed."""


class IsolationBudget:
    """Runs that repeat rows of a failed batch are at most a `share` of a model's executions.

    While the budget is low, fewer requests share a batch, so that what a poisonous one would cost
    can be paid: batches shrink to what suits the share of poison, down to one request each.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._runs = _MOST_RUNS

    def executed(self) -> None:
        """An execution of rows that were not run before."""
        self._runs = min(self._runs + self._share, _MOST_RUNS)

    def repeated(self) -> None:
        """An execution of rows of a failed batch."""
        self._runs = max(self._runs - 1, 0.0)

    @property
    def runs(self) -> int:
        """Repetitions that can be paid for now."""
        return int(self._runs)

    @property
    def company(self) -> int:
        """Requests that may share a batch."""
        if self._runs >= _MOST_RUNS:
            return 1 << 30
        if self._runs < 11:
            return max(1, int(self._runs))
        return int(2 ** ((self._runs - 4) / 2))


def most_runs(requests: int) -> int:
    """Executions that finding the poison in so many requests may take: 4 + 2·log2 at most, which
    is enough for one poisonous request, and for any number of them in ten requests."""
    return min(requests, int(4 + 2 * math.log2(requests)))


def split(entries: Sequence[Entry], parts: int) -> list[list[Entry]]:
    """Into so many parts, or one for each entry, as even as can be, in order."""
    parts = min(parts, len(entries))
    bounds = [round(part * len(entries) / parts) for part in range(parts + 1)]
    return [list(entries[a:b]) for a, b in pairwise(bounds)]


async def isolate(
    batch: list[Entry], error: BackendError, run: Run, budget: IsolationBudget
) -> list[Refused]:
    """Run parts of a failed batch until everybody but the poisonous has an answer.

    Halves, and each entry by itself as soon as there are runs enough; where the first half is well
    the other is not run whole again. Ends at `most_runs`, at the end of the budget, or when it is
    plain that nothing succeeds; what is then under suspicion is refused together.
    """
    failing = [Refused(batch, error)]
    refused: list[Refused] = []
    runs = min(most_runs(len(batch)), budget.runs)
    failed, succeeded, hopeless = 0, False, False
    while failing:
        failing.sort(key=lambda group: len(group.entries))
        suspects, error = failing.pop()
        if len(suspects) == 1 or runs < 2 or hopeless:
            refused.append(Refused(suspects, error))
            continue
        if failed >= _HOPELESS and not succeeded:
            for single in (suspects[:1], suspects[-1:]):
                runs -= 1
                fault = await run(single)
                succeeded = succeeded or fault is None
                if fault is not None:
                    refused.append(Refused(single, fault))
            hopeless = not succeeded
            if len(suspects) > 2:
                failing.append(Refused(suspects[1:-1], error))
            continue
        others = sum(len(group.entries) for group in failing)
        parts = split(suspects, len(suspects) if len(suspects) + others <= runs else 2)
        well = True
        for part in parts:
            if well and part is parts[-1] and len(part) > 1:
                failing.append(Refused(part, error))  # the fault must be here
                break
            runs -= 1
            fault = await run(part)
            if fault is None:
                succeeded = True
            else:
                well = False
                failed += 1
                failing.append(Refused(part, fault))
    return refused


class Suspects:
    """Callers whose rows keep failing, until they no longer do: they run alone.

    A caller is suspected while more than half of its last requests failed, the newest counting
    most. Only so many callers are remembered, the last that failed.
    """

    def __init__(self, remembered: int = 1024) -> None:
        self._remembered = remembered
        self._failing: OrderedDict[str, float] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._failing)

    def __contains__(self, caller: str) -> bool:
        return self._failing.get(caller, 0.0) > 0.5

    def failed(self, caller: str) -> None:
        """A request of this caller failed by itself. Without a name nobody is suspected."""
        if not caller:
            return
        self._failing[caller] = 0.8 * self._failing.pop(caller, 0.0) + 0.2
        if len(self._failing) > self._remembered:
            self._failing.popitem(last=False)

    def succeeded(self, caller: str) -> None:
        if caller in self._failing:
            self._failing[caller] *= 0.8
            if self._failing[caller] < 0.05:
                del self._failing[caller]
