"""How long a batch may wait for company before it starts, and how many rows it takes."""

from collections.abc import Sequence
from typing import Protocol


class BatchPolicy(Protocol):
    """Asked each time rows are waiting and an execution could start."""

    @property
    def holds(self) -> bool:
        """Whether it ever does: who never holds is not asked."""
        ...

    def hold_s(self, queued_rows: int, oldest_wait_s: float) -> float:
        """Seconds to go on waiting; 0 or less starts the batch now."""
        ...

    def batch_rows(self, queued_rows: int) -> int:
        """Rows that the batch takes at most."""
        ...


class Greedy:
    """Start at once: batches come from load, out of the rows that arrived during an execution."""

    holds = False

    def __init__(self, max_batch_rows: int) -> None:
        self._max_batch_rows = max_batch_rows

    def hold_s(self, queued_rows: int, oldest_wait_s: float) -> float:
        return 0.0

    def batch_rows(self, queued_rows: int) -> int:
        return self._max_batch_rows


class Hold:
    """Wait until a batch of the largest preferred size is full or its oldest row has waited
    `hold_s`; it then takes the largest preferred size that is there, or what there is.

    Without preferred sizes that is `max_batch_rows`. epoll rounds up to 1 ms, so shorter holds
    cannot be kept.
    """

    holds = True

    def __init__(
        self, hold_s: float, max_batch_rows: int, preferred_rows: Sequence[int] = ()
    ) -> None:
        self._hold_s = hold_s
        self._max_batch_rows = max_batch_rows
        self._preferred_rows = sorted(preferred_rows or [max_batch_rows])

    def hold_s(self, queued_rows: int, oldest_wait_s: float) -> float:
        return 0.0 if queued_rows >= self._preferred_rows[-1] else self._hold_s - oldest_wait_s

    def batch_rows(self, queued_rows: int) -> int:
        fitting = [rows for rows in self._preferred_rows if rows <= queued_rows]
        return fitting[-1] if fitting else self._max_batch_rows
