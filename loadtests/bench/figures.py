"""What the rounds say: medians and ranges, ratios to the echo of the same round, goals."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from loadtests.bench.server import Reading

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


def ratio(rounds: Rounds, figure: Figure, one: str, other: str, connections: int) -> Spread:
    """`figure` of `one` to that of `other`: divided within each round, where both met the same
    machine."""
    pairs = zip(rounds[one, connections], rounds[other, connections], strict=True)
    return spread([figure(a) / figure(b) for a, b in pairs])


@dataclass(frozen=True)
class Goal:
    """What is promised of a ratio's median."""

    promise: str
    figure: Figure
    other: str
    connections: int
    bound: Literal["at least", "at most"]
    value: float

    def line(self, rounds: Rounds) -> str:
        """PASS or FAIL and what it rests on."""
        if not self._measured(rounds):
            return f"----  {self.promise}: not measured in this run"
        measured = self._measured_ratio(rounds)
        verdict = "PASS" if self.met(rounds) else "FAIL"
        return f"{verdict}  {self.promise}: {measured} (goal: {self.bound} {self.value:g})"

    def met(self, rounds: Rounds) -> bool:
        """A goal without a measurement is not missed."""
        if not self._measured(rounds):
            return True
        median = self._measured_ratio(rounds).median
        return median >= self.value if self.bound == "at least" else median <= self.value

    def _measured(self, rounds: Rounds) -> bool:
        return all((name, self.connections) in rounds for name in ("ours", self.other))

    def _measured_ratio(self, rounds: Rounds) -> Spread:
        return ratio(rounds, self.figure, "ours", self.other, self.connections)


GOALS = (
    Goal("requests a second, to the echo's", requests_s, "echo", 64, "at least", 0.42),
    Goal("CPU a prediction, to the echo's", cpu_us, "echo", 64, "at most", 2.2),
    Goal("p50 at 1 connection, to the echo's", p50_us, "echo", 1, "at most", 2),
    Goal("requests a second, to naive FastAPI's", requests_s, "fastapi", 64, "at least", 4),
    Goal("requests a second, to MLServer's", requests_s, "mlserver", 64, "at least", 8),
    Goal("requests a second, to LitServe's", requests_s, "litserve", 64, "at least", 15),
    Goal("requests a second, to BentoML's", requests_s, "bentoml", 64, "at least", 15),
)
"""Of the GBDT, ours beside the others."""


def table(rounds: Rounds, titles: Mapping[str, str]) -> str:
    """A Markdown table, one line a contender and number of connections. Medians; ratios are to the
    echo of the same round, with their range."""
    head = (
        "| | connections | requests/s | ratio to the echo | p50 µs | p99 µs "
        "| CPU µs a request | its ratio | memory MiB |"
    )
    lines = [head, "|---|--:|--:|--:|--:|--:|--:|--:|--:|"]
    for (name, connections), readings in rounds.items():
        rate = ratio(rounds, requests_s, name, "echo", connections)
        cpu = ratio(rounds, cpu_us, name, "echo", connections)
        cells = [
            titles[name],
            f"{connections}",
            f"{_median(readings, requests_s):,.0f}",
            f"{rate}",
            f"{_median(readings, p50_us):,.0f}",
            f"{statistics.median(reading.p99_us for reading in readings):,.0f}",
            f"{_median(readings, cpu_us):,.0f}",
            f"{cpu}",
            f"{statistics.median(reading.resident_mib for reading in readings):,.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _median(readings: Sequence[Reading], figure: Figure) -> float:
    return statistics.median(figure(reading) for reading in readings)
