"""What a feature service holds, compiled once at publishing so that serving needs no registry."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, Literal, TypeAlias

from pydantic import TypeAdapter, ValidationError

from app.features.entity_key import EntityValue, KeyType

JoinKeyType: TypeAlias = Literal["string", "int", "bytes", "timestamp"]
ValueType: TypeAlias = Literal["number", "text", "other"]

NO_ENTITY: Mapping[JoinKeyType, EntityValue] = {
    "string": "",
    "int": 0,
    "bytes": b"0",  # Feast takes empty bytes for a null
    "timestamp": datetime.fromtimestamp(0, UTC),
}
"""For each type of a join key a value to ask with where the answer does not matter."""


@dataclass(frozen=True, slots=True)
class PlannedFeature:
    """`dtype` is Feast's name of the value type, such as `Float32`."""

    name: str
    dtype: str


@dataclass(frozen=True, slots=True)
class Transformation:
    """What makes the values of an on-demand view.

    It reads the stored features `inputs` (`view:feature`) and the fields `request_fields` of the
    instance. `source` is its Python text, for people; `definition` is Feast's own form of it, a
    serialized `OnDemandFeatureView` in base64, which holds the pickled function.
    """

    mode: Literal["python", "python_singleton", "pandas"]
    inputs: tuple[str, ...]
    request_fields: tuple[str, ...]
    source: str
    definition: str


@dataclass(frozen=True, slots=True)
class PlannedView:
    """One feature view of the service.

    `name` is its name in the service (the alias, where it has one), `join_keys` the fields of an
    instance that name its entity, none for a view without entities. `ttl_s` None: its values never
    grow too old. `stored_as` and `stored_keys` are the names under which its values are stored
    (another than `name` with an alias or a version, others than `join_keys` with a join_key_map);
    None: the same. A view with a `transformation` is not stored but made on demand.
    """

    name: str
    join_keys: tuple[str, ...]
    ttl_s: float | None
    features: tuple[PlannedFeature, ...]
    stored_as: str | None = None
    stored_keys: tuple[str, ...] | None = None
    transformation: Transformation | None = None

    def references(self) -> tuple[str, ...]:
        return tuple(f"{self.name}:{feature.name}" for feature in self.features)


@dataclass(frozen=True, slots=True)
class RedisLayout:
    """Where Feast's Redis store keeps the values of a plan.

    `key_types` is Feast's type of each join key of `FeaturePlan.join_keys`, `fields` the hash field
    of each stored `view:feature` of the plan in hexadecimal, `key_version` Feast's
    entity_key_serialization_version.
    """

    key_version: int
    key_types: Mapping[str, KeyType]
    fields: Mapping[str, str]


@dataclass(frozen=True)
class FeaturePlan:
    """A feature service with its views in the declared order.

    What its on-demand views read without being declared comes last: such features after those of
    their own view, such views after all others.

    `join_keys` maps each field of an instance that names an entity to its type, `request_fields`
    each field that on-demand views take from the instance to Feast's name of its type. `redis` is
    None where the online store is another one.
    """

    project: str
    feature_service: str
    join_keys: Mapping[str, JoinKeyType]
    views: tuple[PlannedView, ...]
    redis: RedisLayout | None = None
    request_fields: Mapping[str, str] = field(default_factory=dict)

    def stored(self) -> "FeaturePlan":
        """The plan without the views that are made on demand."""
        views = tuple(view for view in self.views if view.transformation is None)
        return replace(self, views=views, request_fields={})

    @cached_property
    def references(self) -> tuple[str, ...]:
        """`view:feature` of every feature, in the order of every table read by this plan."""
        return tuple(reference for view in self.views for reference in view.references())

    @cached_property
    def view_columns(self) -> tuple[slice, ...]:
        """For each view, which features of `references` are its own."""
        slices, start = [], 0
        for view in self.views:
            slices.append(slice(start, start + len(view.features)))
            start += len(view.features)
        return tuple(slices)

    @cached_property
    def value_types(self) -> Mapping[str, ValueType]:
        return {
            f"{view.name}:{feature.name}": value_type(feature.dtype)
            for view in self.views
            for feature in view.features
        }

    @cached_property
    def inputs(self) -> frozenset[str]:
        """The stored features from which on-demand views are made."""
        made = (view.transformation for view in self.views)
        return frozenset(name for each in made if each is not None for name in each.inputs)

    def to_json(self) -> bytes:
        """Canonical: the same plan gives the same bytes."""
        return json.dumps(asdict(self), indent=1, sort_keys=True).encode() + b"\n"


