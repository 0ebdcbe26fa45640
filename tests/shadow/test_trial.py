"""What is counted of a candidate: every row that was offered, whatever goes wrong."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app.comparison.pairs import Pairs
from app.comparison.segments import SegmentReader
from app.predictor import Asker
from app.shadow.block import Block, Offered, Said
from app.shadow.pair_log import NoPairLog, Rows
from app.shadow.trial import Records, Trial, TrialId
from app.telemetry.metrics import Metrics
from tests.shadow.lanes import lane


class BrokenLog(NoPairLog):
    """A log with a defect."""

    def note(self, pairs: Pairs, rows: Callable[[], Rows]) -> None:
        raise ZeroDivisionError


class Nobody:
    """Has no labels."""

    def compared(self, *about: Any) -> None: ...


async def test_rows_that_cannot_be_counted_are_told_as_dropped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with lane(tmp_path) as setting:
        answer = await setting.ask({"a": 1, "b": 2}, {"a": 2, "b": 2})
        champion, candidate = setting.champion, setting.lane.candidate
    block = Block(champion, opened_s=0.0)
    block.offered.append(Offered(Asker("0" * 32), answer, 0, 2))
    block.rows = 2
    trial = Trial(
        TrialId.of(champion, candidate, 1),
        candidate.contract,
        SegmentReader(candidate.contract, candidate.decoder.required),
        Records(Metrics(), BrokenLog(), Nobody()),
    )
    trial.count(block, Said(candidate, 2))
    counted = trial.take()
    assert counted is not None
    assert (counted.blocks, counted.dropped) == (0, {"defect": 2})
    assert caplog.messages == ["pairs are not counted"]
