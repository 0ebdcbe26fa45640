"""Turns the model's output tensors into the named values and the decision of each prediction."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite, nan
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from app.contract import Decision, Output
from app.errors import BackendError, InvalidModel
from app.tensors import Signature, Tensors, TensorSpec, row_count

Prediction: TypeAlias = dict[str, Any]
"""Output name → number, or label → number; with `decision` where the contract declares one. Null
where the model returned no finite number and the contract answers that with null."""

_SHOWN = 10


class NotFinite(BackendError):
    """The model returned no finite number in these `rows` of an output, by its name, and the
    contract refuses that."""

    def __init__(self, rows: Mapping[str, Sequence[int]]) -> None:
        self.rows = rows
        faults = [f"{name!r} of {_instances(of_output)}" for name, of_output in rows.items()]
        super().__init__(f"the model returned no finite number as {' and '.join(faults)}")


@dataclass(slots=True)
class Readout:
    """What the model's output tensors say.

    `predictions`: one a row. `distributions`: for each output the finite numbers that describe its
    distribution: the output itself, or the largest of labelled ones. `not_finite`: for each output
    that has such rows, those in which it is null because the model returned no finite number.
    """

    predictions: list[Prediction]
    distributions: Mapping[str, Sequence[float]]
    not_finite: Mapping[str, Sequence[int]]

    def not_finite_in(self, start: int, stop: int) -> Mapping[str, Sequence[int]]:
        """`not_finite` of the rows `start` to `stop`, the first of which counts as 0."""
        found = {
            name: [row - start for row in rows if start <= row < stop]
            for name, rows in self.not_finite.items()
        }
        return {name: rows for name, rows in found.items() if rows}


class OutputReader:
    """Reads predictions by the contract's outputs. Raises `InvalidModel` where the signature has no
    such tensor or the tensor is of another width."""

    def __init__(
        self, outputs: Mapping[str, Output], decision: Decision | None, signature: Signature
    ) -> None:
        tensors = {spec.name: spec for spec in signature.outputs}
        for name, output in outputs.items():
            _check_width(name, output, tensors)
        self._outputs = dict(outputs)
        self._decision = decision
        self._decide = None if decision is None else _decider(decision, outputs[decision.output])

    @property
    def names(self) -> Sequence[str]:
        return list(self._outputs)

    def read(self, tensors: Tensors) -> Readout:
        """Raises `NotFinite` where the contract refuses a value that JSON has no word for."""
        read = self.read_all(tensors)
        if read.not_finite:
            self.refuse(read.not_finite)
        return read

    def read_all(self, tensors: Tensors) -> Readout:
        """The same of the rows of several callers, who must not be refused for each other's."""
        columns: dict[str, list[Any]] = {}
        distributions: dict[str, Sequence[float]] = {}
        not_finite: dict[str, Sequence[int]] = {}
        for name, output in self._outputs.items():
            column = numbers = _values(output, tensors).tolist()
            if output.labels is not None:
                numbers = [_largest(row) for row in column]
                column = [dict(zip(output.labels, row, strict=True)) for row in column]
            if not all(map(isfinite, numbers)):
                not_finite[name] = [row for row, n in enumerate(numbers) if not isfinite(n)]
                column = [v if isfinite(n) else None for v, n in zip(column, numbers, strict=True)]
                numbers = [number for number in numbers if isfinite(number)]
            columns[name] = column
            distributions[name] = numbers
        if self._decide is not None:
            columns["decision"] = self._decide(columns)
        # Of one row, as most requests are, zip with `strict` takes longer than all the rest.
        predictions: list[Prediction] = [
            {name: values[row] for name, values in columns.items()} for row in range(len(column))
        ]
        return Readout(predictions, distributions, not_finite)

    def numbers(self, name: str, tensors: Tensors) -> NDArray[np.float64]:
        """What this output says: shape `[rows]`, or `[rows, labels]` of labelled numbers."""
        return _values(self._outputs[name], tensors).astype(np.float64)

    def decisions(self, tensors: Tensors) -> NDArray[np.int32]:
        """The decision of each row as a number: 0 or 1 of a threshold, the label's place of
        labelled numbers; -1 where there is none."""
        if self._decision is None:
            return np.full(row_count(tensors), -1, np.int32)
        numbers = self.numbers(self._decision.output, tensors)
        given = self._decision.at_least
        at_least = -inf if given is None else given
        if numbers.ndim == 1:
            decided = np.where(np.isfinite(numbers), numbers >= at_least, -1)
        else:
            finite = np.isfinite(numbers).all(axis=1)
            enough = numbers.max(axis=1) >= at_least
            decided = np.where(finite & enough, numbers.argmax(axis=1), -1)
        return decided.astype(np.int32)

    def refuse(self, not_finite: Mapping[str, Sequence[int]]) -> None:
        """Raises `NotFinite` where the contract has such outputs refused."""
        refused = {
            name: rows
            for name, rows in not_finite.items()
            if self._outputs[name].when_not_finite == "refuse"
        }
        if refused:
            raise NotFinite(refused)


def _largest(row: Sequence[float]) -> float:
    return max(row) if all(map(isfinite, row)) else nan


def _instances(rows: Sequence[int]) -> str:
    shown = ", ".join(f"instances[{row}]" for row in rows[:_SHOWN])
    return shown if len(rows) <= _SHOWN else f"{shown} and {len(rows) - _SHOWN} more"


def _check_width(name: str, output: Output, tensors: Mapping[str, TensorSpec]) -> None:
    spec = tensors.get(output.tensor)
    if spec is None:
        raise InvalidModel(
            f"outputs.{name}: the model has no output {output.tensor!r}, it has {sorted(tensors)}"
        )
    width = spec.shape[0] if len(spec.shape) == 1 else 1
    known = len(spec.shape) == 0 or (len(spec.shape) == 1 and width > 0)
    if not known or spec.dtype == "str":
        raise InvalidModel(f"outputs.{name}: cannot read {spec.dtype}{list(spec.shape)} a row")
    if output.labels is not None and len(output.labels) != width:
        raise InvalidModel(f"outputs.{name}: {len(output.labels)} labels for {width} numbers")
    if output.column is not None and output.column >= width:
        raise InvalidModel(f"outputs.{name}: no column {output.column} in {width} numbers")
    if output.labels is None and output.column is None and width != 1:
        raise InvalidModel(f"outputs.{name}: {width} numbers a row need `column` or `labels`")


def _values(output: Output, tensors: Tensors) -> NDArray[Any]:
    """Shape `[rows]`, or `[rows, labels]` for a labelled output."""
    tensor = tensors[output.tensor]
    if output.labels is not None:
        return tensor
    return tensor if tensor.ndim == 1 else tensor[:, output.column or 0]


def _decider(
    decision: Decision, output: Output
) -> Callable[[Mapping[str, list[Any]]], list[bool | str | None]]:
    """Decides on the columns of the outputs; null where the output is null."""
    name, at_least = decision.output, decision.at_least
    if output.labels is None:
        return lambda columns: [None if v is None else v >= at_least for v in columns[name]]

    def label(value: Mapping[str, float] | None) -> str | None:
        if value is None:
            return None
        best = max(value, key=value.__getitem__)
        return best if at_least is None or value[best] >= at_least else None

    return lambda columns: [label(value) for value in columns[name]]
