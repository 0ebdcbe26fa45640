"""The predictions of a declared share of requests, on their way into the state Redis."""

import time
from collections import Counter, OrderedDict, deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from app.clock import FeatureClock
from app.comparison.segments import SegmentReader
from app.contract import Contract
from app.instances import together
from app.labels.bucket import (
    BUCKET_CHARGE,
    FIELD_CHARGE,
    META,
    MOST_FIELDS,
    ROW,
    Place,
    candidate_charge,
    candidate_name,
    row_charge,
    version_field,
)
from app.labels.form import LabelForm, form_of
from app.labels.horizon import ReadHorizon, horizon_reader
from app.predictor import Answer, Asker
from app.request_ids import RequestId, RequestIds
from app.served_model import ServedModel, VersionId
from app.tensors import concatenate

_MOST_WAITING = 20_000
"""Rows: of a second and more at the highest rate that a worker answers."""
_MOST_ROWS = 128
"""In a bucket before the next is begun."""
_OPEN_S = 120.0
"""No request is answered, and no candidate shown it, longer after its id was given."""
_TURN_S = 60.0
_MOST_OPEN = 4_096


class Piece(NamedTuple):
    """Fields to be written to a bucket. With `horizon_s` they are those of rows of a request, and
    the bucket is due then, or later; without it, what a candidate says about such rows."""

    bucket: bytes
    fields: Mapping[bytes, bytes]
    rows: int
    charge: int
    horizon_s: float | None
    request: bytes
    """Random part of its id: its candidates' numbers are kept only where this is."""


class _Offered(NamedTuple):
    request_id: str
    answer: Answer
    predicted_s: float


class _Compared(NamedTuple):
    request: RequestId
    candidate: VersionId
    began: int
    first: int
    numbers: NDArray[np.float64]


class _Open:
    """A bucket that may get more."""

    __slots__ = ("fields", "opened_s", "requests")

    def __init__(self) -> None:
        self.opened_s = time.monotonic()
        self.fields = 0
        self.requests: set[bytes] = set()


