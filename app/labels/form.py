"""What labels of a model look like, and what is kept of a prediction to judge it by them."""

import hashlib
from typing import Literal

import msgspec
import numpy as np

from app.comparison.grid import LARGEST
from app.contract import Contract
from app.errors import InvalidInput

VOID = float("nan")
"""In the place of a label: it is known that there will never be one."""


class LabelForm(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`kind` of the labels, the output `score` that they judge, the names of the `classes` (none of
    other kinds), and for each dimension of the contract's segments the names of these."""

    kind: Literal["binary", "class", "number"]
    score: str
    classes: tuple[str, ...]
    segments: tuple[tuple[str, ...], ...]

    @property
    def width(self) -> int:
        """How many numbers a prediction has."""
        return max(len(self.classes), 1)

    def encode(self) -> bytes:
        return msgspec.msgpack.encode(self)

    @property
    def digest(self) -> bytes:
        """8 bytes; what is kept by another form cannot be added to what is kept by this one."""
        return hashlib.sha256(self.encode()).digest()[:8]

    @property
    def row(self) -> np.dtype[np.void]:
        """How a prediction is kept: which version (its place among those of the bucket), when it
        was made and when its label counts (seconds since 1970), of how many its request is, what
        it said, its segments."""
        return np.dtype(
            [
                ("version", "<u2"),
                ("predicted_s", "<f8"),
                ("horizon_s", "<f8"),
                ("of_rows", "<u4"),
                ("numbers", "<f8", (self.width,)),
                ("segments", "u1", (len(self.segments),)),
            ]
        )

    def number_of(self, label: bool | float | str | None, field: str = "label") -> float:
        """A label as a number: 0 or 1, the place of the class, the number; `VOID` of None. Raises
        `InvalidInput` for what is no label of this kind, with the name of its `field`."""
        if label is None:
            return VOID
        match self.kind:
            case "binary" if isinstance(label, bool):
                return float(label)
            case "class" if isinstance(label, str) and label in self.classes:
                return float(self.classes.index(label))
            case "number" if isinstance(label, int | float) and not isinstance(label, bool):
                # Also of an integer that is beyond floating point.
                if -LARGEST <= label <= LARGEST:
                    return float(label)
        raise InvalidInput(f"{field}: {self._expected}, or null", field=field)

    @property
    def _expected(self) -> str:
        match self.kind:
            case "binary":
                return "true or false"
            case "class":
                return f"one of {', '.join(self.classes[:_SHOWN])}"
            case "number":
                return f"a number up to {LARGEST:.3g} either way"


_SHOWN = 20


def form_of(contract: Contract, segments: tuple[tuple[str, ...], ...]) -> LabelForm:
    """Of a contract that has labels; `segments` are the names of its segments."""
    assert contract.labels is not None
    labels = contract.outputs[contract.score].labels
    classes = labels or () if contract.labels.kind == "class" else ()
    return LabelForm(contract.labels.kind, contract.score, tuple(classes), segments)
