"""Compiles a Feast feature service into the plan that serving reads by."""

import base64
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, cast

from feast import FeatureStore, FeatureView, OnDemandFeatureView
from feast.errors import FeastObjectNotFoundException, FeatureViewVersionNotFound
from feast.feature_view import DUMMY_ENTITY_ID
from feast.feature_view_projection import FeatureViewProjection
from feast.infra.online_stores.helpers import _mmh3, compute_versioned_name

from app.errors import InvalidModel
from app.features.entity_key import KeyType
from app.features.plan import (
    FeaturePlan,
    JoinKeyType,
    PlannedFeature,
    PlannedView,
    RedisLayout,
    Transformation,
)
from app.features.values import DECODABLE

_KEY_TYPES: Mapping[str, JoinKeyType] = {
    "String": "string",
    "Int32": "int",
    "Int64": "int",
    "Bytes": "bytes",
    "UnixTimestamp": "timestamp",
}

REQUEST_TYPES = frozenset({"String", "Float32", "Float64", "Int32", "Int64", "Bool", *_KEY_TYPES})
"""Feast types that a field of an instance can have."""


def compile_plan(store: FeatureStore, service: str) -> FeaturePlan:
    """Views, join keys, ttl and features of a service, in its declared order, then what its
    on-demand views read besides.

    Raises `InvalidModel` naming what is missing or cannot be served.
    """
    try:
        definition = store.get_feature_service(service)
    except FeastObjectNotFoundException as exc:
        known = sorted(known.name for known in store.list_feature_services())
        raise InvalidModel(f"no feature service {service!r} in the registry: {known}") from exc
    draft = _Draft(store, service)
    views = [draft.declare(projection) for projection in definition.feature_view_projections]
    for view, projection in zip(views, definition.feature_view_projections, strict=True):
        if _is_made(view):
            draft.make(view, projection)
    return FeaturePlan(
        store.project,
        service,
        {key: _KEY_TYPES[kind] for key, kind in draft.key_types.items()},
        tuple(draft.views.values()),
        _redis_layout(store, service, draft),
        draft.request_fields,
    )


def find_view(store: FeatureStore, service: str, name: str) -> FeatureView | OnDemandFeatureView:
    """The view of the registry that a plan of the service calls `name`.

    Raises `FeastObjectNotFoundException` without the service, `InvalidModel` without the view.
    """
    draft = _Draft(store, service)
    for projection in store.get_feature_service(service).feature_view_projections:
        if projection.name_to_use() == name:
            return draft.look_up(projection)
        view = draft.look_up(projection)
        if isinstance(view, OnDemandFeatureView):
            for source in view.source_feature_view_projections.values():
                if source.name_to_use() == name:
                    return draft.look_up(source)
    raise InvalidModel(f"{service}: the registry no longer has {name}; publish again")


def why_not_from_redis(store: FeatureStore, plan: FeaturePlan) -> str:
    """Why a plan without a layout for Redis is read through the Feast SDK; empty with one."""
    if plan.redis is not None:
        return ""
    if store.config.online_store.type != "redis":
        return f"the online store is {store.config.online_store.type}"
    return f"{_undecodable(plan.stored().views)} has a type that only Feast reads"


