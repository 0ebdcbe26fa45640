"""Composes the service: settings → runtime → hot operations and FastAPI → one ASGI application."""

import logging
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager

from app.api.admit import Doorkeeper
from app.api.body import MAX_BODY_S, BodyReader
from app.api.gateway import Gateway
from app.api.hot_paths import HotPaths
from app.api.operators import operators_of
from app.api.predictions import PredictOperation
from app.api.service import create_service
from app.clock import FeatureClock
from app.config import Settings
from app.features.plan import FeaturePlan
from app.features.redis_address import ClusterAddress, SentinelAddress, parse_address
from app.features.redis_features import RedisFeatures
from app.features.redis_source import HashReader, RedisSource
from app.features.source import FeatureSource
from app.features.static_source import StaticSource
from app.predictor import Predictor
from app.runtime import ALONE, OpenFeatures, OpenSource, Others, Runtime
from app.telemetry.metrics import Metrics

log = logging.getLogger(__name__)


@asynccontextmanager
async def open_features(settings: Settings, clock: FeatureClock) -> AsyncIterator[OpenSource]:
    """Straight from Redis where the plan was compiled for it and FEATURE_REDIS_URL is set, else
    through the Feast SDK. It takes seconds to import: that, and what is made on demand, only when
    it is needed."""
    async with AsyncExitStack() as stack:
        redis: HashReader | None = None
        if settings.feature_redis_url is not None:
            redis = await stack.enter_async_context(_open_redis(settings.feature_redis_url))

        def open_stored(plan: FeaturePlan) -> FeatureSource:
            if not plan.views:
                return StaticSource(plan)
            if redis is not None and plan.redis is not None:
                return RedisSource(redis, plan, clock)
            return _open_feast(settings, plan, clock)

        def open_source(plan: FeaturePlan) -> FeatureSource:
            stored = open_stored(plan.stored())
            if all(view.transformation is None for view in plan.views):
                return stored
            from app.features.on_demand import OnDemandSource

            log.info("features are made on demand", extra={"service": plan.feature_service})
            return OnDemandSource(stored, plan)

        yield open_source


def _open_redis(url: str) -> AbstractAsyncContextManager[HashReader]:
    """What finds masters and nodes takes a quarter of a second to import: only where it is used."""
    address = parse_address(url)
    if isinstance(address, SentinelAddress):
        from app.features.redis_sentinel import master_features

        return master_features(address)
    if isinstance(address, ClusterAddress):
        from app.features.redis_cluster import ClusterFeatures

        return ClusterFeatures(address)
    return RedisFeatures(address)


def _open_feast(settings: Settings, plan: FeaturePlan, clock: FeatureClock) -> FeatureSource:
    from app.features.feast_repo import open_store
    from app.features.feast_source import FeastSource

    log.info("features are read through the Feast SDK", extra={"service": plan.feature_service})
    store = open_store(settings.feature_repo, settings.feature_redis_url, online_only=True)
    return FeastSource(store, plan, clock)


def create_application(
    settings: Settings,
    open_features: OpenFeatures = open_features,
    metrics: Metrics | None = None,
    others: Others = ALONE,
    *,
    isolated_verification: bool = True,
) -> Gateway:
    """The ASGI application; its lifespan loads the models and releases them.

    Without `isolated_verification` models are opened in this process right away: for those whose
    author is the caller.
    """
    runtime = Runtime(
        settings,
        metrics or Metrics(),
        open_features,
        others,
        isolated_verification=isolated_verification,
    )
    return application_of(runtime)


def application_of(runtime: Runtime) -> Gateway:
    """The ASGI application in front of this runtime; its lifespan opens and closes it."""
    settings, metrics = runtime.settings, runtime.metrics
    predictor = Predictor(runtime.models, runtime.clock, runtime.observers)
    doorkeeper = Doorkeeper(settings.max_body_bytes, operators_of(settings))
    predict = PredictOperation(
        predictor, metrics, lambda model: runtime.labels.new_id(model), runtime.canaries
    )
    hot_paths = HotPaths(doorkeeper, predict, metrics)
    bodies = BodyReader(settings.max_body_bytes, MAX_BODY_S, hot_paths.bodies)
    return Gateway(hot_paths, create_service(runtime), bodies)
