"""What a release is decided by: bounds of each bucket's loss, and labels that are missing."""

from fractions import Fraction

import numpy as np
import pytest
from numpy.typing import NDArray

from app.evidence.counts import WHOLE
from app.evidence.harms import LOSS_STEPS, of_losses
from app.labels.bucket import Kept, Version
from app.labels.form import LabelForm
from app.labels.losses import Losses, losses_by_segment
from app.labels.quality import MOST_GRID, QualityTable, added, judged

BINARY = LabelForm("binary", "p", (), (("b=0", "b=1"),))
CLASSES = LabelForm("class", "p", ("left", "right", "neither"), (("b=0", "b=1"),))
NUMBERS = LabelForm("number", "p", (), (("b=0", "b=1"),))
CHAMPION, CANDIDATE = Version(1, "11" * 32), Version(2, "22" * 32, 3)
PAIR = f"1:{CHAMPION.sha256} 2:{CANDIDATE.sha256} 3"
ROWS = 60


def bucket(form: LabelForm, rng: np.random.Generator) -> Kept:
    """Of rows with a label, but for the first three: void, missing, and not shown."""
    rows = np.zeros(ROWS, form.row)
    rows["numbers"] = said(form, rng)
    rows["segments"][:, 0] = np.arange(ROWS) % 2
    labels = rng.integers(max(len(form.classes), 2), size=ROWS).astype(float)
    labels[:2] = np.nan
    is_labelled = np.arange(ROWS) != 1
    names = [row.to_bytes(2) for row in range(ROWS)]
    candidate = said(form, rng)
    if rng.random() < 0.5:  # about the same
        candidate = rows["numbers"] * 0.9 + candidate * 0.1
    shown = np.arange(ROWS) != 2
    arrived_s = np.ones(ROWS)
    versions = {0: CHAMPION, 1: CANDIDATE}
    return Kept(names, rows, versions, labels, is_labelled, arrived_s, {1: candidate}, {1: shown})


def said(form: LabelForm, rng: np.random.Generator) -> NDArray[np.float64]:
    if form.classes:
        return rng.dirichlet(np.ones(len(form.classes)), ROWS)
    return rng.random((ROWS, 1))


def brier(form: LabelForm, numbers: NDArray[np.float64], label: int) -> Fraction:
    if not form.classes:
        return (Fraction(numbers[0]) - label) ** 2
    squares = ((Fraction(p) - (k == label)) ** 2 for k, p in enumerate(numbers))
    return sum(squares, Fraction(0)) / 2


def bounds(form: LabelForm, kept: Kept, group: int | None) -> tuple[Fraction, Fraction]:
    """The mean difference of a bucket and the most that it could have been, exactly."""
    differences, most = [], []
    for row in range(3, ROWS):
        if group is not None and row % 2 != group:
            continue
        mine, theirs = kept.rows["numbers"][row], kept.candidates[1][row]
        of_each = [
            brier(form, theirs, label) - brier(form, mine, label)
            for label in range(max(len(form.classes), 2))
        ]
        differences.append(of_each[int(kept.labels[row])])
        most.append(max(map(abs, of_each)))
    n = len(most)
    return LOSS_STEPS * sum(differences) / n, LOSS_STEPS * sum(most) / n


@pytest.mark.parametrize("form", [BINARY, CLASSES], ids=["binary", "class"])
def test_each_bucket_is_counted_by_the_bounds_of_its_loss_and_the_most_that_it_could_have_been(
    form: LabelForm,
) -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        kept = bucket(form, rng)
        losses = losses_by_segment(form, judged(form, [kept]).pairs[PAIR])
        for segment, group in ((WHOLE, None), ("b=0", 0), ("b=1", 1)):
            [(low, high, most, buckets)] = losses[segment].loss
            mean, furthest = bounds(form, kept, group)
            assert buckets == 1
            assert low <= mean <= high
            assert high - low == 1
            assert most % MOST_GRID == 0
            assert furthest <= most < furthest + MOST_GRID


@pytest.mark.parametrize("form", [BINARY, CLASSES], ids=["binary", "class"])
def test_a_candidate_that_says_the_same_is_counted_at_zero(form: LabelForm) -> None:
    kept = bucket(form, np.random.default_rng(2))
    kept.candidates[1][:] = kept.rows["numbers"]
    losses = losses_by_segment(form, judged(form, [kept]).pairs[PAIR])
    assert losses[WHOLE].loss == ((0, 0, 0, 1),)


def test_labels_that_are_missing_are_counted_of_those_that_are_due() -> None:
    form = BINARY
    kept = [bucket(form, np.random.default_rng(seed)) for seed in range(3)]
    losses = losses_by_segment(form, judged(form, kept).pairs[PAIR])
    due = {name: (of.labels_due, of.labels_missing) for name, of in losses.items()}
    # Row 0 has a void label, row 1 none; row 2 was not shown.
    assert due == {WHOLE: (177, 3), "b=0": (87, 0), "b=1": (90, 3)}


def test_losses_of_parts_are_those_of_the_whole_also_where_they_were_written() -> None:
    rng = np.random.default_rng(3)
    kept = [bucket(BINARY, rng) for _ in range(40)]
    parts = [judged(BINARY, kept[start : start + 8]) for start in range(0, 40, 8)]
    table = QualityTable.decode(added(parts).encode())
    losses = losses_by_segment(BINARY, table.pairs[PAIR])
    assert losses == losses_by_segment(BINARY, judged(BINARY, kept).pairs[PAIR])
    assert sum(buckets for *_, buckets in losses[WHOLE].loss) == 40
    assert of_losses(losses[WHOLE].loss, LOSS_STEPS, 0.5).no_worse > 0


def test_numbers_have_no_such_loss() -> None:
    kept = bucket(NUMBERS, np.random.default_rng(4))
    losses = losses_by_segment(NUMBERS, judged(NUMBERS, [kept]).pairs[PAIR])
    assert losses[WHOLE] == Losses((), 59, 1)
