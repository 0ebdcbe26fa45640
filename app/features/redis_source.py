"""Reads features straight from the Redis that Feast writes, by the plan, without Feast."""

import asyncio
import random
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import itemgetter
from types import TracebackType
from typing import Any, Self

import hiredis
import numpy as np
from numpy.typing import NDArray

from app.clock import FeatureClock
from app.deadline import Deadline, DeadlineSweep
from app.errors import DeadlineExceeded, FeaturesUnavailable, InvalidInput, InvalidModel
from app.features.entity_key import EntityKeyEncoder
from app.features.plan import FeaturePlan
from app.features.redis_connection import (
    ConnectionLost,
    RedisAddress,
    RedisConnection,
    Reply,
    connect,
)
from app.features.source import MAX_AHEAD_S, EntityColumns, FeatureRows, ValueStatus
from app.features.values import DECODABLE, Corrupt, Stored, decode_column, decode_seconds

_MAX_UNANSWERED = 1024
_STALLED_AFTER_S = 2.0
_FIRST_RETRY_S, _LAST_RETRY_S = 0.05, 0.5


class RedisFeatures:
    """The connection that all plans of a worker read through, kept open.

    While Redis cannot be reached a read fails at once, but for those that make the next attempt
    to connect. Use it as an async context manager.
    """

    def __init__(self, address: RedisAddress) -> None:
        self._address = address
        self._sweep = DeadlineSweep()
        self._connection = RedisConnection()
        self._connecting: asyncio.Task[None] | None = None
        self._retry_s = _FIRST_RETRY_S
        self._retry_at_s = 0.0
        self._reason = "not connected yet"

    async def read(self, commands: bytes, replies: int, deadline: Deadline) -> list[Reply]:
        """The replies to commands that only read. Raises `FeaturesUnavailable`.

        A connection that ends meanwhile is replaced once, while there is time.
        """
        remaining_s = max(0.0, deadline.remaining_s())
        try:
            try:
                return await self._read(commands, replies, deadline)
            except ConnectionLost:
                return await self._read(commands, replies, deadline)
        except ConnectionLost as exc:
            raise FeaturesUnavailable(f"Redis: {exc}") from exc
        except DeadlineExceeded:
            raise FeaturesUnavailable(
                f"the feature store did not answer within {remaining_s * 1000:.0f} ms"
            ) from None

    async def _read(self, commands: bytes, replies: int, deadline: Deadline) -> list[Reply]:
        connection = self._connection
        if not connection.is_open:
            connection = await self._connected(deadline)
        if connection.silent_s() > _STALLED_AFTER_S:
            connection.close()  # a peer that vanished would keep it for ever
        if connection.unanswered >= _MAX_UNANSWERED:
            raise FeaturesUnavailable(f"Redis owes {connection.unanswered} answers")
        answer = connection.send(commands, replies)
        self._sweep.watch(answer, deadline)
        return await answer

    async def _connected(self, deadline: Deadline) -> RedisConnection:
        if self._connecting is None:
            if time.monotonic() < self._retry_at_s:
                raise ConnectionLost(self._reason)
            self._connecting = asyncio.create_task(self._connect(), name="connect to Redis")
        await asyncio.wait({self._connecting}, timeout=max(0.0, deadline.remaining_s()))
        if not self._connection.is_open:
            raise ConnectionLost(self._reason)
        return self._connection

    async def _connect(self) -> None:
        try:
            self._connection = await connect(self._address)
            self._retry_s = _FIRST_RETRY_S
        except ConnectionLost as exc:
            self._reason = str(exc)
            # Spread out, so that the workers of a fleet do not all come back at once.
            self._retry_at_s = time.monotonic() + self._retry_s * random.uniform(0.5, 1.0)
            self._retry_s = min(2 * self._retry_s, _LAST_RETRY_S)
        finally:
            self._connecting = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.wait({self._connecting})
        self._connection.close()
        self._sweep.close()


class RedisSource:
    """Reads one plan: an HMGET for each distinct entity of a request, all in one write.

    Raises `InvalidModel` for a plan that was not compiled for Redis or has values of a type that it
    cannot decode.
    """

    def __init__(self, features: RedisFeatures, plan: FeaturePlan, clock: FeatureClock) -> None:
        self._features = features
        self._plan = plan
        self._clock = clock
        self._entities = _entity_reads(plan)
        self._decoder = _RowDecoder(plan, self._entities)

    @property
    def plan(self) -> FeaturePlan:
        return self._plan

    async def fetch(self, entities: EntityColumns, rows: int, deadline: Deadline) -> FeatureRows:
        asked = [read.ask(entities, rows) for read in self._entities]
        commands = b"".join([command for ask in asked for command in ask.commands])
        count = sum(len(ask.commands) for ask in asked)
        replies = await self._features.read(commands, count, deadline) if count else []
        return self._decoder.decode(_by_row(self._entities, asked, replies, rows), self._clock)

    async def check(self) -> None:
        """Read entities that do not exist."""
        nobody = {
            key: ["" if kind == "string" else 0] for key, kind in self._plan.join_keys.items()
        }
        await self.fetch(nobody, 1, Deadline.after(1.0))


