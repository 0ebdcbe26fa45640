"""Rows that the champion has answered and a candidate is to execute at once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from app.comparison.pairs import NO_DECISION, FloatArray, IntArray
from app.contract import Contract
from app.features.source import FeatureRows, joined
from app.instances import Instances
from app.predictor import Answer, Asker
from app.served_model import ServedModel
from app.tensors import Tensors, concatenate, take_rows


@dataclass(frozen=True, slots=True)
class Offered:
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

    def add(self, offered: Offered) -> None:
        self.offered.append(offered)
        self.rows += offered.stop - offered.start

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
        positions = self.offered[0].answer.instances.positions
        rows = [row for o in self.offered for row in o.answer.instances.rows[o.start : o.stop]]
        if list(positions) != list(order):
            places = [positions[name] for name in order]
            rows = [tuple(row[place] for place in places) for row in rows]
        return Instances(rows, {name: at for at, name in enumerate(order)}, {}, verbose=False)

    def features(self) -> FeatureRows:
        """A copy of the stored features that the champion's inputs rest on."""
        parts = []
        for each in self.offered:
            features, first = each.answer.features, each.answer.first_row
            assert features is not None  # its plan has views
            parts.append(features.rows.part(first + each.start, first + each.stop))
        return joined(parts)

    def fields(self) -> Mapping[str, Sequence[Any]]:
        """For each field of the instances its value in every row."""
        return self.instances(tuple(self.offered[0].answer.instances.positions)).fields

    def champion_numbers(self) -> FloatArray:
        """The compared output as it was answered: `[rows]`, or `[rows, labels]` of labelled
        numbers; NaN where that was null."""
        contract = self.champion.contract
        name = contract.score
        labels = contract.outputs[name].labels
        said = [p[name] for o in self.offered for p in o.answer.predictions[o.start : o.stop]]
        if labels is None:
            return np.array(said, np.float64)
        nothing = dict.fromkeys(labels, np.nan)
        rows = [[value[label] for label in labels] for value in (s or nothing for s in said)]
        return np.array(rows, np.float64)

    def champion_decisions(self) -> IntArray:
        """As numbers: 0 or 1 of a threshold, a label's place; `NO_DECISION` where there is none."""
        contract = self.champion.contract
        if contract.decision is None:
            return np.full(self.rows, NO_DECISION, np.int32)
        number = decision_numbers(contract)
        said = [p["decision"] for o in self.offered for p in o.answer.predictions[o.start : o.stop]]
        return np.array([number[decision] for decision in said], np.int32)

    def champion_row_s(self) -> FloatArray:
        """Seconds of execution for each row: those of its execution over all the rows of that."""
        seconds = np.empty(self.rows)
        row = 0
        for each in self.offered:
            outputs = each.answer.executed.execution.outputs
            executed = len(next(iter(outputs.values())))
            took_s = each.answer.finished_s - each.answer.started_s
            stop = row + each.stop - each.start
            seconds[row:stop] = took_s / executed
            row = stop
        return seconds


def decision_numbers(contract: Contract) -> dict[Any, int]:
    """The number of each decision that an answer can hold."""
    decision = contract.decision
    if decision is None:
        return {}
    labels = contract.outputs[decision.output].labels
    names: Sequence[Any] = (False, True) if labels is None else labels
    return {None: NO_DECISION} | {name: number for number, name in enumerate(names)}