NO_FEATURES = FeaturePlan(project="", feature_service="", join_keys={}, views=())
"""The plan of a model that reads no stored feature."""


_PLAN = TypeAdapter(FeaturePlan)


def plan_from_json(document: bytes) -> FeaturePlan:
    """The inverse of `FeaturePlan.to_json`. Raises `ValueError` on anything else."""
    try:
        return _PLAN.validate_json(document)
    except ValidationError as exc:
        fault = exc.errors()[0]
        where = ".".join(map(str, fault["loc"])) or "document"
        raise ValueError(f"not a feature plan: {where[:200]!r}: {fault['msg']}") from exc


def differences(published: FeaturePlan, registry: FeaturePlan) -> list[str]:
    """In words, what the registry says now that a published plan does not; empty when they agree.

    The pickled form of a function differs from one Python to the next: its text is compared.
    """
    found = _changes("", _facts(published), _facts(registry))
    ours, theirs = (_views_by_name(plan) for plan in (published, registry))
    found += [f"view {name} is gone" for name in ours.keys() - theirs.keys()]
    found += [f"view {name} is new" for name in theirs.keys() - ours.keys()]
    shared = [name for name in ours if name in theirs]
    for name in shared:
        found += _changes(f"view {name}: ", _view_facts(ours[name]), _view_facts(theirs[name]))
    if not found and published.references != registry.references:
        found.append("the order of the features has changed")
    return sorted(found)


def _facts(plan: FeaturePlan) -> dict[str, Any]:
    """What a plan says, its views apart."""
    layout = {} if plan.redis is None else {"key_version": plan.redis.key_version}
    return {
        "project": plan.project,
        "feature service": plan.feature_service,
        "read straight from Redis": plan.redis is not None,
        **layout,
        **{f"join key {key}": kind for key, kind in plan.join_keys.items()},
        **{
            f"Feast type of {key}": kind
            for key, kind in (plan.redis.key_types if plan.redis else {}).items()
        },
        **{f"request field {name}": dtype for name, dtype in plan.request_fields.items()},
    }


def _view_facts(view: PlannedView) -> dict[str, Any]:
    made = view.transformation
    return {
        "join keys": tuple(sorted(view.join_keys)),
        "ttl_s": view.ttl_s,
        "stored as": view.stored_as or view.name,
        "stored under": tuple(sorted(view.stored_keys or view.join_keys)),
        **{f"feature {feature.name}": feature.dtype for feature in view.features},
        **(
            {}
            if made is None
            else {f.name: getattr(made, f.name) for f in fields(made) if f.name != "definition"}
        ),
    }


def _views_by_name(plan: FeaturePlan) -> dict[str, PlannedView]:
    return {view.name: view for view in plan.views}


def _changes(where: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    changes = [f"{where}{name} is gone" for name in ours.keys() - theirs.keys()]
    changes += [f"{where}{name} is new" for name in theirs.keys() - ours.keys()]
    changes += [
        f"{where}{name} was {ours[name]!r}, is {theirs[name]!r}"
        for name in ours.keys() & theirs.keys()
        if ours[name] != theirs[name]
    ]
    return changes


def value_type(dtype: str) -> ValueType:
    if dtype in {"Float32", "Float64", "Int32", "Int64", "Bool"}:
        return "number"
    return "text" if dtype == "String" else "other"