@dataclass(frozen=True, slots=True)
class _Asked:
    """A command for each distinct entity; `entity_of_row` is its index, -1 for a row without that
    entity."""

    commands: list[bytes]
    entity_of_row: list[int]


class _EntityRead:
    """The views with the same join keys: Feast keeps them in one hash, so one HMGET reads them.

    A reply holds the features of these views, in order, then a time stamp for each view.
    """

    def __init__(self, plan: FeaturePlan, views: Sequence[int]) -> None:
        layout = plan.redis
        if layout is None:
            raise InvalidModel(f"{plan.feature_service}: the plan is not for Redis; publish again")
        self.views = views
        members = [plan.views[index] for index in views]
        self._keys = EntityKeyEncoder(
            {key: layout.key_types[key] for key in members[0].join_keys},
            plan.project,
            layout.key_version,
        )
        fields = [
            *(bytes.fromhex(layout.fields[name]) for view in members for name in view.references()),
            *(f"_ts:{view.name}".encode() for view in members),
        ]
        self.nothing: list[Stored] = [None] * len(fields)
        """The reply for an entity that is not stored."""
        self._command_head = b"*%d\r\n$5\r\nHMGET\r\n$" % (len(fields) + 2)
        self._command_tail = b"\r\n" + b"".join(b"$%d\r\n%b\r\n" % (len(f), f) for f in fields)

    def ask(self, entities: EntityColumns, rows: int) -> _Asked:
        """Raises `InvalidInput` for an entity that its type does not hold."""
        index_of: dict[tuple[str | int | None, ...], int] = {}
        entity_of_row = [
            -1 if None in values else index_of.setdefault(values, len(index_of))
            for values in zip(*(entities[key] for key in self._keys.join_keys), strict=True)
        ]
        return _Asked([self._command(values) for values in index_of], entity_of_row)

    def _command(self, values: tuple[Any, ...]) -> bytes:
        try:
            key = self._keys.encode(values)
        except struct.error as exc:
            names = ", ".join(self._keys.join_keys)
            raise InvalidInput(f"{names}: {values} is out of range: {exc}", field=names) from None
        return self._command_head + b"%d\r\n%b" % (len(key), key) + self._command_tail


