"""The rows that every contender is asked about, and the entities that they belong to."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

FIELDS = tuple(f"f{number:02}" for number in range(32))
ROWS = 2_000
SEED = 20131231

VIEWS: Mapping[str, tuple[str, Sequence[str]]] = {
    "driver_stats": ("driver_id", FIELDS[:20]),
    "customer_stats": ("customer_id", FIELDS[20:]),
}
"""Of feature_repo/definitions.py: the join key of each view, and its features."""

REFERENCES = tuple(f"{view}:{field}" for view, (_, fields) in VIEWS.items() for field in fields)
"""The features in the order of the model's columns."""

_FIRST_DRIVER = 100_000
_FIRST_CUSTOMER = 700_000
# It has no divisor in common with ROWS: every customer is met once, never in the drivers' order.
_CUSTOMERS_APART = 7


def varied_rows(count: int, seed: int) -> NDArray[np.float32]:
    """Normal values with four decimals, `[count, 32]`; no two rows are the same."""
    values = np.random.default_rng(seed).normal(size=(count, len(FIELDS)))
    return values.round(4).astype(np.float32)


def entities_of(row: int) -> dict[str, int]:
    """Whose features the row holds: a driver's and a customer's, who meet in no other row."""
    return {
        "driver_id": _FIRST_DRIVER + row,
        "customer_id": _FIRST_CUSTOMER + row * _CUSTOMERS_APART % ROWS,
    }


def as_numbers(row: NDArray[np.float32]) -> list[float]:
    """The row's values as people would write them, four decimals."""
    return [round(float(value), 4) for value in row]


def as_fields(row: NDArray[np.float32]) -> dict[str, float]:
    return dict(zip(FIELDS, as_numbers(row), strict=True))
