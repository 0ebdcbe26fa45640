"""What others are told of a change of the release state."""

from collections.abc import Iterator

from app.events.event import Event, EventType
from app.release.state import Chosen, ReleaseState


def events_of(model: str, before: ReleaseState, after: ReleaseState, by: str) -> Iterator[Event]:
    """Of a change from one generation to the next one."""

    def event(kind: EventType, chosen: Chosen, *reasons: str) -> Event:
        return Event(kind, model, chosen.version, chosen.sha256, after.generation, by, reasons)

    old, new = before.rollout, after.rollout
    if old is None and new is not None:
        yield event("release.started", new.candidate)
    if old is not None and new is None:
        if len(after.quarantined) and after.quarantined[-1:] != before.quarantined[-1:]:
            yield event("release.rolled_back", old.candidate, after.quarantined[-1].reason)
        elif after.champion == old.candidate and not old.is_watched:
            yield event("release.promoted", old.candidate, "it answers all keys")
        else:
            yield event("release.ended", old.candidate)
    if old is None or new is None:
        return
    if new.is_watched and not old.is_watched:
        share = new.stages[-1].stage.share
        yield event("release.promoted", new.candidate, f"it answers {share:.0%} of the keys")
    elif len(new.stages) > len(old.stages):
        share = new.stages[-1].stage.share
        yield event("release.stage_began", new.candidate, f"it answers {share:.0%} of the keys")
    if bool(new.paused) != bool(old.paused):
        yield event("release.paused" if new.paused else "release.resumed", new.candidate)
