"""What was decided of releases, with the counts that it rests on: written where it was decided."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from app.errors import HikyakuError
from app.evidence.counts import Counts
from app.evidence.plan import Plan
from app.evidence.verdict import Verdict, judge
from app.release.beside import Beside
from app.release.state import StateUnavailable

log = logging.getLogger(__name__)

_FORM = 1
_MOST_BYTES = 64 << 20


class UnreadableDecision(HikyakuError):
    """A line of a decision log that this release of the software has not written."""


class Decision(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line."""

    at_s: float
    """Seconds since 1970."""
    worker: str
    model: str
    version: int
    sha256: str
    generation: int
    """Of the release state by which it was decided."""
    plan: Plan
    counts: Counts
    verdict: Verdict
    did: str
    """What was done: empty where nothing was."""
    form: int = _FORM


class DecisionLog:
    """A file a model below `folder`, and the one before it; a line a decision. Every line is on the
    disk before what it says is done."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._beside = Beside()

    def path(self, model: str) -> Path:
        return self._folder / f"{model}.jsonl"

    async def append(self, decision: Decision) -> None:
        """A disk that is full or hangs keeps nobody from rolling back: then it is logged and left
        out."""
        try:
            await self._beside.run(self._append, decision)
        except (OSError, StateUnavailable) as exc:
            extra = {"model": decision.model, "action": decision.verdict.action}
            log.error("a decision is not in the decision log", extra=extra, exc_info=exc)

    def close(self) -> None:
        """A disk that hangs is not waited for."""
        self._beside.close()

    def _append(self, decision: Decision) -> None:
        path = self.path(decision.model)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size > _MOST_BYTES:
            path.replace(path.with_suffix(".1.jsonl"))
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(handle, "ab") as file:
            # What a full disk, or a process that was killed, left of a line is to spoil no other.
            begin = b"" if _ends_a_line(path) else b"\n"
            file.write(begin + msgspec.json.encode(decision) + b"\n")
            file.flush()
            os.fsync(handle)


def decisions(path: Path) -> Iterator[Decision]:
    """Of a log, in order. What is no JSON is what a full disk, or a process that was killed, left
    of a line: it is logged and left out, as is a last line that is not ended. Raises
    `UnreadableDecision` naming any other line that this release of the software does not read."""
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], start=1):
        try:
            decision = msgspec.json.decode(line, type=Decision)
        except (msgspec.MsgspecError, UnicodeDecodeError) as exc:
            if _is_json(line):
                raise UnreadableDecision(f"{path}: line {number}: {exc}") from exc
            log.warning("%s: line %d is torn, and left out", path, number)
            continue
        if decision.form != _FORM:
            raise UnreadableDecision(
                f"{path}: line {number}: of form {decision.form}; this release of the software "
                f"reads form {_FORM}"
            )
        yield decision


def _is_json(line: bytes) -> bool:
    try:
        msgspec.json.decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return False
    return True


def _ends_a_line(path: Path) -> bool:
    """Whether what is there, if anything, ends with one."""
    with path.open("rb") as file:
        if not file.seek(0, os.SEEK_END):
            return True
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


def decided_anew(decision: Decision) -> Verdict:
    """From its plan and counts."""
    return judge(decision.plan, decision.counts)
