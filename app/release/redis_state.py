"""The release state that replicas share, in a Redis."""

import asyncio
import logging
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

from app.features.redis_connection import Reply, command
from app.release.beside import Beside
from app.release.documents import (
    ReportReader,
    decode_state,
    encode_older_report,
    encode_report,
    encode_state,
)
from app.release.folder import KNOWN_FOLDER, ReleaseFolder
from app.release.presence import Presence
from app.release.redis_line import NoAnswer, RedisLine, refused, state_address
from app.release.state import PRESENCE_S, ReleaseState, StateUnavailable, WorkerReport

log = logging.getLogger(__name__)

_ANSWER_S = 0.8
_CHANGE_S = 1.0
_STEP_S = 0.4
# `presence` counts on it.
_LONGEST_PAUSE_S = 0.5
_WORKERS = b"hikyaku:workers"
_ATTEMPTS = 3
_RETRY_S = 0.05
# An answer is missed for a second at most, in which so many others do not succeed.
_MARKS_KEPT = 100


class RedisState:
    """A `StateStore` in one Redis. What it says is also kept below `folder`, for a start without
    it; and what a worker has read while it runs, it puts back into a Redis that has lost it.

    Presence expires by the clock of the Redis, so that those of the machines need not agree.
    """

    def __init__(self, url: str, folder: Path) -> None:
        """Raises `ConfigurationError` for an address that is none; asks nothing yet."""
        address = state_address(url)
        self._presence = Presence()
        self._line = RedisLine(address, self._presence.interrupted, _LONGEST_PAUSE_S)
        # WATCH and MULTI hold for a connection: those who change something take turns on one.
        self._changes = RedisLine(address)
        self._changing = asyncio.Lock()
        self._seen: dict[str, ReleaseState] = {}
        self._reports = ReportReader()
        self._kept = _Kept(ReleaseFolder(folder / KNOWN_FOLDER))

    async def exchange(
        self, report: WorkerReport, models: Sequence[str]
    ) -> Mapping[str, ReleaseState]:
        worker = report.worker.encode()
        expiry_ms = b"%d" % int(PRESENCE_S * 1000)
        told = [
            command(b"SET", _report_key(worker), encode_report(report), b"PX", expiry_ms),
            command(b"SET", _worker_key(worker), encode_older_report(report), b"PX", expiry_ms),
            # After it: who removes the names of those that are gone looks at the first.
            command(b"SADD", _WORKERS, worker),
        ]
        # MGET would call a key of another kind empty.
        reads = [command(b"GET", _state_key(model)) for model in models]
        # What was known before it is asked for: a change that is made meanwhile may be told first.
        before = dict(self._seen)
        replies = await self._line.ask(*told, *reads, within_s=_ANSWER_S)
        keys = [_report_key(worker), _worker_key(worker), _WORKERS, *map(_state_key, models)]
        for key, reply in zip(keys, replies, strict=True):
            _require(key, [reply])
        states = {
            model: _state(model, reply)
            for model, reply in zip(models, replies[len(told) :], strict=True)
        }
        self._presence.told()
        for model, state in states.items():
            seen = before.get(model, state)
            if state.generation < seen.generation:
                await self._put_back(model, state, seen)
                states[model] = seen
        self._remember(states)
        latest = {model: self._seen[model] for model in states}
        self._kept.keep(latest)
        return latest

    async def compare_and_set(self, model: str, generation: int, state: ReleaseState) -> bool:
        if state.generation != generation + 1:
            raise ValueError(f"generation {state.generation} does not follow {generation}")
        made = await self._change(_Change(self._changes, model, generation, state))
        if made:
            self._remember({model: state})
        return made

    async def workers(self) -> Sequence[WorkerReport]:
        self._presence.require_settled()
        [names] = await self._line.ask(command(b"SMEMBERS", _WORKERS), within_s=_ANSWER_S)
        _require(_WORKERS, [names])
        if not names:
            return []
        keys = [key(name) for name in sorted(names) for key in (_worker_key, _report_key)]
        replies = await self._line.ask(*(command(b"GET", key) for key in keys), within_s=_ANSWER_S)
        self._presence.require_settled()  # it may have been interrupted meanwhile
        for key, reply in zip(keys, replies, strict=True):
            _require(key, [reply])
        living = []
        for name, older, whole in zip(sorted(names), replies[::2], replies[1::2], strict=True):
            if older is None:
                await self._forget(name)
                continue
            # A worker of an older release of the software tells nothing more.
            report = older if whole is None else whole
            where = _worker_key(name).decode()
            living.append(self._reports.read(name.decode(), report, where))
        return living

    async def leave(self, worker: str) -> None:
        name = worker.encode()
        replies = await self._line.ask(
            command(b"DEL", _worker_key(name), _report_key(name)),
            command(b"SREM", _WORKERS, name),
            within_s=_ANSWER_S,
        )
        _require(_WORKERS, replies)

    async def last_known(self, models: Sequence[str]) -> Mapping[str, ReleaseState]:
        states = await self._kept.read(models)
        self._remember(states)  # it serves by them: the Redis may come back with less
        return states

    async def close(self) -> None:
        self._line.close("the worker ends")
        self._changes.close("the worker ends")
        await self._kept.close()

    def _remember(self, states: Mapping[str, ReleaseState]) -> None:
        """What was so: a Redis that says less has lost it."""
        for model, state in states.items():
            if state.generation >= self._seen.get(model, state).generation:
                self._seen[model] = state

    async def _change(self, change: "_Change") -> bool:
        try:
            async with asyncio.timeout(_CHANGE_S), self._changing:
                return await change.make()
        except TimeoutError:
            raise StateUnavailable(f"STATE_REDIS_URL: no answer within {_CHANGE_S:g} s") from None

    async def _put_back(self, model: str, lost: ReleaseState, seen: ReleaseState) -> None:
        """The Redis has come back with less than it had accepted: a version that was rolled back
        would serve again."""
        if not await self._change(_Change(self._changes, model, lost.generation, seen)):
            raise StateUnavailable(
                f"STATE_REDIS_URL: {_state_key(model).decode()} is being restored"
            )
        log.warning(
            "the state Redis has lost changes, which are put back",
            extra={"model": model, "generation": lost.generation, "restored": seen.generation},
        )

    async def _forget(self, worker: bytes) -> None:
        """Take a worker that is gone off the list, unless it is back meanwhile."""
        key = _worker_key(worker)
        async with self._changing:
            try:
                watched = await self._changes.ask(
                    command(b"UNWATCH"),
                    command(b"WATCH", key),
                    command(b"EXISTS", key),
                    within_s=_STEP_S,
                )
                _require(key, watched)
                if watched[-1] == 0:
                    removed = await self._changes.ask(
                        command(b"MULTI"),
                        command(b"SREM", _WORKERS, worker),
                        command(b"EXEC"),
                        within_s=_STEP_S,
                    )
                    _require(_WORKERS, removed)
            except BaseException:
                self._changes.close("a change was given up")
                raise


