"""Rows that the champion and a candidate were shown."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int32]

NO_DECISION = -1


@dataclass(frozen=True, slots=True)
class Pairs:
    """What both said about `n` rows, block by block; every array has a row an element.

    `block`: the number of the block, which does not fall. A block is one execution of the
    candidate. `champion`, `candidate`: the compared output; of labelled outputs what each says
    about the label that the champion says; NaN where it is no finite number, or there is none.
    `champion_decision`, `candidate_decision`: the number of the decision (0 and 1 of a threshold,
    the label's place of labelled outputs), `NO_DECISION` where there is none. `failed`: the
    candidate gave no answer. `segments`: `[n, dimensions]`, for each dimension of the contract's
    `segments` the number of the row's segment in it. `champion_s`, `candidate_s`: seconds of
    execution for the row: those of its execution over the rows of that.
    """

    block: NDArray[np.int32] | NDArray[np.int64]
    champion: FloatArray
    candidate: FloatArray
    champion_decision: IntArray
    candidate_decision: IntArray
    failed: NDArray[np.bool_]
    segments: IntArray
    champion_s: FloatArray
    candidate_s: FloatArray

    def __len__(self) -> int:
        return len(self.block)


def joined(parts: Sequence[Pairs]) -> Pairs:
    """The pairs of all parts, one at least; their blocks are counted on."""
    blocks = []
    first = 0
    for part in parts:
        numbered = part.block - part.block[0] + first
        blocks.append(numbered)
        first = int(numbered[-1]) + 1
    return Pairs(
        np.concatenate(blocks),
        *(np.concatenate([getattr(part, name) for part in parts]) for name in Pairs.__slots__[1:]),
    )


def scores(champion: FloatArray, candidate: FloatArray) -> tuple[FloatArray, FloatArray]:
    """The compared output of both, from what they said: `[n]`, or `[n, labels]` of labelled
    numbers. Of those it is what each says about the label that the champion says most of, and NaN
    where the champion says no finite number about some label."""
    if champion.ndim == 1:
        return champion, candidate
    said = np.isfinite(champion).all(axis=1)
    label = np.where(np.isfinite(champion), champion, -np.inf).argmax(axis=1)
    rows = np.arange(len(champion))
    return np.where(said, champion[rows, label], np.nan), candidate[rows, label]
