"""Which of the contract's segments a row belongs to."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from app.comparison.pairs import IntArray
from app.contract import Contract, Segment
from app.errors import InvalidModel
from app.features.encoding import PLAIN_TRANSFORMS


class SegmentReader:
    """Tells the rows of one contract's instances apart.

    `fields` are the names that an instance has. Raises `InvalidModel` that names the segment of
    which the `from` is none of them, or that has edges for what is no number.
    """

    def __init__(self, contract: Contract, fields: Collection[str]) -> None:
        self.names = tuple(segment.names(name) for name, segment in contract.segments.items())
        """For each dimension the names of its segments, `other` the last one."""
        self._dimensions = [
            (segment.source or name, _numbering(name, segment))
            for name, segment in contract.segments.items()
        ]
        for name, (source, _) in zip(contract.segments, self._dimensions, strict=True):
            if source not in fields:
                raise InvalidModel(
                    f"segments.{name}: {source!r} is no field of an instance: {sorted(fields)}"
                )

    def read(self, fields: Mapping[str, Sequence[Any]], rows: int) -> IntArray:
        """`[rows, dimensions]`: the place of each row's segment in `names`. It raises for no
        value: what is none of the segments is `other`."""
        numbers = np.empty((rows, len(self._dimensions)), dtype=np.int32)
        for index, (source, number) in enumerate(self._dimensions):
            numbers[:, index] = number(fields[source])
        return numbers


def _numbering(name: str, segment: Segment) -> Callable[[Sequence[Any]], Sequence[int] | IntArray]:
    """What gives each value of a column the number of its segment."""
    if segment.values is not None:
        places: dict[str | None, int] = {value: at for at, value in enumerate(segment.values)}
        other = len(places)
        return lambda values: [places.get(_as_text(value), other) for value in values]
    assert segment.edges is not None
    if segment.transform in {"category", "text"}:
        raise InvalidModel(
            f"segments.{name}: `as: {segment.transform}` needs `values`, not `edges`"
        )
    edges = np.array(segment.edges)
    transform = PLAIN_TRANSFORMS[segment.transform]

    def number(values: Sequence[Any]) -> IntArray:
        numbers = np.array(
            values
            if segment.transform == "number" and all(map(_is_float, values))
            else [_as_number(transform, value) for value in values],
            dtype=np.float64,
        )
        places = np.searchsorted(edges, numbers, side="right")
        return np.where(np.isnan(numbers), len(edges) + 1, places).astype(np.int32)

    return number


def _is_float(value: Any) -> bool:
    return type(value) is float


def _as_text(value: Any) -> str | None:
    """As JSON would show it; None for what has no one spelling, a null or a float say."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, int) else None


def _as_number(transform: Callable[[Any], Any], value: Any) -> float:
    """NaN for what has none."""
    try:
        number = transform(value)
        return float(number) if isinstance(number, int | float) else np.nan
    except (AttributeError, OverflowError):  # no instant, an integer beyond floating point
        return np.nan
