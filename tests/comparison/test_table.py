"""Counts of pairs: what they are, and that they are the same however they were gathered."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from functools import reduce
from operator import add

import msgspec
import numpy as np
import pytest

from app.comparison import grid
from app.comparison.document import comparison_document
from app.comparison.pairs import Pairs, joined, scores
from app.comparison.table import SHIFT_STEPS, ComparisonTable, Group, UnreadableTable, joint_bins
from tests.comparison.drawn_pairs import NAMES, drawn, in_pieces, taken


def counted(*pieces: Pairs) -> ComparisonTable:
    table = ComparisonTable.empty(NAMES, decisions=2, bounded=True)
    for instant, pairs in enumerate(pieces):
        table.add(pairs, float(instant))
    return table


def same(one: ComparisonTable, other: ComparisonTable) -> None:
    """Counts exactly, sums to rounding."""
    ours, theirs = (msgspec.msgpack.decode(table.encode(), strict=False) for table in (one, other))
    _same(ours, theirs)


def _same(one: object, other: object) -> None:
    if isinstance(one, dict) and isinstance(other, dict):
        assert one.keys() == other.keys()
        for key in one:
            _same(one[key], other[key])
    elif isinstance(one, list) and isinstance(other, list):
        assert len(one) == len(other)
        for ours, theirs in zip(one, other, strict=True):
            _same(ours, theirs)
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=1e-12, abs=1e-12)
    else:
        assert one == other


@pytest.mark.parametrize("seed", range(4))
def test_what_is_added_at_once_equals_what_is_added_in_pieces(seed: int) -> None:
    pairs = drawn(seed, 400)
    pieces = in_pieces(pairs, 1 + 30 * seed)
    whole, parts = counted(pairs), counted(*pieces)
    whole.first_s = whole.last_s = parts.first_s = parts.last_s = 0.0
    same(whole, parts)


@pytest.mark.parametrize("seed", range(4))
def test_tables_add_in_any_order(seed: int) -> None:
    tables = [counted(*in_pieces(drawn(10 * seed + part, 90), 20)) for part in range(5)]
    for part, table in enumerate(tables):
        table.drop("queue_full", part)
        table.drop(f"only of {part % 2}", 1)
    orders = [np.random.default_rng(seed + turn).permutation(5).tolist() for turn in range(3)]
    totals = [reduce(add, [tables[place] for place in order]) for order in orders]
    for total in totals[1:]:
        same(total, totals[0])
    assert totals[0].dropped == {"queue_full": 10, "only of 0": 3, "only of 1": 2}
    assert totals[0].first_s == 0.0
    assert totals[0].last_s == max(table.last_s for table in tables)


def test_an_empty_table_changes_nothing_that_it_is_added_to() -> None:
    table = counted(drawn(1, 50))
    same(table + ComparisonTable.empty(NAMES, 2, True), table)


@pytest.mark.parametrize("pairs", [(), (drawn(3, 300),)])
def test_a_table_is_what_it_was_after_encoding(pairs: Sequence[Pairs]) -> None:
    table = counted(*pairs)
    table.drop("timeout", 7)
    assert ComparisonTable.decode(table.encode()).encode() == table.encode()


def test_what_has_been_damaged_is_refused_or_still_a_table() -> None:
    content = counted(drawn(4, 40)).encode()
    random = np.random.default_rng(4)
    refused = 0
    for _ in range(500):
        damaged = bytearray(content[: random.integers(1, len(content) + 1)])
        damaged[random.integers(len(damaged))] = random.integers(256)
        try:
            comparison_document(ComparisonTable.decode(bytes(damaged)))
        except UnreadableTable:
            refused += 1
    assert refused > 400


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no comparison table"),
        (b"\xff", "no comparison table"),
        (msgspec.msgpack.encode([2, "another"]), "of form 2"),
        (msgspec.msgpack.encode([1, "too short"]), "no comparison table"),
    ],
)
def test_what_is_no_table_of_this_form_is_refused(content: bytes, reason: str) -> None:
    with pytest.raises(UnreadableTable, match=reason):
        ComparisonTable.decode(content)


def test_tables_of_other_segments_do_not_add() -> None:
    with pytest.raises(UnreadableTable, match="other segments"):
        ComparisonTable.empty(NAMES, 2, True) + ComparisonTable.empty((), 2, True)


def rows_of(pairs: Pairs, name: str) -> Sequence[int]:
    """The rows of a group."""
    if not name:
        return range(len(pairs))
    places = [(d, names.index(name)) for d, names in enumerate(NAMES) if name in names]
    ((dimension, number),) = places
    return np.flatnonzero(pairs.segments[:, dimension] == number).tolist()


def brute_force(pairs: Pairs, name: str) -> dict[str, object]:
    """The counts of a group, row by row and block by block."""
    rows = rows_of(pairs, name)
    champion, candidate = pairs.champion.tolist(), pairs.candidate.tolist()
    answered = [row for row in rows if not pairs.failed[row]]
    judged = {row for row in rows if math.isfinite(champion[row])}
    compared = [row for row in answered if row in judged and math.isfinite(candidate[row])]
    flipped = {
        row for row in compared if pairs.champion_decision[row] != pairs.candidate_decision[row]
    }
    blocks: dict[str, Counter[tuple[int, int]]] = {
        kind: Counter() for kind in ("error", "not_finite", "flip")
    }
    shift: Counter[int] = Counter()
    for block in np.unique(pairs.block):
        of = [row for row in rows if pairs.block[row] == block]
        ours = [row for row in of if row in judged]
        said = [row for row in ours if not pairs.failed[row]]
        both = [row for row in of if row in set(compared)]
        for kind, members, harmed in (
            ("error", ours, [row for row in ours if pairs.failed[row]]),
            ("not_finite", said, [row for row in said if not math.isfinite(candidate[row])]),
            ("flip", both, [row for row in both if row in flipped]),
        ):
            if members:
                blocks[kind][len(members), len(harmed)] += 1
        if both:
            mean = math.fsum(candidate[row] - champion[row] for row in both) / len(both)
            shift[min(math.floor(mean * SHIFT_STEPS), SHIFT_STEPS - 1)] += 1
    return {
        "rows": len(rows),
        "failed": len(rows) - len(answered),
        "champion_not_finite": len(rows) - len(judged),
        "candidate_not_finite": sum(not math.isfinite(candidate[row]) for row in answered),
        "compared": len(compared),
        "flips": len(flipped),
        "decisions": Counter(
            (int(pairs.champion_decision[row]), int(pairs.candidate_decision[row]))
            for row in compared
        ),
        "blocks": blocks,
        "shift": shift,
        "difference": math.fsum(candidate[row] - champion[row] for row in compared),
        "difference_2": math.fsum((candidate[row] - champion[row]) ** 2 for row in compared),
        "least": min(candidate[row] - champion[row] for row in compared),
        "largest": max(candidate[row] - champion[row] for row in compared),
        "candidate": math.fsum(candidate[row] for row in compared),
    }


@pytest.mark.parametrize("seed", range(3))
def test_every_count_is_that_of_the_rows_one_by_one(seed: int) -> None:
    pairs = drawn(seed, 300, most_block_rows=1 + 6 * seed)
    groups = counted(pairs).groups()
    assert [group.name for group in groups] == ["", *NAMES[0], *NAMES[1]]
    for group in groups:
        expected = brute_force(pairs, group.name)
        for name in ("rows", "failed", "champion_not_finite", "candidate_not_finite", "compared"):
            assert getattr(group, name) == expected[name], name
        assert (group.flips, group.decisions) == (expected["flips"], expected["decisions"])
        assert group.blocks == expected["blocks"]
        assert group.shift is not None
        assert group.shift.as_dict() == expected["shift"]
        assert group.clustered["difference"].s == pytest.approx(expected["difference"], abs=1e-12)
        for name in ("difference_2", "least", "largest", "candidate"):
            assert getattr(group, name) == pytest.approx(expected[name], abs=1e-12), name
        assert {counts.total for counts in group.distributions.values()} == {group.compared}


def test_segments_of_a_dimension_make_up_the_whole() -> None:
    whole, *segments = counted(drawn(5, 500)).groups()
    for names in NAMES:
        of_dimension = [group for group in segments if group.name in names]
        assert sum(group.rows for group in of_dimension) == whole.rows
        assert sum(group.flips for group in of_dimension) == whole.flips


def test_a_candidate_that_says_nothing_is_counted_and_not_compared() -> None:
    pairs = drawn(6, 40, trouble=0)
    pairs.failed[:] = True
    pairs.candidate[:] = np.nan
    (whole, *_), table = counted(pairs).groups(), counted(pairs)
    assert (whole.rows, whole.failed, whole.compared) == (40, 40, 0)
    assert sum(whole.blocks["error"].values()) == table.blocks
    assert (whole.blocks["flip"], whole.blocks["not_finite"]) == ({}, {})
    assert ComparisonTable.decode(table.encode()).encode() == table.encode()


def test_a_number_beyond_float32_is_none_that_can_be_compared() -> None:
    """Of one alone the sums of squares would be infinite, and no figure known for ever."""
    pairs = drawn(13, 40, trouble=0)
    pairs.candidate[3], pairs.champion[5] = 1e200, -1e200
    table = counted(pairs)
    whole = table.groups()[0]
    assert (whole.candidate_not_finite, whole.champion_not_finite, whole.compared) == (1, 1, 38)
    json.dumps(comparison_document(table), allow_nan=False)


def test_without_decisions_there_are_no_flips() -> None:
    pairs = drawn(7, 60)
    table = ComparisonTable.empty(NAMES, decisions=0, bounded=False)
    table.add(pairs, 0.0)
    whole = table.groups()[0]
    assert (whole.flips, whole.decisions, whole.blocks["flip"]) == (0, {}, {})
    assert whole.shift is None


def test_of_many_labels_those_beyond_the_limit_are_decided_as_one() -> None:
    ours, theirs = np.arange(40, dtype=np.int32), np.roll(np.arange(40, dtype=np.int32), 1)
    number = np.full(40, 0.5)
    no_segments = np.empty((40, 0), np.int32)
    nobody = np.zeros(40, np.bool_)
    pairs = Pairs(ours * 0, number, number, ours, theirs, nobody, no_segments, number, number)
    table = ComparisonTable.empty((), 40, True)
    table.add(pairs, 0.0)
    (whole,) = table.groups()
    assert whole.flips == 40
    assert whole.decisions[31, 31] == 8
    assert max(whole.decisions) == (31, 31)
    names = [f"label {number}" for number in range(40)]
    told = comparison_document(table, names)["decisions"]
    assert told[-1] == {"champion": "…", "candidate": "…", "rows": 8}


def test_labelled_scores_are_what_both_say_about_the_label_of_the_champion() -> None:
    champion = np.array([[0.1, 0.7, 0.2], [0.5, np.nan, 0.1], [0.3, 0.3, 0.4]])
    candidate = np.array([[0.6, 0.3, 0.1], [0.2, 0.2, 0.6], [np.nan, 0.1, 0.2]])
    ours, theirs = scores(champion, candidate)
    assert ours.tolist() == pytest.approx([0.7, np.nan, 0.4], nan_ok=True)
    assert theirs[[0, 2]].tolist() == [0.3, 0.2]


def test_a_model_without_segments_is_counted_as_a_whole() -> None:
    pairs = drawn(8, 60)
    alone = Pairs(
        *(
            np.empty((60, 0), np.int32) if name == "segments" else getattr(pairs, name)
            for name in Pairs.__slots__
        )
    )
    table = ComparisonTable.empty((), 2, True)
    table.add(alone, 0.0)
    (only,) = table.groups()
    assert only.decisions == counted(pairs).groups()[0].decisions


def test_joint_counts_are_of_both_scores_on_the_coarse_grid() -> None:
    pairs = drawn(9, 200)
    both = np.isfinite(pairs.champion) & np.isfinite(pairs.candidate) & ~pairs.failed
    joint = counted(pairs).joint()
    champion, candidate = joint_bins(joint.keys)
    expected = Counter(
        zip(
            grid.codes(pairs.champion[both], grid.COARSE_BITS).tolist(),
            grid.codes(pairs.candidate[both], grid.COARSE_BITS).tolist(),
            strict=True,
        )
    )
    cells = zip(champion.tolist(), candidate.tolist(), strict=True)
    assert dict(zip(cells, joint.counts.tolist(), strict=True)) == expected


def test_execution_times_are_of_rows_that_both_have_answered() -> None:
    pairs = drawn(11, 80)
    times = counted(pairs).execution_time()
    answered = ~pairs.failed
    assert times.rows == answered.sum()
    assert times.champion_s == pytest.approx(pairs.champion_s[answered].sum())
    assert times.candidate_s == pytest.approx(pairs.candidate_s[answered].sum())


def test_blocks_of_several_workers_are_counted_apart() -> None:
    parts = [drawn(seed, 30) for seed in (1, 2)]
    together = counted(joined(parts))
    assert together.blocks == sum(counted(part).blocks for part in parts)


def group_named(groups: Sequence[Group], name: str) -> Group:
    return next(group for group in groups if group.name == name)


def test_a_segment_that_did_not_occur_is_left_out() -> None:
    pairs = taken(drawn(12, 40), 0, 30)
    pairs.segments[:, 0] = 1
    names = [group.name for group in counted(pairs).groups()]
    assert names[:2] == ["", "origin=JFK"]
    assert "origin=EWR" not in names
    whole, jfk = (group_named(counted(pairs).groups(), name) for name in ("", "origin=JFK"))
    assert whole.decisions == jfk.decisions
