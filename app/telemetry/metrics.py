"""Every metric of the service, declared once."""

import asyncio
import platform
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

from prometheus_client import (
    CollectorRegistry,
    GCCollector,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
    start_http_server,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from app.telemetry.black_box import BlackBox
from app.telemetry.histogram import Histogram
from app.telemetry.instruments import Counter, Gauge
from app.telemetry.processes import WorkerProcesses
from app.telemetry.tally import Tallies

STAGES = ("parse", "features", "queue", "execution", "respond")
"""The stages of an answered request, in order; their durations add up to the request's."""

# Half a millisecond's work.
_SAMPLES_AT_ONCE = 64
_LATENCY_BUCKETS_S = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)
_LOAD_BUCKETS_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_ROW_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 16384)
_AGE_BUCKETS_S = (1, 10, 60, 300, 900, 3600, 10800, 21600, 86400, 259200, 604800, 2592000)
_MAGNITUDES = tuple(m * 10**e for e in range(7) for m in (2, 5, 10))
# One set for every output: twentieths for probabilities and shares, then 2-5-10 steps.
_PREDICTION_BUCKETS = (
    *(-m for m in reversed(_MAGNITUDES)),
    *(-1, -0.5, -0.2, -0.1),
    *(round(0.05 * i, 2) for i in range(21)),
    *_MAGNITUDES,
)
_DIFFERENCES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 10, 100, 1000)
_DIFFERENCE_BUCKETS = (*(-d for d in reversed(_DIFFERENCES)), 0, *_DIFFERENCES)


