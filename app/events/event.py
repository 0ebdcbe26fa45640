"""What is told about releases: events of a closed list, as CloudEvents 1.0 (docs/events.md)."""

import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, TypeAlias, get_args

import msgspec

from app.clock import as_rfc3339
from app.errors import printable

EventType: TypeAlias = Literal[
    "release.started",
    "release.stage_began",
    "release.held",
    "release.promoted",
    "release.rolled_back",
    "release.paused",
    "release.resumed",
    "release.ended",
    "guardrail.suspected",
]
EVENT_TYPES: tuple[EventType, ...] = get_args(EventType)

CONTENT_TYPE = "application/cloudevents+json; charset=utf-8"
MOST_REASONS = 16
MOST_REASON = 300
MOST_DETAILS_BYTES = 12_000

_WORDS: Mapping[EventType, str] = {
    "release.started": "is released",
    "release.stage_began": "has begun a stage",
    "release.held": "is held",
    "release.promoted": "is promoted",
    "release.rolled_back": "is rolled back",
    "release.paused": "is paused",
    "release.resumed": "goes on",
    "release.ended": "is no longer watched",
    "guardrail.suspected": "is under suspicion",
}
_IN_TEXT = 3


class Event(msgspec.Struct, frozen=True):
    """Something that happened to a version that is released, told once by whoever did it.

    `generation` of the release state that it made; `by` an operator or a worker; `details` are
    counts or a verdict, as JSON says them. Whoever is told twice knows it by the `id`.
    """

    type: EventType
    model: str
    version: int | None = None
    sha256: str = ""
    generation: int | None = None
    by: str = ""
    reasons: Sequence[str] = ()
    details: Mapping[str, Any] = {}
    id: str = msgspec.field(default_factory=lambda: str(uuid.uuid4()))
    at_s: float = msgspec.field(default_factory=time.time)
    """Seconds since 1970."""

    def encode(self, source: str) -> bytes:
        """As a CloudEvent in JSON, of 40 kB at most: what is longer is cut, and details that are
        too large are left out. `source` is a URI reference."""
        reasons = [_short(reason) for reason in self.reasons[:MOST_REASONS]]
        event = {
            "specversion": "1.0",
            "id": self.id,
            "source": source,
            "type": self.type,
            "subject": self.model,
            "time": as_rfc3339(self.at_s),
            "datacontenttype": "application/json",
            "data": {
                "text": self._text(reasons),
                "model": self.model,
                "version": self.version,
                "sha256": self.sha256,
                "generation": self.generation,
                "by": _short(self.by),
                "reasons": reasons,
                "details": _bounded(self.details),
            },
        }
        return msgspec.json.encode(event)

    def _text(self, reasons: Sequence[str]) -> str:
        """A sentence for people."""
        version = "" if self.version is None else f" version {self.version}"
        because = f": {'; '.join(reasons[:_IN_TEXT])}" if reasons else ""
        return f"{self.model}{version} {_WORDS[self.type]}{because}"


class Events(Protocol):
    """Who is told."""

    def tell(self, event: Event) -> None:
        """Later, and to whoever there is: this neither waits nor raises. In the thread of the
        event loop."""
        ...


class NoEvents:
    """Nobody wants to know."""

    def tell(self, event: Event) -> None:
        pass


def _short(text: str) -> str:
    line = printable(text[: MOST_REASON + 1])
    return line if len(line) <= MOST_REASON else f"{line[:MOST_REASON]}…"


def _bounded(details: Mapping[str, Any]) -> msgspec.Raw | Mapping[str, int]:
    content = msgspec.json.encode(details)
    if len(content) > MOST_DETAILS_BYTES:
        return {"left_out_bytes": len(content)}
    return msgspec.Raw(content)