class _Change:
    """One attempt of a worker to put a state in place of that of a generation.

    With the state, Redis keeps the mark of who put it. When an answer is lost, the mark tells
    whether the change was made; where it was not, making it once more is safe: what of the first
    attempt may still be on its way is void as soon as the key was written.
    """

    def __init__(self, line: RedisLine, model: str, generation: int, state: ReleaseState) -> None:
        self._line = line
        self._model = model
        self._key = _state_key(model)
        self._marks = f"hikyaku:changes:{model}".encode()
        self._generation = generation
        self._document = encode_state(state)
        self._mark = secrets.token_hex(8).encode()
        self._sent = False
        """Whether Redis may have made the change without our knowing."""

    async def make(self) -> bool:
        """Raises `StateUnavailable`, or is cancelled, when it does not succeed soon."""
        attempts = 0
        while True:
            attempts += 1
            try:
                made = await self._attempt()
            except BaseException as exc:
                self._line.close("a change was given up")  # and with it what it watches
                if not isinstance(exc, NoAnswer) or attempts == _ATTEMPTS:
                    raise
                await asyncio.sleep(attempts * _RETRY_S)
            else:
                if made is not None:
                    return made

    async def _attempt(self) -> bool | None:
        """None when the key was written since we looked."""
        look = [command(b"UNWATCH"), command(b"WATCH", self._key), command(b"GET", self._key)]
        if self._sent:
            look.append(command(b"LRANGE", self._marks, b"0", b"-1"))
        looked = await self._line.ask(*look, within_s=_STEP_S)
        _require(self._key, looked[:3])
        _require(self._marks, looked[3:])
        if self._sent and self._mark in looked[3]:
            return True
        if _state(self._model, looked[2]).generation != self._generation:
            return False
        # By itself: if it were refused, what comes behind it would be done at once, whoever has
        # written the key meanwhile.
        _require(self._key, await self._line.ask(command(b"MULTI"), within_s=_STEP_S))
        self._sent = True
        *queued, made = await self._line.ask(
            command(b"SET", self._key, self._document),
            command(b"LPUSH", self._marks, self._mark),
            command(b"LTRIM", self._marks, b"0", b"%d" % (_MARKS_KEPT - 1)),
            command(b"EXEC"),
            within_s=_STEP_S,
        )
        _require(self._key, [*queued, made])
        return None if made is None else True


