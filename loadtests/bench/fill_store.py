"""Writes the features of every entity of the benchmark through Feast's own store.

    python -m loadtests.bench.fill_store REPOSITORY REDIS_URL

A process of its own: Feast takes seconds to import and leaves threads behind.
"""

import os
import sys
import warnings
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd

from app.features.feast_repo import apply, open_store, write
from loadtests.bench.rows import FIELDS, ROWS, SEED, VIEWS, entities_of, varied_rows

_OLDEST_S = 40_000


def fill(repo: Path, url: str) -> None:
    """Each entity has an event time of its own."""
    pd.DataFrame({"at": [datetime.now(UTC)]}).to_parquet(repo / "data" / "none.parquet")
    apply(repo, url)
    store = open_store(repo, url)
    rows = pd.DataFrame(varied_rows(ROWS, SEED), columns=list(FIELDS))
    entities = pd.DataFrame([entities_of(row) for row in range(ROWS)])
    ages_s = np.random.default_rng(SEED).integers(_OLDEST_S, size=ROWS)
    at = datetime.now(UTC) - pd.to_timedelta(ages_s, "s")
    for view, (key, fields) in VIEWS.items():
        write(store, view, rows[list(fields)].assign(**{key: entities[key], "at": at}))


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # Feast's, about its own dependencies
    fill(Path(sys.argv[1]), sys.argv[2])
    os._exit(0)  # Feast leaves threads and an open connection behind
