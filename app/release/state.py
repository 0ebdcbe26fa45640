"""What workers and replicas agree on: which version of a model serves, and which may be next."""

import os
import secrets
import socket
from collections.abc import Mapping, Sequence
from typing import Protocol

import msgspec

from app.errors import HikyakuError
from app.evidence.plan import Plan, Stage


class StateUnavailable(HikyakuError):
    """The release state can be neither read nor changed now; the text says why."""


class Chosen(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A version, and the digest of its manifest: what was decided on cannot be exchanged later."""

    version: int
    sha256: str


class Preparation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A version that every worker is to have verified and warm before it serves anywhere."""

    chosen: Chosen
    worker: str
    """Who has asked for it: without that worker, nothing will come of it."""


class ShadowState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A candidate that is shown what the champion answers."""

    chosen: Chosen
    share: float
    """Of the requests, above 0 and at most 1."""
    began: int
    """The generation in which it was asked for: what was counted before is of another trial."""


class BegunStage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A stage of a release that has begun."""

    stage: Stage
    began: int
    """The generation: what was counted of exposures before is of another stage."""
    began_s: float
    """Seconds since 1970."""


class Rollout(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A release under way: a candidate earns more of the routing keys stage by stage."""

    candidate: Chosen
    against: Chosen
    """The champion when it began; it answers the other keys, also while it is watched."""
    plan: Plan
    hold_out: float
    """Share of the keys that the candidate never answers."""
    control: float
    """Share of the keys that `against` still answers while it is watched."""
    watch_s: float
    slow_factor: float
    per_s: float
    """Requests that were expected when it was started."""
    began: int
    """The generation in which it was started."""
    by: str
    stages: tuple[BegunStage, ...]
    """The last one goes on."""
    paused: str = ""
    """By whom: no stage is promoted meanwhile, and none ends for its time."""
    paused_since_s: float = 0.0
    """Seconds since 1970."""
    watched_since_s: float | None = None
    """Seconds since 1970 at which the candidate became the champion: from then on the last stage is
    a restarted test."""
    routing_key: str | None = None
    """The instance field that requests are routed by, of model.yaml when it began: workers may have
    read another one since, and each key is to stay where it is."""

    @property
    def is_watched(self) -> bool:
        return self.watched_since_s is not None

    def is_deadly(self, died: Mapping[str, int]) -> bool:
        """Whether the candidate ends workers: twice, as one death may be chance, and more often
        than they end with the version that it is released against. `died`: by a manifest's digest,
        how often workers have died while they executed it."""
        of_candidate = died.get(self.candidate.sha256, 0)
        return of_candidate > max(1, died.get(self.against.sha256, 0))


class Quarantined(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A version that was rolled back: no release takes it again unless an operator says so."""

    chosen: Chosen
    reason: str
    at_s: float
    """Seconds since 1970."""


class ReleaseState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The state of one model. The first one, of which nothing was ever decided, has generation 0:
    then CURRENT of the repository says what serves."""

    generation: int = 0
    """Grows by one with each change."""
    champion: Chosen | None = None
    previous: Chosen | None = None
    """Served before the champion, and stays ready to serve again."""
    preparing: Preparation | None = None
    current: Chosen | None = None
    """What CURRENT named when the champion was decided on: whatever else it names is a newer word.
    """
    shadows: tuple[ShadowState, ...] = ()
    """Candidates, in the order in which they were asked for."""
    rollout: Rollout | None = None
    quarantined: tuple[Quarantined, ...] = ()
    """The latest ones, in the order in which they were rolled back."""
    decided: int = 0
    """The generation in which the champion was decided on: the same version may be anew, by another
    model.yaml."""


class ModelReport(msgspec.Struct, frozen=True):
    """How a worker stands with one model."""

    generation: int
    """Of the last state of which it has done all: it serves the champion, and has tried to get
    ready what is to be prepared."""
    serves: Chosen | None
    ready: Sequence[Chosen] = ()
    """Verified and warm in this worker, what serves among them."""
    failed: Mapping[str, str] = {}
    """By a manifest's digest, why the version that is being prepared cannot serve here."""
    refused: str = ""
    """Why the version that CURRENT names does not serve, where this worker has tried it."""
    candidates: Mapping[str, str] = {}
    """By a manifest's digest: empty where this worker shows the candidate requests, or why not."""
    tripped: Mapping[str, str] = {}
    """By a manifest's digest, what a candidate did that no release goes on with."""
    per_s: float = 0.0
    """Requests that it was asked lately."""
    routes: int = 0
    """The generation in which the stage began by which this worker routes requests; 0 where none
    is."""
    died: Mapping[str, int] = {}
    """By a manifest's digest, how many workers of its service have died in the midst of executing
    it since the release under way began."""
    ended: Mapping[str, int] = {}
    """By a manifest's digest, how often the process of a candidate has ended of itself while this
    worker showed it requests."""


class WorkerReport(msgspec.Struct, frozen=True):
    """A worker that lives, and how it stands with each model: with none where what it tells cannot
    be read."""

    worker: str
    models: Mapping[str, ModelReport]
    knows_releases: bool = True
    """False of an older release of the software, which cannot read the state while a release is
    under way: what one worker does for all is not left to it."""


class StateStore(Protocol):
    """Where the state is kept. Every call raises `StateUnavailable` when it cannot be done."""

    async def exchange(
        self, report: WorkerReport, models: Sequence[str]
    ) -> Mapping[str, ReleaseState]:
        """Tell how this worker stands, which is forgotten after `PRESENCE_S` without another word,
        and read the state of each of the models."""
        ...

    async def compare_and_set(self, model: str, generation: int, state: ReleaseState) -> bool:
        """Replace the state of the model, whose generation is to be `generation` still, by one of
        the next generation. False when it is another: then nothing has changed. When it raises
        `StateUnavailable`, the change may have been made, or may be yet: `exchange` will tell."""
        ...

    async def workers(self) -> Sequence[WorkerReport]:
        """Every worker that lives, this one among them, in the order of their names. After an
        interruption it raises `StateUnavailable` until the others can have told of themselves
        again."""
        ...

    async def leave(self, worker: str) -> None:
        """This worker ends: nobody need wait for it."""
        ...

    async def last_known(self, models: Sequence[str]) -> Mapping[str, ReleaseState]:
        """The states that this machine has read last, where it has, without asking anybody: what a
        worker starts with when there is nothing better. What cannot be read is logged, and left
        out."""
        ...

    async def close(self) -> None: ...


PRESENCE_S = 3.0


def worker_name() -> str:
    """Of no other worker of any replica, nor of one that was here before."""
    return f"{socket.gethostname()[:64]}-{os.getpid()}-{secrets.token_hex(4)}"
