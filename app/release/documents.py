"""How the documents of the release state are written: JSON, with the number of their form."""

import logging
from typing import Any, TypeVar

import msgspec

from app.release.state import ReleaseState, StateUnavailable, WorkerReport

log = logging.getLogger(__name__)

_FORM = 3
# Without releases and quarantine. While one release of the software takes another one's place they
# share the state, and an older one refuses a document with a field that it does not know.
_OLDER_FORM = 2
_NEW_IN_STATES = ("rollout", "quarantined")
_NEW_IN_REPORTS = ("tripped", "per_s", "routes", "died", "ended")
_Content = TypeVar("_Content")


class _StateDocument(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    form: int
    state: ReleaseState


class _ReportDocument(msgspec.Struct, frozen=True):
    form: int
    report: WorkerReport


def encode_state(state: ReleaseState) -> bytes:
    """By the older form where that can say it."""
    if state.rollout is not None or state.quarantined:
        return msgspec.json.encode(_StateDocument(_FORM, state))
    said = _without(msgspec.to_builtins(state), _NEW_IN_STATES)
    return msgspec.json.encode({"form": _OLDER_FORM, "state": said})


def decode_state(content: bytes, where: str) -> ReleaseState:
    """Raises `StateUnavailable` that names `where` for what this release of the software cannot
    read: to take a part of it would be to lose the rest with the next change."""
    return _decoded(content, _StateDocument, where).state


def encode_report(report: WorkerReport) -> bytes:
    """All of it."""
    return msgspec.json.encode(_ReportDocument(_FORM, report))


def encode_older_report(report: WorkerReport) -> bytes:
    """As much of it as an older release of the software reads, which would stop at the rest."""
    said = _without(msgspec.to_builtins(report), ("knows_releases",))
    said["models"] = {
        name: _without(model, _NEW_IN_REPORTS) for name, model in said["models"].items()
    }
    return msgspec.json.encode({"form": _OLDER_FORM, "report": said})


class ReportReader:
    """Reads what workers tell of themselves, of either form. Fields that are not known are those of
    a newer release of the software, and left out."""

    def __init__(self) -> None:
        self._unread: set[str] = set()

    def read(self, worker: str, content: bytes, where: str) -> WorkerReport:
        """What cannot be read is logged once, and the worker lives all the same: it confirms
        nothing of any model, so that what is to be ready everywhere waits for it."""
        try:
            document = _decoded(content, _ReportDocument, where)
        except StateUnavailable as exc:
            if worker not in self._unread:
                extra = {"worker": worker, "reason": str(exc)}
                log.warning("what a worker tells of itself cannot be read", extra=extra)
            self._unread.add(worker)
            return WorkerReport(worker, {})
        self._unread.discard(worker)
        if document.form == _FORM:
            return document.report
        return msgspec.structs.replace(document.report, knows_releases=False)


class _Form(msgspec.Struct):
    form: int


def _decoded(content: bytes, kind: type[_Content], where: str) -> _Content:
    try:
        form = msgspec.json.decode(content, type=_Form).form
        if form not in {_OLDER_FORM, _FORM}:
            raise StateUnavailable(
                f"{where}: of form {form}; this release of the software reads forms "
                f"{_OLDER_FORM} and {_FORM}"
            )
        return msgspec.json.decode(content, type=kind)
    except (msgspec.MsgspecError, RecursionError) as exc:
        raise StateUnavailable(f"{where}: cannot be read: {exc}") from exc


def _without(said: dict[str, Any], fields: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in said.items() if name not in fields}
