"""When the labels of predictions count."""

from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from app.comparison.segments import SegmentReader
from app.contract import Contract, LabelHorizon
from app.errors import InvalidModel

Instants: TypeAlias = NDArray[np.float64]
"""Seconds since 1970, NaN where there is none."""
ReadHorizon: TypeAlias = Callable[[Mapping[str, Sequence[Any]], Instants], Instants]
"""From the fields of instances and the instants of their predictions, when their labels count."""

_LONGEST_S = 2 * 366 * 86_400.0


def horizon_reader(horizon: LabelHorizon, fields: Collection[str]) -> ReadHorizon:
    """`fields` are the names that an instance has. Raises `InvalidModel` where the horizon is
    counted from none of them.

    NaN where the field has no instant (a null, a text), where the horizon lies before the
    prediction, and where it lies over two years ahead: nobody waits for that.
    """
    source, after_s = horizon.source, horizon.after_s
    if source is None:
        return lambda fields, predicted_s: predicted_s + after_s
    if source not in fields:
        raise InvalidModel(
            f"labels.horizon: {source!r} is no field of an instance: {sorted(fields)}"
        )

    def read(fields: Mapping[str, Sequence[Any]], predicted_s: Instants) -> Instants:
        horizon_s = np.array([_instant(value) for value in fields[source]]) + after_s
        ahead_s = horizon_s - predicted_s
        return np.where((ahead_s > 0) & (ahead_s < _LONGEST_S), horizon_s, np.nan)

    return read


def check_labels(contract: Contract, fields: Collection[str]) -> None:
    """Raises `InvalidModel` where the labels or segments of the contract need a field that its
    instances do not have."""
    SegmentReader(contract, fields)
    if contract.labels is not None:
        horizon_reader(contract.labels.horizon, fields)


def _instant(value: Any) -> float:
    """A date with a time zone, or seconds since 1970."""
    if isinstance(value, datetime):
        return value.timestamp()
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    return float("nan")
