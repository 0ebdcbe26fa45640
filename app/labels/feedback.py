"""Joins labels that are told to the predictions that they are about."""

import asyncio
import logging
import math
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from typing import Annotated, TypeAlias

import msgspec

from app.clock import FeatureClock
from app.errors import InvalidInput
from app.features.redis_connection import Reply, command
from app.labels.bucket import LABEL, LABEL_VALUE, META, ROW, Keys, Place
from app.labels.form import LabelForm
from app.labels.recorder import LabelRecorder
from app.labels.sample import LabelSample
from app.labels.transactions import STEP_S, required
from app.labels.writer import Written
from app.release.redis_line import RedisLine
from app.request_ids import RequestId

log = logging.getLogger(__name__)

_AT_ONCE = 1_000
_WAIT_S = 1.0
"""A worker writes its predictions ten times a second."""
_BEHIND_S = 3.0
"""One that has written before may be behind, where it and the Redis are very busy."""
_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 0.4
_QUIET_S = 60.0
"""A worker begins another bucket at least so often."""
_ROW_HEAD = struct.Struct("<Hdd")
_MULTI, _EXEC = command(b"MULTI"), command(b"EXEC")


class Outcome(Enum):
    """What became of a label; the value is a sentence for who told it."""

    ACCEPTED = "it counts at the prediction's horizon"
    DUPLICATE = "this label was told before"
    CONFLICT = "another label was told before, which counts"
    UNKNOWN = "no prediction that is kept has this request id and instance"
    EXPIRED = "labels counted until the prediction's horizon, which has passed"
    NOT_SAMPLED = "the request is not among those whose predictions are kept"


InstanceNumber: TypeAlias = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]


