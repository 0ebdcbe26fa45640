"""Pushes again what was ever pushed to the views of a feature service, as it became known."""

from pathlib import Path

import pyarrow.parquet as pa_parquet
from feast import FeatureStore

from app.errors import ConfigurationError, HikyakuError
from app.features.feast_repo import pushed_histories
from app.features.push import CheckedRows, PushTarget


class Pushes:
    """The histories of every push source that feeds a service, until an instant. `store` comes from
    `open_writer`."""

    def __init__(self, store: FeatureStore, service: str, until_us: int) -> None:
        self._histories = [
            PushedHistory(PushTarget(store, push_source), known_at, path, until_us)
            for push_source, known_at, path in pushed_histories(store, service)
        ]

    def push_until(self, until_us: int) -> None:
        """What became known since the last call, as `PushedHistory` does."""
        for history in self._histories:
            history.push_until(until_us)


class PushedHistory:
    """What was ever pushed to one push source, a parquet file whose column `known_at` says when.

    Instants are microseconds since 1970. Raises `ConfigurationError` for a value at fault.
    """

    def __init__(self, target: PushTarget, known_at: str, path: Path, until_us: int) -> None:
        self._target = target
        self._known_at = known_at
        self._rows = _checked(target, known_at, path, until_us)
        self._pushed = 0
        self._has_begun = False

    def push_until(self, until_us: int) -> None:
        """Write what became known since the last call, the first time from the beginning; of each
        entity the newest row only, as an online store keeps no other.

        Raises `HikyakuError` where the store holds rows from after that: nothing older is put over
        them, and whoever reads them would know the future. What the online store raises, too.
        """
        known = int(self._rows.times_us[self._known_at].searchsorted(until_us, side="right"))
        if known > self._pushed:
            written = self._target.write(self._rows.part(self._pushed, known))
            if self._has_begun and 0 in written.stored.values():
                raise HikyakuError(
                    f"{self._target.push_source}: the online store holds values from later than "
                    "what is replayed: begin with an empty one"
                )
            self._pushed = known
        self._has_begun = True


def _checked(target: PushTarget, known_at: str, path: Path, until_us: int) -> CheckedRows:
    """Every row that is known by then, in order, its values looked at once for all pushes."""
    table = pa_parquet.read_table(path, columns=list(target.columns)).sort_by(known_at)
    columns = {name: table[name].combine_chunks() for name in table.column_names}
    rows, faults = target.check(columns, from_text=False)
    if faults:
        row, fault = min(faults.items())
        raise ConfigurationError(f"{path}: row {row + 1} by {known_at}: {fault}")
    known = int(rows.times_us[known_at].searchsorted(until_us, side="right"))
    return rows.part(0, known)
