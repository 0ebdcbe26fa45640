"""Reads features straight from the Redis that Feast writes, by the plan, without Feast."""

import asyncio
import time
from collections import deque
from collections.abc import Collection, Sequence
from typing import Any, Protocol, TypeAlias, cast

import hiredis
import numpy as np

from app.clock import FeatureClock
from app.deadline import Deadline
from app.errors import DeadlineExceeded, FeaturesUnavailable
from app.features.plan import NO_ENTITY, FeaturePlan
from app.features.redis_connection import Reading, Reply
from app.features.redis_hash import Entity, EntityHash, Form, Found, Row, entity_hashes
from app.features.redis_rows import HashRows, RowDecoder
from app.features.redis_shape import FEW, Shape
from app.features.source import EntityColumns, FeatureRows, joined

# What Redis says of itself rather than of one command.
_SERVES_NOBODY = (
    *("LOADING", "MASTERDOWN", "READONLY", "CLUSTERDOWN", "MOVED", "ASK", "TRYAGAIN"),
    *("NOAUTH", "NOPERM", "BUSY", "MISCONF", "OOM"),
)
_ROWS_AT_ONCE = 256
# Some are read while another is decoded; a fourth gains nothing.
_PARTS_UNDER_WAY = 3


class HashReader(Protocol):
    """What reads hashes: one Redis or a cluster."""

    def read(self, reading: Reading) -> None:
        """Send its commands; its reader is told how it ends. Raises `FeaturesUnavailable` when it
        is not worth trying."""
        ...

    def check_up(self) -> None:
        """Raises `FeaturesUnavailable` when nothing is worth waiting for."""
        ...

    def watch(self, answer: "asyncio.Future[Any]", deadline: Deadline) -> None:
        """Fail it with `DeadlineExceeded` at its deadline."""
        ...

    def answered(self) -> None:
        """A read was answered in time."""
        ...

    def late(self, waited_s: float, readings: Collection[Reading]) -> None:
        """A read ran out of time after so long; these readings of it are not complete."""
        ...

    def refused(self, reason: str) -> None:
        """Redis answered that it serves nobody now."""
        ...


