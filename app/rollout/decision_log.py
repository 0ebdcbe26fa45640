"""What was decided of releases, with the counts that it rests on: written where it was decided."""

import asyncio
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from app.errors import HikyakuError
from app.evidence.counts import Counts
from app.evidence.plan import Plan
from app.evidence.verdict import Verdict, judge

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

    def path(self, model: str) -> Path:
        return self._folder / f"{model}.jsonl"

    async def append(self, decision: Decision) -> None:
        """A disk that is full keeps nobody from rolling back: then it is logged and left out."""
        try:
            await asyncio.to_thread(self._append, decision)
        except OSError as exc:
            extra = {"model": decision.model, "action": decision.verdict.action}
            log.error("a decision is not in the decision log", extra=extra, exc_info=exc)

    def _append(self, decision: Decision) -> None:
        path = self.path(decision.model)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size > _MOST_BYTES:
            path.replace(path.with_suffix(".1.jsonl"))
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(handle, "ab") as file:
            file.write(msgspec.json.encode(decision) + b"\n")
            file.flush()
            os.fsync(handle)


def decisions(path: Path) -> Iterator[Decision]:
    """Of a log, in order. Raises `UnreadableDecision` naming the line; the last one may be half
    written where a process was killed, and is left out."""
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], start=1):
        try:
            decision = msgspec.json.decode(line, type=Decision)
        except msgspec.MsgspecError as exc:
            raise UnreadableDecision(f"{path}: line {number}: {exc}") from exc
        if decision.form != _FORM:
            raise UnreadableDecision(
                f"{path}: line {number}: of form {decision.form}; this release of the software "
                f"reads form {_FORM}"
            )
        yield decision


def decided_anew(decision: Decision) -> Verdict:
    """From its plan and counts."""
    return judge(decision.plan, decision.counts)
