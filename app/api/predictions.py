"""The predict operation: bytes in, bytes out, without a framework."""

import base64
import logging
import math
import re
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from app.api.answers import Reply, as_request_error, refusal
from app.batching.priority import Priority
from app.canary.canary import OVERRIDE, Canary, Override, no_canary
from app.canary.exposures import Exposure
from app.clock import as_rfc3339
from app.contract import Limits
from app.deadline import Deadline
from app.errors import InvalidInput
from app.features.source import FeatureRows, ValueStatus
from app.instances import Instances
from app.predictor import Answer, Asked, Asker, DegradedReason, NotFiniteOutput, Predictor
from app.request_ids import RequestIds
from app.served_model import ServedModel
from app.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

_PREDICT_PATH = re.compile(r"/v1/models/([^/:]+):predict")
_PLAIN = (
    b'{"predictions":%b,%b,"request_id":"%b","route":"%b","degraded":false,"degraded_reasons":[]}'
)
_ROUTE = OVERRIDE.lower().encode()
_NO_CANARIES: Mapping[str, Canary] = {}


def predicted_model(path: str) -> str | None:
    """The model that a path asks a prediction of; None for every other path."""
    match = _PREDICT_PATH.fullmatch(path)
    return match[1] if match else None


new_request_id = RequestIds().next
"""The id of a request that no model answers."""


class Call:
    """A request for a prediction, admitted by its head.

    `answered` is told the reply, once, and nothing after `leave`: whatever goes wrong is a reply
    with a code.
    """

    __slots__ = (
        *("_answered", "_asked", "_asker", "_deadline", "_exposure", "_metrics", "_model"),
        *("_operation", "_override", "_parsed_s", "_priority", "_received_s", "_verbose"),
    )

    def __init__(
        self,
        operation: "PredictOperation",
        model: ServedModel,
        deadline: Deadline,
        priority: Priority,
        asker: Asker,
        override: Override | None,
        received_s: float,
        answered: Callable[[Reply], None],
    ) -> None:
        self._operation = operation
        self._model = model
        self._deadline = deadline
        self._priority = priority
        self._asker = asker
        self._override = override
        self._received_s = received_s
        self._answered = answered
        self._asked: Asked | None = None
        self._exposure: Exposure | None = None

    def begin(self, body: bytes) -> None:
        """The body is complete. Which version answers is decided now: while the body was on its way
        another one may have taken the place of the one that let it in."""
        operation = self._operation
        try:
            name = self._model.id.model
            self._model = operation.predictor.champion(name)
            instances = self._model.decoder.decode(body)
            self._verbose = instances.verbose
            self._parsed_s = self._deadline.check()
            canary = operation.canaries.get(name)
            if canary is not None and not canary.is_idle:
                instances = self._routed(canary, instances, body)
            elif self._override == "canary":
                raise no_canary()
            self._asked = operation.predictor.begin(
                self._model, instances, self._deadline, self._priority, self._asker, self.told
            )
        except Exception as exc:
            self.refuse(exc)

    def _routed(self, canary: Canary, instances: Instances, body: bytes) -> Instances:
        """From now on it is its version's that is to answer; what that reads in the body, which the
        champion has read as these."""
        champion = self._model
        routed = canary.route(self._asker, instances, champion, self._override, self._parsed_s)
        self._model, self._asker.route, self._exposure = routed
        if self._model.decoder.reads_as(champion.decoder):
            return instances
        return self._model.decoder.decode(body)

    def leave(self) -> None:
        """The caller waits no longer: what is not executed yet is not, and nobody is answered."""
        if self._asked is not None:
            self._asked.leave()
            self._asked = None
            if self._exposure is not None:
                self._exposure.left(time.monotonic())

    def refuse(self, exc: Exception) -> None:
        """It cannot be answered."""
        if self._exposure is not None:
            self._exposure.failed(time.monotonic())
        label = self._model.id.model
        self._give(_refused(exc, self._asker.request_id, label, self._operation.metrics))

    def told(self, answer: Answer | Exception) -> None:
        """How the prediction ended."""
        self._asked = None  # which refers to us: a cycle would wait for the garbage collector
        try:
            if isinstance(answer, Exception):
                raise answer
            reply = Reply(200, _body(answer, self._asker, self._verbose))
            answered_s = self._deadline.check()
        except Exception as exc:
            self.refuse(exc)
            return
        if self._exposure is not None:
            self._exposure.answered(answered_s, answer.model.id)
        self._model.recorder.answered(
            (
                self._received_s,
                self._parsed_s,
                answer.encoded_s,
                answer.started_s,
                answer.finished_s,
                answered_s,
            )
        )
        self._give(reply)

    def _give(self, reply: Reply) -> None:
        try:
            self._answered(reply)
        except Exception as exc:  # a defect of the door must not harm those in the same execution
            log.error(
                "a reply was lost", extra={"request_id": self._asker.request_id}, exc_info=exc
            )


