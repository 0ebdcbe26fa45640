"""How the documents of the release state are written: JSON, with the number of their form."""

from typing import TypeVar

import msgspec

from app.release.state import ReleaseState, StateUnavailable, WorkerReport

_FORM = 3
_Content = TypeVar("_Content")


class _StateDocument(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    form: int
    state: ReleaseState


class _ReportDocument(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    form: int
    report: WorkerReport


def encode_state(state: ReleaseState) -> bytes:
    return msgspec.json.encode(_StateDocument(_FORM, state))


def decode_state(content: bytes, where: str) -> ReleaseState:
    """Raises `StateUnavailable` that names `where` for what this release of the software cannot
    read: to take a part of it would be to lose the rest with the next change."""
    return _decoded(content, _StateDocument, where).state


def encode_report(report: WorkerReport) -> bytes:
    return msgspec.json.encode(_ReportDocument(_FORM, report))


def decode_report(content: bytes, where: str) -> WorkerReport:
    """Raises `StateUnavailable` that names `where`."""
    return _decoded(content, _ReportDocument, where).report


class _Form(msgspec.Struct):
    form: int


def _decoded(content: bytes, kind: type[_Content], where: str) -> _Content:
    try:
        form = msgspec.json.decode(content, type=_Form).form
        if form != _FORM:
            raise StateUnavailable(
                f"{where}: of form {form}; this release of the software reads form {_FORM}"
            )
        return msgspec.json.decode(content, type=kind)
    except (msgspec.MsgspecError, RecursionError) as exc:
        raise StateUnavailable(f"{where}: cannot be read: {exc}") from exc
