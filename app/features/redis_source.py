"""Reads features straight from the Redis that Feast writes, by the plan, without Feast."""

import asyncio
import random
import struct
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import hiredis
import numpy as np
from numpy.typing import NDArray

from app.clock import FeatureClock
from app.deadline import Deadline, DeadlineSweep
from app.errors import DeadlineExceeded, FeaturesUnavailable, InvalidInput, InvalidModel
from app.features.entity_key import EntityKeyEncoder
from app.features.plan import FeaturePlan, PlannedView
from app.features.redis_connection import (
    ConnectionLost,
    RedisAddress,
    RedisConnection,
    Reply,
    connect,
)
from app.features.source import EntityColumns, FeatureRows, ValueStatus
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
        self._waiting_since_s = 0.0
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
        now_s = time.monotonic()
        if not connection.unanswered:
            self._waiting_since_s = now_s
        elif now_s - self._waiting_since_s > _STALLED_AFTER_S:
            connection.close()  # a peer that vanished would keep it for ever
        if connection.unanswered >= _MAX_UNANSWERED:
            raise FeaturesUnavailable(f"Redis owes {connection.unanswered} answers")
        answer = connection.send(commands, replies)
        self._sweep.watch(answer, deadline)
        replied = await answer
        self._waiting_since_s = time.monotonic()
        return replied

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
        await self._sweep.__aexit__(None, None, None)


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

    @property
    def plan(self) -> FeaturePlan:
        return self._plan

    async def fetch(self, entities: EntityColumns, rows: int, deadline: Deadline) -> FeatureRows:
        asked = [read.ask(entities, rows) for read in self._entities]
        commands = b"".join(command for ask in asked for command in ask.commands)
        count = sum(len(ask.commands) for ask in asked)
        replies = await self._features.read(commands, count, deadline) if count else []
        return self._rows(asked, replies, rows)

    async def check(self) -> None:
        """Read entities that do not exist."""
        nobody = {
            key: ["" if kind == "string" else 0] for key, kind in self._plan.join_keys.items()
        }
        await self.fetch(nobody, 1, Deadline.after(1.0))

    def _rows(self, asked: "Sequence[_Asked]", replies: Sequence[Reply], rows: int) -> FeatureRows:
        columns: list[NDArray[Any]] = [np.empty(0)] * len(self._plan.references)
        status = np.empty((rows, len(self._plan.references)), dtype=np.uint8)
        event_time_s = np.empty((rows, len(self._plan.views)))
        now_s = self._clock.now_s()
        start = 0
        for read, ask in zip(self._entities, asked, strict=True):
            stop = start + len(ask.commands)
            part = read.decode(replies[start:stop], now_s)
            start = stop
            for position, column in zip(read.positions, part.columns, strict=True):
                columns[position] = column[ask.entity_of_row]
            status[:, read.positions] = part.status[ask.entity_of_row]
            event_time_s[:, read.view_positions] = part.event_time_s[ask.entity_of_row]
        return FeatureRows(self._plan, tuple(columns), status, event_time_s)


@dataclass(frozen=True, slots=True)
class _Asked:
    """A command for each distinct entity; `entity_of_row` is its index, the one past the last for a
    row without that entity."""

    commands: list[bytes]
    entity_of_row: NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class _Part:
    """What is known of some entities, and of nobody in the last row."""

    columns: list[NDArray[Any]]
    status: NDArray[np.uint8]
    event_time_s: NDArray[np.float64]


