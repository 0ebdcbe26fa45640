"""What the model gets in place of stored values that are missing, by the policies of model.yaml."""

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from app.contract import Features, MissingValue
from app.errors import FeaturesUnavailable
from app.features.plan import FeaturePlan, PlannedView
from app.features.source import Columns, EntityColumns, FeatureRows, ValueStatus

# Plain numbers: numpy takes 20 µs to compare an array with a member of an enumeration.
_PRESENT, _NOT_FOUND = int(ValueStatus.PRESENT), int(ValueStatus.NOT_FOUND)
_UNAVAILABLE = int(ValueStatus.UNAVAILABLE)

SubstitutedBy: TypeAlias = Literal["last_good", "constant", "training_mean"]


@dataclass(frozen=True, slots=True)
class Substitutes:
    """Values that were replaced: `mask` `[features, rows]` says which, for the features at
    `positions` of `plan.references`."""

    by: SubstitutedBy
    positions: Sequence[int]
    mask: NDArray[np.bool_]


@dataclass(slots=True)  # made for every request, like `Instances`
class FilledRows:
    """Features as the model gets them: `columns` as those of the `FeatureRows` that they were made
    from, which still hold what the store said, but for the substitutes."""

    columns: Columns
    substitutes: Sequence[Substitutes]


class MissingValues:
    """The policies of one model version, and the values that they remember.

    `means` are those of the version's training. A version without policies costs nothing here.

    For `last_good` each view with such a feature keeps the values of at most
    `last_good_entities` entities, those that were asked for last: about 250 bytes an entity and 16
    a number of it (a text takes its own length more), so 3.5 MB for a view with 6 such numbers and
    10,000 entities. Nothing else is kept.
    """

    def __init__(self, features: Features, plan: FeaturePlan, means: Mapping[str, float]) -> None:
        positions = {name: plan.references.index(name) for name in features.missing}
        policies = {positions[name]: policy for name, policy in features.missing.items()}
        self._refused = [p for p, policy in policies.items() if policy.use == "refuse"]
        self._refuses_unavailable = features.when_unavailable == "refuse"
        self._last_good = [
            _LastGood(view, index, plan, remembered, features.last_good_entities)
            for index, view in enumerate(plan.views)
            if (remembered := _remembered(plan.view_columns[index], policies))
        ]
        constants = {p: policy.value for p, policy in policies.items() if policy.use == "constant"}
        averages = {
            positions[name]: means[name]
            for name, policy in features.missing.items()
            if policy.use == "training_mean"
        }
        self._fixed = [
            *_by_type("constant", constants, plan),
            *_by_type("training_mean", averages, plan),
        ]
        self._has_policies = bool(
            self._refused or self._refuses_unavailable or self._last_good or self._fixed
        )
        self._remembered_by = (features.missing, features.last_good_entities, plan)
        self._given_by = (*self._remembered_by, self._refuses_unavailable, averages)

    def gives_the_same_as(self, other: "MissingValues") -> bool:
        """Whether both give the same for missing values of the same rows, once one has taken over
        what the other remembers."""
        return self._given_by == other._given_by

    def take_over(self, before: "MissingValues") -> None:
        """Go on with what another version remembers, where both keep the same values of the same
        plan: a new version need not learn them anew."""
        if self._remembered_by == before._remembered_by:
            self._last_good = before._last_good

    def remember(self, rows: FeatureRows, entities: EntityColumns) -> None:
        """Keep what `last_good` asks for. `rows` hold what the store said and nothing else: what a
        caller gives is not the entity's, and must not come back to another caller."""
        for view in self._last_good:
            view.remember(rows, entities)

    def fill(self, rows: FeatureRows, entities: EntityColumns, now_s: float) -> FilledRows:
        """What the model gets at the feature time `now_s`; `rows` are not changed.

        Raises `FeaturesUnavailable` naming the instance and the feature that the contract refuses
        to go without.
        """
        if not self._has_policies or not rows.status.any():  # PRESENT is 0
            return FilledRows(rows.columns, ())
        self._refuse(rows)
        columns = list(rows.columns)
        substitutes: list[Substitutes] = []
        for view in self._last_good:
            substitutes += view.fill(rows, columns, entities, now_s)
        for fixed in self._fixed:
            if rows.status[:, fixed.positions].any():
                null = _nulls([columns[position] for position in fixed.positions])
                substitutes += _put(columns, fixed.by, fixed.positions, null, fixed.values)
        return FilledRows(columns, substitutes)

    def _refuse(self, rows: FeatureRows) -> None:
        missing = rows.status[:, self._refused] != _PRESENT
        if missing.any():
            row, index = np.argwhere(missing)[0].tolist()
            raise _without(rows, row, self._refused[index])
        if not self._refuses_unavailable:
            return
        unavailable = rows.status == _UNAVAILABLE
        if unavailable.any():
            row, position = np.argwhere(unavailable)[0].tolist()
            raise _without(rows, row, position)


