"""What one served version reports of its predictions, its metrics looked up once."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from app.telemetry.instruments import Count
from app.telemetry.metrics import STAGES, Metrics

Role: TypeAlias = Literal["champion", "canary", "previous"]
"""Of a version that answers: `previous` still does for some while the champion is watched."""

# Of so many requests and predictions together each costs hardly more than to remember it.
_AT_ONCE = 256


class PredictionRecorder:
    """Records some requests at a time, and the last ones before the metrics are read.

    `views` are the feature views of the version, `view_of_feature` says for each feature which of
    them it is of, `statuses` are the names of the value statuses, in the order of their numbers.
    `now_s` says feature time, seconds since 1970; a row further ahead of it than `max_ahead_s` is
    not known yet.
    """

    def __init__(
        self,
        metrics: Metrics,
        model: str,
        *,
        outputs: Sequence[str],
        views: Sequence[str],
        view_of_feature: Sequence[int],
        statuses: Sequence[str],
        now_s: Callable[[], float],
        max_ahead_s: float,
    ) -> None:
        self._metrics = metrics
        self._model = model
        self._views = views
        self._statuses = statuses
        self._view_of_feature = np.array(view_of_feature, dtype=np.intp)
        self._first_code = self._view_of_feature * len(statuses)
        self._values: dict[int, Count] = {}
        self._substitutes: dict[tuple[int, str], Count] = {}
        self._predictions = {
            name: metrics.prediction.labels(model, "champion", name) for name in outputs
        }
        self._role: Role = "champion"
        self._answered = metrics.requests.labels(model, "ok")
        self._duration = metrics.request_duration.labels(model)
        self._stages = [metrics.stage_duration.labels(model, stage) for stage in STAGES]
        self._ages = [metrics.feature_age.labels(model, view) for view in views]
        self._outputs: dict[str, list[float]] = {name: [] for name in outputs}
        self._instants_s: list[tuple[float, ...]] = []
        self._reads: list[tuple[NDArray[np.uint8], NDArray[np.float64], float]] = []
        self._kept_back = 0
        metrics.before_reading(self._record)
        self._now_s = now_s
        self._max_ahead_s = max_ahead_s
        self._newest_s = np.full(len(views), np.nan)

    def lead(self, before: "PredictionRecorder | None") -> None:
        """It records for what serves from now on, after another one, and says how old the newest
        rows are."""
        self.answers_as("champion")
        for view in () if before is None else before._views:
            self._metrics.feature_newest_age.labels(self._model, view).forget()
        for index, view in enumerate(self._views):
            age = self._metrics.feature_newest_age.labels(self._model, view)
            age.set_function(partial(self._newest_age_s, index))

    def answers_as(self, role: Role) -> None:
        """What is predicted from now on is told apart by this role."""
        if role == self._role:
            return
        self._record()
        self._role = role
        self._predictions = {
            name: self._metrics.prediction.labels(self._model, role, name) for name in self._outputs
        }

    def close(self) -> None:
        """Nothing more will come: what was kept back is recorded."""
        self._record()
        self._metrics.forget(self._record)

    def answered(self, instants_s: tuple[float, ...]) -> None:
        """A request was answered; `instants_s` are the beginnings of its stages and its end."""
        self._instants_s.append(instants_s)

    def predicted(self, distributions: Mapping[str, Sequence[float]]) -> None:
        """`distributions`: the values of each output."""
        for output, values in distributions.items():
            self._outputs[output] += values
            self._kept_back += len(values)
        self._kept_back += 1
        if self._kept_back >= _AT_ONCE:
            self._record()

    def not_finite(self, rows: Mapping[str, Sequence[int]]) -> None:
        """In these rows of an output, by its name, the model returned no finite number."""
        for output, of_output in rows.items():
            self._metrics.not_finite_values.labels(self._model, output).inc(len(of_output))

    def read(
        self, status: NDArray[np.uint8], event_time_s: NDArray[np.float64], now_s: float
    ) -> None:
        """Stored features, of which nothing may change later: `status` `[rows, features]`,
        `event_time_s` `[rows, views]` with NaN where nothing is stored, at a feature time."""
        self._reads.append((status, event_time_s, now_s))

    def degraded(self, view: str, status: str) -> None:
        """This request rests on values of the view that are missing or too old."""
        self._metrics.degraded_requests.labels(self._model, view, status).inc()

    def substituted(self, policy: str, features: Sequence[int], mask: NDArray[np.bool_]) -> None:
        """Where the mask `[features, rows]` says so, the model got what the policy gives."""
        values = np.bincount(self._view_of_feature[list(features)], mask.sum(axis=1))
        for view in np.flatnonzero(values).tolist():
            if (view, policy) not in self._substitutes:
                self._substitutes[view, policy] = self._metrics.substituted_values.labels(
                    self._model, self._views[view], policy
                )
            self._substitutes[view, policy].inc(float(values[view]))

    def _record(self) -> None:
        self._kept_back = 0
        for output, values in self._outputs.items():
            self._predictions[output].observe_all(values)
            values.clear()
        if self._instants_s:
            self._record_durations(np.array(self._instants_s))
            self._instants_s.clear()
        if self._reads:
            status = np.concatenate([status for status, _, _ in self._reads])
            ages_s = [now_s - event_time_s for _, event_time_s, now_s in self._reads]
            self._record_reads(status, np.concatenate(ages_s))
            self._reads.clear()

    def _record_durations(self, instants_s: NDArray[np.float64]) -> None:
        for stage, durations_s in zip(self._stages, np.diff(instants_s).T, strict=True):
            stage.observe_all(durations_s)
        self._duration.observe_all(instants_s[:, -1] - instants_s[:, 0])
        self._answered.inc(len(instants_s))

    def _record_reads(self, status: NDArray[np.uint8], ages_s: NDArray[np.float64]) -> None:
        for series, ages in zip(self._ages, ages_s.T, strict=True):
            series.observe_all(ages)
        self._remember_newest(ages_s)
        codes = np.bincount((status + self._first_code).ravel())
        for code in np.flatnonzero(codes).tolist():
            self._counter(code).inc(float(codes[code]))

    def _remember_newest(self, ages_s: NDArray[np.float64]) -> None:
        # fmin and fmax know a number from NaN, without a warning where all are NaN.
        known = ages_s >= -self._max_ahead_s
        youngest_s = np.fmin.reduce(ages_s, axis=0, where=known, initial=np.nan)
        self._newest_s = np.fmax(self._newest_s, self._now_s() - youngest_s)

    def _newest_age_s(self, view: int) -> float:
        return float(self._now_s() - self._newest_s[view])

    def _counter(self, code: int) -> Count:
        if code not in self._values:
            view, status = divmod(code, len(self._statuses))
            self._values[code] = self._metrics.feature_values.labels(
                self._model, self._views[view], self._statuses[status]
            )
        return self._values[code]