class RedisSource:
    """Reads the stored views of one plan: a command for each distinct entity, all in one write.

    Reads of one entity at the same time share one command, and nothing is kept beyond it. What
    arrives together is decoded together. Raises `InvalidModel` for a plan that was not compiled for
    Redis or has values of a type that it cannot decode.
    """

    def __init__(self, features: HashReader, plan: FeaturePlan, clock: FeatureClock) -> None:
        self._features = features
        self._plan = plan
        self._clock = clock
        self._hashes = entity_hashes(plan)
        self._decoder = RowDecoder(plan, self._hashes)
        self._reads: list[tuple[EntityHash, _UnderWay]] = [(read, {}) for read in self._hashes]

    @property
    def plan(self) -> FeaturePlan:
        return self._plan

    async def fetch(self, entities: EntityColumns, rows: int, deadline: Deadline) -> FeatureRows:
        """Many rows are read a part at a time, so that others get a turn in between."""
        if rows <= _ROWS_AT_ONCE:
            return await self._wait(self._begin(entities, rows), deadline)
        parts: list[FeatureRows] = []
        under_way: deque[_Fetch] = deque()
        try:
            for start in range(0, rows, _ROWS_AT_ONCE):
                stop = min(start + _ROWS_AT_ONCE, rows)
                part = {key: values[start:stop] for key, values in entities.items()}
                under_way.append(self._begin(part, stop - start))
                if len(under_way) == _PARTS_UNDER_WAY:
                    parts.append(await self._wait(under_way.popleft(), deadline))
            while under_way:
                parts.append(await self._wait(under_way.popleft(), deadline))
        finally:
            for fetch in under_way:  # we leave early
                if not fetch.answer.cancel() and not fetch.answer.cancelled():
                    fetch.answer.exception()  # the caller is told of the first
        return joined(parts)

    async def _wait(self, fetch: "_Fetch", deadline: Deadline) -> FeatureRows:
        self._features.watch(fetch.answer, deadline)
        try:
            answer = await fetch.answer
        except DeadlineExceeded:
            waited_s = time.monotonic() - fetch.begun_s
            self._features.late(waited_s, fetch.outstanding())
            raise FeaturesUnavailable(
                f"the feature store did not answer within {waited_s * 1000:.0f} ms"
            ) from None
        finally:
            # An exception keeps this frame, and the frame the future that keeps the exception.
            del fetch
        self._features.answered()
        return answer

    async def check(self) -> None:
        """Read entities that do not exist."""
        nobody = {key: [NO_ENTITY[kind]] for key, kind in self._plan.join_keys.items()}
        await self.fetch(nobody, 1, Deadline.after(1.0))

    def arrived(self, readings: Sequence[Reading]) -> None:
        complete: list[_Fetch] = []
        for reading in cast("Sequence[_SharedReading]", readings):  # we send no others
            try:
                refusal = self._take(reading)
            except Exception as exc:  # a defect: nobody may be left waiting, nor share it
                for fetch in reading.withdraw():
                    fetch.fail(exc)
                continue
            for fetch in reading.withdraw():
                fetch.missing -= 1
                fetch.refusal = fetch.refusal or refusal
                if not fetch.missing and not self._is_over(fetch):
                    complete.append(fetch)
        try:
            if complete:
                self._answer(complete)
        except Exception as exc:  # a defect: nobody may be left waiting
            for fetch in complete:
                fetch.fail(exc)

    def failed(self, reading: Reading, reason: str) -> None:
        for fetch in cast("_SharedReading", reading).withdraw():
            fetch.fail(FeaturesUnavailable(f"Redis: {reason}"))

    def _begin(self, entities: EntityColumns, rows: int) -> "_Fetch":
        """Send what is not under way already. Raises `InvalidInput`, `FeaturesUnavailable`."""
        own = _SharedReading(self)
        fetch = _Fetch(rows)
        shared: set[_SharedReading] = set()
        for read, under_way in self._reads:
            distinct, of_row = read.entities(entities, rows)
            form, first = read.form(), len(own.commands)
            new = distinct
            spans = [(own, first, first + len(distinct))] if distinct else []
            if under_way and not under_way.keys().isdisjoint(distinct):
                new, spans = own.split(distinct, under_way)
                shared.update([reading for reading, _, _ in spans if reading is not own])
            own.commands += read.commands(new, form)
            own.runs.append((form, under_way, new, len(own.commands)))
            fetch.parts.append((spans, of_row))
        if own.commands:
            self._features.read(own)
            own.offer()
            shared.add(own)
        else:
            self._features.check_up()
        for reading in shared:
            reading.fetches.append(fetch)
        fetch.missing = len(shared)
        if not shared:
            self._answer([fetch])
        return fetch

    def _answer(self, fetches: "Sequence[_Fetch]") -> None:
        """Decode the replies of all these fetches at once, and give each its rows."""
        if len(fetches) == 1 and fetches[0].rows == 1 and self._answer_one(fetches[0]):
            return
        rows = sum([fetch.rows for fetch in fetches])
        stored = [self._stored(number, read, fetches) for number, read in enumerate(self._hashes)]
        table = self._decoder.decode(stored, rows, self._clock.now_s())
        start = 0
        for fetch in fetches:
            fetch.answer.set_result(table.part(start, start + fetch.rows))
            start += fetch.rows

    def _answer_one(self, fetch: "_Fetch") -> bool:
        """Whether it was so simple that this did it."""
        stored: list[Row] = []
        for (spans, _), read in zip(fetch.parts, self._hashes, strict=True):
            found: Found = read.nothing
            for reading, start, _ in spans:
                if reading.in_stretches:
                    return False
                found = reading.found[start]
            stored.append(cast("Row", found))
        fetch.answer.set_result(self._decoder.decode_row(stored, self._clock.now_s()))
        return True

    def _stored(self, number: int, read: EntityHash, fetches: "Sequence[_Fetch]") -> HashRows:
        rows: list[Found] = []
        of_row: list[int] = []
        in_stretches = False
        for fetch in fetches:
            spans, entity_of_row = fetch.parts[number]
            before = len(rows)
            for reading, start, stop in spans:
                rows += reading.found[start:stop]
                in_stretches |= reading.in_stretches
            if before:
                of_row += [before + entity if entity >= 0 else -1 for entity in entity_of_row]
            else:
                of_row += entity_of_row
        if of_row == list(range(len(rows))):
            return HashRows(rows, None, in_stretches=in_stretches)
        if -1 in of_row:
            rows.append(read.nothing)  # where it points
        return HashRows(rows, np.array(of_row, dtype=np.intp), in_stretches=in_stretches)

    def _take(self, reading: "_SharedReading") -> str:
        """Make its replies rows; why Redis serves nobody now, if it says so."""
        replies = reading.replies
        start = 0
        kinds = set(map(type, replies))
        reading.in_stretches = tuple in kinds  # of which hiredis makes none
        for form, _, _, stop in reading.runs:
            own, to_row = replies[start:stop], form.row
            if reading.in_stretches:
                reading.found += [r if type(r) is tuple else to_row(r) for r in own]
            else:
                reading.found += map(to_row, own)
            start = stop
        if hiredis.ReplyError not in kinds:
            return ""
        refusal = next(filter(None, map(_refusal, replies)), "")
        if refusal:
            self._features.refused(refusal)
        return refusal

    def _is_over(self, fetch: "_Fetch") -> bool:
        """Whether its caller has left, or Redis answered nothing but that it serves nobody now."""
        if fetch.refusal and all(
            _refusal(reading.replies[index])
            for spans, _ in fetch.parts
            for reading, start, stop in spans
            for index in range(start, stop)
        ):
            fetch.fail(FeaturesUnavailable(f"Redis: {fetch.refusal}"))
        return fetch.answer.done()