@dataclass
class _Draft:
    """What is known of a plan so far. `views` is by name, in order."""

    store: FeatureStore
    service: str
    views: dict[str, PlannedView] = field(default_factory=dict)
    key_types: dict[str, KeyType] = field(default_factory=dict)
    request_fields: dict[str, str] = field(default_factory=dict)
    _origins: dict[str, object] = field(default_factory=dict)

    def declare(self, projection: FeatureViewProjection) -> FeatureView | OnDemandFeatureView:
        """Add a view of the service."""
        view = self.look_up(projection)
        name = projection.name_to_use()
        if _is_made(view):
            if name in self.views:
                raise InvalidModel(f"{self.service}: two views are named {name}")
            # Its place; what makes it is known when all views of the service are.
            self.views[name] = PlannedView(name, (), None, _features(projection))
        else:
            self._add_stored(view, projection)
        return view

    def make(self, view: OnDemandFeatureView, projection: FeatureViewProjection) -> None:
        """Complete an on-demand view, and add what it reads that is not there yet."""
        name = projection.name_to_use()
        inputs = []
        # The registry keeps the sources in no order.
        for _, source in sorted(view.source_feature_view_projections.items()):
            if source.name_alias:
                raise InvalidModel(f"{name}: reads {source.name} under another name")
            stored = self.look_up(source)
            if _is_made(stored):
                raise InvalidModel(f"{name}: reads {source.name}, which is made on demand too")
            self._add_stored(stored, source, only_missing=True)
            inputs += [f"{source.name_to_use()}:{feature.name}" for feature in source.features]
        fields = self._request_fields_of(view)
        self.views[name] = replace(
            self.views[name],
            transformation=_transformation(view, tuple(inputs), tuple(fields)),
        )

    def look_up(self, projection: FeatureViewProjection) -> FeatureView | OnDemandFeatureView:
        """The view behind it. Raises `InvalidModel` for one that cannot be read online."""
        where, name = self.service, projection.name_to_use()
        registry, project = self.store.registry, self.store.project
        versioned = self.store.config.registry.enable_online_feature_view_versioning
        try:
            if projection.version_tag is None:
                view = registry.get_any_feature_view(projection.name, project)
            elif versioned:
                view = registry.get_feature_view_by_version(
                    projection.name, project, projection.version_tag
                )
            else:
                raise InvalidModel(
                    f"{where}: {name} is a version, but the registry keeps none online "
                    "(enable_online_feature_view_versioning)"
                )
        except (FeastObjectNotFoundException, FeatureViewVersionNotFound) as exc:
            raise InvalidModel(f"{where}: no view {name} in the registry") from exc
        if not isinstance(view, FeatureView | OnDemandFeatureView):
            raise InvalidModel(f"{where}: {name} is a {type(view).__name__}, which is not served")
        if not view.enabled:
            raise InvalidModel(f"{where}: view {name} is disabled")
        if isinstance(view, FeatureView) and not view.online:
            raise InvalidModel(f"{where}: view {name} has no online data")
        if isinstance(view, OnDemandFeatureView):
            _check_mode(view, f"{where}: {name}")
        return view

    def _add_stored(
        self,
        view: FeatureView | OnDemandFeatureView,
        projection: FeatureViewProjection,
        *,
        only_missing: bool = False,
    ) -> None:
        """Add a view, or its features to the view of that name, which must be the same one."""
        name, renamed = projection.name_to_use(), dict(projection.join_key_map)
        origin = (projection.name, projection.version_tag, renamed)
        features = _features(projection)
        if name in self.views:
            if self._origins.get(name) != origin:
                raise InvalidModel(
                    f"{self.service}: {name} names two views, or one with two sets of join keys; "
                    "give one of them another name (with_name)"
                )
            known = self.views[name]
            twice = {feature.name for feature in features} & {f.name for f in known.features}
            if twice and not only_missing:
                raise InvalidModel(f"{self.service}: {name}:{min(twice)} is asked for twice")
            new = tuple(feature for feature in features if feature.name not in twice)
            self.views[name] = replace(known, features=known.features + new)
            return
        self._origins[name] = origin
        columns = [column for column in view.entity_columns if column.name != DUMMY_ENTITY_ID]
        for column in columns:
            self._add_key(name, renamed.get(column.name, column.name), str(column.dtype))
        stored_keys = tuple(column.name for column in columns)
        join_keys = tuple(renamed.get(key, key) for key in stored_keys)
        pinned = view.with_projection(projection) if projection.version_tag is not None else view
        stored_as = compute_versioned_name(
            pinned, self.store.config.registry.enable_online_feature_view_versioning
        )
        self.views[name] = PlannedView(
            name,
            join_keys,
            _seconds(getattr(view, "ttl", None)),
            features,
            None if stored_as == name else stored_as,
            None if stored_keys == join_keys else stored_keys,
        )

    def _add_key(self, view: str, key: str, dtype: str) -> None:
        if dtype not in _KEY_TYPES:
            raise InvalidModel(f"{view}: join key {key} is {dtype}")
        kind = self.key_types.setdefault(key, cast(KeyType, dtype))
        if kind != dtype:
            raise InvalidModel(f"{view}: join key {key} is {dtype} here and {kind} elsewhere")

    def _request_fields_of(self, view: OnDemandFeatureView) -> list[str]:
        names = []
        for _, source in sorted(view.source_request_sources.items()):
            for column in source.schema:
                name, dtype = column.name, str(column.dtype)
                if dtype not in REQUEST_TYPES:
                    raise InvalidModel(f"{view.name}: request field {name} is {dtype}")
                if name in self.key_types:
                    raise InvalidModel(f"{view.name}: request field {name} is a join key too")
                kind = self.request_fields.setdefault(name, dtype)
                if kind != dtype:
                    raise InvalidModel(
                        f"{view.name}: request field {name} is {dtype} here and {kind} elsewhere"
                    )
                names.append(name)
        return names