class Told(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A label for the instance (counted from 0) of a request; None: there will never be one."""

    request_id: str
    label: bool | int | float | str | None
    instance: InstanceNumber = 0


class Feedback:
    """Of one model. `sample` says in which form labels are expected now."""

    def __init__(
        self,
        line: RedisLine,
        keys: Keys,
        clock: FeatureClock,
        sample: Callable[[], LabelSample],
        recorder: LabelRecorder,
    ) -> None:
        self._line = line
        self._keys = keys
        self._clock = clock
        self._sample = sample
        self._recorder = recorder
        self._forms: dict[bytes, LabelForm | None] = {}

    async def tell(self, labels: Sequence[Told]) -> list[Outcome]:
        """What became of each, in order. The first label of a prediction counts; to tell it again
        changes nothing. An id that is not known yet is waited for, three seconds at most.

        Raises `InvalidInput` for what is no label of the model's kind, and `StateUnavailable`, when
        some may have been accepted.
        """
        fields = [
            f"labels[{place}].label" if len(labels) > 1 else "label" for place in range(len(labels))
        ]
        await self._check(labels, fields)
        began_s = time.monotonic()
        outcomes: list[Outcome] = []
        for start in range(0, len(labels), _AT_ONCE):
            stop = start + _AT_ONCE
            outcomes += await self._some(labels[start:stop], fields[start:stop], began_s)
        for outcome, count in Counter(outcomes).items():
            self._recorder.told(outcome.name.lower(), count)
        return outcomes

    async def _check(self, labels: Sequence[Told], fields: Sequence[str]) -> None:
        """Raises `InvalidInput` for a label that is none of the model's kind, unless its prediction
        was made when that was another."""
        form = self._sample().form
        others = []
        for place, (label, field) in enumerate(zip(labels, fields, strict=True)):
            try:
                form.number_of(label.label, field)
            except InvalidInput:
                request = RequestId.parse(label.request_id)
                if request is None:
                    raise
                others.append(_Waiting(place, label, request, field))
        for start in range(0, len(others), _AT_ONCE):
            some = others[start : start + _AT_ONCE]
            for each, (meta, row, _) in zip(some, await self._look(some), strict=True):
                if row is None:
                    form.number_of(each.label.label, each.field)
                else:
                    await self._number(each, meta)

    async def _some(
        self, labels: Sequence[Told], fields: Sequence[str], began_s: float
    ) -> list[Outcome]:
        outcomes: list[Outcome | None] = [None] * len(labels)
        waiting = []
        for place, (label, field) in enumerate(zip(labels, fields, strict=True)):
            request = RequestId.parse(label.request_id)
            if request is None:
                outcomes[place] = Outcome.UNKNOWN
            else:
                waiting.append(_Waiting(place, label, request, field))
        pause_s = _FIRST_PAUSE_S
        while waiting:
            for each, outcome in await self._round(waiting, time.monotonic() - began_s):
                outcomes[each.place] = outcome
            waiting = [each for each in waiting if outcomes[each.place] is None]
            if waiting:
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        return [outcome for outcome in outcomes if outcome is not None]

    async def _round(
        self, waiting: Sequence["_Waiting"], waited_s: float
    ) -> list[tuple["_Waiting", Outcome]]:
        """Those that are decided now; all of them after some seconds."""
        found = await self._look(waiting)
        decided = []
        fresh = []
        missing = []
        for each, (meta, row, told) in zip(waiting, found, strict=True):
            if row is None:
                missing.append((each, meta is not None))
                continue
            _, predicted_s, horizon_s = _ROW_HEAD.unpack_from(row)
            number = await self._number(each, meta)
            if self._clock.now_s() >= horizon_s:
                decided.append((each, Outcome.EXPIRED))
            elif told is not None:
                decided.append((each, _repeated(number, told)))
            else:
                fresh.append((each, number, predicted_s))
        decided += await self._write(fresh)
        decided += await self._missing(missing, waited_s)
        return decided

    async def _look(self, waiting: Sequence["_Waiting"]) -> Sequence[tuple[Reply, Reply, Reply]]:
        """Of each the bucket's meta, the row, and the label that was told."""
        by_bucket = _by_bucket(waiting)
        reads = []
        for bucket, members in by_bucket.items():
            names = [kind + each.at.name for each in members for kind in (ROW, LABEL)]
            reads.append(command(b"HMGET", self._keys.bucket(bucket), META, *names))
        replies = required(await self._line.ask(*reads, within_s=STEP_S))
        found: dict[int, tuple[Reply, Reply, Reply]] = {}
        for members, [meta, *values] in zip(by_bucket.values(), replies, strict=True):
            for each, row, told in zip(members, values[::2], values[1::2], strict=True):
                found[each.place] = (meta, row, told)
        return [found[each.place] for each in waiting]

    async def _number(self, each: "_Waiting", meta: bytes) -> float:
        """The label, of the form that predictions had when its own was made. Raises `InvalidInput`
        for what is none of it."""
        form = self._sample().form
        digest = meta
        if digest != form.digest:
            if digest not in self._forms:
                [content] = required(
                    await self._line.ask(command(b"GET", self._keys.form(digest)), within_s=STEP_S)
                )
                known = content and msgspec.msgpack.decode(content, type=LabelForm)
                self._forms[digest] = known or None
            form = self._forms[digest] or form
        return form.number_of(each.label.label, each.field)

    async def _write(
        self, fresh: Sequence[tuple["_Waiting", float, float]]
    ) -> Iterable[tuple["_Waiting", Outcome]]:
        """Unless others were before us.

        The bucket may have been taken out since we looked, by a worker whose clock is ahead. Then
        it is made anew with nothing but labels, and is due at once, so that it is found and
        removed. To watch it instead would have labels for the same bucket hinder each other.
        """
        if not fresh:
            return []
        now_s = self._clock.now_s()
        numbers = {each.place: number for each, number, _ in fresh}
        commands = [_MULTI]
        members = _by_bucket([each for each, _, _ in fresh])
        for bucket, of_bucket in members.items():
            key = self._keys.bucket(bucket)
            for each in of_bucket:
                name = LABEL + each.at.name
                value = LABEL_VALUE.pack(numbers[each.place], now_s)
                commands.append(command(b"HSETNX", key, name, value))
                commands.append(command(b"HGET", key, name))
            due = (b"NX", repr(now_s).encode(), bucket)
            commands.append(command(b"ZADD", self._keys.due, *due))
        *_, made = required(await self._line.ask(*commands, _EXEC, within_s=STEP_S))
        replies = iter(required(made))
        decided = []
        for of_bucket in members.values():
            of_labels = [(next(replies), next(replies)) for _ in of_bucket]
            was_gone = next(replies) == 1
            for each, (is_first, value) in zip(of_bucket, of_labels, strict=True):
                if was_gone:
                    outcome = Outcome.EXPIRED
                elif is_first:
                    outcome = Outcome.ACCEPTED
                else:
                    outcome = _repeated(numbers[each.place], value)
                decided.append((each, outcome))
        accepted = {each.place for each, outcome in decided if outcome is Outcome.ACCEPTED}
        for each, _, predicted_s in fresh:
            if each.place in accepted:
                self._recorder.delayed(max(now_s - predicted_s, 0.0))
        return decided

    async def _missing(
        self, missing: Sequence[tuple["_Waiting", bool]], waited_s: float
    ) -> list[tuple["_Waiting", Outcome]]:
        """Why there is no such row, of those with whether there is its bucket."""
        decided = []
        asked = []
        for each, has_bucket in missing:
            if not self._sample().ids.is_sampled(each.label.request_id):
                decided.append((each, Outcome.NOT_SAMPLED))
            else:
                asked.append((each, has_bucket))
        if not asked:
            return decided
        writers = await self._writers({each.request.tag for each, _ in asked})
        firsts = [each.first() for each, _ in asked]
        for (each, has_bucket), (meta, row, _) in zip(asked, await self._look(firsts), strict=True):
            written = writers[each.request.tag]
            number = each.request.bucket
            patience_s = _WAIT_S if written is None else _BEHIND_S
            if waited_s < patience_s and not _is_settled(number, written):
                continue
            if written is None or number > written.newest or has_bucket:
                outcome = Outcome.UNKNOWN
            elif row is not None:
                # Of a large request: the bucket of this instance may have been due before others.
                [rows] = _ROWS.unpack_from(row, _ROW_HEAD.size)
                outcome = Outcome.EXPIRED if each.label.instance < rows else Outcome.UNKNOWN
            else:
                outcome = Outcome.EXPIRED if meta is None else Outcome.UNKNOWN
            decided.append((each, outcome))
        return decided

    async def _writers(self, tags: set[bytes]) -> Mapping[bytes, Written | None]:
        asked = sorted(tags)
        reads = [command(b"GET", self._keys.writer(tag)) for tag in asked]
        replies = required(await self._line.ask(*reads, within_s=STEP_S))
        return dict(zip(asked, map(Written.decode, replies), strict=True))


_ROWS = struct.Struct("<I")


class _Waiting:
    """A label that is not decided yet: the `place`-th of those told together, which was told as
    this `field`."""

    __slots__ = ("at", "field", "label", "place", "request")

    def __init__(self, place: int, label: Told, request: RequestId, field: str) -> None:
        self.place = place
        self.field = field
        self.label = label
        self.request = request
        self.at = Place.of(request, label.instance)

    def first(self) -> "_Waiting":
        """For the request's first instance."""
        return _Waiting(self.place, Told(self.label.request_id, None), self.request, self.field)


def _by_bucket(waiting: Iterable[_Waiting]) -> dict[bytes, list[_Waiting]]:
    by_bucket: dict[bytes, list[_Waiting]] = {}
    for each in waiting:
        by_bucket.setdefault(each.at.bucket, []).append(each)
    return by_bucket


def _repeated(number: float, told: bytes) -> Outcome:
    before, _ = LABEL_VALUE.unpack(told)
    same = before == number or (math.isnan(before) and math.isnan(number))
    return Outcome.DUPLICATE if same else Outcome.CONFLICT


def _is_settled(number: int, written: Written | None) -> bool:
    """Whether all that the worker keeps of this bucket is there."""
    if written is None or number > written.newest:
        return False
    return number <= written.settled or time.time() - written.at_s > _QUIET_S
