"""Turns columns of values into the model's input tensors: the one implementation that training and
serving share."""

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from app.contract import Column, InputTensor, is_stored_feature
from app.errors import InvalidInput
from app.tensors import Tensors

ValueColumn: TypeAlias = Sequence[Any] | NDArray[Any]
"""One value a row: an array of a stored feature, or the plain values of an instance's field."""

Categories: TypeAlias = Mapping[str, Mapping[str, float]]
"""For each source that is encoded `as: category`, the number that stands for each category."""


class StoredMisfit(Exception):
    """The stored feature `source` does not fit its tensor in `rows`."""

    def __init__(self, source: str, rows: Sequence[int], text: str) -> None:
        super().__init__(f"instances[{rows[0]}]: the stored {source} {text}")
        self.source = source
        self.rows = rows


class Encoder:
    """Encodes rows by the columns that model.yaml declares.

    `categories` is what training learnt; a category that training never saw is NaN, as is a null.
    """

    def __init__(self, inputs: Sequence[InputTensor], categories: Categories) -> None:
        self._inputs = tuple(inputs)
        self._categories = categories
        self.sources = frozenset(column.source for spec in inputs for column in spec.columns)
        """The features and fields that the columns are made of."""

    def encode(self, columns: Mapping[str, ValueColumn], rows: int) -> Tensors:
        """Input tensors of shape `[rows, columns]`, by name. `columns` holds every source.

        A value that the tensor's type does not have raises `InvalidInput` where the caller sent it
        and `StoredMisfit` where it was stored: left to itself, numpy writes infinity for a float
        too large and -2**63 for a missing integer.
        """
        with np.errstate(over="raise", invalid="raise"):
            return {spec.tensor: self._tensor(spec, columns, rows) for spec in self._inputs}

    def _tensor(
        self, spec: InputTensor, columns: Mapping[str, ValueColumn], rows: int
    ) -> NDArray[Any]:
        dtype = np.dtype(object if spec.dtype == "str" else spec.dtype)
        tensor = np.empty((rows, len(spec.columns)), dtype=dtype)
        for index, column in enumerate(spec.columns):
            self._write(tensor[:, index], column, columns[column.source])
        return tensor

    def _write(self, target: NDArray[Any], column: Column, values: ValueColumn) -> None:
        try:
            target[:] = self._transformed(column, values)
        except (FloatingPointError, OverflowError, ValueError, TypeError):
            raise self._misfit(target, column, values) from None

    def _misfit(
        self, target: NDArray[Any], column: Column, values: ValueColumn
    ) -> "InvalidInput | StoredMisfit":
        rows = []
        for row in range(len(target)):
            try:
                target[row : row + 1] = self._transformed(column, values[row : row + 1])
            except (FloatingPointError, OverflowError, ValueError, TypeError):
                rows.append(row)
        text = f"does not fit the model's {target.dtype}"
        if is_stored_feature(column.source):
            return StoredMisfit(column.source, rows, text)
        field = f"instances[{rows[0]}].{column.source}"
        return InvalidInput(f"{field}: {text}", field=field)

    def _transformed(self, column: Column, values: ValueColumn) -> ValueColumn:
        if column.transform == "category":
            return _categories(values, self._categories[column.source])
        return _TRANSFORMS[column.transform](values)


def _numbers(values: ValueColumn) -> ValueColumn:
    if isinstance(values, np.ndarray) and values.dtype != object:
        return values
    return [np.nan if value is None else value for value in values]


def _categories(values: ValueColumn, known: Mapping[str, float]) -> ValueColumn:
    return [known.get(value, np.nan) for value in values]


def _minutes_of_day(values: Sequence[datetime | None]) -> ValueColumn:
    """0 to 1439, on the clock of the place that the timestamp's own offset names."""
    return [np.nan if value is None else value.hour * 60 + value.minute for value in values]


def _days_of_week(values: Sequence[datetime | None]) -> ValueColumn:
    """Monday is 0, in the timestamp's own offset."""
    return [np.nan if value is None else value.weekday() for value in values]


def _texts(values: ValueColumn) -> ValueColumn:
    return ["" if value is None else value for value in values]


_TRANSFORMS: Mapping[str, Callable[[Any], ValueColumn]] = {
    "number": _numbers,
    "minute_of_day": _minutes_of_day,
    "day_of_week": _days_of_week,
    "text": _texts,
}
