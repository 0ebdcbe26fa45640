"""Takes predictions whose horizon has passed out of their buckets, into the quality table."""

import asyncio
import logging
import struct
import time
from collections.abc import Sequence

import msgspec

from app.clock import FeatureClock
from app.features.redis_connection import Reply, command
from app.labels.bucket import CHARGE, META, Kept, Keys, read_bucket
from app.labels.form import LabelForm
from app.labels.quality import TABLE, QualityTable, added, judged
from app.labels.transactions import Transactions
from app.release.state import StateUnavailable

log = logging.getLogger(__name__)

_AT_ONCE = 8
"""Buckets: of 512 rows, which take 3 ms, with two dozen segments and a candidate."""
_TURN_MS = 2_000
_TURN_S = 1.0
_MOST_TABLES = 32
_ATTEMPTS = 5


class Maturity:
    """Of one model. A bucket is due at the last horizon of its predictions, by feature time, and
    enters as a whole: with its removal, in one transaction, the table of its rows is appended to
    those that make up the quality. So each enters once, whoever is killed, and whatever is lost.
    """

    def __init__(self, keys: Keys, transactions: Transactions, clock: FeatureClock) -> None:
        self._keys = keys
        self._transactions = transactions
        self._clock = clock

    async def take_turn(self, worker: bytes) -> bool:
        """All that is due, within a second, unless it is another worker's turn; whether there is
        probably more. Raises `StateUnavailable`."""
        async with self._transactions.alone():
            turn = (b"SET", self._keys.turn, worker, b"NX", b"PX", b"%d" % _TURN_MS)
            [has_turn] = await self._transactions.read(command(*turn))
        if has_turn is None:
            return False
        until_s = time.monotonic() + _TURN_S
        more = True
        while more and time.monotonic() < until_s:
            async with self._transactions.alone():
                more = await self._take_some()
            await asyncio.sleep(0)
        async with self._transactions.alone():
            await self._transactions.read(command(b"DEL", self._keys.turn))
        return more

    async def _take_some(self) -> bool:
        """Whether there was something."""
        names = await self._due()
        if not names:
            return False
        keys = [self._keys.bucket(name) for name in names]
        looked = await self._transactions.look(
            [*keys, self._keys.due],
            *(command(b"HGETALL", key) for key in keys),
            *(command(b"ZSCORE", self._keys.due, name) for name in names),
        )
        contents = [dict(zip(r[::2], r[1::2], strict=True)) for r in looked[: len(names)]]
        now_s = self._clock.now_s()
        still_due = [
            (name, content)
            for name, content, score in zip(names, contents, looked[len(names) :], strict=True)
            if score is not None and float(score) <= now_s
        ]
        if still_due:
            commands = await self._commands(dict(still_due))
            await self._transactions.make(*commands)  # or others were before us: once more
        return True

    async def _due(self) -> Sequence[bytes]:
        now = repr(self._clock.now_s()).encode()
        limit = (b"LIMIT", b"0", b"%d" % _AT_ONCE)
        look = command(b"ZRANGEBYSCORE", self._keys.due, b"-inf", now, *limit)
        [names] = await self._transactions.read(look)
        return list(names)

    async def _commands(self, buckets: dict[bytes, dict[bytes, bytes]]) -> Sequence[bytes]:
        """That remove these buckets, and count what was in them."""
        charged = sum(int(content.get(CHARGE, 0)) for content in buckets.values())
        commands = [
            command(b"DEL", *map(self._keys.bucket, buckets)),
            command(b"ZREM", self._keys.due, *buckets),
            command(b"DECRBY", self._keys.charged, b"%d" % charged),
        ]
        by_form: dict[bytes, list[dict[bytes, bytes]]] = {}
        for name, content in buckets.items():
            if META in content:
                by_form.setdefault(content[META], []).append(content)
            else:  # what came when it had been taken out already
                log.info("a bucket had nothing but leftovers", extra={"bucket": name.hex()})
        for digest, contents in by_form.items():
            form = await self._form(digest)
            if form is None:
                log.error("predictions are of an unknown form", extra={"form": digest.hex()})
                continue
            kept = [each for content in contents if (each := _read(form, content)) is not None]
            if kept:
                table = judged(form, kept).encode()
                commands.append(command(b"RPUSH", self._keys.quality(digest, TABLE), table))
        commands.append(command(b"INCR", self._keys.changes))
        return commands

    async def _form(self, digest: bytes) -> LabelForm | None:
        [content] = await self._transactions.read(command(b"GET", self._keys.form(digest)))
        return None if content is None else msgspec.msgpack.decode(content, type=LabelForm)

    async def gather(self, form: LabelForm) -> None:
        """Add up tables of this form where there are many. Raises `StateUnavailable`."""
        key = self._keys.quality(form.digest, TABLE)
        async with self._transactions.alone():
            [count] = await self._transactions.read(command(b"LLEN", key))
            if count <= _MOST_TABLES:
                return
            for _ in range(_ATTEMPTS):
                [contents] = await self._transactions.look(
                    [key], command(b"LRANGE", key, b"0", b"-1")
                )
                kept, gathered = await asyncio.to_thread(_gathered, contents)
                trim = (b"LTRIM", key, b"0", b"%d" % (kept - 1)) if kept else (b"DEL", key)
                commands = (command(*trim), command(b"RPUSH", key, gathered))
                if await self._transactions.make(*commands) is not None:
                    return


def _read(form: LabelForm, content: dict[bytes, bytes]) -> Kept | None:
    """None of what no software of ours has written: it must not stand in the way of the rest."""
    try:
        return read_bucket(form, content)
    except (ValueError, struct.error) as exc:
        log.error("predictions that cannot be read are left out", exc_info=exc)
        return None


def _gathered(contents: Sequence[bytes]) -> tuple[int, bytes]:
    """The last tables in one, and how many there are before them: a table is read and written again
    only when what came since is half as large, so that a large one is not for every small one."""
    kept = len(contents)
    size = 0
    while kept and (kept > len(contents) - _MOST_TABLES or len(contents[kept - 1]) <= 2 * size):
        kept -= 1
        size += len(contents[kept])
    tables = [QualityTable.decode(content) for content in contents[kept:]]
    return kept, added(tables).of_the_last().encode()


async def read_quality(transactions: Transactions, keys: Keys, form: LabelForm) -> QualityTable:
    """Of all predictions of this form whose horizon has passed. Raises `StateUnavailable`."""
    async with transactions.alone():
        read = command(b"LRANGE", keys.quality(form.digest, TABLE), b"0", b"-1")
        [contents] = await transactions.read(read)
    return await asyncio.to_thread(_added, contents)


def _added(contents: Sequence[Reply]) -> QualityTable:
    try:
        return added([QualityTable.decode(content) for content in contents])
    except (ValueError, msgspec.DecodeError) as exc:
        raise StateUnavailable(f"STATE_REDIS_URL: a quality table: {exc}") from exc
