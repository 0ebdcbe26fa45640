"""Pairs drawn at random, with everything in them that can go wrong."""

import numpy as np

from app.comparison.pairs import NO_DECISION, Pairs

NAMES = (("origin=EWR", "origin=JFK", "origin=other"), ("hour=..12", "hour=12..", "hour=other"))


def drawn(seed: int, rows: int, *, most_block_rows: int = 8, trouble: float = 0.1) -> Pairs:
    """So many rows of `NAMES` in blocks of 1 to `most_block_rows`; a share of `trouble` of the rows
    fails, and as many scores of either side are no finite number."""
    random = np.random.default_rng(seed)
    sizes = random.integers(1, most_block_rows + 1, rows)
    block = np.repeat(np.arange(rows), sizes)[:rows].astype(np.int32)
    champion = random.beta(1, 3, rows).round(3)
    moved = champion + random.normal(0.01, 0.05, rows) * random.integers(0, 2, rows)
    candidate = np.clip(moved, 0, 1)
    failed = random.random(rows) < trouble
    nothing = np.array([np.nan, np.inf, -np.inf])
    for scores in (champion, candidate):
        lost = random.random(rows) < trouble
        scores[lost] = random.choice(nothing, lost.sum())
    candidate[failed] = np.nan
    return Pairs(
        block,
        champion,
        candidate,
        _decisions(champion),
        _decisions(candidate),
        failed,
        np.stack([random.integers(0, len(names), rows) for names in NAMES], axis=1).astype(
            np.int32
        ),
        random.gamma(3, 1e-5, rows),
        np.where(failed, np.nan, random.gamma(3, 2e-5, rows)),
    )


def taken(pairs: Pairs, start: int, stop: int) -> Pairs:
    return Pairs(*(getattr(pairs, name)[start:stop] for name in Pairs.__slots__))


def in_pieces(pairs: Pairs, most_rows: int) -> list[Pairs]:
    """Whole blocks, a new piece after so many rows."""
    pieces, start = [], 0
    ends = [*(np.flatnonzero(np.diff(pairs.block)) + 1).tolist(), len(pairs)]
    for end in ends:
        if end - start >= most_rows or end == len(pairs):
            pieces.append(taken(pairs, start, end))
            start = end
    return pieces


def _decisions(scores: np.ndarray) -> np.ndarray:
    decided = np.where(scores >= 0.4, 1, 0)
    return np.where(np.isfinite(scores), decided, NO_DECISION).astype(np.int32)