class _RowDecoder:
    """Decodes rows of stored values: each is the replies of its entities, one after the other.

    All values of one type are decoded at once; what is rare (a value that is missing, too old or
    corrupt) is looked for with one comparison and paid for only where it is found.
    """

    def __init__(self, plan: FeaturePlan, entities: Sequence[_EntityRead]) -> None:
        self._plan = plan
        places: dict[int, int] = {}  # of each feature of the plan in a row
        stamps: dict[int, int] = {}  # of each view's time stamp
        place = 0
        for read in entities:
            for view in read.views:
                for feature in range(*plan.view_columns[view].indices(len(plan.references))):
                    places[feature] = place
                    place += 1
            for view in read.views:
                stamps[view] = place
                place += 1
        self._stamps = _picker([stamps[view] for view in range(len(plan.views))])
        self._kinds = [
            (dtype, _picker([places[feature] for feature in features]), features)
            for dtype, features in _by_dtype(plan).items()
        ]
        self._max_age_s = np.array([view.ttl_s or np.inf for view in plan.views])
        self._view_of_feature = [i for i, view in enumerate(plan.views) for _ in view.features]

    def decode(self, rows: Sequence[Sequence[Stored]], clock: FeatureClock) -> FeatureRows:
        times, unreadable = self._event_times(rows)
        columns: list[NDArray[Any]] = [_NO_COLUMN] * len(self._plan.references)
        status = np.zeros((len(rows), len(columns)), dtype=np.uint8)
        for dtype, pick, features in self._kinds:
            flat = list(chain.from_iterable(map(pick, rows)))
            values, corrupt = decode_column(dtype, flat)
            null = values == None if values.dtype == object else np.isnan(values)  # noqa: E711
            status[:, features] = null.reshape(len(rows), -1)  # NULL_VALUE is 1
            for index in corrupt:
                row, feature = divmod(index, len(features))
                status[row, features[feature]] = ValueStatus.UNAVAILABLE
            table = values.reshape(len(rows), -1)
            for offset, feature in enumerate(features):
                columns[feature] = table[:, offset]
        now_s = clock.now_s()
        ages_s = now_s - times
        usable = (ages_s <= self._max_age_s) & (ages_s >= -MAX_AHEAD_S)  # NaN is neither
        if not usable.all():
            self._hide_unusable(columns, status, ages_s)
        for row, view in unreadable:
            self._hide_view(columns, status, row, view)
        return FeatureRows(self._plan, tuple(columns), status, times)

    def _event_times(
        self, rows: Sequence[Sequence[Stored]]
    ) -> tuple[NDArray[np.float64], list[tuple[int, int]]]:
        """Seconds `[rows, views]`, and the row and view of those that are corrupt."""
        unreadable = []
        seconds = []
        for row, values in enumerate(rows):
            for view, stamp in enumerate(self._stamps(values)):
                try:
                    seconds.append(decode_seconds(stamp))
                except Corrupt:
                    seconds.append(np.nan)
                    unreadable.append((row, view))
        return np.array(seconds, dtype=np.float64).reshape(len(rows), -1), unreadable

    def _hide_unusable(
        self,
        columns: Sequence[NDArray[Any]],
        status: NDArray[np.uint8],
        ages_s: NDArray[np.float64],
    ) -> None:
        absent = (np.isnan(ages_s) | (ages_s < -MAX_AHEAD_S))[:, self._view_of_feature]
        too_old = (ages_s > self._max_age_s)[:, self._view_of_feature]
        status[too_old] = ValueStatus.OUTSIDE_MAX_AGE
        status[absent] = ValueStatus.NOT_FOUND
        for column, hidden in zip(columns, (absent | too_old).T, strict=True):
            column[hidden] = None

    def _hide_view(
        self, columns: Sequence[NDArray[Any]], status: NDArray[np.uint8], row: int, view: int
    ) -> None:
        own = self._plan.view_columns[view]
        status[row, own] = ValueStatus.UNAVAILABLE
        for column in columns[own]:
            column[row] = None


_NO_COLUMN: NDArray[Any] = np.empty(0)
# No time stamp has this form: its view is UNAVAILABLE.
_BROKEN = b"\xff"


def _by_row(
    entities: Sequence[_EntityRead], asked: Sequence[_Asked], replies: Sequence[Reply], rows: int
) -> list[list[Stored]]:
    """The stored values of each row: the replies of its entities, one after the other."""
    table: list[list[Stored]] = [[] for _ in range(rows)]
    start = 0
    for read, ask in zip(entities, asked, strict=True):
        stop = start + len(ask.commands)
        own = [_stored(reply, read.nothing) for reply in replies[start:stop]]
        start = stop
        for values, entity in zip(table, ask.entity_of_row, strict=True):
            values += own[entity] if entity >= 0 else read.nothing
    return table


def _stored(reply: Reply, nothing: list[Stored]) -> list[Stored]:
    """A reply's values. WRONGTYPE is about one key; any other error is about the store.

    Raises `FeaturesUnavailable` for the latter.
    """
    if isinstance(reply, hiredis.ReplyError):
        if str(reply).startswith("WRONGTYPE"):
            return [_BROKEN for _ in nothing]
        raise FeaturesUnavailable(f"Redis: {reply}")
    values: list[Stored] = reply
    return values


def _entity_reads(plan: FeaturePlan) -> list[_EntityRead]:
    for view in plan.views:
        for feature in view.features:
            if feature.dtype not in DECODABLE:
                raise InvalidModel(
                    f"{view.name}:{feature.name}: {feature.dtype} cannot be served from Redis"
                )
    groups: dict[tuple[str, ...], list[int]] = {}
    for index, view in enumerate(plan.views):
        groups.setdefault(tuple(sorted(view.join_keys)), []).append(index)
    return [_EntityRead(plan, views) for views in groups.values()]


def _by_dtype(plan: FeaturePlan) -> Mapping[str, list[int]]:
    """For each type, the positions of its features in the plan."""
    positions: dict[str, list[int]] = {}
    dtypes = (feature.dtype for view in plan.views for feature in view.features)
    for position, dtype in enumerate(dtypes):
        positions.setdefault(dtype, []).append(position)
    return positions


def _picker(places: Sequence[int]) -> Callable[[Sequence[Stored]], Sequence[Stored]]:
    """Takes the values at these places out of a row."""
    if len(places) == 1:
        return lambda row: (row[places[0]],)
    return itemgetter(*places)
