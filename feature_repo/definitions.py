"""What is known about a flight before it leaves: Feast's entities, views and feature service."""

from datetime import timedelta

from feast import (
    Entity,
    FeatureService,
    FeatureView,
    Field,
    FileSource,
    PushSource,
    ValueType,
)
from feast.types import Float32, Int64, PrimitiveFeastType, String

origin = Entity(name="origin", join_keys=["origin"], value_type=ValueType.STRING)
carrier = Entity(name="carrier", join_keys=["carrier"], value_type=ValueType.STRING)
dest = Entity(name="dest", join_keys=["dest"], value_type=ValueType.STRING)
tailnum = Entity(name="tailnum", join_keys=["tailnum"], value_type=ValueType.STRING)


def _view(
    name: str, entities: list[Entity], ttl: timedelta, features: dict[str, PrimitiveFeastType]
) -> FeatureView:
    # Relative, so that a registry applied on one machine is right on another. `feast apply` takes
    # it from this folder, the duckdb store from the working directory: make them the same.
    history = FileSource(
        name=f"{name}_history", path=f"data/{name}.parquet", timestamp_field="event_timestamp"
    )
    return FeatureView(
        name=name,
        entities=entities,
        ttl=ttl,
        schema=[
            # Feast reads the files to guess the type of a key that the schema leaves out.
            *(Field(name=entity.join_key, dtype=String) for entity in entities),
            *(Field(name=feature, dtype=dtype) for feature, dtype in features.items()),
        ],
        online=True,
        source=PushSource(name=f"{name}_push", batch_source=history),
    )


origin_departures = _view(
    "origin_departures",
    [origin],
    timedelta(hours=3),
    {
        "mean_departure_delay_1h": Float32,
        "mean_departure_delay_3h": Float32,
        "departures_3h": Int64,
        "late_departure_share_3h": Float32,
    },
)

carrier_arrivals = _view(
    "carrier_arrivals",
    [carrier],
    timedelta(hours=24),
    {
        "mean_arrival_delay_3h": Float32,
        "mean_arrival_delay_24h": Float32,
        "late_arrival_share_24h": Float32,
    },
)

destination_arrivals = _view(
    "destination_arrivals",
    [dest],
    timedelta(hours=24),
    {
        "mean_arrival_delay_3h": Float32,
        "mean_arrival_delay_24h": Float32,
        "late_arrival_share_24h": Float32,
    },
)

route_arrivals = _view(
    "route_arrivals",
    [origin, dest],
    timedelta(days=7),
    {
        "mean_arrival_delay_7d": Float32,
        "late_arrival_share_7d": Float32,
        "arrivals_7d": Int64,
    },
)

aircraft_departures = _view(
    "aircraft_departures",
    [tailnum],
    timedelta(days=3),
    {"last_departure_delay": Float32},
)

aircraft_arrivals = _view(
    "aircraft_arrivals",
    [tailnum],
    timedelta(days=3),
    {
        "last_arrival_delay": Float32,
        "last_arrived_flight_departure_delay": Float32,
    },
)

# event_timestamp is one hour after the observation's own hour: the airports report at about 51
# past, so that what stands under hour h is only sure to be public by h + 1.
origin_weather = _view(
    "origin_weather",
    [origin],
    timedelta(hours=6),
    {
        "temperature": Float32,
        "dew_point": Float32,
        "humidity": Float32,
        "wind_direction": Float32,
        "wind_speed": Float32,
        "wind_gust": Float32,
        "precipitation": Float32,
        "pressure": Float32,
        "visibility": Float32,
    },
)

flight_delay = FeatureService(
    name="flight_delay",
    features=[
        origin_departures,
        carrier_arrivals,
        destination_arrivals,
        route_arrivals,
        aircraft_departures,
        aircraft_arrivals,
        origin_weather,
    ],
)
