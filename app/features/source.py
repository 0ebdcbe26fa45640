"""The port through which rows get their stored features."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from app.deadline import Deadline
from app.features.plan import FeaturePlan

MAX_AHEAD_S = 60.0
"""How far a value's event time may lie ahead of our clock: clocks differ. One that lies further
ahead is not known yet, and NOT_FOUND."""

EntityColumns: TypeAlias = Mapping[str, Sequence[Any]]
"""For each join key and request field of the plan, its value in every row; a join key is None where
the row has no such entity."""


Columns: TypeAlias = Sequence[NDArray[Any]] | NDArray[np.float64]


class ValueStatus(IntEnum):
    """What is known about one stored value. Everything from NOT_FOUND on degrades the answer."""

    PRESENT = 0
    NULL_VALUE = 1
    NOT_FOUND = 2
    OUTSIDE_MAX_AGE = 3
    UNAVAILABLE = 4
    """The store did not answer in time."""


@dataclass(slots=True)  # made for every request: a frozen one takes 1 µs longer to make
class FeatureRows:
    """Features of `n` rows, in the order of `plan.references` and of the rows asked for.

    `columns`: one array of length n a feature, which may be the rows of one array; numbers are
    float64 with NaN for null, anything else is an object array with None for null, as are integers
    when one of them lies beyond ±2**53, where float64 has gaps. A stored value that is not PRESENT
    is null; one made on demand is what its function makes of such nulls, with the worst status of
    what it read.
    `status`: uint8 `[n, features]` of `ValueStatus`. `event_time_s`: float64 `[n, views]`, seconds
    since 1970, NaN where the view has no row for the entity; of a view made on demand, the oldest
    of what it read.
    """

    plan: FeaturePlan
    columns: Columns
    status: NDArray[np.uint8]
    event_time_s: NDArray[np.float64]

    def part(self, start: int, stop: int) -> "FeatureRows":
        """Some of the rows, as views of the same arrays."""
        columns: Columns = (
            self.columns[:, start:stop]
            if isinstance(self.columns, np.ndarray)
            else [column[start:stop] for column in self.columns]
        )
        return FeatureRows(
            self.plan, columns, self.status[start:stop], self.event_time_s[start:stop]
        )


def joined(parts: Sequence[FeatureRows]) -> FeatureRows:
    """The rows of all parts, which are of one plan, one after the other."""
    return FeatureRows(
        parts[0].plan,
        [
            _end_to_end([part.columns[feature] for part in parts])
            for feature in range(len(parts[0].plan.references))
        ],
        np.concatenate([part.status for part in parts]),
        np.concatenate([part.event_time_s for part in parts]),
    )


def _end_to_end(columns: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Integers beyond ±2**53 in one of them make the others objects too, with None for null."""
    if len({column.dtype for column in columns}) > 1:
        columns = [
            column
            if column.dtype == object
            else np.array([None if v != v else int(v) for v in column.tolist()], dtype=object)
            for column in columns
        ]
    return np.concatenate(columns)


class FeatureSource(Protocol):
    """Reads the features of one plan."""

    @property
    def plan(self) -> FeaturePlan: ...

    async def fetch(self, entities: EntityColumns, rows: int, deadline: Deadline) -> FeatureRows:
        """Features of `rows` rows by the deadline.

        Raises `FeaturesUnavailable` when the store does not answer by then; cancelling leaves
        nothing behind.
        """
        ...

    async def check(self) -> None:
        """Raises `FeaturesUnavailable`, saying why, when a fetch could not succeed now."""
        ...


def empty_column(value_type: str, rows: int) -> NDArray[Any]:
    """`rows` nulls of a value type."""
    if value_type == "number":
        return np.full(rows, np.nan)
    return np.full(rows, None, dtype=object)


def all_with_status(plan: FeaturePlan, rows: int, status: ValueStatus) -> FeatureRows:
    """Rows in which every value is null for the same reason."""
    return FeatureRows(
        plan,
        tuple(empty_column(plan.value_types[name], rows) for name in plan.references),
        np.full((rows, len(plan.references)), status, dtype=np.uint8),
        np.full((rows, len(plan.views)), np.nan),
    )
