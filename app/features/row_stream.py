"""Pushes the entries of a Redis stream as they come, as one of the consumers of a group."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import redis
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, NoPermissionError, RedisError, ResponseError
from redis.retry import Retry

from app.errors import ConfigurationError, HikyakuError
from app.features.push import CheckedRows, PushTarget, Written
from app.features.push_progress import Progress
from app.features.typed_columns import Faults, text_column
from app.telemetry.metrics import PushMetrics

Entry: TypeAlias = tuple[bytes, Mapping[bytes, bytes]]
"""The id of a stream's entry and its fields."""

_BLOCK_MS = 1000
_CLAIM_EVERY_S = 10.0
_SOCKET_TIMEOUT_S = 5.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 5.0


@dataclass(frozen=True, slots=True)
class StreamPosition:
    """Which stream is read, and as whom.

    Every entry of the stream goes to one consumer of the group. `claim_after_s`: an entry that its
    consumer has not acknowledged for so long is taken over.
    """

    key: str
    group: str
    consumer: str
    claim_after_s: float

    @property
    def refused(self) -> str:
        """The stream that keeps what cannot be used."""
        return f"{self.key}:refused"


class StreamPush:
    """Writes a stream's entries to a push source's views.

    The fields of an entry are the columns, as UTF-8 text; empty text is null. An entry is
    acknowledged once it is written, or kept in the stream of refused ones with the reason in
    `hikyaku_reason`. An entry that is delivered again, or to two consumers, changes nothing the
    second time.
    """

    def __init__(
        self,
        client: redis.Redis,
        position: StreamPosition,
        target: PushTarget,
        metrics: PushMetrics,
        *,
        batch_rows: int,
        progress: Progress,
        say: Callable[[str], None],
    ) -> None:
        self._client = client
        self._at = position
        self._target = target
        self._metrics = metrics
        self._batch_rows = batch_rows
        self._progress = progress
        self._say = say
        self._claim_at_s = 0.0
        self.refused_entries = 0

    def run(self, stop: threading.Event, *, once: bool = False) -> None:
        """Consume until `stop` is set, which is looked at between batches; `once`: until nothing is
        left that this consumer may take.

        Raises `ConfigurationError` when the stream's Redis refuses us or the key holds no stream,
        `HikyakuError` when a Redis fails and `once` is set. Without `once` it waits for Redis.
        """
        pause_s = _FIRST_PAUSE_S
        failed_s: float | None = None
        has_group = False
        entries: list[Entry] = []
        while not stop.is_set():
            try:
                if not has_group:
                    self._create_group()
                    has_group = True
                entries = entries or self._next(block=not once)
                if entries:
                    self._consume(entries)
                    entries = []
                elif once:
                    break
            except RedisError as exc:
                self._refuse_for_good(exc)
                if once:
                    raise HikyakuError(f"Redis failed: {exc or type(exc).__name__}") from exc
                if failed_s is None:
                    self._say(f"Redis failed: {exc or type(exc).__name__}; waiting for it")
                    failed_s = time.monotonic()
                has_group = False  # a Redis that comes back empty has lost it
                stop.wait(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
                continue
            if failed_s is not None:
                self._say(f"Redis answers again after {time.monotonic() - failed_s:.0f} s")
            failed_s, pause_s = None, _FIRST_PAUSE_S
        self._leave()

    def _create_group(self) -> None:
        """From the stream's beginning: what was pushed before changes nothing."""
        try:
            self._client.xgroup_create(self._at.key, self._at.group, id="0", mkstream=True)
        except ResponseError as exc:
            if not str(exc).startswith("BUSYGROUP"):
                raise

    def _next(self, *, block: bool) -> list[Entry]:
        """Entries that a consumer left behind, else new ones, else none."""
        if time.monotonic() >= self._claim_at_s:
            left = self._claimed()
            if left:
                return left
            self._claim_at_s = time.monotonic() + _CLAIM_EVERY_S
        # redis-py has one type for the answers of its blocking and its asynchronous clients.
        streams: Any = self._client.xreadgroup(
            self._at.group,
            self._at.consumer,
            {self._at.key: ">"},
            count=self._batch_rows,
            block=_BLOCK_MS if block else None,
        )
        return streams[0][1] if streams else []

    def _claimed(self) -> list[Entry]:
        cursor = b"0-0"
        while True:
            answer: Any = self._client.xautoclaim(
                self._at.key,
                self._at.group,
                self._at.consumer,
                min_idle_time=round(1000 * self._at.claim_after_s),
                start_id=cursor,
                count=self._batch_rows,
            )
            cursor = answer[0]
            entries = [
                entry for entry in answer[1] if entry[1] is not None
            ]  # not trimmed meanwhile
            if entries or cursor == b"0-0":
                return entries

    def _consume(self, entries: Sequence[Entry]) -> None:
        """Write what can be written, keep the rest with its reason, acknowledge both."""
        started_s = time.monotonic()
        checked, places, refused = self._checked(entries)
        written = self._write(checked, places, refused)
        with self._client.pipeline(transaction=True) as transaction:
            for place, reason in sorted(refused.items()):
                identity, fields = entries[place]
                kept = {**fields, b"hikyaku_id": identity, b"hikyaku_reason": reason.encode()}
                transaction.xadd(self._at.refused, kept)  # type: ignore[arg-type]  # see above
            transaction.xack(self._at.key, self._at.group, *(entry[0] for entry in entries))
            transaction.execute()
        self.refused_entries += len(refused)
        self._metrics.refused_entries.inc(len(refused))
        self._progress.add(written)
        self._metrics.record(
            written.stored,
            written.not_newer,
            self._progress.written.newest_s,
            time.monotonic() - started_s,
        )

    def _checked(self, entries: Sequence[Entry]) -> tuple[CheckedRows, list[int], Faults]:
        """The rows that can be written, the place of each, and the reason of the other places."""
        refused: Faults = {}
        places: list[int] = []
        rows: list[dict[str, str]] = []
        for place, (_, fields) in enumerate(entries):
            try:
                row = {name.decode(): value.decode() for name, value in fields.items()}
            except UnicodeDecodeError:
                refused[place] = "is not UTF-8"
                continue
            fault = self._target.fault_of_columns(row)
            if fault is not None:
                refused[place] = fault
                continue
            places.append(place)
            rows.append(row)
        columns = {
            name: text_column([row[name] or None for row in rows]) for name in self._target.columns
        }
        checked, faults = self._target.check(columns, from_text=True)
        refused |= {places[index]: reason for index, reason in faults.items()}
        return checked, [place for place in places if place not in refused], refused

    def _write(self, checked: CheckedRows, places: Sequence[int], refused: Faults) -> Written:
        """Write the rows; an entity whose key holds something else is refused, the others are
        written."""
        try:
            return self._target.write(checked)
        except ResponseError as exc:
            if not str(exc).startswith("WRONGTYPE"):
                raise
            if len(places) == 1:
                refused[places[0]] = f"the key of its entity holds no features: {exc}"
                return Written()
        half = len(places) // 2
        written = self._write(checked.part(0, half), places[:half], refused)
        written.add(self._write(checked.part(half, len(places)), places[half:], refused))
        return written

    def _refuse_for_good(self, exc: RedisError) -> None:
        """Raise for what waiting does not mend."""
        if isinstance(exc, AuthenticationError | NoPermissionError):
            raise ConfigurationError(f"Redis refuses us: {exc}") from exc
        if isinstance(exc, ResponseError) and str(exc).startswith("WRONGTYPE"):
            raise ConfigurationError(f"{self._at.key}: its key holds no stream") from exc

    def _leave(self) -> None:
        """Take our name out of the group, unless entries wait for us: Redis would forget them."""
        at = self._at
        try:
            if not self._client.xpending_range(at.key, at.group, "-", "+", 1, at.consumer):
                self._client.xgroup_delconsumer(at.key, at.group, at.consumer)
        except RedisError as exc:  # a name that stays does no harm
            self._say(f"consumer {at.consumer} stays in group {at.group}: {exc}")


def stream_client(url: str, setting: str) -> redis.Redis:
    """A client of the stream's Redis, which raises at once what goes wrong.

    Raises `ConfigurationError` naming `setting` for an address that is none.
    """
    try:
        return redis.Redis.from_url(
            url,
            socket_timeout=_SOCKET_TIMEOUT_S,
            socket_connect_timeout=_SOCKET_TIMEOUT_S,
            retry=Retry(NoBackoff(), 0),
        )
    except ValueError as exc:
        raise ConfigurationError(
            f"{setting}: {exc}; --stream-url names the one Redis that has the stream"
        ) from exc
