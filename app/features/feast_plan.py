"""Compiles a Feast feature service into the plan that serving reads by."""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import cast

from feast import FeatureStore
from feast.errors import FeastObjectNotFoundException
from feast.infra.online_stores.helpers import _mmh3

from app.errors import InvalidModel
from app.features.entity_key import KeyType
from app.features.plan import FeaturePlan, JoinKeyType, PlannedFeature, PlannedView, RedisLayout

_KEY_TYPES: dict[str, JoinKeyType] = {
    "String": "string",
    "Int32": "int",
    "Int64": "int",
}


def compile_plan(store: FeatureStore, service: str) -> FeaturePlan:
    """Views, join keys, ttl and features of a service, in its declared order.

    Raises `InvalidModel` naming what is missing or cannot be served.
    """
    try:
        definition = store.get_feature_service(service)
    except FeastObjectNotFoundException as exc:
        known = sorted(known.name for known in store.list_feature_services())
        raise InvalidModel(f"no feature service {service!r} in the registry: {known}") from exc
    join_keys: dict[str, JoinKeyType] = {}
    key_types: dict[str, str] = {}
    views = []
    for projection in definition.feature_view_projections:
        if projection.name_alias or projection.join_key_map:
            raise InvalidModel(f"{service}: {projection.name} is renamed, which is not served yet")
        try:
            view = store.get_feature_view(projection.name)
        except FeastObjectNotFoundException as exc:
            raise InvalidModel(
                f"{service}: {projection.name} is not an ordinary feature view, the only kind "
                "that is served yet"
            ) from exc
        if not view.online:
            raise InvalidModel(f"{service}: view {view.name} has no online data")
        for column in view.entity_columns:
            if str(column.dtype) not in _KEY_TYPES:
                raise InvalidModel(f"{view.name}: join key {column.name} is {column.dtype}")
            kind = key_types.setdefault(column.name, str(column.dtype))
            if kind != str(column.dtype):
                raise InvalidModel(f"{view.name}: join key {column.name} is {kind} elsewhere")
            join_keys[column.name] = _KEY_TYPES[kind]
        views.append(
            PlannedView(
                view.name,
                tuple(column.name for column in view.entity_columns),
                _seconds(view.ttl),
                tuple(PlannedFeature(f.name, str(f.dtype)) for f in projection.features),
            )
        )
    return FeaturePlan(
        store.project, service, join_keys, tuple(views), _redis_layout(store, key_types, views)
    )


def _redis_layout(
    store: FeatureStore, key_types: Mapping[str, str], views: Sequence[PlannedView]
) -> RedisLayout | None:
    """None where Redis is not the online store, or not a single one.

    Raises `InvalidModel` when two features of one entity have the same hash field: Feast would
    write one over the other.
    """
    online = store.config.online_store
    if online.type != "redis" or online.redis_type != "redis":
        return None
    fields: dict[str, str] = {}
    owners: dict[tuple[tuple[str, ...], str], str] = {}
    for view in views:
        for reference in view.references():
            field = _mmh3(reference).hex()
            other = owners.setdefault((tuple(sorted(view.join_keys)), field), reference)
            if other != reference:
                raise InvalidModel(f"{reference} and {other} share the hash field {field}")
            fields[reference] = field
    return RedisLayout(
        store.config.entity_key_serialization_version,
        {key: cast(KeyType, kind) for key, kind in key_types.items()},
        fields,
    )


def _seconds(ttl: timedelta | None) -> float | None:
    """Feast writes "never expires" as None or as zero."""
    return ttl.total_seconds() if ttl else None
