"""Latencies at a rate that does not wait for answers, as callers who know nothing of each other."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle

import uvloop

from loadtests.bench.answers import body_of
from loadtests.bench.contenders import Contender
from loadtests.bench.figures import Spread, spread
from loadtests.bench.workload import Workload
from loadtests.open_loop import OpenLoop

_SEED = 7


@dataclass(frozen=True)
class Paced:
    """One contender in one round. Latencies count from when a request should have been sent."""

    p50_us: float
    p99_us: float
    lost: int
    """Requests without a 200 within ten seconds. They are none of the latencies."""


def paced(
    contender: Contender, workload: Workload, port: int, per_s: float, seconds: float
) -> Paced:
    """Ask about the rows in turn at random instants, `per_s` a second on average."""
    headers = {"Content-Type": "application/json"}
    loop = OpenLoop(port, contender.path(workload), headers, per_s, _SEED)
    rows = range(len(workload.rows))
    bodies = cycle([body_of(contender, workload, row).encode() for row in rows])
    uvloop.run(loop.run(seconds, lambda: next(bodies)))
    latencies_s = [asked.latency_s for asked in loop.ledger if asked.status == 200]
    lost = len(loop.ledger) - len(latencies_s)
    if len(latencies_s) < 2:
        return Paced(float("inf"), float("inf"), lost)
    percentiles = statistics.quantiles(latencies_s, n=100, method="inclusive")
    return Paced(percentiles[49] * 1e6, percentiles[98] * 1e6, lost)


def paced_table(rounds: Mapping[str, Sequence[Paced]], titles: Mapping[str, str]) -> str:
    """A Markdown table: medians of the rounds, ratios to the echo of the same round."""
    lines = ["| | p50 µs | its ratio | p99 µs | its ratio | lost |", "|---|" + "--:|" * 5]
    for name, seen in rounds.items():
        p50 = statistics.median(one.p50_us for one in seen)
        p99 = statistics.median(one.p99_us for one in seen)
        ratios = [_ratio(seen, rounds["echo"], figure) for figure in ("p50_us", "p99_us")]
        lost = sum(one.lost for one in seen)
        cells = [
            titles[name],
            f"{p50:,.0f}",
            f"{ratios[0]}",
            f"{p99:,.0f}",
            f"{ratios[1]}",
            f"{lost}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _ratio(ones: Sequence[Paced], others: Sequence[Paced], figure: str) -> Spread:
    pairs = zip(ones, others, strict=True)
    return spread([getattr(one, figure) / getattr(other, figure) for one, other in pairs])
