"""Rows with what a model said about them when it was verified."""

from dataclasses import dataclass

import numpy as np

from app.tensors import Tensor, Tensors, take_rows

_ROWS = 8


@dataclass(frozen=True, slots=True)
class Reference:
    """A few rows and their outputs."""

    inputs: Tensors
    outputs: Tensors

    def differs(self, outputs: Tensors) -> str:
        """The output that is not the same, empty where all are; rounding is forgiven."""
        return next((n for n in self.outputs if not _same(self.outputs[n], outputs[n])), "")


def reference_rows(example: Tensors, max_rows: int) -> Tensors:
    return take_rows(example, 0, min(_ROWS, max_rows))


def _same(expected: Tensor, found: Tensor) -> bool:
    if expected.shape != found.shape:
        return False
    if expected.dtype.kind == "f":
        return bool(np.allclose(expected, found, rtol=1e-3, atol=1e-4, equal_nan=True))
    return bool(np.array_equal(expected, found))
