"""The release state of one machine, in files that its workers share."""

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote, unquote

import msgspec

from app.release.beside import Beside
from app.release.documents import ReportReader, encode_older_report, encode_report
from app.release.folder import FOLDER, ReleaseFolder, read_file, write_file
from app.release.presence import Presence
from app.release.state import (
    PRESENCE_S,
    ReleaseState,
    StateUnavailable,
    WorkerReport,
)

log = logging.getLogger(__name__)

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
# Its file is of no use to anybody: it does not come back after so long.
_GONE_S = 20 * PRESENCE_S


class FileState:
    """A `StateStore` below `folder`, which must be on a disk of this machine: locks and the clock
    by which presence expires are its own."""

    def __init__(self, folder: Path) -> None:
        self._states = ReleaseFolder(folder / FOLDER)
        self._workers = self._states.folder / "workers"
        self._boot = _boot_id()
        self._presence = Presence()
        self._beside = Beside()
        self._seen: dict[str, ReleaseState] = {}
        self._reports = ReportReader()

    async def exchange(
        self, report: WorkerReport, models: Sequence[str]
    ) -> Mapping[str, ReleaseState]:
        states = await self._beside.run(self._exchange, report, models)
        self._presence.told()
        return states

    async def compare_and_set(self, model: str, generation: int, state: ReleaseState) -> bool:
        if state.generation != generation + 1:
            raise ValueError(f"generation {state.generation} does not follow {generation}")
        return await self._beside.run(self._compare_and_set, model, generation, state)

    async def workers(self) -> Sequence[WorkerReport]:
        self._presence.require_settled()
        return await self._beside.run(self._living)

    async def leave(self, worker: str) -> None:
        await self._beside.run(_remove, self._file_of(worker))

    async def last_known(self, models: Sequence[str]) -> Mapping[str, ReleaseState]:
        return await self._beside.run(self._states.known, models)

    async def close(self) -> None:
        self._beside.close()

    def _exchange(self, report: WorkerReport, models: Sequence[str]) -> Mapping[str, ReleaseState]:
        older, whole = msgspec.Raw(encode_older_report(report)), msgspec.Raw(encode_report(report))
        word = _Word(self._boot, time.monotonic(), older, whole)
        try:
            self._workers.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as exc:
            raise StateUnavailable(f"{self._workers}: {exc.strerror or exc}") from exc
        write_file(self._file_of(report.worker), msgspec.json.encode(word), lasting=False)
        return {model: self._read(model) for model in models}

    def _read(self, model: str) -> ReleaseState:
        """What the file says. One that was deleted under the service, or put back from a copy, gets
        what it said before: a version that was rolled back would serve again."""
        state = self._states.read(model)
        seen = self._seen.get(model, state)
        if state.generation < seen.generation:
            with self._states.locked():
                state = self._states.read(model)
                if state.generation < seen.generation:
                    lost, state = state, seen
                    self._states.write(model, state)
                    extra = {"generation": lost.generation, "restored": seen.generation}
                    log.warning("a release state was lost, and is put back", extra=extra)
        self._seen[model] = state
        return state

    def _compare_and_set(self, model: str, generation: int, state: ReleaseState) -> bool:
        with self._states.locked():
            if self._states.read(model).generation != generation:
                return False
            self._states.write(model, state)
            self._seen[model] = state
            return True

    def _living(self) -> Sequence[WorkerReport]:
        living = []
        for path in sorted(self._workers.glob("*.json")):
            content = read_file(path)
            if content is None:
                continue
            try:
                word = _read_word(content, path)
            except StateUnavailable:
                if _is_old(path):  # who lives writes its own anew all the time
                    _remove(path)
                    continue
                raise
            age_s = time.monotonic() - word.told_s if word.boot == self._boot else _GONE_S
            if age_s < PRESENCE_S:
                report = bytes(word.whole) or bytes(word.report)
                living.append(self._reports.read(unquote(path.stem), report, str(path)))
            elif age_s >= _GONE_S:
                _remove(path)
        return sorted(living, key=lambda report: report.worker)

    def _file_of(self, worker: str) -> Path:
        return self._workers / f"{quote(worker, safe='')}.json"


class _Word(msgspec.Struct, frozen=True):
    """What a worker told, and when by the clock that all processes of a machine share."""

    boot: str
    told_s: float
    report: msgspec.Raw
    """As an older release of the software reads it, which leaves the rest of the word alone."""
    whole: msgspec.Raw = msgspec.Raw()
    """Empty of a worker of an older release."""


def _read_word(content: bytes, path: Path) -> _Word:
    try:
        return msgspec.json.decode(content, type=_Word)
    except msgspec.MsgspecError as exc:
        raise StateUnavailable(f"{path}: cannot be read: {exc}") from exc


def _is_old(path: Path) -> bool:
    """Whether nobody has written it for long, by the clock on the wall."""
    try:
        return time.time() - path.stat().st_mtime > _GONE_S
    except FileNotFoundError:
        return False


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as exc:
        raise StateUnavailable(f"{path}: {exc.strerror or exc}") from exc


def _boot_id() -> str:
    """That clock begins anew with each start of the machine. Outside Linux nothing says which one
    it is, and a file of an earlier one may pass for a living worker for three seconds."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""