class PredictOperation:
    """Answers `POST /v1/models/{name}:predict`."""

    def __init__(
        self,
        predictor: Predictor,
        metrics: Metrics,
        new_id: Callable[[ServedModel], str] = lambda model: new_request_id(),
        canaries: Mapping[str, Canary] = _NO_CANARIES,
    ) -> None:
        """`new_id` gives the id of a request to the model; `canaries` by the name of the model
        route requests while a release is under way. They may change while requests run."""
        self.predictor = predictor
        self.metrics = metrics
        self.canaries = canaries
        self._new_id = new_id

    def label(self, name: str) -> str:
        """The name as a metric's label."""
        return self.predictor.label(name)

    def open(
        self,
        name: str,
        headers: Mapping[bytes, bytes],
        received_s: float,
        peer: str,
        answered: Callable[[Reply], None],
    ) -> Call | None:
        """A call that waits for its body. None where the body need not be read, because it would be
        in vain: then `answered` has been told why.

        `received_s` is the monotonic instant of the request's arrival, `peer` the address that it
        came from.
        """
        try:
            model = self.predictor.champion(name)
            deadline = _deadline(headers, model.contract.limits, received_s)
            priority = _priority(headers)
            override = _override(headers)
            model.batcher.admit(1, deadline, priority)
        except Exception as exc:
            answered(_refused(exc, new_request_id(), self.predictor.label(name), self.metrics))
            return None
        asker = Asker(self._new_id(model), peer, _routing_key(headers))
        return Call(self, model, deadline, priority, asker, override, received_s, answered)


def _refused(exc: Exception, request_id: str, label: str, metrics: Metrics) -> Reply:
    error = as_request_error(exc, request_id)
    metrics.requests.labels(label, error.code).inc()
    return refusal(error, request_id, "/v1/")


def _deadline(headers: Mapping[bytes, bytes], limits: Limits, received_s: float) -> Deadline:
    """The request's instant: its own timeout, capped by the contract, counted from its arrival."""
    given = headers.get(b"request-timeout-ms")
    if given is None:
        timeout_ms = limits.default_timeout_ms
    elif given.isdigit() and len(given) < 10 and int(given) > 0:
        timeout_ms = int(given)
    else:
        raise InvalidInput(
            "Request-Timeout-Ms: a whole number of milliseconds above 0", field="Request-Timeout-Ms"
        )
    return Deadline(received_s + min(timeout_ms, limits.max_timeout_ms) / 1000)


def _priority(headers: Mapping[bytes, bytes]) -> Priority:
    """Bulk is what can wait while others are in a hurry."""
    given = headers.get(b"request-priority")
    if given is None or given == b"live":
        return Priority.LIVE
    if given == b"bulk":
        return Priority.BULK
    raise InvalidInput("Request-Priority: live or bulk", field="Request-Priority")


