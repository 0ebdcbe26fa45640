"""Rows that the champion has answered and a candidate executes at once, and what both say."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import repeat
from typing import Any, NamedTuple

import msgspec
import numpy as np

from app.comparison.pairs import NO_DECISION, FloatArray, IntArray, Pairs, scores
from app.comparison.segments import SegmentReader
from app.contract import Contract
from app.errors import BackendError
from app.features.source import FeatureRows, joined
from app.instances import Instances
from app.outputs import Prediction
from app.predictor import Answer, Asker
from app.served_model import Candidate, ServedModel
from app.tensors import Tensors, concatenate, take_rows


class Offered(NamedTuple):
    """The instances `start` to `stop` of a request."""

    asker: Asker
    answer: Answer
    start: int
    stop: int


class Block:
    """Rows of requests that one champion answered, in the order of their answers."""

    __slots__ = ("champion", "offered", "opened_s", "rows")

    def __init__(self, champion: ServedModel, opened_s: float) -> None:
        self.champion = champion
        self.opened_s = opened_s
        """Monotonic seconds."""
        self.offered: list[Offered] = []
        self.rows = 0

    def inputs(self) -> Tensors:
        """The rows as the champion got them; those that came together are not copied apart."""
        runs: list[tuple[Tensors, int, int]] = []
        for each in self.offered:
            inputs, first = each.answer.inputs, each.answer.first_input
            start, stop = first + each.start, first + each.stop
            if runs and runs[-1][0] is inputs and runs[-1][2] == start:
                runs[-1] = (inputs, runs[-1][1], stop)
            else:
                runs.append((inputs, start, stop))
        return concatenate([take_rows(*run) for run in runs])

    def instances(self, order: Sequence[str]) -> Instances:
        """What was asked, the values of each row in this order of the fields."""
        instances = _instances(self.offered)
        positions = instances.positions
        if list(positions) == list(order):
            return instances
        places = [positions[name] for name in order]
        rows = [tuple(row[place] for place in places) for row in instances.rows]
        return Instances(rows, {name: at for at, name in enumerate(order)}, {}, verbose=False)

    def overrides(self, names: Collection[str]) -> Mapping[str, Sequence[Any]]:
        """What callers gave themselves of these stored features, in every row."""
        given = {name for each in self.offered for name in each.answer.instances.overrides}
        return {name: self._given(name) for name in given.intersection(names)}

    def _given(self, name: str) -> Sequence[Any]:
        values: list[Any] = []
        for _, answer, start, stop in self.offered:
            of_request = answer.instances.overrides.get(name)
            nothing = repeat(msgspec.UNSET, stop - start)
            values += nothing if of_request is None else of_request[start:stop]
        return values

    def features(self) -> FeatureRows:
        """A copy of the stored features that the champion's inputs rest on."""
        parts = []
        for each in self.offered:
            features, first = each.answer.features, each.answer.first_row
            assert features is not None  # its plan has views
            parts.append(features.rows.part(first + each.start, first + each.stop))
        return joined(parts)

    def answers(self) -> Iterator[Prediction]:
        """What the champion answered, row by row."""
        for offered in self.offered:
            yield from offered.answer.predictions[offered.start : offered.stop]


class Said:
    """What a candidate says about the rows of a block; of those that it does not answer nothing.

    `numbers`: the compared output, `[rows]`, or `[rows, labels]` of labelled numbers, NaN where
    there is none. `decisions`: as numbers (`decision_numbers`). `took_s`: until it had answered.
    """

    __slots__ = ("_candidate", "decisions", "failed", "numbers", "took_s")

    def __init__(self, candidate: Candidate, rows: int) -> None:
        labels = candidate.contract.outputs[candidate.contract.score].labels
        self._candidate = candidate
        self.numbers = np.full((rows,) if labels is None else (rows, len(labels)), np.nan)
        self.decisions = np.full(rows, NO_DECISION, np.int32)
        self.failed = np.ones(rows, np.bool_)
        self.took_s = 0.0

    def fill(self, start: int, rows: int, outputs: Tensors) -> None:
        """Of so many rows from `start` on. Raises `BackendError` for another number of them."""
        for name, tensor in outputs.items():
            if len(tensor) != rows:
                raise BackendError(f"output {name!r} has {len(tensor)} rows for a block of {rows}")
        candidate, stop = self._candidate, start + rows
        self.numbers[start:stop] = candidate.outputs.numbers(candidate.contract.score, outputs)
        self.decisions[start:stop] = candidate.outputs.decisions(outputs)
        self.failed[start:stop] = False


def pairs_of(blocks: Sequence[tuple[Block, Said]], segments: SegmentReader) -> Pairs:
    """What both said, of one block at least; all of one champion and one candidate."""
    contract = blocks[0][0].champion.contract
    offered = [each for block, _ in blocks for each in block.offered]
    answers = [answer for block, _ in blocks for answer in block.answers()]
    champion, candidate = scores(
        _numbers(answers, contract), np.concatenate([said.numbers for _, said in blocks])
    )
    rows = [block.rows for block, _ in blocks]
    return Pairs(
        np.repeat(np.arange(len(blocks), dtype=np.int32), rows),
        champion,
        candidate,
        _decisions(answers, contract),
        np.concatenate([said.decisions for _, said in blocks]),
        np.concatenate([said.failed for _, said in blocks]),
        segments.read(_instances(offered).fields, len(answers)),
        np.repeat(
            [(a.finished_s - a.started_s) / a.executed.execution.rows for _, a, _, _ in offered],
            [stop - start for _, _, start, stop in offered],
        ),
        np.repeat([said.took_s / n for n, (_, said) in zip(rows, blocks, strict=True)], rows),
    )


def _instances(offered: Sequence[Offered]) -> Instances:
    rows = [row for _, answer, start, stop in offered for row in answer.instances.rows[start:stop]]
    return Instances(rows, offered[0].answer.instances.positions, {}, verbose=False)


def _numbers(answers: Sequence[Prediction], contract: Contract) -> FloatArray:
    """The compared output as it was answered: `[rows]`, or `[rows, labels]` of labelled numbers;
    NaN where that was null."""
    name = contract.score
    labels = contract.outputs[name].labels
    said = [answer[name] for answer in answers]
    if labels is None:
        return np.array(said, np.float64)
    nothing = dict.fromkeys(labels, np.nan)
    return np.array([[(each or nothing)[label] for label in labels] for each in said], np.float64)


def _decisions(answers: Sequence[Prediction], contract: Contract) -> IntArray:
    if contract.decision is None:
        return np.full(len(answers), NO_DECISION, np.int32)
    number = decision_numbers(contract)
    return np.array([number[answer["decision"]] for answer in answers], np.int32)


def decision_numbers(contract: Contract) -> dict[Any, int]:
    """The number of each decision that an answer can hold."""
    decision = contract.decision
    if decision is None:
        return {}
    labels = contract.outputs[decision.output].labels
    names: Sequence[Any] = (False, True) if labels is None else labels
    return {None: NO_DECISION} | {name: number for number, name in enumerate(names)}
