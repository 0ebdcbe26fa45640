"""The tables of the workers of one machine, in files."""

import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote, unquote

import msgspec

from app.errors import HikyakuError
from app.release.beside import Beside
from app.release.folder import ReleaseFolder, read_file, write_file
from app.release.own_tables import (
    Absences,
    Found,
    OwnTables,
    TableDocument,
    UnreadableDocument,
    counted,
    decode_document,
    total,
)
from app.release.state import StateUnavailable
from app.release.tables import (
    GONE_S,
    KEPT_REMOVED_S,
    MOST_BYTES,
    Additive,
    Kinds,
    StoredTable,
)

log = logging.getLogger(__name__)

FOLDER = "tables"
_FORM = 1
_FOLDED_FILE = "folded"
_SUFFIX = ".table"
_Argument = TypeVar("_Argument")
_Result = TypeVar("_Result")


class _Folded(msgspec.Struct, frozen=True, array_like=True):
    """The sum of the tables of those that are gone."""

    form: int = _FORM
    held: Mapping[str, int] = {}
    """By worker, the number of the last write that is in there."""
    removed: bool = False
    """Nobody is to write a table of this name any more."""
    content: bytes = b""
    """Empty where none was folded yet."""


class FileTables:
    """A `TableStore` below `folder`, which must be on a disk of this machine: a folder a name, in
    it a file a worker and the folded one. Whoever writes holds the lock; whoever reads does not."""

    def __init__(
        self,
        folder: Path,
        worker: str,
        kinds: Kinds,
        refused: Callable[[str], None],
        gone_s: float = GONE_S,
    ) -> None:
        """`refused` is told the kind of what was left out."""
        self._folder = folder / FOLDER
        self._lock = ReleaseFolder(self._folder)
        self._worker = worker
        self._kinds = kinds
        self._own = OwnTables(refused)
        self._absences = Absences(gone_s)
        self._beside = Beside()

    @property
    def next_write(self) -> int:
        return self._own.number + 1

    async def write(self, counted: Mapping[str, Additive]) -> None:
        self._own.gather(counted)
        while due := await self._own.due():
            found = await self._run(self._store, due)
            for name, document in due.items():
                self._own.told(name, document is not None, found[name])
            if self._own.is_done():
                return

    async def read(self, prefix: str) -> Mapping[str, StoredTable]:
        return await self._run(self._read, prefix)

    async def remove(self, name: str) -> None:
        self._own.forget(name)
        await self._run(self._remove, name)

    async def fold(self, living: Collection[str]) -> int:
        return await self._run(self._fold, living)

    async def close(self) -> None:
        self._beside.close()

    async def _run(self, call: Callable[[_Argument], _Result], argument: _Argument) -> _Result:
        try:
            return await self._beside.run(call, argument)
        except OSError as exc:
            raise StateUnavailable(f"{exc.filename}: {exc.strerror}") from exc

    def _store(self, due: Mapping[str, bytes | None]) -> Mapping[str, Found]:
        with self._lock.locked():
            return {name: self._stored(name, document) for name, document in due.items()}

    def _stored(self, name: str, document: bytes | None) -> Found:
        folder = self._of(name)
        path = folder / _file_of(self._worker)
        folded = _read_folded(folder)
        if document is not None and not folded.removed:
            folder.mkdir(mode=0o700, exist_ok=True)
            write_file(path, document, lasting=False)
        return Found(path.exists(), folded.held.get(self._worker, 0), folded.removed)

    def _read(self, prefix: str) -> Mapping[str, StoredTable]:
        tables = {name: _table(folder) for name, folder in self._names() if name.startswith(prefix)}
        return {name: table for name, table in tables.items() if table.contents}

    def _remove(self, name: str) -> None:
        folder = self._of(name)
        with self._lock.locked():
            folder.mkdir(mode=0o700, exist_ok=True)
            _write_folded(folder, _Folded(removed=True))
            for path in folder.glob(f"*{_SUFFIX}"):
                path.unlink()

    def _fold(self, living: Collection[str]) -> int:
        by_name = {name: list(_workers(folder)) for name, folder in self._names()}
        workers = {worker for of_name in by_name.values() for worker in of_name} - {self._worker}
        gone = self._absences.gone(workers, living)
        folded = 0
        for name, of_name in by_name.items():
            of_gone = set(gone).intersection(of_name)
            try:
                with self._lock.locked():
                    folded += self._folded(name, of_gone) if of_gone else 0
                    self._forget_removed(self._of(name))
            except HikyakuError as exc:
                # The others are to be folded all the same.
                log.error("a table is not folded", extra={"table": name}, exc_info=exc)
        return folded

    def _folded(self, name: str, gone: Collection[str]) -> int:
        folder = self._of(name)
        before = _read_folded(folder)
        found = [(w, d) for w, d in _documents(folder) if w in gone]
        taken = {} if before.removed else counted(found, before.held)
        if taken:
            contents = [document.content for document in taken.values()]
            contents += [before.content] if before.content else []
            content = total(self._kinds, name, contents)
            if len(content) > MOST_BYTES:
                log.error("a table cannot be folded any more", extra={"table": name})
                return 0
            numbers = {worker: document.number for worker, document in taken.items()}
            _write_folded(folder, _Folded(held={**before.held, **numbers}, content=content))
        for worker in gone:
            (folder / _file_of(worker)).unlink(missing_ok=True)
        return len(taken)

    def _forget_removed(self, folder: Path) -> None:
        path = folder / _FOLDED_FILE
        is_old = path.exists() and time.time() - path.stat().st_mtime > KEPT_REMOVED_S
        if is_old and _read_folded(folder).removed:
            path.unlink()
            folder.rmdir()

    def _names(self) -> Iterator[tuple[str, Path]]:
        for folder in sorted(self._folder.glob("*/")):
            yield unquote(folder.name), folder

    def _of(self, name: str) -> Path:
        return self._folder / quote(name, safe="")


def _table(folder: Path) -> StoredTable:
    # In this order: what is folded meanwhile is then in the folded table, which says so.
    documents = list(_documents(folder))
    folded = _read_folded(folder)
    if folded.removed:
        return StoredTable([], {})
    latest = counted(documents, folded.held)
    contents = [document.content for document in latest.values()]
    contents += [folded.content] if folded.content else []
    numbers = {worker: document.number for worker, document in latest.items()}
    return StoredTable(contents, {**folded.held, **numbers})


def _workers(folder: Path) -> Iterator[str]:
    for path in sorted(folder.glob(f"*{_SUFFIX}")):
        yield unquote(path.name.removesuffix(_SUFFIX))


def _documents(folder: Path) -> Iterator[tuple[str, TableDocument]]:
    for worker in _workers(folder):
        path = folder / _file_of(worker)
        content = read_file(path)
        if content is not None:
            yield worker, decode_document(content, str(path))


def _read_folded(folder: Path) -> _Folded:
    path = folder / _FOLDED_FILE
    content = read_file(path)
    if content is None:
        return _Folded()
    try:
        folded = msgspec.msgpack.decode(content, type=_Folded)
    except msgspec.MsgspecError as exc:
        raise UnreadableDocument(f"{path}: cannot be read: {exc}") from exc
    if folded.form != _FORM:
        raise UnreadableDocument(f"{path}: of form {folded.form}, not {_FORM}")
    return folded


def _write_folded(folder: Path, folded: _Folded) -> None:
    write_file(folder / _FOLDED_FILE, msgspec.msgpack.encode(folded), lasting=True)


def _file_of(worker: str) -> str:
    return quote(worker, safe="") + _SUFFIX