class _EntityRead:
    """The views with the same join keys: Feast keeps them in one hash, so one HMGET reads them."""

    def __init__(self, plan: FeaturePlan, views: Sequence[int]) -> None:
        layout = plan.redis
        if layout is None:
            raise InvalidModel(f"{plan.feature_service}: the plan is not for Redis; publish again")
        members = [plan.views[index] for index in views]
        self._keys = EntityKeyEncoder(
            {key: layout.key_types[key] for key in members[0].join_keys},
            plan.project,
            layout.key_version,
        )
        self.view_positions = list(views)
        self.positions = [
            position for index in views for position in _positions(plan.view_columns[index])
        ]
        fields = [
            bytes.fromhex(layout.fields[name]) for view in members for name in view.references()
        ]
        stamps = [f"_ts:{view.name}".encode() for view in members]
        self._width = len(fields) + len(stamps)
        words = b"".join(b"$%d\r\n%b\r\n" % (len(f), f) for f in (*fields, *stamps))
        self._command_head = b"*%d\r\n$5\r\nHMGET\r\n$" % (self._width + 2)
        self._command_tail = b"\r\n" + words
        self._by_dtype = _by_dtype(members)
        self._view_of_feature = [index for index, view in enumerate(members) for _ in view.features]
        self._max_age_s = np.array([view.ttl_s or np.inf for view in members])

    def ask(self, entities: EntityColumns, rows: int) -> _Asked:
        """Raises `InvalidInput` for an entity that its type does not hold."""
        index_of: dict[tuple[str | int | None, ...], int] = {}
        entity_of_row = np.empty(rows, dtype=np.intp)
        named = [entities[key] for key in self._keys.join_keys]
        nobody: list[int] = []
        for row, values in enumerate(zip(*named, strict=True)):
            if None in values:
                nobody.append(row)
            else:
                entity_of_row[row] = index_of.setdefault(values, len(index_of))
        entity_of_row[nobody] = len(index_of)
        return _Asked([self._command(values) for values in index_of], entity_of_row)

    def _command(self, values: tuple[Any, ...]) -> bytes:
        try:
            key = self._keys.encode(values)
        except struct.error as exc:
            names = ", ".join(self._keys.join_keys)
            raise InvalidInput(f"{names}: {values} is out of range: {exc}", field=names) from None
        return self._command_head + b"%d\r\n%b" % (len(key), key) + self._command_tail

    def decode(self, replies: Sequence[Reply], now_s: float) -> _Part:
        """One row an entity, and one more in which nothing is stored."""
        broken = [index for index, reply in enumerate(replies) if _is_broken(reply)]
        nothing: list[Stored] = [None] * self._width
        stored: list[list[Stored]] = [*replies, nothing]
        for index in broken:
            stored[index] = nothing
        event_time_s, unreadable = self._event_times(stored)
        columns, null, corrupt = self._columns(stored)

        found = ~np.isnan(event_time_s)
        too_old = found & (now_s - event_time_s > self._max_age_s)
        status = np.where(null, np.uint8(ValueStatus.NULL_VALUE), np.uint8(ValueStatus.PRESENT))
        status[corrupt] = ValueStatus.UNAVAILABLE
        by_feature = self._view_of_feature
        status[too_old[:, by_feature]] = ValueStatus.OUTSIDE_MAX_AGE
        status[~found[:, by_feature]] = ValueStatus.NOT_FOUND
        status[unreadable[:, by_feature]] = ValueStatus.UNAVAILABLE
        status[broken] = ValueStatus.UNAVAILABLE
        for column, one in zip(columns, status.T, strict=True):
            hidden = one > ValueStatus.NULL_VALUE
            if hidden.any():
                column[hidden] = None
        return _Part(columns, status, event_time_s)

    def _event_times(
        self, stored: Sequence[Sequence[Stored]]
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Seconds `[entities, views]`, and which of them are not to be read."""
        features = len(self.positions)
        times = np.full((len(stored), len(self.view_positions)), np.nan)
        unreadable = np.zeros(times.shape, dtype=bool)
        for row, values in enumerate(stored):
            for view, stamp in enumerate(values[features:]):
                try:
                    times[row, view] = decode_seconds(stamp)
                except Corrupt:
                    unreadable[row, view] = True
        return times, unreadable

    def _columns(
        self, stored: Sequence[Sequence[Stored]]
    ) -> tuple[list[NDArray[Any]], NDArray[np.bool_], NDArray[np.bool_]]:
        """A column a feature, and `[entities, features]` which values are null and corrupt: all
        features of one type are decoded together."""
        rows, features = len(stored), len(self.positions)
        columns: list[NDArray[Any]] = [np.empty(0)] * features
        null = np.empty((rows, features), dtype=bool)
        corrupt = np.empty((rows, features), dtype=bool)
        for dtype, offsets in self._by_dtype.items():
            flat = [values[offset] for offset in offsets for values in stored]
            decoded, bad = decode_column(dtype, flat)
            decoded = decoded.reshape(len(offsets), rows)
            corrupt[:, offsets] = bad.reshape(len(offsets), rows).T
            missing = decoded == None if decoded.dtype == object else np.isnan(decoded)  # noqa: E711
            null[:, offsets] = missing.T
            for offset, column in zip(offsets, decoded, strict=True):
                columns[offset] = column
        return columns, null, corrupt


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


def _by_dtype(views: Sequence[PlannedView]) -> Mapping[str, list[int]]:
    """For each type, the places of its features among all features of these views."""
    offsets: dict[str, list[int]] = {}
    dtypes = (feature.dtype for view in views for feature in view.features)
    for offset, dtype in enumerate(dtypes):
        offsets.setdefault(dtype, []).append(offset)
    return offsets


def _positions(columns: slice) -> range:
    return range(columns.start, columns.stop)


def _is_broken(reply: Reply) -> bool:
    """WRONGTYPE is about one key; any other error is about the store.

    Raises `FeaturesUnavailable` for the latter.
    """
    if not isinstance(reply, hiredis.ReplyError):
        return False
    if str(reply).startswith("WRONGTYPE"):
        return True
    raise FeaturesUnavailable(f"Redis: {reply}")
