"""What a comparison table says, as JSON: the same online and offline (docs/comparison.md)."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import isfinite, sqrt
from typing import Any

import numpy as np

from app.comparison import grid
from app.comparison.descriptors import (
    PSI_PRACTICAL,
    Bars,
    association,
    bars,
    distances,
    quantile,
)
from app.comparison.intervals import ClusterSums
from app.comparison.pairs import NO_DECISION
from app.comparison.table import (
    MOST_DECISIONS,
    ComparisonTable,
    Counts,
    ExecutionTime,
    Group,
    joint_bins,
)

LEVEL = 0.95
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
_ANY = (-np.inf, np.inf)
_TIME_QUANTILES = (0.5, 0.95, 0.99)
_MOST_JOINT_CELLS = 20_000


def comparison_document(
    table: ComparisonTable, decisions: Sequence[bool | str] = ()
) -> dict[str, Any]:
    """`decisions` are the names of the numbered ones; without them they stay numbers.

    It holds nothing that JSON has no word for: what is not known is null.
    """
    whole, *segments = table.groups()
    counted = _distances(whole)
    return {
        "blocks": table.blocks,
        "first_s": _known(table.first_s),
        "last_s": _known(table.last_s),
        "dropped": dict(sorted(table.dropped.items())),
        "level": LEVEL,
        **_group(whole, decisions),
        "score_distance": counted,
        "association": asdict(association(table.joint())),
        "execution_time": _times(table.execution_time()),
        "histograms": _histograms(whole),
        "joint": _joint(table.joint()),
        "segments": [
            {"name": group.name, **_group(group, decisions), "score_distance": _distances(group)}
            for group in segments
        ],
    }


def _group(group: Group, names: Sequence[bool | str]) -> dict[str, Any]:
    clustered = group.clustered
    agreed = 1 - group.flips / group.compared if group.compared else None
    return {
        "rows": group.rows,
        "compared": group.compared,
        "failed": {"rows": group.failed, **_share(clustered["error"])},
        "not_finite": {
            "rows": group.candidate_not_finite,
            **_share(clustered["not_finite"]),
        },
        "champion_not_finite": {"rows": group.champion_not_finite},
        "flips": {"rows": group.flips, **_share(clustered["flip"])},
        "agreement": agreed,
        "decisions": [
            {"champion": _named(ours, names), "candidate": _named(theirs, names), "rows": rows}
            for (ours, theirs), rows in sorted(group.decisions.items())
        ],
        "difference": _difference(group),
        "champion": _scores(group, group.champion, group.champion_2, "champion"),
        "candidate": _scores(group, group.candidate, group.candidate_2, "candidate"),
    }


def _difference(group: Group) -> dict[str, Any]:
    """Candidate less champion."""
    n, sums = group.compared, group.clustered["difference"]
    counts = group.distributions["difference"]
    square = group.difference_2 / n if n else None
    return {
        **_mean(sums),
        "mean_absolute": _mean(group.clustered["absolute_difference"]),
        "standard_deviation": _deviation(sums.s, group.difference_2, n),
        "root_mean_square": None if square is None else sqrt(square),
        "min": _known(group.least),
        "max": _known(group.largest),
        "quantiles": _quantiles(counts, QUANTILES, group.least, group.largest),
        "equal": counts.as_dict().get(0, 0),
    }


def _scores(group: Group, total: float, squares: float, of: Any) -> dict[str, Any]:
    n = group.compared
    return {
        "mean": total / n if n else None,
        "standard_deviation": _deviation(total, squares, n),
        "quantiles": _quantiles(group.distributions[of], QUANTILES, *_ANY),
    }


def _distances(group: Group) -> dict[str, Any] | None:
    found = distances(group.distributions["champion"], group.distributions["candidate"])
    return None if found is None else {**asdict(found), "psi_practical": PSI_PRACTICAL}


def _times(times: ExecutionTime) -> dict[str, Any]:
    """Milliseconds of execution a row."""
    n = times.rows
    sides = {
        "champion": (times.champion_s, times.champion),
        "candidate": (times.candidate_s, times.candidate),
    }
    told = {
        name: {
            "mean_ms": 1e3 * total_s / n if n else None,
            "quantiles_ms": {
                share: None if seconds is None else 1e3 * seconds
                for share, seconds in _quantiles(counts, _TIME_QUANTILES, *_ANY).items()
            },
        }
        for name, (total_s, counts) in sides.items()
    }
    ratio = times.candidate_s / times.champion_s if times.champion_s else None
    return {"rows": n, **told, "ratio_of_means": ratio}


def _histograms(whole: Group) -> dict[str, Any]:
    champion, candidate = bars(whole.distributions["champion"], whole.distributions["candidate"])
    (difference,) = bars(whole.distributions["difference"])
    return {
        "scores": {
            "width": champion.width,
            "first": champion.first,
            "champion": _bars(champion),
            "candidate": _bars(candidate),
        },
        "difference": {"width": difference.width, "first": difference.first, **_bars(difference)},
    }


def _bars(counted: Bars) -> dict[str, Any]:
    return {"rows": counted.counts, "below": counted.below, "above": counted.above}


def _joint(joint: Counts) -> dict[str, Any] | None:
    """None where there are more cells than a plot shows."""
    if len(joint.keys) > _MOST_JOINT_CELLS:
        return None
    champion, candidate = joint_bins(joint.keys)
    bins = np.unique(np.concatenate([champion, candidate]))
    low, high = grid.edges(bins, grid.COARSE_BITS)
    cells = zip(
        np.searchsorted(bins, champion).tolist(),
        np.searchsorted(bins, candidate).tolist(),
        joint.counts.tolist(),
        strict=True,
    )
    return {"low": low.tolist(), "high": high.tolist(), "cells": [list(cell) for cell in cells]}


def _mean(sums: ClusterSums) -> dict[str, float | None]:
    """Of rows that come in blocks, with the interval of `LEVEL`."""
    interval = sums.interval(LEVEL)
    low, high = (None, None) if interval is None else interval
    return {"mean": sums.mean(), "low": low, "high": high}


def _share(sums: ClusterSums) -> dict[str, float | None]:
    """The same of a share."""
    interval = sums.share_interval(LEVEL)
    low, high = (None, None) if interval is None else interval
    return {"share": sums.mean(), "low": low, "high": high}


def _quantiles(
    counts: Counts, shares: Sequence[float], least: float, largest: float
) -> Mapping[str, float | None]:
    return {f"p{100 * s:g}": quantile(counts, s, least, largest) for s in shares}


def _deviation(total: float, squares: float, n: int) -> float | None:
    """Of the rows, about their mean; None below two."""
    if n < 2:
        return None
    return sqrt(max(squares - total * total / n, 0.0) / (n - 1))


def _known(number: float) -> float | None:
    return number if isfinite(number) else None


def _named(decision: int, names: Sequence[bool | str]) -> bool | str | int | None:
    if decision == NO_DECISION:
        return None
    if not names:
        return decision
    if decision == MOST_DECISIONS - 1 and len(names) > MOST_DECISIONS:
        return "…"  # those from here on are counted as one
    return names[decision]
