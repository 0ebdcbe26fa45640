"""Which version was being executed when a worker died: on memory that outlives it."""

import time
from collections.abc import Sequence

from app.telemetry.tally import Tallies

_FAMILY = "black box"
_KEPT = 8
"""Deaths in the midst of one version; earlier ones are forgotten."""


class Executing:
    """The executions of one version that are under way in this worker."""

    __slots__ = ("_cells",)

    def __init__(self, cells: "memoryview[float]") -> None:
        self._cells = cells

    @classmethod
    def elsewhere(cls) -> "Executing":
        """Of what another process executes: it does not die of that."""
        return cls(memoryview(bytearray(8)).cast("d"))

    def begin(self) -> None:
        """One has begun."""
        self._cells[0] += 1

    def end(self) -> None:
        """One is over, however it ended."""
        self._cells[0] -= 1


class BlackBox:
    """What a worker executes is written where the one that takes its place finds it.

    A native crash leaves no error, no row and no line of ours: whoever counts only what has ended
    never blames the version that ends all. Being killed by chance in the midst of one is rare, as
    long as executions do not fill the time.
    """

    def __init__(self, tallies: Tallies) -> None:
        self._tallies = tallies
        found: list[tuple[str, int, str]] = []
        now_s = time.time()
        for labels, cells in tallies.inherited(_FAMILY, 3, 1 + _KEPT).items():
            if cells[0] > 0:
                model, version, sha256 = labels
                found.append((model, int(version), sha256))
                for place in range(1, _KEPT):
                    cells[place] = cells[place + 1]
                cells[_KEPT] = now_s
            cells[0] = 0
        self.found: Sequence[tuple[str, int, str]] = found
        """Model, version and a manifest's digest of what the worker before us was executing when it
        died."""

    def executing(self, model: str, version: int, sha256: str) -> Executing:
        """To be told of the executions of this version."""
        labels = model, str(version), sha256
        return Executing(self._tallies.ours(_FAMILY, labels, 1 + _KEPT))

    def deaths(self, model: str, version: int, sha256: str, since_s: float) -> int:
        """How many workers of this service have died in the midst of executing it, since then
        (seconds since 1970), and had their places taken; of each place 8 at most."""
        everyones = self._tallies.everyones(_FAMILY, 3, 1 + _KEPT)
        places = everyones.get((model, str(version), sha256), ())
        return sum(at_s >= since_s for cells in places for at_s in cells[1:] if at_s)