class _Kept:
    """The last states, on the disk of this machine. Nothing waits for it."""

    def __init__(self, folder: ReleaseFolder) -> None:
        self._folder = folder
        self._beside = Beside()
        self._states: dict[str, ReleaseState] = {}
        self._fault = ""
        self._writing: asyncio.Task[None] | None = None

    def keep(self, states: Mapping[str, ReleaseState]) -> None:
        """Write those that changed; while others are being written, with the next call."""
        changed = {model: state for model, state in states.items() if self._is_new(model, state)}
        if changed and (self._writing is None or self._writing.done()):
            self._writing = asyncio.create_task(self._write(changed), name="release state kept")

    async def read(self, models: Sequence[str]) -> Mapping[str, ReleaseState]:
        return await self._beside.run(self._folder.known, models)

    async def close(self) -> None:
        if self._writing is not None:
            await self._writing
        self._beside.close()

    def _is_new(self, model: str, state: ReleaseState) -> bool:
        return self._states.get(model) != state

    async def _write(self, states: Mapping[str, ReleaseState]) -> None:
        try:
            await self._beside.run(self._folder.keep, states)
        except StateUnavailable as exc:
            if str(exc) != self._fault:  # it is tried again four times a second
                log.warning("the release state is not kept on disk", exc_info=exc)
            self._fault = str(exc)
        else:
            self._states |= states
            self._fault = ""


def _state_key(model: str) -> bytes:
    return f"hikyaku:release:{model}".encode()


def _worker_key(worker: bytes) -> bytes:
    """Of what older releases of the software read of it, and by which it lives."""
    return b"hikyaku:worker:" + worker


def _report_key(worker: bytes) -> bytes:
    """Of all that it tells."""
    return b"hikyaku:report:" + worker


def _state(model: str, reply: Reply) -> ReleaseState:
    """Of the reply to a GET of its key."""
    if reply is None:
        return ReleaseState()
    return decode_state(reply, f"STATE_REDIS_URL: {_state_key(model).decode()}")


def _require(key: bytes, replies: Sequence[Reply]) -> None:
    """Raises `StateUnavailable` when one of them is an error."""
    error = refused(replies)
    if error is not None:
        raise StateUnavailable(f"STATE_REDIS_URL: {key.decode()}: {error}")