def _override(headers: Mapping[bytes, bytes]) -> Override | None:
    """Of an operator: nobody else gets here with it."""
    given = headers.get(_ROUTE)
    if given is None:
        return None
    if given == b"champion":
        return "champion"
    if given == b"canary":
        return "canary"
    raise InvalidInput(f"{OVERRIDE}: champion or canary", field=OVERRIDE)


def _routing_key(headers: Mapping[bytes, bytes]) -> str | None:
    given = headers.get(b"routing-key")
    return None if given is None else given.decode("latin-1")


def _body(answer: Answer, asker: Asker, verbose: bool) -> bytes:
    """A plain answer is most of the time all there is, and only its predictions are its own."""
    if not verbose and not answer.degraded:
        return _PLAIN % (
            orjson.dumps(answer.predictions),
            answer.model.id.as_json,
            asker.request_id.encode(),
            asker.route.encode(),
        )
    document: dict[str, Any] = {
        "predictions": answer.predictions,
        "model_name": answer.model.id.model,
        "model_version": str(answer.model.id.version),
        "request_id": asker.request_id,
        "route": asker.route,
        "degraded": bool(answer.degraded),
        "degraded_reasons": [_reason(reason) for reason in answer.degraded],
    }
    if verbose:
        document["features"] = _features(answer)
    return orjson.dumps(document)


def _reason(reason: DegradedReason | NotFiniteOutput) -> dict[str, Any]:
    if isinstance(reason, NotFiniteOutput):
        return {"output": reason.output, "status": "NOT_FINITE", "instances": reason.instances}
    return {
        "feature_view": reason.feature_view,
        "status": reason.status.name,
        "instances": reason.instances,
    }


def _features(answer: Answer) -> list[dict[str, Any]]:
    """For each instance: `view:feature` → value, status, event time and age by feature time, and
    what the model got where that was not the value."""
    if answer.features is None:
        return [{} for _ in answer.predictions]
    rows, filled = answer.features.rows, answer.features.filled
    first = answer.first_row
    ages_s = answer.features.now_s - rows.event_time_s
    plan = rows.plan
    views = [index for index, view in enumerate(plan.views) for _ in view.features]
    features = [
        {
            name: _feature(rows, ages_s, row, position, views[position])
            for position, name in enumerate(plan.references)
        }
        for row in range(first, first + len(answer.predictions))
    ]
    for substitute in filled.substitutes:
        for feature, row in np.argwhere(substitute.mask).tolist():
            if not 0 <= row - first < len(features):  # of another request
                continue
            position = substitute.positions[feature]
            value = _shown(filled.columns[position][row])
            name = plan.references[position]
            features[row - first][name]["substitute"] = {"by": substitute.by, "value": value}
    return features


def _feature(
    rows: FeatureRows, ages_s: NDArray[np.float64], row: int, position: int, view: int
) -> dict[str, Any]:
    value = rows.columns[position][row]
    age_s = ages_s[row, view]
    known = not np.isnan(age_s)
    return {
        "value": _shown(value),
        "status": ValueStatus(rows.status[row, position]).name,
        "event_time": as_rfc3339(float(rows.event_time_s[row, view])) if known else None,
        "age_s": float(age_s) if known else None,
    }


def _shown(value: Any) -> Any:
    """A value in what JSON has: NaN is null, bytes are base64, a set is a sorted list."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | set):
        shown = [_shown(each) for each in value]
        return sorted(shown, key=_null_last) if isinstance(value, set) else shown
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, dict):
        return {str(key): _shown(each) for key, each in value.items()}
    if value is None or isinstance(value, str | bool | int | datetime):
        return value
    if isinstance(value, float):
        return None if math.isnan(value) else value
    return str(value)  # a decimal number, say


def _null_last(value: Any) -> tuple[bool, Any]:
    return (True, 0) if value is None else (False, value)