class Metrics:
    """One attribute a metric, in base units, on a registry of its own.

    Labels come from closed sets: `model` from the loaded models (`unknown` for any other name),
    `code` from the error tree and `ok`, `feature_view` and `output` from the model's own files.
    """

    def __init__(self, tallies: Tallies | None = None) -> None:
        """`tallies`: where the workers of a service count, ours among them; None counts alone."""
        tallies = tallies or Tallies.private()
        self.registry = CollectorRegistry()
        self._kept_back = _KeptBack(self.registry)
        if tallies.workers == 1:
            ProcessCollector(registry=self.registry)
        else:
            self.registry.register(WorkerProcesses(tallies))
        PlatformCollector(registry=self.registry, platform=platform)
        if tallies.workers == 1:
            GCCollector(registry=self.registry)
        self.requests = Counter(
            "hikyaku_requests",
            "Predict requests by their outcome: ok, or the code of the refusal.",
            ["model", "code"],
            registry=self.registry,
            tallies=tallies,
        )
        self.request_duration = Histogram(
            "hikyaku_request_duration_seconds",
            "From the request's arrival to its answer, answered requests only.",
            ["model"],
            buckets=_LATENCY_BUCKETS_S,
            registry=self.registry,
            tallies=tallies,
        )
        self.stage_duration = Histogram(
            "hikyaku_stage_duration_seconds",
            "Where an answered request's time went; the stages add up to its duration.",
            ["model", "stage"],
            buckets=_LATENCY_BUCKETS_S,
            registry=self.registry,
            tallies=tallies,
        )
        self.batch_rows = Histogram(
            "hikyaku_batch_rows",
            "Rows of each execution.",
            ["model"],
            buckets=_ROW_BUCKETS,
            registry=self.registry,
            tallies=tallies,
        )
        self.execution_duration = Histogram(
            "hikyaku_execution_duration_seconds",
            "How long each execution took.",
            ["model"],
            buckets=_LATENCY_BUCKETS_S,
            registry=self.registry,
            tallies=tallies,
        )
        self.queue_delay = Histogram(
            "hikyaku_queue_delay_seconds",
            "How long the first row of each execution had waited for it.",
            ["model"],
            buckets=_LATENCY_BUCKETS_S,
            registry=self.registry,
            tallies=tallies,
        )
        self.failed_executions = Counter(
            "hikyaku_failed_executions",
            "Executions without outputs, by what became of them.",
            ["model", "outcome"],
            registry=self.registry,
            tallies=tallies,
        )
        self.backend_events = Counter(
            "hikyaku_backend_events",
            "What happened to a model's backend beside its executions.",
            ["model", "event"],
            registry=self.registry,
            tallies=tallies,
        )
        self.repeated_executions = Counter(
            "hikyaku_repeated_executions",
            "Executions of parts of a batch that failed, to find the rows that made it fail.",
            ["model"],
            registry=self.registry,
            tallies=tallies,
        )
        self.deaths_executing = Counter(
            "hikyaku_deaths_executing",
            "Workers that died in the midst of an execution of this version.",
            ["model", "version"],
            registry=self.registry,
            tallies=tallies,
        )
        self.black_box = BlackBox(tallies)
        for model, version, _ in self.black_box.found:
            self.deaths_executing.labels(model, str(version)).inc()
        self.left_queue = Counter(
            "hikyaku_left_queue",
            "Requests whose caller left, or whose deadline passed, before they were executed.",
            ["model"],
            registry=self.registry,
            tallies=tallies,
        )
        self.queue_refusals = Counter(
            "hikyaku_queue_refusals",
            "Requests that the queue refused, by the reason.",
            ["model", "reason"],
            registry=self.registry,
            tallies=tallies,
        )
        self.queued_rows = Gauge(
            "hikyaku_queued_rows",
            "Rows that wait for an execution.",
            ["model"],
            together=sum,
            registry=self.registry,
            tallies=tallies,
        )
        self.prediction = Histogram(
            "hikyaku_prediction",
            "Distribution of each output's values; of labelled outputs, the largest one.",
            ["model", "role", "output"],
            buckets=_PREDICTION_BUCKETS,
            registry=self.registry,
            tallies=tallies,
        )
        self.degraded_requests = Counter(
            "hikyaku_degraded_requests",
            "Answers that rest on a missing or too old value of this view.",
            ["model", "feature_view", "status"],
            registry=self.registry,
            tallies=tallies,
        )
        self.not_finite_values = Counter(
            "hikyaku_not_finite_values",
            "Values of an output that were no finite number, refused or answered as null.",
            ["model", "output"],
            registry=self.registry,
            tallies=tallies,
        )
        self.feature_values = Counter(
            "hikyaku_feature_values",
            "Stored values read, by what was known about them.",
            ["model", "feature_view", "status"],
            registry=self.registry,
            tallies=tallies,
        )
        self.substituted_values = Counter(
            "hikyaku_substituted_values",
            "Missing values in whose place the model got another, by the policy that gave it.",
            ["model", "feature_view", "policy"],
            registry=self.registry,
            tallies=tallies,
        )
        self.feature_age = Histogram(
            "hikyaku_feature_age_seconds",
            "Age of the rows read, by feature time, whatever their status.",
            ["model", "feature_view"],
            buckets=_AGE_BUCKETS_S,
            registry=self.registry,
            tallies=tallies,
        )
        self.feature_newest_age = Gauge(
            "hikyaku_feature_newest_age_seconds",
            "Age of the newest row read so far, by feature time; NaN before there was one.",
            ["model", "feature_view"],
            together=min,
            registry=self.registry,
            tallies=tallies,
        )
        self.model_info = Gauge(
            "hikyaku_model_info",
            "1 for each version that is open: the champion, and who could serve at once (standby).",
            ["model", "version", "sha256", "role"],
            together=max,
            registry=self.registry,
            tallies=tallies,
        )
        self.loads = Counter(
            "hikyaku_loads",
            "Versions that were asked for, by an operator or by CURRENT, by what came of it.",
            ["model", "outcome"],
            registry=self.registry,
            tallies=tallies,
        )
        self.load_duration = Histogram(
            "hikyaku_load_duration_seconds",
            "From asking for a version until every worker serves it, or it was refused.",
            ["model"],
            buckets=_LOAD_BUCKETS_S,
            registry=self.registry,
            tallies=tallies,
        )
        self.release_generation = Gauge(
            "hikyaku_release_generation",
            "Generation of the release state that every worker follows: the least of them.",
            ["model"],
            together=min,
            registry=self.registry,
            tallies=tallies,
        )
        self.release_evidence = Gauge(
            "hikyaku_release_evidence",
            "Base-10 logarithm of E against a claim about a version under release.",
            ["model", "guardrail", "claim"],
            together=max,
            registry=self.registry,
            tallies=tallies,
        )
        self.release_decisions = Counter(
            "hikyaku_release_decisions",
            "What was done about versions under release on evidence.",
            ["model", "action"],
            registry=self.registry,
            tallies=tallies,
        )
        self.release_state_age = Gauge(
            "hikyaku_release_state_age_seconds",
            "How long ago the release state was read: the longest of all workers.",
            together=max,
            registry=self.registry,
            tallies=tallies,
        )
        self.repository_failures = Counter(
            "hikyaku_repository_failures",
            "Looks at the model repository that failed.",
            registry=self.registry,
            tallies=tallies,
        )
        self.shadow_rows = Counter(
            "hikyaku_shadow_rows",
            "Rows offered to a candidate: compared, not_finite, failed, or why they were dropped.",
            ["model", "outcome"],
            registry=self.registry,
            tallies=tallies,
        )
        self.shadow_flips = Counter(
            "hikyaku_shadow_flips",
            "Compared rows on which the candidate decides otherwise than the champion.",
            ["model"],
            registry=self.registry,
            tallies=tallies,
        )
        self.shadow_difference = Histogram(
            "hikyaku_shadow_difference",
            "Compared output of the candidate less that of the champion, row by row.",
            ["model"],
            buckets=_DIFFERENCE_BUCKETS,
            registry=self.registry,
            tallies=tallies,
        )
        self.shadow_execution_duration = Histogram(
            "hikyaku_shadow_execution_duration_seconds",
            "From sending a block of rows to a candidate until it has answered.",
            ["model"],
            buckets=_LATENCY_BUCKETS_S,
            registry=self.registry,
            tallies=tallies,
        )
        self.shadow_events = Counter(
            "hikyaku_shadow_events",
            "What happened to what executes a candidate beside its executions.",
            ["model", "event"],
            registry=self.registry,
            tallies=tallies,
        )
        self.shadow_pending_rows = Gauge(
            "hikyaku_shadow_pending_rows",
            "Rows that wait for candidates.",
            ["model"],
            together=sum,
            registry=self.registry,
            tallies=tallies,
        )
        self.unwritten_comparisons = Counter(
            "hikyaku_unwritten_comparisons",
            "Attempts to write what was counted of candidates that failed; the next one has all.",
            registry=self.registry,
            tallies=tallies,
        )
        self.refused_tables = Counter(
            "hikyaku_refused_tables",
            "Counts that were left out because their table would have become too large.",
            ["kind"],
            registry=self.registry,
            tallies=tallies,
        )
        self.webhook_deliveries = Counter(
            "hikyaku_webhook_deliveries",
            "Events for receivers of webhooks, by what became of them; retried: of an attempt.",
            ["outcome"],
            registry=self.registry,
            tallies=tallies,
        )
        self.webhook_waiting_events = Gauge(
            "hikyaku_webhook_waiting_events",
            "Events that receivers of webhooks are still to be told.",
            together=sum,
            registry=self.registry,
            tallies=tallies,
        )
        self.plan_outdated = Gauge(
            "hikyaku_plan_outdated",
            "1 where Feast's registry no longer matches the served plan, 0 where it does.",
            ["model"],
            together=max,
            registry=self.registry,
            tallies=tallies,
        )
        self.ready = Gauge(
            "hikyaku_ready",
            "1 while models are warm and the feature store answers, looked at every few seconds.",
            together=min,
            registry=self.registry,
            tallies=tallies,
        )
        self.canary_share = Gauge(
            "hikyaku_canary_share",
            "Share of the routing keys that the candidate of a release answers.",
            ["model"],
            together=max,
            registry=self.registry,
            tallies=tallies,
        )
        self.canary_requests = Counter(
            "hikyaku_canary_requests",
            "Requests while a release was under way, by who was to answer and how they ended.",
            ["model", "route", "outcome"],
            registry=self.registry,
            tallies=tallies,
        )
        self.canary_request_duration = Histogram(
            "hikyaku_canary_request_duration_seconds",
            "From the whole request to its answer while a release was under way, answered only.",
            ["model", "route"],
            buckets=_LATENCY_BUCKETS_S,
            registry=self.registry,
            tallies=tallies,
        )
        self.canary_exposures = Counter(
            "hikyaku_canary_exposures",
            "First exposures of routing keys in a stage of a release, by how they ended.",
            ["model", "arm", "outcome"],
            registry=self.registry,
            tallies=tallies,
        )
        self.canary_outside = Counter(
            "hikyaku_canary_outside",
            "Requests that are no evidence about a candidate, by the reason.",
            ["model", "reason"],
            registry=self.registry,
            tallies=tallies,
        )
        self.canary_misrouted = Counter(
            "hikyaku_canary_misrouted",
            "First exposures that another version answered than the one their key leads to.",
            ["model"],
            registry=self.registry,
            tallies=tallies,
        )
        self.label_predictions = Counter(
            "hikyaku_label_predictions",
            "Predictions of the sample that labels are kept for, by whether they are kept.",
            ["model", "outcome"],
            registry=self.registry,
            tallies=tallies,
        )
        self.labels = Counter(
            "hikyaku_labels",
            "Labels that were told, by what became of them.",
            ["model", "outcome"],
            registry=self.registry,
            tallies=tallies,
        )
        self.label_delay = Histogram(
            "hikyaku_label_delay_seconds",
            "From the prediction to its label, by feature time.",
            ["model"],
            buckets=_AGE_BUCKETS_S,
            registry=self.registry,
            tallies=tallies,
        )
        self.label_bytes = Gauge(
            "hikyaku_label_bytes",
            "What the predictions that wait for their horizon take in the state Redis.",
            ["model"],
            together=max,
            registry=self.registry,
            tallies=tallies,
        )
        self.label_limit = Gauge(
            "hikyaku_label_limit_bytes",
            "What they may take: model.yaml's labels.max_megabytes.",
            ["model"],
            together=max,
            registry=self.registry,
            tallies=tallies,
        )
        self.quality_rows = Gauge(
            "hikyaku_quality_rows",
            "Predictions of the version that are judged: their horizon has passed.",
            ["model", "role"],
            together=max,
            registry=self.registry,
            tallies=tallies,
        )
        self.quality_coverage = Gauge(
            "hikyaku_quality_coverage",
            "Share of the champion's predictions past their horizon that have a label.",
            ["model"],
            together=max,
            registry=self.registry,
            tallies=tallies,
        )
        self.quality = Gauge(
            "hikyaku_quality",
            "How good the predictions past their horizon were, by the figure.",
            ["model", "role", "figure"],
            together=max,
            registry=self.registry,
            tallies=tallies,
        )
        self.open_connections = Gauge(
            "hikyaku_open_connections",
            "HTTP connections, idle ones included.",
            together=sum,
            registry=self.registry,
            tallies=tallies,
        )
        self.closed_connections = Counter(
            "hikyaku_closed_connections",
            "HTTP connections that the service closed, or cut off, by the reason.",
            ["reason"],
            registry=self.registry,
            tallies=tallies,
        )
        self.loop_lag = Histogram(
            "hikyaku_loop_lag_seconds",
            "How late the event loop's heartbeat was, ten times a second.",
            buckets=_LATENCY_BUCKETS_S,
            registry=self.registry,
            tallies=tallies,
        )
        self.worker_replacements = Counter(
            "hikyaku_worker_replacements",
            "Workers replaced since the service started: stuck, or died by themselves.",
            ["reason"],
            registry=self.registry,
            tallies=tallies,
        )
        self._published = [own for own in vars(self).values() if isinstance(own, Gauge | Histogram)]

    def before_reading(self, record: Callable[[], None]) -> None:
        """Call `record` before metrics are read: it records what was kept back until then."""
        self._kept_back.records.append(record)

    def forget(self, record: Callable[[], None]) -> None:
        """Keeps nothing back any more."""
        self._kept_back.records.remove(record)

    def record(self) -> None:
        """What was kept back until now is there for other workers to read."""
        self._kept_back.collect()
        for metric in self._published:
            metric.publish()

    async def render(self) -> bytes:
        """The exposition format, for a scrape; in pieces between which the event loop runs."""
        return b"".join([piece async for piece in self._pieces()])

    async def _pieces(self) -> AsyncIterator[bytes]:
        for metric in self.registry.collect():
            samples = metric.samples
            for start in range(0, max(len(samples), 1), _SAMPLES_AT_ONCE):
                metric.samples = samples[start : start + _SAMPLES_AT_ONCE]
                text = generate_latest(_Collected(metric))
                # Its help and its type are told once.
                yield text if start == 0 else text.split(b"\n", 2)[2]
                await asyncio.sleep(0)


