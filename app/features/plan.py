"""What a feature service holds, compiled once at publishing so that serving needs no registry."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, TypeAlias

from app.features.entity_key import KeyType

JoinKeyType: TypeAlias = Literal["string", "int"]
ValueType: TypeAlias = Literal["number", "text", "other"]


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
    """A feature service with its views in the declared order; those that its on-demand views read
    without being declared come last.

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

    def to_json(self) -> bytes:
        """Canonical: the same plan gives the same bytes."""
        return json.dumps(asdict(self), indent=1, sort_keys=True).encode() + b"\n"


NO_FEATURES = FeaturePlan(project="", feature_service="", join_keys={}, views=())
"""The plan of a model that reads no stored feature."""


def plan_from_json(document: bytes) -> FeaturePlan:
    """The inverse of `FeaturePlan.to_json`. Raises `ValueError` on anything else."""
    content: dict[str, Any] = json.loads(document)
    try:
        views = tuple(
            PlannedView(
                view["name"],
                tuple(view["join_keys"]),
                view["ttl_s"],
                tuple(PlannedFeature(**feature) for feature in view["features"]),
                view["stored_as"],
                None if view["stored_keys"] is None else tuple(view["stored_keys"]),
                _transformation(view["transformation"]),
            )
            for view in content["views"]
        )
        return FeaturePlan(
            content["project"],
            content["feature_service"],
            content["join_keys"],
            views,
            None if content["redis"] is None else RedisLayout(**content["redis"]),
            content["request_fields"],
        )
    except (KeyError, TypeError) as exc:
        raise ValueError(f"not a feature plan: {exc}") from exc


def _transformation(content: Any) -> Transformation | None:
    if content is None:
        return None
    lists = {name: tuple(content[name]) for name in ("inputs", "request_fields")}
    return Transformation(**{**content, **lists})


def value_type(dtype: str) -> ValueType:
    if dtype in {"Float32", "Float64", "Int32", "Int64", "Bool"}:
        return "number"
    return "text" if dtype == "String" else "other"
