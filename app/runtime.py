"""What is open while the service runs, opened in order and closed in reverse."""

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable, Mapping, MutableSequence, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self, TypeAlias

from pydantic import SecretStr

from app.canary.canaries import Canaries
from app.canary.canary import Canary
from app.canary.first_seen import open_first_seen
from app.canary.table import KIND as EXPOSURES
from app.canary.table import ExposureTable
from app.clock import FeatureClock, ReplayClock, WallClock
from app.config import Settings
from app.deadline import DeadlineSweep
from app.errors import FeaturesUnavailable, ModelNotReady
from app.events.event import Events, NoEvents
from app.features.plan import FeaturePlan
from app.features.registry_watch import RegistryWatch, require_registry
from app.features.source import FeatureSource
from app.labels.keeper import LabelKeeper, Labels, NoLabels
from app.predictor import Answer, Asker, Observer
from app.release.state import ReleaseState, worker_name
from app.release.store import open_state, open_tables
from app.reload.blocking import BlockingCalls
from app.reload.hot_reload import HotReload
from app.reload.residents import VersionSource
from app.repository.last_known import LastKnown
from app.repository.load import VersionOpener
from app.repository.signing import TrustedKeys
from app.repository.store import is_url, open_repository
from app.repository.vault import Vault
from app.rollout.decider import Decider
from app.rollout.decision_log import DecisionLog
from app.rollout.observed import Observations
from app.rollout.verbs import RolloutVerbs
from app.served_model import ServedModel
from app.shadow.comparisons import TABLE_KINDS, Comparisons
from app.shadow.pair_log import NoPairLog, PairFiles, PairLog
from app.shadow.shadow import Shadow
from app.shadow.trial import Records
from app.tasks import ended
from app.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

_READINESS_EVERY_S = 5
_REPOSITORY_CALLS = 2
# Of whoever asks where a version came from: they must not keep a version from being loaded.
_PUBLIC_READS = 4
# Each takes a core for some seconds, and 200 MB.
_REGISTRY_CHECKS_APART_S = 20.0

OpenSource: TypeAlias = Callable[[FeaturePlan], FeatureSource]
OpenFeatures: TypeAlias = Callable[
    [Settings, FeatureClock], AbstractAsyncContextManager[OpenSource]
]


class Others(NamedTuple):
    """The other workers of this service."""

    before_us: int
    """How many of them are counted before this one."""
    missing: Callable[[], Sequence[str]]
    """Says which of them have not been ready yet, a sentence each."""
    replay_instant: "MutableSequence[float] | memoryview[float] | None"
    """The cell where the replay clock of all of them stands."""


ALONE = Others(0, tuple, None)


