"""Pushes again what was ever pushed to the views of a feature service, as it became known."""

from pathlib import Path

import pyarrow.parquet as pa_parquet
from feast import FeatureStore

from app.errors import ConfigurationError
from app.features.feast_repo import pushed_histories
from app.features.push import CheckedRows, PushTarget


class Pushes:
    """The history of every view that a service reads and that is pushed to, until an instant.

    Instants are microseconds since 1970. `store` comes from `open_writer`.
    """

    def __init__(self, store: FeatureStore, service: str, until_us: int) -> None:
        self._sources = [
            _Source(PushTarget(store, push_source), known_at, path, until_us)
            for push_source, known_at, path in pushed_histories(store, service)
        ]

    def push_until(self, until_us: int) -> None:
        """Write what became known since the last call; of each entity the newest value only, as an
        online store keeps no other. Raises what the online store raises."""
        for source in self._sources:
            source.push_until(until_us)


class _Source:
    """One push source and its history."""

    def __init__(self, target: PushTarget, known_at: str, history: Path, until_us: int) -> None:
        self._target = target
        self._known_at = known_at
        self._rows = _checked(target, known_at, history, until_us)
        self._pushed = 0

    def push_until(self, until_us: int) -> None:
        times_us = self._rows.times_us[self._known_at]
        known = int(times_us.searchsorted(until_us, side="right"))
        if known > self._pushed:
            self._target.write(self._rows.part(self._pushed, known))
            self._pushed = known


def _checked(target: PushTarget, known_at: str, history: Path, until_us: int) -> CheckedRows:
    """Every row that is known by then, in order, its values looked at once for all pushes."""
    table = pa_parquet.read_table(history, columns=list(target.columns)).sort_by(known_at)
    columns = {name: table[name].combine_chunks() for name in table.column_names}
    rows, faults = target.check(columns, from_text=False)
    if faults:
        row, fault = min(faults.items())
        raise ConfigurationError(f"{history}: row {row + 1} by {known_at}: {fault}")
    known = int(rows.times_us[known_at].searchsorted(until_us, side="right"))
    return rows.part(0, known)
