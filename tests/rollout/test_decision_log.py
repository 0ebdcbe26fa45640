"""The decision log on disks that are full, that hang, and after a process was killed."""

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.evidence.counts import Counts
from app.evidence.plan import Plan
from app.evidence.verdict import Verdict
from app.rollout.decision_log import Decision, DecisionLog, UnreadableDecision, decisions


def decision(generation: int) -> Decision:
    counts, verdict = Counts({}, ()), Verdict("hold", ("waits",), ())
    return Decision(1.0, "w", "m", 2, "bb" * 32, generation, Plan(), counts, verdict, "")


def generations(path: Path) -> list[int]:
    return [each.generation for each in decisions(path)]


@pytest.fixture
def log(tmp_path: Path) -> Iterator[DecisionLog]:
    log = DecisionLog(tmp_path / "decisions")
    yield log
    log.close()


@pytest.mark.parametrize("kept", [1, 15, 20, 120, -2])
async def test_what_is_left_of_a_line_spoils_no_other(
    log: DecisionLog, caplog: pytest.LogCaptureFixture, kept: int
) -> None:
    """Wherever it was torn."""
    path = log.path("m")
    for generation in (1, 2):
        await log.append(decision(generation))
    first, second, _ = path.read_bytes().split(b"\n")
    path.write_bytes(first + b"\n" + second[:kept])
    assert generations(path) == [1]
    await log.append(decision(3))
    await log.append(decision(4))
    assert generations(path) == [1, 3, 4]
    assert caplog.messages == [f"{path}: line 2 is torn, and left out"]


async def test_lines_that_were_glued_together_are_left_out(log: DecisionLog) -> None:
    path = log.path("m")
    await log.append(decision(1))
    line = path.read_bytes()
    path.write_bytes(line + line[:12] + line + b"\0" * 100 + b"\n" + line)
    assert generations(path) == [1, 1]


@pytest.mark.parametrize("other", [b'{"form":9}\n', b"[]\n"])
async def test_a_line_of_another_form_is_refused_by_its_number(
    log: DecisionLog, other: bytes
) -> None:
    path = log.path("m")
    await log.append(decision(1))
    with path.open("ab") as file:
        file.write(other)
    with pytest.raises(UnreadableDecision, match=r"m\.jsonl: line 2"):
        generations(path)


async def test_a_disk_that_hangs_holds_nobody_up(
    log: DecisionLog, caplog: pytest.LogCaptureFixture
) -> None:
    path = log.path("m")
    path.parent.mkdir()
    os.mkfifo(path)  # who opens it waits for somebody at its other end
    async with asyncio.timeout(10):
        await log.append(decision(1))
    assert caplog.messages == ["a decision is not in the decision log"]
    # Both ends, so that whoever waits goes on.
    os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK))
