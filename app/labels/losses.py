"""What labels say about a candidate, in the counts that its release is decided by."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from app.evidence.counts import WHOLE
from app.labels.form import LabelForm
from app.labels.quality import PAIR_COUNTS, LossCounts, PairQuality, pair_columns


class Losses(NamedTuple):
    """Of rows that the candidate was shown and whose horizon has passed: the fields of these names
    of `app.evidence.counts.PairedCounts`."""

    loss: Sequence[tuple[int, int, int, int]] = ()
    labels_due: int = 0
    labels_missing: int = 0
    """Neither a label nor a void one."""


def losses_by_segment(form: LabelForm, pair: PairQuality) -> Mapping[str, Losses]:
    """By segment; `WHOLE` are all rows."""
    names = (WHOLE, *(name for dimension in form.segments for name in dimension))
    cells = pair.cells.reshape(-1, pair_columns(form))[:, : len(PAIR_COUNTS)].astype(int).tolist()
    losses = {}
    for group, (name, cell) in enumerate(zip(names, cells, strict=True)):
        shown, labelled, void, _ = cell
        blocks = loss_counts(pair.blocks.get(group, {}))
        losses[name] = Losses(blocks, shown, shown - labelled - void)
    return losses


def loss_counts(blocks: LossCounts) -> Sequence[tuple[int, int, int, int]]:
    """`(low, high, most, blocks)`, as `app.evidence.harms.of_losses` takes them, in order."""
    return tuple((*block, count) for block, count in sorted(blocks.items()))
