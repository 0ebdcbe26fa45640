"""Named arrays whose first axis is the row, and the signature that describes them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Tensor: TypeAlias = NDArray[Any]
Tensors: TypeAlias = Mapping[str, Tensor]
"""Tensors by name; all have the same length on axis 0, the rows. Never changed in place."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """`dtype` is numpy's name (`float32`, `int64`, `str`, …); `shape` excludes the row axis, -1 is
    any length."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "TensorSpec":
        return cls(document["name"], document["dtype"], tuple(document["shape"]))


@dataclass(frozen=True, slots=True)
class Signature:
    """The tensors that a model takes and returns."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "inputs": [spec.to_json() for spec in self.inputs],
            "outputs": [spec.to_json() for spec in self.outputs],
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "Signature":
        return cls(
            tuple(TensorSpec.from_json(spec) for spec in document["inputs"]),
            tuple(TensorSpec.from_json(spec) for spec in document["outputs"]),
        )


def row_count(tensors: Tensors) -> int:
    return len(next(iter(tensors.values())))


def concatenate(parts: Sequence[Tensors]) -> Tensors:
    """Rows of all parts, in order. The parts must have the same names."""
    if len(parts) == 1:
        return parts[0]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def take_rows(tensors: Tensors, start: int, stop: int) -> Tensors:
    """Views of rows `start` to `stop`; nothing is copied."""
    return {name: tensor[start:stop] for name, tensor in tensors.items()}