class Runtime:
    """The models of the repository, their feature sources and clocks, as an async context manager.

    `open_features` opens what the sources of plans share; a source is asked for only by models that
    read stored features. Entering raises `ConfigurationError` or `InvalidModel` with a sentence for
    the operator.
    """

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        open_features: OpenFeatures,
        others: Others = ALONE,
        *,
        isolated_verification: bool = True,
    ) -> None:
        self._isolated_verification = isolated_verification
        self.settings = settings
        self.metrics = metrics
        self.clock: FeatureClock = (
            WallClock()
            if settings.replay_clock is None
            else ReplayClock(settings.replay_clock, others.replay_instant)
        )
        self._others = others
        self.models: dict[str, ServedModel | None] = {}
        self.observers: dict[str, Observer] = {}
        """By the name of the model: what sees its answers."""
        self.canaries: dict[str, Canary] = {}
        """By the name of the model: what routes its requests."""
        self.labels: Labels = NoLabels()
        self.events: Events = NoEvents()
        self.registry = RegistryWatch(
            settings.feature_repo,
            settings.registry_check_s,
            self._plans,
            metrics,
            first_after_s=others.before_us * _REGISTRY_CHECKS_APART_S,
        )
        self._open_features = open_features
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        settings = self.settings
        async with AsyncExitStack() as stack:
            # Before anything that takes long: what is wrong with it is told at once.
            trusted = None if settings.trusted_keys is None else TrustedKeys(settings.trusted_keys)
            worker = worker_name()
            if settings.webhooks is not None:
                # First, so that it closes last: what happens meanwhile is told too.
                webhooks = _webhooks(settings, worker, self.metrics)
                self.events = await stack.enter_async_context(webhooks)
            # Of this repository: what was decided on another one's versions is no business of ours.
            location = _location(settings.model_repository)
            of_repository = hashlib.sha256(location.encode()).hexdigest()[:16]
            state = settings.work_dir / "state" / of_repository
            repository = LastKnown(
                open_repository(settings.model_repository),
                settings.work_dir / "contracts" / of_repository,
            )
            store = await stack.enter_async_context(open_state(settings.state_redis_url, state))
            sweep = await stack.enter_async_context(DeadlineSweep())
            open_source = await stack.enter_async_context(self._open_features(settings, self.clock))

            def open_checked(plan: FeaturePlan) -> FeatureSource:
                require_registry(settings.feature_repo)
                return open_source(plan)

            opener = VersionOpener(
                open_checked, sweep, self.metrics, self.clock, settings.drain_s, settings.workers
            )
            calls = BlockingCalls(_REPOSITORY_CALLS)
            stack.push_async_callback(calls.close)
            self.reads = BlockingCalls(_PUBLIC_READS)
            stack.push_async_callback(self.reads.close)
            vault = Vault(settings.work_dir / "versions", repository, trusted)
            isolated = self._isolated_verification
            source = VersionSource(repository, vault, opener, calls, asyncio.Lock(), isolated)
            poll_s = settings.repository_poll_s
            kinds = {**TABLE_KINDS, EXPOSURES: ExposureTable.decode}
            tables = await stack.enter_async_context(
                open_tables(settings.state_redis_url, state, worker, kinds, self._table_refused)
            )
            first_seen = await stack.enter_async_context(
                open_first_seen(settings.state_redis_url, state, worker)
            )
            self._canaries = Canaries(self.canaries, first_seen, tables, self.metrics)
            if settings.state_redis_url is not None:
                keeper = LabelKeeper(
                    settings.state_redis_url, self.models, self.clock, self.metrics
                )
                self.labels = await stack.enter_async_context(keeper)
            pair_log: PairLog = NoPairLog()
            if settings.comparison_log is not None:
                most_bytes = settings.comparison_log_mb * 1_000_000
                pair_log = PairFiles(settings.comparison_log, worker, most_bytes)
            records = Records(self.metrics, pair_log, self.labels)
            comparisons = Comparisons(
                tables,
                self.models,
                self._states,
                records,
                self.labels.document,
                self.clock.now_s,
                self._canaries.take,
            )
            self.comparisons = await stack.enter_async_context(comparisons)
            await stack.enter_async_context(self._canaries)
            self.reload = HotReload(
                self.models,
                source,
                store,
                worker,
                poll_s,
                self._shadow,
                self._canaries.canary,
                self._release,
                self.events,
                self.metrics,
            )
            changes = self.reload.changes
            observations = Observations(tables, self.labels.losses)
            self.rollout_verbs = RolloutVerbs(
                changes,
                source,
                observations,
                keeps_labels=settings.state_redis_url is not None,
                replays=settings.replay_clock is not None,
            )
            await stack.enter_async_context(self.reload)
            decision_log = DecisionLog(settings.work_dir / "decisions")
            stack.callback(decision_log.close)
            decider = Decider(
                changes,
                self.rollout_verbs,
                observations,
                decision_log,
                self.events,
                self.metrics,
            )
            self.decider = await stack.enter_async_context(decider)
            await stack.enter_async_context(self.comparisons.tidied(self.reload.workers))
            await stack.enter_async_context(self.registry)
            watch = asyncio.create_task(self._watch_readiness(), name="readiness")
            stack.push_async_callback(ended, watch)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._stack.aclose()

    def _shadow(self, model: str) -> Shadow:
        """Of this model; it observes what is answered, after it was kept for labels."""
        shadow = self.comparisons.shadow(model)
        self.observers[model] = _Observers(self.labels, shadow)
        return shadow

    async def _release(self, model: str, version: int) -> None:
        """Of what CURRENT has come to name, with as many requests as there are."""
        await self.rollout_verbs.start(model, version, by="CURRENT")

    def _states(self) -> Mapping[str, ReleaseState]:
        return {name: model.state for name, model in self.reload.followed.items()}

    def _table_refused(self, kind: str) -> None:
        self.metrics.refused_tables.labels(kind).inc()

    def serving(self) -> Mapping[str, int | None]:
        """Of each model the version that answers, None while there is none."""
        return {name: m if m is None else m.id.version for name, m in self.models.items()}

    async def unready(self) -> list[str]:
        """Why this process should get no traffic now; empty when it should."""
        reasons = [f"{name}: not loaded" for name, model in self.models.items() if model is None]
        loaded = {name: model for name, model in self.models.items() if model is not None}
        if not self.models:
            reasons.append("no model is loaded")
        reasons += await _failed("features", loaded, lambda model: model.source.check())
        reasons += await _failed("backend", loaded, lambda model: model.batcher.check())
        reasons += self._others.missing()
        self.metrics.ready.set(0 if reasons else 1)
        return reasons

    async def _watch_readiness(self) -> None:
        """Keeps `hikyaku_ready` true: a scrape must not wait for the feature store."""
        while True:
            await self.unready()
            await asyncio.sleep(_READINESS_EVERY_S)

    def _plans(self) -> Mapping[str, FeaturePlan]:
        """Of the models that read stored features."""
        served = {name: model for name, model in self.models.items() if model is not None}
        return {name: m.source.plan for name, m in served.items() if m.source.plan.views}


class _Observers:
    """Several as one."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    def offer(self, asker: Asker, answer: Answer) -> None:
        for observer in self._observers:
            observer.offer(asker, answer)


def _location(repository: str) -> str:
    """The same however it is written."""
    return repository if is_url(repository) else str(Path(repository).resolve())


def _webhooks(
    settings: Settings, worker: str, metrics: Metrics
) -> AbstractAsyncContextManager[Events]:
    from app.events.webhooks import open_webhooks  # imports httpx, which most do not need

    def text(setting: SecretStr | None) -> str:
        return "" if setting is None else setting.get_secret_value()

    return open_webhooks(
        text(settings.webhooks),
        settings.webhook_hosts or "",
        settings.webhook_networks or "",
        text(settings.webhook_secret),
        worker,
        metrics,
    )


async def _failed(
    part: str, models: Mapping[str, ServedModel], check: Callable[[ServedModel], Awaitable[None]]
) -> list[str]:
    """Of which models this check fails, and why."""
    failures = await asyncio.gather(*map(check, models.values()), return_exceptions=True)
    reasons = []
    for name, failure in zip(models, failures, strict=True):
        if isinstance(failure, FeaturesUnavailable | ModelNotReady):
            reasons.append(f"{name}: {part}: {failure}")
        elif failure is not None:
            log.error("a check failed", extra={"model": name, "part": part}, exc_info=failure)
            reasons.append(f"{name}: {part}: {type(failure).__name__}")
    return reasons
