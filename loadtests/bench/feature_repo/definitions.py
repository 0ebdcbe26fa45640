"""The feature repository of the benchmark: 20 features of drivers, 12 of customers."""

from datetime import timedelta

from feast import Entity, FeatureService, FeatureView, Field, FileSource, ValueType
from feast.types import Float32, Int64

driver = Entity(name="driver", join_keys=["driver_id"], value_type=ValueType.INT64)
customer = Entity(name="customer", join_keys=["customer_id"], value_type=ValueType.INT64)


def _stats(name: str, entity: Entity, numbers: range) -> FeatureView:
    features = [Field(name=f"f{number:02}", dtype=Float32) for number in numbers]
    return FeatureView(
        name=name,
        entities=[entity],
        ttl=timedelta(days=3650),  # what was written once is kept from run to run
        schema=[Field(name=entity.join_key, dtype=Int64), *features],
        source=FileSource(name=f"{name}_file", path="data/none.parquet", timestamp_field="at"),
    )


driver_stats = _stats("driver_stats", driver, range(20))
customer_stats = _stats("customer_stats", customer, range(20, 32))
both = FeatureService(name="both", features=[driver_stats, customer_stats])
