"""What champion and candidate said about each row, in files: to look into disagreements, and to
recompute what is told about them."""

import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote, unquote

import msgspec
import numpy as np

from app.comparison.pairs import FloatArray, Pairs
from app.comparison.table import Names
from app.release.beside import Beside
from app.release.state import StateUnavailable

log = logging.getLogger(__name__)

SUFFIX = ".jsonl"
_FILES = 16
"""So many fit into the folder."""


class LoggedPair(msgspec.Struct, frozen=True):
    """A line of the log."""

    model: str
    trial: str
    write: int
    """The first write of this worker's table that counts the pair."""
    request_id: str
    instance: int
    block: int
    """Of this worker: rows of the same one were executed together by the candidate."""
    champion: float | None
    """The compared output, null where it is no finite number. Of labelled outputs what each says
    about the label that the champion says."""
    candidate: float | None
    champion_decision: bool | str | int | None
    candidate_decision: bool | str | int | None
    failed: bool
    """The candidate gave no answer."""
    segments: tuple[str, ...]
    champion_s: float
    candidate_s: float


@dataclass(frozen=True, slots=True)
class Rows:
    """Of which trial pairs are, and of which rows of which requests, each a pair."""

    model: str
    trial: str
    request_ids: Sequence[str]
    instances: Sequence[int]
    segments: Names
    decisions: Sequence[Any]
    """By their numbers; the last stands for none, which is number -1."""


class PairLog(Protocol):
    """Takes pairs where they are counted."""

    def note(self, pairs: Pairs, rows: Callable[[], Rows]) -> None:
        """Keep these pairs for the next `append`."""
        ...

    async def append(self, write: int) -> None:
        """Log what was noted since the last call, which is counted by the write of this number. It
        is there when this returns, or left out, which is told in the service's log. Cancelling it
        leaves what was noted out or not."""
        ...

    async def close(self) -> None: ...


class NoPairLog:
    """A `PairLog` that keeps nothing."""

    def note(self, pairs: Pairs, rows: Callable[[], Rows]) -> None:
        pass

    async def append(self, write: int) -> None:
        pass

    async def close(self) -> None:
        pass


class PairFiles:
    """A `PairLog` of JSON lines in `folder`, `<worker>.<number>.jsonl`. All files there take about
    `most_bytes`: before one is begun, the oldest are removed."""

    def __init__(self, folder: Path, worker: str, most_bytes: int) -> None:
        self._folder = folder
        self._worker = quote(worker, safe="")
        self._most_bytes = most_bytes
        self._noted: list[tuple[Pairs, Rows]] = []
        self._blocks = 0
        self._files = 0
        self._file: int | None = None
        self._size = 0
        self._beside = Beside()

    def note(self, pairs: Pairs, rows: Callable[[], Rows]) -> None:
        # In int32 the numbers would end after some weeks.
        numbered = replace(pairs, block=pairs.block.astype(np.int64) + self._blocks)
        self._blocks += int(pairs.block[-1]) + 1
        self._noted.append((numbered, rows()))

    async def append(self, write: int) -> None:
        noted, self._noted = self._noted, []
        if not noted:
            return
        try:
            await self._beside.run(self._append, noted, write)
        except (OSError, StateUnavailable) as exc:
            left_out = sum(len(pairs) for pairs, _ in noted)
            extra = {"pairs": left_out, "write": write, "reason": str(exc)}
            log.error("pairs are not logged", extra=extra)

    async def close(self) -> None:
        self._beside.close()

    def _append(self, noted: Sequence[tuple[Pairs, Rows]], write: int) -> None:
        lines = [
            msgspec.json.encode(line) + b"\n"
            for pairs, rows in noted
            for line in _lines(pairs, rows, write)
        ]
        content = b"".join(lines)
        file = self._opened(len(content))
        try:
            view = memoryview(content)
            while view:
                view = view[os.write(file, view) :]
        except OSError:
            # Half a line would spoil the next one.
            os.ftruncate(file, self._size)
            raise
        self._size += len(content)

    def _opened(self, size: int) -> int:
        """The file that takes so many bytes more."""
        piece = self._most_bytes // _FILES
        if self._file is not None and (self._size + size > piece or self._is_removed(self._file)):
            os.close(self._file)
            self._file = None
        if self._file is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._make_room(self._most_bytes - max(piece, size))
            path = self._folder / f"{self._worker}.{self._files}{SUFFIX}"
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            self._files += 1
            self._size = 0
        return self._file

    def _is_removed(self, file: int) -> bool:
        """Another worker has made room: nobody would find what is written there."""
        return os.fstat(file).st_nlink == 0

    def _make_room(self, most_bytes: int) -> None:
        files = []
        for path in self._folder.glob(f"*{SUFFIX}"):
            try:
                stat = path.stat()
            except FileNotFoundError:  # another worker has made room
                continue
            files.append((stat.st_mtime_ns, path, stat.st_size))
        total = sum(size for _, _, size in files)
        for _, path, size in sorted(files):
            if total <= most_bytes:
                return
            path.unlink(missing_ok=True)
            total -= size


def read_pairs(folder: Path, worker: str = "*") -> Iterator[tuple[str, LoggedPair]]:
    """Every pair in the log, with its worker, in the order in which that counted them. A last line
    that was cut off, when its worker was killed, is left out."""
    pattern = worker if worker == "*" else quote(worker, safe="")
    for path in sorted(folder.glob(f"{pattern}.*{SUFFIX}"), key=_order):
        name = unquote(path.name.removesuffix(SUFFIX).rpartition(".")[0])
        for line in path.read_bytes().splitlines(keepends=True):
            if line.endswith(b"\n"):
                yield name, msgspec.json.decode(line, type=LoggedPair)


def _order(path: Path) -> tuple[str, int]:
    worker, _, number = path.name.removesuffix(SUFFIX).rpartition(".")
    return worker, int(number)


def _lines(pairs: Pairs, rows: Rows, write: int) -> Iterator[LoggedPair]:
    columns = zip(
        rows.request_ids,
        rows.instances,
        pairs.block.tolist(),
        _finite(pairs.champion),
        _finite(pairs.candidate),
        (rows.decisions[number] for number in pairs.champion_decision.tolist()),
        (rows.decisions[number] for number in pairs.candidate_decision.tolist()),
        pairs.failed.tolist(),
        _names(pairs, rows.segments),
        pairs.champion_s.tolist(),
        pairs.candidate_s.tolist(),
        strict=True,
    )
    for line in columns:
        yield LoggedPair(rows.model, rows.trial, write, *line)


def _names(pairs: Pairs, segments: Names) -> Iterator[tuple[str, ...]]:
    for of_row in pairs.segments.tolist():
        yield tuple(names[number] for names, number in zip(segments, of_row, strict=True))


def _finite(numbers: FloatArray) -> Iterator[float | None]:
    # JSON has no other numbers.
    return (number if math.isfinite(number) else None for number in numbers.tolist())
