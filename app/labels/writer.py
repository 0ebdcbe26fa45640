"""Writes the kept predictions of one model in one worker into the state Redis, within the cap."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec

from app.clock import FeatureClock
from app.features.redis_connection import command
from app.labels.bucket import CHARGE, Keys
from app.labels.sample import LabelSample, Piece
from app.labels.transactions import Transactions

_ROWS_AT_ONCE = 128
"""To encode them takes the event loop 2 to 4 ms."""
_ATTEMPTS = 20
_KNOWN_FOR_S = 30 * 86_400
"""So long after its last horizon an id is still told to be expired rather than unknown."""


class Written(NamedTuple):
    """How far a worker is: the number of its last batch of predictions and how many pieces of it
    were kept, the numbers of its newest bucket and of the last that gets no more (-1: none), and
    when that was, by its wall clock."""

    batch: int
    kept: int
    newest: int
    settled: int
    at_s: float

    @classmethod
    def decode(cls, content: bytes | None) -> "Written | None":
        return None if content is None else cls(*msgspec.msgpack.decode(content))

    def encode(self) -> bytes:
        return msgspec.msgpack.encode(self)


class SampleWriter:
    """Writes each batch exactly once, whatever becomes of replies: with it, Redis keeps its number.

    A batch that does not get through waits and is the first of the next attempt, while the sample
    fills up and leaves out what does not fit.
    """

    def __init__(
        self,
        sample: LabelSample,
        keys: Keys,
        transactions: Transactions,
        clock: FeatureClock,
        count: Callable[[str, int], None],
    ) -> None:
        """`count` is told what became of so many rows."""
        self.sample = sample
        labels = sample.contract.labels
        assert labels is not None
        self._cap = labels.max_megabytes * 1_000_000
        self._known_for_ms = b"%d" % round(1_000 * (_KNOWN_FOR_S + labels.horizon.after_s))
        self._keys = keys
        self._transactions = transactions
        self._clock = clock
        self._count_rows = count
        self._batch: list[Piece] = []
        self._number = 0
        self._record = b""
        """Name of the key where Redis keeps the number."""

    @property
    def is_idle(self) -> bool:
        return not self._batch and self.sample.is_empty

    async def write(self) -> None:
        """All that waits. Raises `StateUnavailable`."""
        while True:
            if not self._batch:
                self._batch = list(self.sample.take(_ROWS_AT_ONCE))
                self._count_left_out()
                if not self._batch:
                    return
                self._number += 1
                self._record = self._keys.writer(self.sample.tag)
            async with self._transactions.alone():
                kept = await self._written()
            self._count(kept)
            self._batch = []

    def give_up(self) -> None:
        """What waits is lost."""
        self._count(0, "lost")
        self._batch = list(self.sample.take(1 << 30))
        self._count(0, "lost")
        self._batch = []

    async def _written(self) -> int:
        """How many pieces of the batch were kept, the first ones."""
        for _ in range(_ATTEMPTS):
            watched = (self._record, self._keys.charged)
            reads = (command(b"GET", key) for key in watched)
            record, charged = await self._transactions.look(watched, *reads)
            written = Written.decode(record)
            if written is not None and written.batch == self._number:
                return written.kept
            kept = self._fitting(int(charged or 0))
            if await self._transactions.make(*self._commands(kept)) is not None:
                return kept
        return 0  # others are always before us: the batch is left out

    def _fitting(self, charged: int) -> int:
        for place, piece in enumerate(self._batch):
            charged += piece.charge
            if charged > self._cap:
                return place
        return len(self._batch)

    def _commands(self, kept: int) -> list[bytes]:
        pieces = self._batch[:kept]
        fields: dict[bytes, dict[bytes, bytes]] = {}
        charges: Counter[bytes] = Counter()
        horizons: dict[bytes, float] = {}
        for piece in pieces:
            fields.setdefault(piece.bucket, {}).update(piece.fields)
            charges[piece.bucket] += piece.charge
            if piece.horizon_s is not None:
                last_s = horizons.get(piece.bucket, piece.horizon_s)
                horizons[piece.bucket] = max(last_s, piece.horizon_s)
        commands = []
        now_s = self._clock.now_s()
        for bucket, of_bucket in fields.items():
            key = self._keys.bucket(bucket)
            words = [word for field in of_bucket.items() for word in field]
            commands.append(command(b"HSET", key, *words))
            commands.append(command(b"HINCRBY", key, CHARGE, b"%d" % charges[bucket]))
            if bucket in horizons:
                commands.append(_due(self._keys.due, b"GT", horizons[bucket], bucket))
            else:
                # It may be gone meanwhile: what we make anew then is found, and removed.
                commands.append(_due(self._keys.due, b"NX", now_s, bucket))
        form = self.sample.form
        newest, settled = self.sample.progress()
        written = Written(self._number, kept, newest, settled, time.time())
        commands.append(command(b"INCRBY", self._keys.charged, b"%d" % charges.total()))
        commands.append(command(b"SET", self._keys.form(form.digest), form.encode()))
        record = written.encode()
        commands.append(command(b"SET", self._record, record, b"PX", self._known_for_ms))
        return commands

    def _count(self, kept: int, otherwise: str = "full") -> None:
        self._count_rows("kept", _rows(self._batch[:kept]))
        self._count_rows(otherwise, _rows(self._batch[kept:]))
        for piece in self._batch[kept:]:
            self.sample.forget(piece)
        self._count_left_out()

    def _count_left_out(self) -> None:
        left_out, self.sample.left_out = self.sample.left_out, Counter()
        for reason, rows in left_out.items():
            self._count_rows(reason, rows)


def _due(key: bytes, condition: bytes, at_s: float, bucket: bytes) -> bytes:
    return command(b"ZADD", key, condition, repr(at_s).encode(), bucket)


def _rows(pieces: Sequence[Piece]) -> int:
    return sum(piece.rows for piece in pieces)
