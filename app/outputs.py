"""Turns the model's output tensors into the named values and the decision of each prediction."""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from app.contract import Decision, Output
from app.errors import BackendError, InvalidModel
from app.tensors import Signature, Tensors, TensorSpec

Prediction: TypeAlias = dict[str, Any]
"""Output name → number, or label → number; with `decision` where the contract declares one."""


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
        self._decide = None if decision is None else _decider(decision, outputs[decision.output])

    def read(self, tensors: Tensors) -> tuple[list[Prediction], Mapping[str, NDArray[Any]]]:
        """One prediction a row, and the number that describes each output's distribution: the
        output itself, or the largest of labelled ones.

        Raises `BackendError` when a value is not finite: JSON has no word for it and a caller could
        not tell it from an answer.
        """
        values = {name: _values(output, tensors) for name, output in self._outputs.items()}
        for name, value in values.items():
            if not np.isfinite(value).all():
                raise BackendError(f"the model returned a value of {name!r} that is not finite")
        columns = [self._column(name, value) for name, value in values.items()]
        predictions = [dict(zip(values, row, strict=True)) for row in zip(*columns, strict=True)]
        if self._decide is not None:
            for prediction in predictions:
                prediction["decision"] = self._decide(prediction)
        return predictions, {
            name: value if value.ndim == 1 else value.max(axis=1) for name, value in values.items()
        }

    def _column(self, name: str, value: NDArray[Any]) -> list[Any]:
        labels = self._outputs[name].labels
        numbers: list[Any] = value.tolist()
        if labels is None:
            return numbers
        return [dict(zip(labels, row, strict=True)) for row in numbers]


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


def _decider(decision: Decision, output: Output) -> Callable[[Prediction], Any]:
    name, at_least = decision.output, decision.at_least
    if output.labels is None:
        return lambda prediction: prediction[name] >= at_least

    def label(prediction: Prediction) -> str | None:
        best = max(prediction[name], key=prediction[name].__getitem__)
        return best if at_least is None or prediction[name][best] >= at_least else None

    return label
