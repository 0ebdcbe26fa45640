"""Releases as a test wants them, and requests of one stage."""

import time
from dataclasses import dataclass, field

from app.canary.exposures import Exposure, StageExposures
from app.canary.first_seen import FirstSeen, SeenHere
from app.canary.table import ExposureTable
from app.evidence.plan import Plan, Stage
from app.release.state import BegunStage, Chosen, Rollout, StateUnavailable
from app.routing_key import Lots
from app.served_model import VersionId
from app.telemetry.metrics import Metrics

AGAINST, CANDIDATE = VersionId("m", 1, "a" * 64), VersionId("m", 2, "c" * 64)


def chosen(version: VersionId) -> Chosen:
    return Chosen(version.version, version.sha256)


def release(
    share: float,
    *,
    candidate: VersionId = CANDIDATE,
    against: VersionId = AGAINST,
    keys: int = 1,
    slow_s: float | None = None,
    median_s: float | None = None,
    hold_out: float = 0.0,
    is_watched: bool = False,
    began: int = 3,
    stage_began: int = 4,
    routing_key: str | None = None,
) -> Rollout:
    """In its only stage."""
    return Rollout(
        candidate=chosen(candidate),
        against=chosen(against),
        plan=Plan(),
        hold_out=hold_out,
        control=0.05,
        watch_s=3600.0,
        slow_factor=1.2,
        per_s=10.0,
        began=began,
        by="a test",
        stages=(BegunStage(Stage(share, keys, slow_s, median_s), stage_began, 0.0),),
        watched_since_s=0.0 if is_watched else None,
        routing_key=routing_key,
    )


class Together:
    """A `FirstSeen` in memory, of as many workers as use it."""

    def __init__(self) -> None:
        self.seen = SeenHere()
        self.is_down = False

    async def claim(self, name: str, marks: list[int], ours: bytearray) -> list[bool]:
        if self.is_down:
            raise StateUnavailable("it is down")
        return [self.seen.is_new(mark) for mark in marks]

    async def close(self) -> None: ...


@dataclass
class Worker:
    """Counts one stage; a request is told when it began and how it ended."""

    rollout: Rollout
    store: FirstSeen = field(default_factory=Together)
    metrics: Metrics = field(default_factory=Metrics)

    def __post_init__(self) -> None:
        [begun] = self.rollout.stages
        self.exposures = StageExposures(
            "m", self.rollout, begun, self.store, self.metrics, lambda: None
        )
        self._lots = Lots("canary", "m", self.rollout.candidate.sha256, str(self.rollout.began))

    def arm(self, key: str) -> bool:
        """Whether the candidate answers it."""
        return self._lots.draw(key)[0] < self.rollout.stages[-1].stage.share

    def begin(
        self, key: str, by: VersionId | None = None, began_s: float | None = None
    ) -> Exposure:
        """Led to where its key leads, or to `by`."""
        place, mark = self._lots.draw(key)
        is_candidates = place < self.rollout.stages[-1].stage.share
        right = CANDIDATE if is_candidates else AGAINST
        began_s = time.monotonic() if began_s is None else began_s
        return self.exposures.begin(
            "canary" if is_candidates else "champion",
            by or right,
            began_s,
            key,
            mark,
            is_candidates,
        )

    async def counted(self) -> ExposureTable:
        """Since it was asked the last time."""
        return await self._taken() + await self._taken()

    async def _taken(self) -> ExposureTable:
        await self.exposures.settle()
        return self.exposures.take() or ExposureTable()


def keys_of(worker: Worker, candidates: int, others: int) -> tuple[list[str], list[str]]:
    """So many keys of each arm."""
    keys = [f"key {n}" for n in range(100 * (candidates + others + 1))]
    mine = [key for key in keys if worker.arm(key)][:candidates]
    theirs = [key for key in keys if not worker.arm(key)][:others]
    return mine, theirs
