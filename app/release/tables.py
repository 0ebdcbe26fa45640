"""Tables that workers count in, each its own, and that whoever reads adds up."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, Self, TypeAlias

MOST_BYTES = 4 << 20
"""Of one table."""
GONE_S = 60.0
"""So long a worker must have been missing before its tables are folded."""
KEPT_REMOVED_S = 86_400.0
"""So long a name that was removed cannot come back."""


class Additive(Protocol):
    """Counts, sums, minima: two of them make one of the same kind, whatever the order."""

    def __add__(self, other: Self, /) -> Self:
        """Another one; both are unchanged."""
        ...

    def encode(self) -> bytes: ...


Decode: TypeAlias = Callable[[bytes], Additive]
"""Raises a `HikyakuError` for what it cannot read."""
Kinds: TypeAlias = Mapping[str, Decode]
"""By the first word of a table's name, which ends at the first colon."""


@dataclass(frozen=True, slots=True)
class StoredTable:
    """What is stored under one name."""

    contents: Sequence[bytes]
    """Their sum is all that was counted; each is an encoded table."""
    writes: Mapping[str, int]
    """By worker, gone ones among them, the number of the last of its writes that is in there: with
    it all before it are."""


class TableStore(Protocol):
    """The tables of one worker, and those of all others to be read. A name begins with the kind of
    the table and a colon, as `comparison:flight_delay:3-7-ab12cd34`.

    Whatever is lost, repeated, late, paused or restarted on the way, what `write` was told of
    counts once; only what a worker had not written dies with it. What a Redis loses is written
    again by the workers that live. Every call raises `StateUnavailable` when it cannot be done.
    """

    @property
    def next_write(self) -> int:
        """The number that the next call of `write` will have, from 1 on."""
        ...

    async def write(self, counted: Mapping[str, Additive]) -> None:
        """Add what was counted *since the last call*, by name, to what this worker has stored.

        To be called every second, also with nothing: it finds out what was lost or removed. The
        tables belong to the store from now on. When it raises, or is cancelled, what it was given
        is kept and written with the next call. A name that was removed takes nothing any more. What
        would make a table larger than `MOST_BYTES` is logged, counted and left out."""
        ...

    async def read(self, prefix: str) -> Mapping[str, StoredTable]:
        """Those whose names begin so."""
        ...

    async def remove(self, name: str) -> None:
        """Remove what all workers have written under the name, and will write within a day."""
        ...

    async def fold(self, living: Collection[str]) -> int:
        """Put the tables of workers that are gone into one a name; how many have been. Gone is who
        was not among the `living` of any call of the last minute. A worker that comes back
        all the same counts on from what was folded."""
        ...

    async def close(self) -> None: ...
