"""The recorded requests of a model: what was asked when, and what came of it, known when."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from app.contract import Contract, LabelHorizon, Replay
from app.errors import ConfigurationError
from app.features.plan import FeaturePlan
from app.instances import InstanceDecoder
from app.repository.layout import CONTRACT_FILE

NO_HORIZON_US = np.iinfo(np.int64).max
"""Of a request that has not the instant from which its horizon is counted: it never counts."""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class RequestLog:
    """Requests in order of asking, a row each; instants are microseconds since 1970.

    `instances` are what an application would send. `truth` holds None where there never is one,
    `known_us` the instants at which it is known, or that there is none: never before the request,
    and -1 where that is never known. `horizon_us`: from when on a label counts no more; None for a
    contract without `labels`. `entities` is for a point-in-time join: the instants, join keys and
    request fields.
    """

    instances: Sequence[Mapping[str, Any]]
    asked_us: NDArray[np.int64]
    truth: NDArray[Any]
    known_us: NDArray[np.int64]
    horizon_us: NDArray[np.int64] | None
    entities: pd.DataFrame

    def __len__(self) -> int:
        return len(self.instances)

    def known_truth(self, rows: NDArray[np.intp]) -> NDArray[Any]:
        """Of these rows, which must have one: booleans where the truths are of two kinds, else
        numbers."""
        truth = self.truth[rows]
        return truth.astype(bool if set(truth) <= {True, False} else np.float64)


def replay_section(model_dir: Path, contract: Contract) -> Replay:
    """Raises `ConfigurationError` where model.yaml has none."""
    if contract.replay is None:
        raise ConfigurationError(f"{model_dir / CONTRACT_FILE}: has no `replay` section")
    return contract.replay


def read_log(
    model_dir: Path,
    contract: Contract,
    plan: FeaturePlan,
    start: datetime | None,
    end: datetime | None,
    *,
    every_days: int = 1,
    with_truth_only: bool = False,
) -> RequestLog:
    """The requests in `[start, end)`, of one day in `every_days` from the first one on.

    Raises `ConfigurationError` when the log is not there, lacks a column or has none of them.
    """
    replay = replay_section(model_dir, contract)
    path = (model_dir / replay.requests).resolve()
    if not path.is_file():
        raise ConfigurationError(f"{path}: no such request log; `make run` builds it")
    log = pd.read_parquet(path)
    required = InstanceDecoder(contract, plan).required
    used = [replay.asked_at, replay.label, replay.label_known_at, *required]
    missing = [name for name in used if name is not None and name not in log.columns]
    if missing:
        raise ConfigurationError(f"{path}: has no column {', '.join(missing)}")
    at = log[replay.asked_at]
    wanted = log[replay.label].notna() if with_truth_only else at.notna()
    if start is not None:
        wanted &= at >= pd.Timestamp(start)
    if end is not None:
        wanted &= at < pd.Timestamp(end)
    days = (at - at[wanted].min()).dt.days
    requests = log[wanted & (days % every_days == 0)]
    if requests.empty:
        raise ConfigurationError(f"{path}: no request in that time")
    requests = requests.sort_values(replay.asked_at, kind="stable", ignore_index=True)
    instances = _records(requests[list(required)])
    asked_us = _microseconds(requests[replay.asked_at])
    horizon = None if contract.labels is None else contract.labels.horizon
    return RequestLog(
        instances=instances,
        asked_us=asked_us,
        truth=_objects(requests[replay.label]),
        known_us=_known_us(requests, replay, asked_us),
        horizon_us=None if horizon is None else _horizon_us(instances, horizon, asked_us),
        entities=requests[[replay.asked_at, *plan.join_keys, *plan.request_fields]],
    )


def as_datetime(at_us: int) -> datetime:
    return _EPOCH + timedelta(microseconds=int(at_us))


def as_microseconds(at: datetime) -> int:
    return (at - _EPOCH) // timedelta(microseconds=1)


def _known_us(
    requests: pd.DataFrame, replay: Replay, asked_us: NDArray[np.int64]
) -> NDArray[np.int64]:
    if replay.label_known_at is None:
        return np.full(len(requests), -1, dtype=np.int64)
    has_truth = requests[replay.label].notna().to_numpy()
    known_us = np.where(has_truth, _microseconds(requests[replay.label_known_at]), -1)
    if replay.no_label_after_s is not None:
        never_us = asked_us + round(replay.no_label_after_s * 1e6)
        known_us = np.where(has_truth, known_us, never_us)
    return np.where(known_us < 0, -1, np.maximum(known_us, asked_us))


def _horizon_us(
    instances: Sequence[Mapping[str, Any]], horizon: LabelHorizon, asked_us: NDArray[np.int64]
) -> NDArray[np.int64]:
    after_us = round(horizon.after_s * 1e6)
    if horizon.source is None:
        return asked_us + after_us
    starts = (instance[horizon.source] for instance in instances)
    return np.array(
        [
            NO_HORIZON_US
            if start is None
            else as_microseconds(datetime.fromisoformat(start)) + after_us
            for start in starts
        ]
    )


def _microseconds(instants: "pd.Series[Any]") -> NDArray[np.int64]:
    """Null is an instant far in the past."""
    times_us: NDArray[np.int64] = (
        instants.dt.tz_convert("UTC").dt.as_unit("us").astype("int64").to_numpy()
    )
    return times_us


def _objects(column: "pd.Series[Any]") -> NDArray[Any]:
    return column.astype(object).where(column.notna(), None).to_numpy()


def _records(columns: pd.DataFrame) -> Sequence[Mapping[str, Any]]:
    records = columns.astype(object).where(columns.notna(), None).to_dict("records")
    return [{str(name): value for name, value in record.items()} for record in records]