class _Collected(Collector):
    """One metric, as it was collected."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric

    def collect(self) -> Iterable[Metric]:
        return [self._metric]


class _KeptBack(Collector):
    """The first on the registry, so that what it has recorded is what the others tell."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.records: list[Callable[[], None]] = []
        registry.register(self)

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        for record in self.records:
            record()
        return ()


class PushMetrics:
    """Metrics of a job that pushes a stream's entries, on a registry of its own."""

    def __init__(self) -> None:
        tallies = Tallies.private()
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry, platform=platform)
        GCCollector(registry=self.registry)
        self.rows = Counter(
            "hikyaku_push_rows",
            "Rows written to a view: stored, or not newer than what was there.",
            ["feature_view", "result"],
            registry=self.registry,
            tallies=tallies,
        )
        self.refused_entries = Counter(
            "hikyaku_push_refused_entries",
            "Entries that could not be used and were kept in the stream of refused ones.",
            registry=self.registry,
            tallies=tallies,
        )
        self.batch_duration = Histogram(
            "hikyaku_push_batch_duration_seconds",
            "From a batch's arrival to its acknowledgement.",
            buckets=_LATENCY_BUCKETS_S,
            registry=self.registry,
            tallies=tallies,
        )
        self.newest_event = Gauge(
            "hikyaku_push_newest_event_timestamp_seconds",
            "Newest event time written to a view, in seconds since 1970.",
            ["feature_view"],
            together=max,
            registry=self.registry,
            tallies=tallies,
        )

    def record(
        self,
        stored: Mapping[str, int],
        not_newer: Mapping[str, int],
        newest_s: Mapping[str, float],
        took_s: float,
    ) -> None:
        """One batch: its rows by view, `newest_s` the newest event time so far by view."""
        for view, rows in stored.items():
            self.rows.labels(view, "stored").inc(rows)
        for view, rows in not_newer.items():
            self.rows.labels(view, "not_newer").inc(rows)
        for view, seconds in newest_s.items():
            self.newest_event.labels(view).set(seconds)
        self.batch_duration.observe(took_s)

    @contextmanager
    def served(self, host: str, port: int) -> Iterator[int]:
        """Answer scrapes on a thread of its own; yields the port, 0 having been a free one.

        Raises `OSError` when the address cannot be bound.
        """
        server, thread = start_http_server(port, addr=host, registry=self.registry)
        try:
            yield server.server_port
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