class _SharedReading(Reading):
    """The commands of one fetch; others that ask for the same entities then wait for it too."""

    __slots__ = ("fetches", "found", "in_stretches", "runs")

    def __init__(self, source: RedisSource) -> None:
        super().__init__(source, [])
        self.runs: list[_Run] = []
        """Hash by hash, in the order of the commands."""
        self.found: list[Found] = []
        """What was stored, in the order of the commands, once they are answered."""
        self.in_stretches = False
        """Some of that is a member of a stretch."""
        self.fetches: list[_Fetch] = []

    def split(
        self, entities: Sequence[Entity], under_way: "_UnderWay"
    ) -> "tuple[list[Entity], list[_Span]]":
        """Those that nobody has asked for yet, which come next; where the replies for all will
        be."""
        new: list[Entity] = []
        spans = []
        for entity in entities:
            reading, index = under_way.get(entity, (self, len(self.commands) + len(new)))
            if reading is self:
                new.append(entity)
            spans.append((reading, index, index + 1))
        return new, spans

    def offer(self) -> None:
        """Let others find its entities."""
        start = 0
        for _, under_way, entities, stop in self.runs:
            for index, entity in enumerate(entities, start):
                under_way[entity] = (self, index)
            start = stop

    def expected(self) -> tuple[Shape, int] | None:
        taken = len(self.replies)
        if len(self.commands) < FEW:
            return None
        for form, _, _, stop in self.runs:
            if taken < stop:
                shape = form.shape
                return (shape, stop - taken) if shape is not None else None
        return None

    def withdraw(self) -> "list[_Fetch]":
        """Nobody finds it any more; those who did."""
        for _, under_way, entities, _ in self.runs:
            for entity in entities:
                del under_way[entity]
        # They refer to it too: a cycle would wait for the garbage collector, replies and all.
        fetches, self.fetches = self.fetches, []
        return fetches


_Place: TypeAlias = tuple[_SharedReading, int]
"""A reading and which of its replies."""

_Span: TypeAlias = tuple[_SharedReading, int, int]
"""A reading, the first of its replies and the one after the last."""

_UnderWay: TypeAlias = dict[Entity, _Place]
"""Where the reply for an entity will be."""


_Run: TypeAlias = tuple[Form, _UnderWay, list[Entity], int]
"""Commands of one reading to one hash: how it is read, where others find that, the entities, and
the end of the run among the commands."""


class _Fetch:
    """One call of `fetch`: what it waits for."""

    __slots__ = ("answer", "begun_s", "missing", "parts", "refusal", "rows")

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.begun_s = time.monotonic()
        self.parts: list[tuple[list[_Span], list[int]]] = []
        """For each hash: where the replies for its entities will be, and the entity of each row."""
        self.missing = 0
        """Readings that are not complete."""
        self.refusal = ""
        """Why Redis serves nobody now, if it said so."""
        self.answer: asyncio.Future[FeatureRows] = asyncio.get_running_loop().create_future()

    def outstanding(self) -> set[_SharedReading]:
        """The readings that it waits for and that are not complete."""
        return {reading for spans, _ in self.parts for reading, _, _ in spans if not reading.found}

    def fail(self, exc: Exception) -> None:
        if not self.answer.done():
            self.answer.set_exception(exc)


def _refusal(reply: Reply) -> str:
    """What Redis says of itself in a reply; empty when it says nothing of the kind."""
    if isinstance(reply, hiredis.ReplyError) and str(reply).startswith(_SERVES_NOBODY):
        return str(reply)
    return ""