def _is_made(view: FeatureView | OnDemandFeatureView) -> bool:
    return isinstance(view, OnDemandFeatureView) and not view.write_to_online_store


def _check_mode(view: OnDemandFeatureView, what: str) -> None:
    """What is written to the online store is made by whoever writes it."""
    if view.write_to_online_store:
        return
    if view.aggregations:
        raise InvalidModel(f"{what} aggregates on demand, which is not served")
    if view.mode not in {"python", "pandas"}:
        raise InvalidModel(f"{what} is made in mode {view.mode}, which is not served")


def _transformation(
    view: OnDemandFeatureView, inputs: tuple[str, ...], request_fields: tuple[str, ...]
) -> Transformation:
    definition = view.to_proto().spec
    body = definition.feature_transformation.user_defined_function
    return Transformation(
        cast(Any, "python_singleton" if view.singleton else view.mode),
        inputs,
        request_fields,
        body.body_text,
        base64.b64encode(definition.SerializeToString(deterministic=True)).decode(),
    )


def _features(projection: FeatureViewProjection) -> tuple[PlannedFeature, ...]:
    return tuple(
        PlannedFeature(feature.name, str(feature.dtype)) for feature in projection.features
    )


def _redis_layout(store: FeatureStore, service: str, draft: _Draft) -> RedisLayout | None:
    """None where Redis is not the online store, or a value is of a type that only Feast reads.

    Raises `InvalidModel` when two features of one entity have the same hash field: Feast would
    write one over the other.
    """
    views = [view for view in draft.views.values() if view.transformation is None]
    if store.config.online_store.type != "redis" or _undecodable(views):
        return None
    version = store.config.entity_key_serialization_version
    if version not in {2, 3}:
        raise InvalidModel(f"{service}: entity_key_serialization_version {version} is not served")
    fields: dict[str, str] = {}
    owners = _hash_fields(store)
    for view in views:
        for feature, reference in zip(view.features, view.references(), strict=True):
            stored = f"{view.stored_as or view.name}:{feature.name}"
            digest = _mmh3(stored).hex()
            entity = tuple(sorted(view.stored_keys or view.join_keys))
            others = owners.get((entity, digest), set()) - {stored}
            if others:
                raise InvalidModel(
                    f"{service}: {stored} and {min(others)} share the hash field {digest}, so that "
                    "Feast writes one over the other"
                )
            fields[reference] = digest
    return RedisLayout(version, draft.key_types, fields)


def _hash_fields(store: FeatureStore) -> Mapping[tuple[tuple[str, ...], str], set[str]]:
    """For each entity and hash field of the registry, the features that are written there."""
    versioned = store.config.registry.enable_online_feature_view_versioning
    owners: dict[tuple[tuple[str, ...], str], set[str]] = {}
    for view in store.registry.list_all_feature_views(store.project):
        if not isinstance(view, FeatureView | OnDemandFeatureView) or _is_made(view):
            continue
        entity = tuple(sorted(set(view.join_keys) - {DUMMY_ENTITY_ID}))
        for feature in view.features:
            stored = f"{compute_versioned_name(view, versioned)}:{feature.name}"
            owners.setdefault((entity, _mmh3(stored).hex()), set()).add(stored)
    return owners


def _undecodable(views: Iterable[PlannedView]) -> str:
    """The first stored feature of a type that only Feast reads, and its type; empty without one."""
    for view in views:
        for feature in view.features:
            if feature.dtype not in DECODABLE:
                return f"{view.name}:{feature.name} ({feature.dtype})"
    return ""


def _seconds(ttl: timedelta | None) -> float | None:
    """Feast writes "never expires" as None or as zero."""
    return ttl.total_seconds() if ttl else None