@dataclass(frozen=True, slots=True)
class _Fixed:
    """One value a feature, in `values` `[features, 1]`, for features of one type."""

    by: SubstitutedBy
    positions: list[int]
    values: NDArray[Any]


class _LastGood:
    """The values of one view that were last read, of the entities that were asked for last.

    An entity has a slot, which is a row of the tables; the last one is nobody's and stays empty.
    """

    def __init__(
        self,
        view: PlannedView,
        index: int,
        plan: FeaturePlan,
        policies: Mapping[int, MissingValue],
        max_entities: int,
    ) -> None:
        """`index` is that of the view; `policies` are those of its features with `last_good`, by
        their position in the plan."""
        self._join_keys = view.join_keys
        self._positions = np.array(list(policies))
        self._tables = [
            _SlotTable(index, positions, policies, max_entities, dtype)
            for dtype, positions in _dtypes(policies, plan).items()
        ]
        self._max_entities = max_entities
        self._slots: OrderedDict[tuple[Any, ...], int] = OrderedDict()

    def remember(self, rows: FeatureRows, entities: EntityColumns) -> None:
        present = rows.status[:, self._positions] == _PRESENT
        # No more than there are slots: the entities of one request never take each other's.
        kept = np.flatnonzero(present.any(axis=1))[-self._max_entities :]
        if not len(kept):
            return
        names = self._names(entities, len(present))
        slots = np.array([self._slot(names[row]) for row in kept.tolist()])
        whole = bool(present.all())
        for table in self._tables:
            table.remember(rows, kept, slots, whole)

    def fill(
        self,
        rows: FeatureRows,
        columns: list[NDArray[Any]],
        entities: EntityColumns,
        now_s: float,
    ) -> list[Substitutes]:
        """Replace in `columns` what the store has not; says what was replaced."""
        if not (rows.status[:, self._positions] >= _NOT_FOUND).any():
            return []
        nobody = self._max_entities
        slots = np.full(len(rows.status), nobody)
        for row, name in enumerate(self._names(entities, len(slots))):
            slots[row] = self._slots.get(name, nobody)
            if slots[row] != nobody:
                self._slots.move_to_end(name)
        return [done for table in self._tables for done in table.fill(rows, columns, slots, now_s)]

    def _slot(self, name: tuple[Any, ...]) -> int:
        """The entity's slot, or that of the entity that nobody has asked for the longest."""
        slot = self._slots.get(name)
        if slot is not None:
            self._slots.move_to_end(name)
            return slot
        if len(self._slots) < self._max_entities:
            slot = len(self._slots)
        else:
            _, slot = self._slots.popitem(last=False)
        self._slots[name] = slot
        for table in self._tables:
            table.clear(slot)
        return slot

    def _names(self, entities: EntityColumns, rows: int) -> Sequence[tuple[Any, ...]]:
        if not self._join_keys:
            return [()] * rows
        return list(zip(*(entities[key] for key in self._join_keys), strict=True))


