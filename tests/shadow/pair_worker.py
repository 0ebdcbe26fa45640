"""A worker that counts and logs pairs until it is killed: folder, name, seed."""

import asyncio
import itertools
import sys
from pathlib import Path

import numpy as np

from app.comparison.pairs import Pairs
from app.comparison.table import ComparisonTable
from app.release.store import open_tables
from app.shadow.pair_log import PairFiles, Rows

TRIAL = "1.aa-2.bb-3-cc"
NAME = f"comparison:m:{TRIAL}"
NAMES = (("a=..1", "a=1..", "a=other"), ("b=x", "b=other"))
KINDS = {"comparison": ComparisonTable.decode}


def drawn(rng: np.random.Generator) -> Pairs:
    """A few blocks."""
    rows = int(rng.integers(1, 40))
    champion = rng.random(rows)
    candidate = np.clip(champion + rng.normal(0, 0.1, rows), 0, 1)
    candidate[rng.random(rows) < 0.05] = np.nan
    failed = rng.random(rows) < 0.02
    candidate[failed] = np.nan
    finite = np.isfinite(candidate)
    return Pairs(
        np.sort(rng.integers(0, 3, rows)).astype(np.int32),
        champion,
        candidate,
        (champion >= 0.5).astype(np.int32),
        np.where(finite, candidate >= 0.5, -1).astype(np.int32),
        failed,
        np.stack([rng.integers(0, len(of), rows) for of in NAMES], axis=1).astype(np.int32),
        rng.random(rows),
        rng.random(rows),
    )


async def count(folder: Path, worker: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    log = PairFiles(folder / "pairs", worker, 100_000_000)
    requests = itertools.count()
    async with open_tables(None, folder, worker, KINDS, lambda kind: None) as tables:
        while True:
            table = ComparisonTable.empty(NAMES, 2, bounded=False)
            for _ in range(int(rng.integers(1, 4))):
                pairs = drawn(rng)
                ids = [f"{worker} {next(requests)}" for _ in range(len(pairs))]
                rows = Rows("m", TRIAL, ids, [0] * len(ids), NAMES, [False, True, None])
                log.note(pairs, lambda rows=rows: rows)
                table.add(pairs, 0)
            await log.append(tables.next_write)
            await tables.write({NAME: table})
            print(tables.next_write, flush=True)


if __name__ == "__main__":
    asyncio.run(count(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
