"""Turns columns of values into the model's input tensors: the one implementation that training and
serving share."""

import struct
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from operator import itemgetter
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from app.contract import Column, InputTensor, is_stored_feature
from app.errors import InvalidInput
from app.features.source import Columns
from app.tensors import Tensors

ValueColumn: TypeAlias = Sequence[Any] | NDArray[Any]
"""One value a row: an array of a stored feature, or the plain values of an instance's field."""

Categories: TypeAlias = Mapping[str, Mapping[str, float]]
"""For each source that is encoded `as: category`, the number that stands for each category."""

_Transform: TypeAlias = Callable[[Any], Any]
"""What the model gets for one value."""


# For fewer `struct` is faster than numpy.
_FEW_ROWS = 4


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

    def makes_the_same_as(self, other: "Encoder") -> bool:
        """Whether both make the same tensors of the same values."""
        return self._inputs == other._inputs and self._categories == other._categories

    def for_rows(self, fields: Sequence[str], features: Sequence[str] = ()) -> "RowEncoder | None":
        """The same for rows that hold these sources, in this order, and for columns of those; None
        where a tensor has others than floating-point numbers."""
        if any(spec.dtype not in _FLOATS for spec in self._inputs):
            return None
        return RowEncoder(self._inputs, self._categories, fields, features)

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
        if column.transform == "number" and _is_plain(values):
            return values
        transform = _transform(column, self._categories)
        return [transform(value) for value in values]


class RowEncoder:
    """Encodes rows and the columns of their features, bit for bit as `Encoder` does, and faster.

    A few rows are written by `struct`, in a tenth of the time that lists of 32 columns take; of
    more the features are written all at once.
    """

    def __init__(
        self,
        inputs: Sequence[InputTensor],
        categories: Categories,
        fields: Sequence[str],
        features: Sequence[str],
    ) -> None:
        order = [*fields, *features]
        self._tensors = [_RowTensor(spec, categories, order, len(fields)) for spec in inputs]

    def encode(
        self, rows: Sequence[Sequence[Any]], columns: Columns | None = None
    ) -> Tensors | None:
        """Input tensors of shape `[rows, columns]`, by name, perhaps read-only.

        `rows` hold the values of the fields, `columns` those of the features. None where a value is
        no number or none that its tensor can hold: `Encoder` then says what becomes of it.
        """
        try:
            if isinstance(columns, np.ndarray) and len(rows) >= _FEW_ROWS:
                with np.errstate(over="raise", invalid="raise"):
                    return {t.name: t.encode_columns(rows, columns) for t in self._tensors}
            whole = rows if columns is None else _joined(rows, columns)
            return {tensor.name: tensor.encode(whole) for tensor in self._tensors}
        except (struct.error, FloatingPointError, OverflowError, TypeError, ValueError):
            return None


class _RowTensor:
    def __init__(
        self, spec: InputTensor, categories: Categories, order: Sequence[str], fields: int
    ) -> None:
        self.name = spec.tensor
        self._dtype = np.dtype(spec.dtype)
        self._width = len(spec.columns)
        self._pack = struct.Struct(f"={self._width}{_FLOATS[spec.dtype]}").pack
        places = [order.index(column.source) for column in spec.columns]
        self._in_order = places == list(range(len(order)))
        self._pick = itemgetter(*places) if len(places) > 1 else _only(places[0])
        self._transforms = [
            (index, _transform(column, categories))
            for index, column in enumerate(spec.columns)
            if column.transform != "number"
        ]
        plain = [
            column.transform == "number" and place >= fields
            for column, place in zip(spec.columns, places, strict=True)
        ]
        whole = [index for index in range(self._width) if plain[index]]
        self._whole = _index(whole)
        self._features = _index([places[index] - fields for index in whole])
        self._others = [
            (index, place, place - fields, _transform(column, categories))
            for index, (column, place) in enumerate(zip(spec.columns, places, strict=True))
            if not plain[index]
        ]

    def encode(self, rows: Sequence[Sequence[Any]]) -> NDArray[Any]:
        if not self._in_order:
            rows = [self._pick(row) for row in rows]
        if self._transforms:
            rows = [self._transformed(row) for row in rows]
        packed = b"".join([self._pack(*row) for row in rows])
        return np.ndarray((len(rows), self._width), self._dtype, packed)

    def encode_columns(
        self, rows: Sequence[Sequence[Any]], columns: NDArray[np.float64]
    ) -> NDArray[Any]:
        """`columns` `[features, rows]`."""
        tensor = np.empty((len(rows), self._width), dtype=self._dtype)
        tensor[:, self._whole] = columns[self._features].T
        for index, place, feature, transform in self._others:
            values = [row[place] for row in rows] if feature < 0 else columns[feature].tolist()
            tensor[:, index] = values if transform is _number else [transform(v) for v in values]
        return tensor

    def _transformed(self, row: Sequence[Any]) -> Sequence[Any]:
        values = list(row)
        for index, transform in self._transforms:
            values[index] = transform(values[index])
        return values


def _joined(rows: Sequence[Sequence[Any]], columns: Columns) -> Sequence[Sequence[Any]]:
    """The values of each row followed by its features."""
    if isinstance(columns, np.ndarray):
        features = columns.T.tolist()
    else:
        features = zip(*[column.tolist() for column in columns], strict=True)
    return [(*values, *more) for values, more in zip(rows, features, strict=True)]


def _index(places: Sequence[int]) -> slice | Sequence[int]:
    """A slice where the places are consecutive: numpy is several times faster with it."""
    first = places[0] if places else 0
    consecutive = list(places) == list(range(first, first + len(places)))
    return slice(first, first + len(places)) if consecutive else places


def _only(place: int) -> Callable[[Sequence[Any]], Sequence[Any]]:
    return lambda row: (row[place],)


def _is_plain(values: ValueColumn) -> bool:
    return isinstance(values, np.ndarray) and values.dtype != object


def _transform(column: Column, categories: Categories) -> _Transform:
    if column.transform == "category":
        known = categories[column.source]
        return lambda value: known.get(value, np.nan)
    return PLAIN_TRANSFORMS[column.transform]


def _number(value: Any) -> Any:
    return np.nan if value is None else value


def _minute_of_day(value: datetime | None) -> float:
    """0 to 1439, on the clock of the place that the timestamp's own offset names."""
    return np.nan if value is None else value.hour * 60 + value.minute


def _day_of_week(value: datetime | None) -> float:
    """Monday is 0, in the timestamp's own offset."""
    return np.nan if value is None else value.weekday()


def _text(value: Any) -> Any:
    return "" if value is None else value


PLAIN_TRANSFORMS: Mapping[str, _Transform] = {
    "number": _number,
    "minute_of_day": _minute_of_day,
    "day_of_week": _day_of_week,
    "text": _text,
}
"""Those for which nothing has to be learnt: by its name, what a transform makes of one value."""

_FLOATS = {"float32": "f", "float64": "d"}
"""The sign of each floating-point type in `struct`."""
