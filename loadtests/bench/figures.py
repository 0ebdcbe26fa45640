"""What the rounds say: medians and ranges, ratios to the echo of the same round, goals."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

from loadtests.bench.reading import Reading
from loadtests.bench.workload import Kind

Rounds: TypeAlias = Mapping[tuple[str, int], Sequence[Reading]]
"""By contender and connections, one reading a round, in the order of the rounds."""


@dataclass(frozen=True)
class Spread:
    """Of one figure over the rounds."""

    median: float
    lowest: float
    highest: float

    def __str__(self) -> str:
        return f"{self.median:.3g} [{self.lowest:.3g}-{self.highest:.3g}]"


def spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values))


Figure: TypeAlias = Callable[[Reading], float]


def requests_s(reading: Reading) -> float:
    return reading.requests_s


def cpu_us(reading: Reading) -> float:
    return reading.cpu_us


def p50_us(reading: Reading) -> float:
    return reading.p50_us


def p99_us(reading: Reading) -> float:
    return reading.p99_us


def resident_mib(reading: Reading) -> float:
    return reading.resident_mib


def ratio(rounds: Rounds, figure: Figure, one: str, other: str, connections: int) -> Spread:
    """`figure` of `one` to that of `other`: divided within each round, where both met the same
    machine."""
    pairs = zip(rounds[one, connections], rounds[other, connections], strict=True)
    return spread([figure(a) / figure(b) for a, b in pairs])


@dataclass(frozen=True)
class Goal:
    """What is promised of a median: of `contender`'s figure as a ratio to that of `other`, or of
    the figure itself where `other` is None."""

    kind: Kind
    promise: str
    figure: Figure
    contender: str
    other: str | None
    connections: int
    bound: Literal["at least", "at most"]
    value: float
    stretch: float | None = None

    def line(self, rounds: Rounds) -> str:
        """PASS or FAIL and what it rests on."""
        what = f"{self.contender}: {self.promise}"
        if not self._measured(rounds):
            return f"----  {what}: not measured in this run"
        verdict = "PASS" if self.met(rounds) else "FAIL"
        stretch = "" if self.stretch is None else f", stretch {self.stretch:.3g}"
        goal = f"goal: {self.bound} {self.value:.3g}{stretch}"
        return f"{verdict}  {what}: {self._spread(rounds)} ({goal})"

    def met(self, rounds: Rounds) -> bool:
        """A goal without a measurement is not missed."""
        if not self._measured(rounds):
            return True
        median = self._spread(rounds).median
        return median >= self.value if self.bound == "at least" else median <= self.value

    def _measured(self, rounds: Rounds) -> bool:
        names = [self.contender] if self.other is None else [self.contender, self.other]
        return all((name, self.connections) in rounds for name in names)

    def _spread(self, rounds: Rounds) -> Spread:
        if self.other is None:
            readings = rounds[self.contender, self.connections]
            return spread([self.figure(reading) for reading in readings])
        return ratio(rounds, self.figure, self.contender, self.other, self.connections)


_RATE = "requests a second, to"
_MEMORY_MIB = 150e6 / 2**20

GOALS = (
    Goal("entity", "CPU a prediction, to the echo's", cpu_us, "ours", "echo", 64, "at most", 1.6),
    Goal("entity", f"{_RATE} the echo's", requests_s, "ours", "echo", 64, "at least", 0.55, 0.8),
    Goal(
        "entity",
        f"{_RATE} async Feast's",
        requests_s,
        "ours",
        "feast-async",
        64,
        "at least",
        20,
        30,
    ),
    Goal("entity", f"{_RATE} def Feast's", requests_s, "ours", "feast-def", 64, "at least", 20, 30),
    Goal("entity", f"{_RATE} the echo's", requests_s, "ours-asgi", "echo", 64, "at least", 0.33),
    Goal("entity", "p50 at 1 connection, to the echo's", p50_us, "ours", "echo", 1, "at most", 3),
    Goal("entity", "p99, to the echo's", p99_us, "ours", "echo", 64, "at most", 2),
    Goal("entity", "memory, MiB", resident_mib, "ours", None, 64, "at most", _MEMORY_MIB),
    Goal("tensor", f"{_RATE} the echo's", requests_s, "ours", "echo", 64, "at least", 0.8, 1.1),
    Goal("tensor", f"{_RATE} the echo's", requests_s, "ours-asgi", "echo", 64, "at least", 0.42),
    Goal("tensor", f"{_RATE} mosec's", requests_s, "ours", "mosec", 64, "at least", 1, 1.3),
    Goal("tensor", f"{_RATE} MLServer's", requests_s, "ours", "mlserver", 64, "at least", 10),
    Goal("tensor", f"{_RATE} LitServe's", requests_s, "ours", "litserve", 64, "at least", 15),
    Goal("tensor", f"{_RATE} BentoML's", requests_s, "ours", "bentoml", 64, "at least", 15),
    Goal("tensor", "p99, to the echo's", p99_us, "ours", "echo", 64, "at most", 2),
    Goal("tensor", "memory, MiB", resident_mib, "ours", None, 64, "at most", _MEMORY_MIB),
)
"""With the GBDT, one worker."""


def table(rounds: Rounds, titles: Mapping[str, str]) -> str:
    """A Markdown table, one line a contender and number of connections. Medians; ratios are to the
    echo of the same round, with their range."""
    head = (
        "| | connections | requests/s | ratio to the echo | p50 µs | its ratio | p99 µs "
        "| its ratio | CPU µs a request | its ratio | memory MiB | Redis CPU µs |"
    )
    lines = [head, "|---|" + "--:|" * 11]
    for (name, connections), readings in rounds.items():
        cells = [titles[name], f"{connections}"]
        for figure in FIGURES.values():
            cells.append(f"{_median(readings, figure):,.0f}")
            cells.append(f"{ratio(rounds, figure, name, 'echo', connections)}")
        cells.append(f"{_median(readings, resident_mib):,.0f}")
        cells.append(f"{statistics.median(reading.redis_us for reading in readings):,.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


FIGURES: Mapping[str, Figure] = {
    figure.__name__: figure for figure in (requests_s, p50_us, p99_us, cpu_us)
}


def document(rounds: Rounds, titles: Mapping[str, str]) -> list[dict[str, Any]]:
    """For machines: of each contender and number of connections, medians, ratios to the echo with
    their range, and every reading."""
    return [
        {
            "contender": name,
            "title": titles[name],
            "connections": connections,
            "medians": {figure: _median(readings, FIGURES[figure]) for figure in FIGURES},
            "ratios": {
                figure: asdict(ratio(rounds, FIGURES[figure], name, "echo", connections))
                for figure in FIGURES
            },
            "rounds": [asdict(reading) for reading in readings],
        }
        for (name, connections), readings in rounds.items()
    ]


def _median(readings: Sequence[Reading], figure: Figure) -> float:
    return statistics.median(figure(reading) for reading in readings)
