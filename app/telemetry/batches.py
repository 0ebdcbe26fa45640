"""What a model's batcher reports, its metrics looked up once."""

from app.telemetry.black_box import Executing
from app.telemetry.metrics import Metrics


class BatchRecorder:
    """The observer of one version's batcher and of its backend."""

    def __init__(self, metrics: Metrics, model: str, executing: Executing) -> None:
        self._executing = executing
        self._rows = metrics.batch_rows.labels(model)
        self._execution = metrics.execution_duration.labels(model)
        self._delay = metrics.queue_delay.labels(model)
        self._events = metrics.backend_events
        self._failed = metrics.failed_executions
        self._repeated = metrics.repeated_executions.labels(model)
        self._left = metrics.left_queue.labels(model)
        self._refusals = metrics.queue_refusals
        self._model = model

    def began(self) -> None:
        """An execution has begun."""
        self._executing.begin()

    def ended(self) -> None:
        """It is over, however it ended."""
        self._executing.end()

    def executed(self, rows: int, waited_s: float, took_s: float) -> None:
        """An execution succeeded; its first row had waited `waited_s`."""
        self._rows.observe(rows)
        self._delay.observe(waited_s)
        self._execution.observe(took_s)

    def failed(self, outcome: str) -> None:
        """An execution did not: `failed`, `died`, `not_executed` or `given_up`."""
        self._failed.labels(self._model, outcome).inc()

    def happened(self, event: str) -> None:
        """To the backend, beside its executions."""
        self._events.labels(self._model, event).inc()

    def repeated(self) -> None:
        """An execution began that repeats rows of a failed batch."""
        self._repeated.inc()

    def left(self) -> None:
        """A caller left, or its deadline passed, before its rows were executed."""
        self._left.inc()

    def refused(self, reason: str) -> None:
        """Rows were refused at the door: `rows`, `deadline` or `shapes`."""
        self._refusals.labels(self._model, reason).inc()
