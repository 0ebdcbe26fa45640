"""Tables of exposures: they add, are read again, and say what a verdict takes."""

import msgspec
import pytest

from app.canary.table import (
    ArmTable,
    ExposureTable,
    UnreadableExposures,
    began_of,
    table_name,
)
from app.evidence.counts import Arm
from app.evidence.plan import Stage


def table(n: int) -> ExposureTable:
    arm = ArmTable(10 * n, 9 * n, 1, n, 2 * n)
    arm.answered([0.001 * n, 0.5])
    made = ExposureTable(arm, ArmTable(n), {(0, 0): n, (n, 1): 1}, {(1, 0): 2}, {(2, 1): n}, n)
    made.leave_out("override", n)
    return made


def test_tables_add_in_any_order_and_leave_their_parts_as_they_were() -> None:
    one, two, three = (table(n) for n in (1, 2, 3))
    assert one + two + three == three + one + two
    assert (one + two).errors == {(0, 0): 3, (1, 1): 1, (2, 1): 1}
    assert one == table(1)


def test_a_table_is_read_as_it_was_written() -> None:
    assert ExposureTable.decode(table(3).encode()) == table(3)
    assert ExposureTable.decode(ExposureTable().encode()) == ExposureTable()


@pytest.mark.parametrize("content", [b"", b"\x00", msgspec.msgpack.encode([99, "?"])])
def test_what_is_no_table_of_ours_is_refused(content: bytes) -> None:
    with pytest.raises(UnreadableExposures):
        ExposureTable.decode(content)


def test_counts_are_what_a_verdict_takes() -> None:
    stage = Stage(0.1, 20, 0.25)
    counts = table(2).counts(stage, 60.0)
    assert (counts.stage, counts.seconds, counts.misrouted) == (stage, 60.0, 2)
    assert counts.candidate == Arm(20, 18, 1, 2, 4)
    assert counts.champion == Arm(2)
    assert (counts.errors, counts.slow) == ([(0, 0, 2), (2, 1, 1)], [(1, 0, 2)])
    assert counts.median == [(2, 1, 2)]


def test_a_quantile_is_right_to_a_bin() -> None:
    arm = ArmTable()
    arm.answered([n / 1_000 for n in range(1, 1_001)])
    for q in (0.5, 0.99, 1.0):
        assert arm.quantile_s(q) == pytest.approx(q, rel=0.035)
    assert ArmTable().quantile_s(0.99) is None


def test_the_name_says_in_which_generation_the_stage_began() -> None:
    assert began_of(table_name("a_model", 17)) == 17
