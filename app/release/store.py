"""Opens the stores of what workers share: in a Redis, else in files of this machine."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from app.release.file_state import FileState
from app.release.file_tables import FileTables
from app.release.folder import KNOWN_FOLDER
from app.release.redis_line import RedisAbsent, check_state_store
from app.release.redis_state import RedisState
from app.release.redis_tables import RedisTables
from app.release.state import StateStore
from app.release.tables import GONE_S, Kinds, TableStore

log = logging.getLogger(__name__)


@asynccontextmanager
async def open_state(redis_url: str | None, folder: Path) -> AsyncIterator[StateStore]:
    """`folder`, where this machine works, keeps the state, or what the Redis said last.

    Raises `ConfigurationError` when the Redis must not be used (`check_state_store`), or does not
    answer and nothing is known here of what was decided: a replica that starts meanwhile goes on
    with what it knows.
    """
    if redis_url is None:
        store: StateStore = FileState(folder)
    else:
        store = RedisState(redis_url, folder)
    try:
        if redis_url is not None:
            await _check(redis_url, folder)
        yield store
    finally:
        await store.close()


@asynccontextmanager
async def open_tables(
    redis_url: str | None,
    folder: Path,
    worker: str,
    kinds: Kinds,
    refused: Callable[[str], None],
    gone_s: float = GONE_S,
) -> AsyncIterator[TableStore]:
    """The tables of this `worker`, where the release state is; nothing is asked yet. `refused` is
    told the kind of a table whenever something is left out for its size."""
    if redis_url is None:
        store: TableStore = FileTables(folder, worker, kinds, refused, gone_s)
    else:
        store = RedisTables(redis_url, worker, kinds, refused, gone_s)
    try:
        yield store
    finally:
        await store.close()


async def _check(url: str, folder: Path) -> None:
    try:
        await check_state_store(url)
    except RedisAbsent as exc:
        if not await asyncio.to_thread(_knows_any, folder):
            raise
        log.warning("the release state is what this machine knows of it", exc_info=exc)


def _knows_any(folder: Path) -> bool:
    return any((folder / KNOWN_FOLDER).glob("*.json"))
