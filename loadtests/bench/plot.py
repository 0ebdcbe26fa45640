"""Draws what a benchmark wrote, with the Python of the environment that has matplotlib.

    python plot.py FILE.json FILE.png

A row of charts a table: requests a second and processor time a request as ratios to the echo's,
and latency, all at the most connections. Bars are medians, whiskers the range of the rounds.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

_COLORS = {"ours": "#0b6e4f", "ours-asgi": "#5fb49c", "echo": "#333333", "protocol-echo": "#777777"}
_PEER = "#c9b38c"
_ROW_HEIGHT_IN = 0.34
_WIDTH_IN = 15


def draw(document: dict[str, Any], file: Path) -> None:
    tables = [_ranked(table) for table in document["tables"]]
    heights = [1.6 + _ROW_HEIGHT_IN * len(readings) for _, readings in tables]
    figure, rows = plt.subplots(
        len(tables),
        3,
        figsize=(_WIDTH_IN, sum(heights)),
        height_ratios=heights,
        width_ratios=[3, 2, 2],
        squeeze=False,
        layout="constrained",
    )
    for (title, readings), (rate, cpu, latency) in zip(tables, rows, strict=True):
        _bars(rate, readings, "requests_s", f"{title}\nrequests a second, ratio to the echo's")
        rate.set_yticks(range(len(readings)), [reading["title"] for reading in readings])
        _bars(cpu, readings, "cpu_us", "CPU a request, ratio to the echo's")
        _latencies(latency, readings)
        for axes in (rate, cpu, latency):
            axes.set_ylim(-0.7, len(readings) - 0.3)
    seconds = f"{document['rounds']} rounds of {document['seconds']} s"
    figure.supxlabel(f"{document['machine']}; {seconds}; logarithmic scales", fontsize=8)
    figure.savefig(file, dpi=110)


def _ranked(table: dict[str, Any]) -> tuple[str, Sequence[dict[str, Any]]]:
    """The title of a table, and its readings at the most connections, the fastest last."""
    most = max(reading["connections"] for reading in table["readings"])
    readings = [reading for reading in table["readings"] if reading["connections"] == most]
    readings.sort(key=lambda reading: reading["ratios"]["requests_s"]["median"])
    return f"{table['kind']} → prediction, {table['model']}, {most} connections", readings


def _bars(axes: Any, readings: Sequence[dict[str, Any]], figure: str, title: str) -> None:
    spreads = [reading["ratios"][figure] for reading in readings]
    medians = [spread["median"] for spread in spreads]
    whiskers = [
        [spread["median"] - spread["lowest"] for spread in spreads],
        [spread["highest"] - spread["median"] for spread in spreads],
    ]
    colors = [_COLORS.get(reading["contender"], _PEER) for reading in readings]
    axes.barh(range(len(readings)), medians, xerr=whiskers, color=colors, ecolor="#444444")
    for place, spread in enumerate(spreads):
        axes.text(
            spread["highest"] * 1.1, place, f"{spread['median']:.3g}", va="center", fontsize=8
        )
    axes.axvline(1, color="#333333", linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    axes.set_xlim(min(0.5, *medians) / 2, max(medians) * 5)
    axes.set_yticks([])
    axes.set_title(title, fontsize=9, loc="left")


def _latencies(axes: Any, readings: Sequence[dict[str, Any]]) -> None:
    for place, reading in enumerate(readings):
        color = _COLORS.get(reading["contender"], _PEER)
        p50_ms, p99_ms = (reading["medians"][name] / 1000 for name in ("p50_us", "p99_us"))
        axes.plot([p50_ms, p99_ms], [place, place], color=color, linewidth=2)
        axes.plot(p50_ms, place, "o", color=color)
        axes.plot(p99_ms, place, "|", color=color, markersize=12, markeredgewidth=2)
    axes.set_xscale("log")
    axes.set_yticks([])
    axes.set_title("latency, ms: p50 (dot) to p99 (bar)", fontsize=9, loc="left")


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
