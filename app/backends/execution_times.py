"""How long an execution takes, by its rows: measured at warm-up, followed while it serves."""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from app.tensors import Tensors, row_count, take_rows

# A thread hop costs about 90 µs; an execution longer than this would hold up every other caller.
MAX_INLINE_S = 0.001
_HOP_S = 0.0001
# A busy machine takes longer than the warm-up did, and a batch must not leave the loop for that.
_INLINE_SHARE = 0.7
# What a batch costs beside its execution: turns of the event loop, joining and parting of rows, and
# callers that wake up in smaller groups (64 connections on two cores: 8 rows a batch made a request
# take half as long again as 32 did).
_BATCH_S = 0.0002
# One pause of the machine must not be taken for the model's own pace.
_MOST = 8.0
_WEIGHT = 0.1
_HARDLY_MORE = 1.03


class ExecutionTimes:
    """Seconds of an execution by its rows, between measured sizes in proportion.

    `measured` is seconds by rows; without any an execution counts as `unknown_s`, whatever its
    rows. `in_loop`: executions within `MAX_INLINE_S` run in the event loop, others in a thread.
    """

    def __init__(
        self, measured: Mapping[int, float], *, unknown_s: float = 0.0, in_loop: bool = False
    ) -> None:
        self._in_loop = in_loop
        self._rows = sorted(measured) or [1]
        self._seconds = [max(measured.get(rows, unknown_s), 1e-9) for rows in self._rows]

    def predicted_s(self, rows: int) -> float:
        """Seconds of an execution of so many rows."""
        at = bisect_left(self._rows, rows)
        if at == 0:
            return self._seconds[0]
        if at == len(self._rows):
            return self._seconds[-1] * rows / self._rows[-1]
        low, high = self._rows[at - 1], self._rows[at]
        share = (rows - low) / (high - low)
        return self._seconds[at - 1] * (1 - share) + self._seconds[at] * share

    def observe(self, rows: int, seconds: float) -> None:
        """An execution of so many rows took so long: that size follows by a tenth, or the two
        measured sizes between which it lies."""
        factor = 1 + _WEIGHT * (min(seconds / self.predicted_s(rows), _MOST) - 1)
        at = min(bisect_left(self._rows, rows), len(self._rows) - 1)
        self._seconds[at] *= factor
        if at and rows < self._rows[at]:
            self._seconds[at - 1] *= factor

    def best_rows(self, max_rows: int) -> int:
        """The rows of a batch, `max_rows` at most, at which a row costs least.

        Where executions run in the event loop, one that is too long for it pays for a thread hop;
        that is worth it only where it makes a row cheaper by a quarter.
        """
        sizes = sorted({rows for rows in self._rows if rows <= max_rows} | {max_rows})
        if not self._in_loop:
            return self._cheapest(sizes)
        most_s = _INLINE_SHARE * MAX_INLINE_S
        best_inline = self._cheapest([r for r in sizes if self.predicted_s(r) <= most_s])
        in_thread = self._cheapest([r for r in sizes if self.predicted_s(r) > MAX_INLINE_S])
        if not best_inline or not in_thread:
            return best_inline or in_thread
        worth_it = self._row_cost_s(in_thread) < 0.75 * self._row_cost_s(best_inline)
        return in_thread if worth_it else best_inline

    def _cheapest(self, sizes: Sequence[int]) -> int:
        """The largest of those at which a row costs hardly more than the least; 0 of none."""
        least_s = min(map(self._row_cost_s, sizes), default=0.0)
        return max((r for r in sizes if self._row_cost_s(r) <= _HARDLY_MORE * least_s), default=0)

    def _row_cost_s(self, rows: int) -> float:
        seconds = self.predicted_s(rows)
        hop_s = _HOP_S if self._in_loop and seconds > MAX_INLINE_S else 0.0
        return (seconds + hop_s + _BATCH_S) / rows


def warm_up_batches(example: Tensors, max_rows: int) -> Iterator[tuple[int, Tensors]]:
    """`example` repeated to 1, 2, 4, … and `max_rows` rows."""
    for rows in sorted({1 << power for power in range(max_rows.bit_length())} | {max_rows}):
        copies = -(-rows // row_count(example))
        whole = {name: np.concatenate([tensor] * copies) for name, tensor in example.items()}
        yield rows, take_rows(whole, 0, rows)
