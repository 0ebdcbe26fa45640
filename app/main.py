"""Composes the service: settings → runtime → hot operations and FastAPI → one ASGI application."""

from collections.abc import Callable

from app.api.admit import Doorkeeper
from app.api.gateway import Gateway
from app.api.predictions import PredictOperation
from app.api.service import create_service
from app.clock import FeatureClock
from app.config import Settings
from app.features.plan import FeaturePlan
from app.features.source import FeatureSource
from app.predictor import Predictor
from app.runtime import Runtime
from app.telemetry.metrics import Metrics


def open_feast(settings: Settings, clock: FeatureClock) -> Callable[[FeaturePlan], FeatureSource]:
    """Feature sources on the Feast SDK, which takes seconds to import: only when it is needed."""
    from app.features.feast_repo import open_store
    from app.features.feast_source import FeastSource

    store = open_store(settings.feature_repo, settings.feature_redis_url, online_only=True)
    return lambda plan: FeastSource(store, plan, clock)


def create_application(
    settings: Settings,
    open_features: Callable[
        [Settings, FeatureClock], Callable[[FeaturePlan], FeatureSource]
    ] = open_feast,
) -> Gateway:
    """The ASGI application; its lifespan loads the models and releases them."""
    metrics = Metrics()
    runtime = Runtime(settings, metrics, open_features)
    predictor = Predictor(runtime.models, runtime.clock, metrics)
    return Gateway(
        Doorkeeper(settings.max_body_bytes),
        PredictOperation(predictor, metrics),
        create_service(runtime),
        metrics,
    )
