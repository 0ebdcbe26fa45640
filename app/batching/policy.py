"""How long a batch may wait for company before it starts."""

from typing import Protocol


class BatchPolicy(Protocol):
    """Asked each time rows are waiting and an execution could start."""

    def hold_s(self, queued_rows: int, oldest_wait_s: float) -> float:
        """Seconds to go on waiting; 0 or less starts the batch now."""
        ...


class Greedy:
    """Start at once: batches come from load, out of the rows that arrived during an execution."""

    def hold_s(self, queued_rows: int, oldest_wait_s: float) -> float:
        return 0.0


class Hold:
    """Wait until a batch is full or its oldest row has waited `hold_s`.

    epoll rounds up to 1 ms, so shorter holds cannot be kept.
    """

    def __init__(self, hold_s: float, max_batch_rows: int) -> None:
        self._hold_s = hold_s
        self._max_batch_rows = max_batch_rows

    def hold_s(self, queued_rows: int, oldest_wait_s: float) -> float:
        return 0.0 if queued_rows >= self._max_batch_rows else self._hold_s - oldest_wait_s
