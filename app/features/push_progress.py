"""How far a push is, for people."""

import time
from collections.abc import Callable
from datetime import UTC, datetime

from app.features.push import Written

_SAY_EVERY_S = 5.0


class Progress:
    """Adds up what was written and tells `say` every few seconds, while rows come."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.written = Written()
        self._say = say
        self._started_s = self._said_s = time.monotonic()
        self._said_rows = 0

    def add(self, written: Written) -> None:
        self.written.add(written)
        now_s = time.monotonic()
        if now_s - self._said_s >= _SAY_EVERY_S:
            rate = (self.written.rows - self._said_rows) / (now_s - self._said_s)
            self._say(f"{self.written.rows:,} rows, {rate:,.0f} rows/s{_newest(self.written)}")
            self._said_s, self._said_rows = now_s, self.written.rows

    def totals(self, push_source: str) -> list[str]:
        """What a person is told at the end: the sum, then a line a view."""
        took_s = max(time.monotonic() - self._started_s, 1e-9)
        rows = self.written.rows
        return [
            f"pushed {rows:,} rows to {push_source} in {took_s:.1f} s ({rows / took_s:,.0f} rows/s)"
            f"{_newest(self.written)}",
            *(
                f"  {view}: {stored:,} stored, {self.written.not_newer[view]:,} not newer than "
                "what was there"
                for view, stored in self.written.stored.items()
            ),
        ]


def _newest(written: Written) -> str:
    if not written.newest_s:
        return ""
    newest = datetime.fromtimestamp(max(written.newest_s.values()), UTC)
    return f", newest event {newest.isoformat(timespec='seconds')}"