class LabelSample:
    """Keeps what is offered of one model in one worker: an `Observer` (app/predictor.py), shown the
    candidates' numbers later. Nothing is written here: `take` hands it over, some at a time.

    Its `ids` are to be those of the model's requests in this worker.
    """

    def __init__(
        self,
        contract: Contract,
        segments: SegmentReader,
        fields: Collection[str],
        clock: FeatureClock,
    ) -> None:
        """`fields` are the names that an instance has. Raises `InvalidModel`."""
        assert contract.labels is not None
        self.contract = contract
        self.form: LabelForm = form_of(contract, segments.names)
        self.ids = RequestIds(contract.labels.share)
        self._segments = segments
        self._horizon: ReadHorizon = horizon_reader(contract.labels.horizon, fields)
        self._clock = clock
        self._row_charge = row_charge(self.form)
        self._candidate_charge = candidate_charge(self.form)
        self._offered: list[_Offered] = []
        self._compared: list[_Compared] = []
        self._waiting = 0
        """Rows in both."""
        self._bucket = self._in_bucket = 0
        self._open: OrderedDict[bytes, _Open] = OrderedDict()
        self._current = (self.ids.tag, -1, 0.0)
        """The bucket whose ids are given, as tag and number, and since when."""
        self._past: deque[tuple[float, bytes, int]] = deque()
        """When others ceased to be it."""
        self._settled = -1
        self._versions: dict[tuple[VersionId, int | None], int] = {}
        self.left_out: Counter[str] = Counter()
        """Rows that are not kept, by the reason, since it was last looked at."""

    def offer(self, asker: Asker, answer: Answer) -> None:
        if not self.ids.is_sampled(asker.request_id):
            return
        rows = len(answer.predictions)
        if not self._has_room(rows):
            return
        # What can be done later is done later, for many at a time.
        self._offered.append(_Offered(asker.request_id, answer, self._clock.now_s()))
        if self.ids.bucket != self._bucket:
            self._bucket, self._in_bucket = self.ids.bucket, 0
        self._in_bucket += rows
        if self._in_bucket >= _MOST_ROWS:
            self.ids.turn()

    def compared(
        self,
        request_id: str,
        candidate: VersionId,
        began: int,
        first: int,
        numbers: NDArray[np.float64],
    ) -> None:
        """What a candidate says about the instances from `first` on of a request that was offered:
        `[rows]`, or `[rows, labels]` of labelled outputs; NaN where it said nothing. It is shown
        requests since the generation `began`. Of other requests it is passed over."""
        if not self.ids.is_sampled(request_id):
            return
        request = RequestId.parse(request_id)
        if request is not None and self._has_room(len(numbers)):
            self._compared.append(_Compared(request, candidate, began, first, numbers))

    @property
    def tag(self) -> bytes:
        return self.ids.tag

    def progress(self) -> tuple[int, int]:
        """How far it is: the number of the newest bucket, and that of the newest for which nothing
        more can come, nor for those before it (-1: there is none)."""
        return self.ids.bucket, self._settled

    def take(self, most_rows: int) -> Iterator[Piece]:
        """The oldest of what waits, encoded: whole requests up to so many rows, one at least; what
        candidates said only once all that was offered before is taken."""
        offered = self._oldest(most_rows)
        by_model: dict[int, list[_Offered]] = {}
        for each in offered:
            by_model.setdefault(id(each.answer.model), []).append(each)
        for group in by_model.values():
            yield from self._predictions(group[0].answer.model, group)
        if not self._offered:
            compared, self._compared = self._compared, []
            self._waiting -= sum(len(each.numbers) for each in compared)
            for comparison in compared:
                yield from self._candidates(comparison)
        self._grow_older()

    @property
    def is_empty(self) -> bool:
        return not self._offered and not self._compared

    def _has_room(self, rows: int) -> bool:
        if self._waiting + rows > _MOST_WAITING and self._waiting:
            self.left_out["overflow"] += rows
            return False
        self._waiting += rows
        return True

    def _oldest(self, most_rows: int) -> list[_Offered]:
        taken = rows = 0
        for each in self._offered:
            rows += len(each.answer.predictions)
            taken += 1
            if rows >= most_rows:
                break
        offered, self._offered = self._offered[:taken], self._offered[taken:]
        self._waiting -= rows
        return offered

    def _predictions(self, model: ServedModel, offered: Sequence[_Offered]) -> Iterator[Piece]:
        """Of one version, encoded together."""
        counts = [len(each.answer.predictions) for each in offered]
        total = sum(counts)
        if model.contract.label_digest != self.contract.label_digest:
            self.left_out["other_contract"] += total
            return
        instances = together([each.answer.instances for each in offered])
        outputs = concatenate([each.answer.executed.outputs for each in offered])
        rows = np.zeros(total, self.form.row)
        rows["version"] = index = self._index(model.id)
        predicted_s = np.repeat([each.predicted_s for each in offered], counts)
        rows["predicted_s"] = predicted_s
        rows["of_rows"] = np.repeat(counts, counts)
        rows["horizon_s"] = horizon_s = self._horizon(instances.fields, predicted_s)
        numbers = model.outputs.numbers(self.form.score, outputs)
        rows["numbers"] = numbers.reshape(total, self.form.width)
        rows["segments"] = self._segments.read(instances.fields, total)
        has_horizon = np.isfinite(horizon_s)
        self.left_out["no_horizon"] += int(total - has_horizon.sum())
        content, size = rows.tobytes(), rows.dtype.itemsize
        version = version_field(index, model.id, None)
        ends = np.cumsum(counts).tolist()
        for each, count, end in zip(offered, counts, ends, strict=True):
            request = RequestId.parse(each.request_id)
            assert request is not None  # it was given by us
            start = end - count
            by_bucket: dict[bytes, dict[bytes, bytes]] = {}
            last_s: dict[bytes, float] = {}
            for row in range(start, end):
                if not has_horizon[row]:
                    continue
                bucket, name = Place.of(request, row - start)
                at = float(horizon_s[row])
                row_content = content[row * size : (row + 1) * size]
                by_bucket.setdefault(bucket, {})[ROW + name] = row_content
                last_s[bucket] = max(last_s.get(bucket, at), at)
            for bucket, fields in by_bucket.items():
                yield self._piece(request, bucket, fields, version, last_s[bucket])

    def _piece(
        self,
        request: RequestId,
        bucket: bytes,
        fields: dict[bytes, bytes],
        version: tuple[bytes, bytes],
        horizon_s: float,
    ) -> Piece:
        rows = len(fields)
        known = self._open.setdefault(bucket, _Open())
        known.requests.add(request.random)
        charge = self._charge(known, rows * self._row_charge, 2 * rows)
        fields[META] = self.form.digest
        fields[version[0]] = version[1]
        return Piece(bucket, fields, rows, charge, horizon_s, request.random)

    def _candidates(self, comparison: _Compared) -> Iterator[Piece]:
        request, candidate, began, first, numbers = comparison
        said = numbers.reshape(len(numbers), -1)
        if said.shape[1] != self.form.width:
            self.left_out["other_contract"] += len(numbers)
            return
        index = self._index(candidate, began)
        content = np.ascontiguousarray(said, "<f8").tobytes()
        size = 8 * self.form.width
        by_bucket: dict[bytes, dict[bytes, bytes]] = {}
        for row in range(len(numbers)):
            bucket, name = Place.of(request, first + row)
            known = self._open.get(bucket)
            if known is not None and request.random in known.requests:
                fields = by_bucket.setdefault(bucket, {})
                fields[candidate_name(name, index)] = content[row * size : (row + 1) * size]
        for bucket, fields in by_bucket.items():
            rows = len(fields)
            charge = self._charge(self._open[bucket], rows * self._candidate_charge, rows)
            fields.update([version_field(index, candidate, began)])
            yield Piece(bucket, fields, 0, charge, None, request.random)

    def _index(self, version: VersionId, began: int | None = None) -> int:
        """By which the rows of this worker mean a version; a candidate in each of its trials."""
        return self._versions.setdefault((version, began), len(self._versions))

    def _charge(self, bucket: _Open, bytes_: int, fields: int) -> int:
        """What a bucket counts for in addition when it gets so many fields."""
        before = bucket.fields
        bucket.fields += fields
        charge = bytes_ if before else bytes_ + BUCKET_CHARGE
        if bucket.fields > MOST_FIELDS:  # Redis keeps each by itself from then on
            charge += FIELD_CHARGE * (fields if before > MOST_FIELDS else bucket.fields)
        return charge

    def forget(self, piece: Piece) -> None:
        """It was not kept: what candidates say about it is of no use."""
        known = self._open.get(piece.bucket)
        if known is not None:
            known.requests.discard(piece.request)

    def _grow_older(self) -> None:
        """Buckets are closed by their age, too: of a quiet model they would otherwise be open for
        days."""
        now_s = time.monotonic()
        tag, number, since_s = self._current
        if (tag, number) != (self.ids.tag, self.ids.bucket):
            self._past.append((now_s, tag, number))
            self._current = (self.ids.tag, self.ids.bucket, now_s)
        elif now_s - since_s > _TURN_S:
            self.ids.turn()
        while self._past and now_s - self._past[0][0] > _OPEN_S:
            _, tag, number = self._past.popleft()
            if tag == self.ids.tag:
                self._settled = number
        if self._past and self._past[-1][1] != self.ids.tag:
            self._settled = -1
        while self._open:
            first = next(iter(self._open.values()))
            if len(self._open) <= _MOST_OPEN and now_s - first.opened_s < _OPEN_S:
                break
            self._open.popitem(last=False)