class _SlotTable:
    """Values of features of one type, a row a slot, with each value's own event time."""

    def __init__(
        self,
        view: int,
        positions: list[int],
        policies: Mapping[int, MissingValue],
        max_entities: int,
        dtype: Any,
    ) -> None:
        self._view = view
        self._positions = positions
        # Zeros, unlike NaNs, take no memory before they are written over.
        self._values = np.zeros((max_entities + 1, len(positions)), dtype=dtype)
        self._times_s = np.zeros((max_entities + 1, len(positions)))
        self.clear(max_entities)
        self._max_age_s = np.array([policies[position].max_age_s for position in positions])
        otherwise = [policies[position].value for position in positions]
        self._otherwise = np.array(otherwise, dtype=dtype)[:, np.newaxis]
        self._has_otherwise = np.array([value is not None for value in otherwise])

    def clear(self, slot: int) -> None:
        self._times_s[slot] = np.nan

    def remember(
        self, rows: FeatureRows, kept: NDArray[Any], slots: NDArray[Any], whole: bool
    ) -> None:
        """What is PRESENT in the rows `kept`, which with `whole` is everything, for the entities in
        `slots`."""
        values = self._read(rows.columns).T[kept]
        times_s = rows.event_time_s[kept, self._view][:, np.newaxis]
        if not whole:
            present = rows.status[kept][:, self._positions] == _PRESENT
            values = np.where(present, values, self._values[slots])
            times_s = np.where(present, times_s, self._times_s[slots])
        self._values[slots] = values
        self._times_s[slots] = times_s

    def _read(self, columns: Columns) -> NDArray[Any]:
        if isinstance(columns, np.ndarray):
            return columns[self._positions]
        return np.array([columns[p] for p in self._positions], dtype=self._values.dtype)

    def fill(
        self, rows: FeatureRows, columns: list[NDArray[Any]], slots: NDArray[Any], now_s: float
    ) -> list[Substitutes]:
        missing = rows.status[:, self._positions] >= _NOT_FOUND
        usable = missing & (now_s - self._times_s[slots] <= self._max_age_s)  # NaN is not
        unknown = missing & ~usable & self._has_otherwise
        return [
            *_put(columns, "last_good", self._positions, usable.T, self._values[slots].T),
            *_put(columns, "constant", self._positions, unknown.T, self._otherwise),
        ]


def _remembered(columns: slice, policies: Mapping[int, MissingValue]) -> Mapping[int, MissingValue]:
    """The policies of a view's features with `last_good`."""
    own = range(columns.start, columns.stop)
    return {p: policies[p] for p in own if p in policies and policies[p].use == "last_good"}


def _by_type(
    by: SubstitutedBy, values: Mapping[int, float | str | None], plan: FeaturePlan
) -> list[_Fixed]:
    return [
        _Fixed(by, positions, np.array([[values[p]] for p in positions], dtype=dtype))
        for dtype, positions in _dtypes(values, plan).items()
    ]


def _dtypes(positions: Iterable[int], plan: FeaturePlan) -> Mapping[Any, list[int]]:
    """Positions of numbers and of other values, by the type of an array that holds them."""
    groups: dict[Any, list[int]] = {}
    for position in positions:
        number = plan.value_types[plan.references[position]] == "number"
        groups.setdefault(np.float64 if number else object, []).append(position)
    return groups


def _nulls(columns: Sequence[NDArray[Any]]) -> NDArray[np.bool_]:
    """Mask `[columns, rows]`."""
    if any(column.dtype == object for column in columns):
        # Numbers are objects too where one of them is beyond the reach of a float.
        return np.array([[v is None or v != v for v in column.tolist()] for column in columns])
    null: NDArray[np.bool_] = np.isnan(np.array(columns))
    return null


def _put(
    columns: list[NDArray[Any]],
    by: SubstitutedBy,
    positions: Sequence[int],
    mask: NDArray[np.bool_],
    values: NDArray[Any],
) -> list[Substitutes]:
    """Exchange the columns at `positions` for copies with `values` `[features, rows or 1]` where
    the mask says so; all at once where all hold numbers."""
    if not mask.any():
        return []
    old = [columns[position] for position in positions]
    if any(column.dtype == object for column in old):
        values = np.broadcast_to(values, mask.shape)
        for position, column, rows, new in zip(positions, old, mask, values, strict=True):
            columns[position] = np.where(rows, new.astype(column.dtype), column)
    else:
        for position, new in zip(positions, np.where(mask, values, np.array(old)), strict=True):
            columns[position] = new
    return [Substitutes(by, positions, mask)]


def _without(rows: FeatureRows, row: int, position: int) -> FeaturesUnavailable:
    name, status = rows.plan.references[position], ValueStatus(rows.status[row, position])
    return FeaturesUnavailable(f"instances[{row}]: {name} is {status.name}")
