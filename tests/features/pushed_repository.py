"""A repository whose views are fed by push sources, beside those of the fleet."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import redis

from tests.tiny_feast import DEFINITIONS

if TYPE_CHECKING:  # importing feast takes seconds
    from feast import FeatureStore

    from app.features.push import PushTarget

DEFINITIONS_OF_PUSHED = (
    DEFINITIONS
    + """
from feast import PushSource
from feast.types import Array, Float64, Int32, UnixTimestamp


def pushed(name, source, entities, online=True, **features):
    return FeatureView(
        name=name,
        entities=entities,
        ttl=timedelta(hours=1),
        online=online,
        schema=[
            *([Field(name="driver_id", dtype=Int64)] if entities else []),
            *(Field(name=n, dtype=t) for n, t in features.items()),
        ],
        source=source,
    )


def push_source(name, **mapping):
    history = FileSource(name=name + "_history", path="data/driver.parquet",
                         timestamp_field="known_at", field_mapping=mapping)
    return PushSource(name=name, batch_source=history)


tracked = push_source("tracked", stars="rating")
ratings = pushed("ratings", tracked, [driver_id], rating=Float32, trips=Int64, plate=String)
states = pushed("states", tracked, [driver_id], active=Bool)

measured = pushed("measured", push_source("measured"), [driver_id], price=Float64, seats=Int32,
                  seen=UnixTimestamp, tags=Array(String))
worldwide = pushed("worldwide", push_source("worldwide"), [], drivers=Int64)
kept_offline = pushed("kept_offline", push_source("kept_offline"), [driver_id], online=False,
                      trips=Int64)
"""
)


@dataclass(frozen=True)
class Pushed:
    """The repository, applied, and the Redis of its online store."""

    repo: Path
    redis_url: str

    def target(self, push_source: str) -> "PushTarget":
        from app.features.feast_repo import open_writer
        from app.features.push import PushTarget

        return PushTarget(open_writer(self.repo, self.redis_url), push_source)

    def dump(self) -> dict[bytes, bytes]:
        """Everything that the Redis holds."""
        with redis.Redis.from_url(self.redis_url) as client:
            return {key: client.dump(key) for key in client.scan_iter()}

    def online(self, *features: str, driver_id: int | None = None) -> list[Any]:
        """What the Feast SDK reads of these features for one driver."""
        from app.features.feast_repo import open_store

        store: FeatureStore = open_store(self.repo, self.redis_url)
        entity = {} if driver_id is None else {"driver_id": driver_id}
        read = store.get_online_features(
            list(features), [entity], full_feature_names=True
        ).to_dict()
        return [read[feature.replace(":", "__")][0] for feature in features]
