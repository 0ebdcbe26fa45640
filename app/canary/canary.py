"""Which version of one model answers a request, in this worker."""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal, NamedTuple, TypeAlias

from app.canary.exposures import Exposure, Outside, StageExposures, lots_of
from app.canary.first_seen import FirstSeen
from app.canary.table import ExposureTable
from app.errors import InvalidInput, ModelNotReady
from app.instances import Instances
from app.predictor import Asker
from app.release.state import Chosen, Rollout, StateUnavailable
from app.routing_key import Lots, agree, key_of
from app.served_model import ServedModel
from app.telemetry.metrics import Metrics
from app.telemetry.recorder import Role

Override: TypeAlias = Literal["champion", "canary"]
"""What an operator asks for, whatever the key says."""

OVERRIDE = "Hikyaku-Route"


class Routed(NamedTuple):
    """Where a request goes."""

    model: ServedModel
    route: Role
    exposure: Exposure | None
    """Is to be told how it ends; None where nobody asks."""


class Canary:
    """Routes the requests of one model by its release, and counts how they end.

    In a stage the place of a request's key is below the share, and the candidate answers, or it is
    not, and the version that it is released against does. While the candidate is watched it is the
    champion, and the other one the previous. Where a version is not open here the champion answers.
    """

    def __init__(
        self, model: str, first_seen: FirstSeen, metrics: Metrics, tell: Callable[[], None]
    ) -> None:
        """`tell` is called when there is something to `claim`."""
        self._tell = tell
        self._model = model
        self._first_seen = first_seen
        self._metrics = metrics
        self._rollout: Rollout | None = None
        self._exposures: StageExposures | None = None
        self._ended: list[StageExposures] = []
        """Of stages that are over; the last requests of them may not have ended yet."""
        self._candidate: ServedModel | None = None
        self._against: ServedModel | None = None
        self._routing_key: str | None = None
        self._lots = Lots()
        self._held_lots = Lots("hold-out", model)
        self._share = self._hold_out = 0.0
        self._is_watched = False

    @property
    def is_idle(self) -> bool:
        """No release is under way: the champion answers all."""
        return self._exposures is None

    def follow(
        self,
        rollout: Rollout | None,
        candidate: ServedModel | None,
        against: ServedModel | None,
    ) -> None:
        """Requests that begin from now on are routed by this release; by none where it is None.
        `candidate` and `against` are None while they are not open here."""
        self._rollout, self._candidate, self._against = rollout, candidate, against
        stage = None if rollout is None else rollout.stages[-1]
        before = self._exposures
        if before is not None and (stage is None or stage.began != before.began):
            before.end()
            self._ended.append(before)
            self._exposures = None
        share = self._metrics.canary_share.labels(self._model)
        if rollout is None or stage is None:
            share.forget()
            return
        if self._exposures is None:
            self._exposures = StageExposures(
                self._model, rollout, stage, self._first_seen, self._metrics, self._tell
            )
        share.set(stage.stage.share)
        self._share, self._hold_out = stage.stage.share, rollout.hold_out
        self._is_watched = rollout.is_watched
        self._lots = lots_of(self._model, rollout)
        opened = [model for model in (candidate, against) if model is not None]
        for model in opened:
            longest_s = model.contract.limits.max_timeout_ms / 1000
            self._exposures.longest_s = max(self._exposures.longest_s, longest_s)
        self._routing_key = rollout.routing_key
        if candidate is not None and not rollout.is_watched:
            candidate.recorder.answers_as("canary")
        if against is not None and rollout.is_watched:
            against.recorder.answers_as("previous")

    def route(
        self,
        asker: Asker,
        instances: Instances,
        champion: ServedModel,
        override: Override | None,
        began_s: float,
    ) -> Routed:
        """Where a request goes that began at this monotonic instant; `instances` as the champion
        reads them.

        Raises `InvalidInput` where an override asks for a candidate that answers nobody,
        `ModelNotReady` for one that is not open here.
        """
        exposures = self._exposures
        if exposures is None or self._share == 0:
            if override == "canary":
                raise no_canary()
            if exposures is None:
                return Routed(champion, "champion", None)
            # Nobody is exposed, but how long answers take is what later stages are held against.
            return Routed(champion, "champion", exposures.pass_by("champion", champion.id, began_s))
        if override is not None:
            return self._overridden(exposures, champion, override, began_s)
        key = key_of(asker.routing_key, self._routing_key, instances)
        drawn = asker.request_id if key is None else key
        place, mark = self._lots.draw(drawn)
        is_candidates = place < self._share
        outside: Outside | None = None
        if self._hold_out and self._held_lots.draw(drawn)[0] < self._hold_out:
            is_candidates, outside = False, "hold_out"
        elif self._candidate is None or self._against is None:
            # Of both alike: the other one's answers alone would be no fair part.
            outside = "not_open"
        elif not asker.routing_key and not agree(self._routing_key, instances):
            outside = "disagree"
        model, route = self._way(champion, is_candidates)
        if outside is not None:
            return Routed(model, route, exposures.pass_by(route, model.id, began_s, outside))
        seen_by = None if key is None else mark
        return Routed(
            model,
            route,
            exposures.begin(route, model.id, began_s, drawn, seen_by, is_candidates),
        )

    def _way(self, champion: ServedModel, is_candidates: bool) -> tuple[ServedModel, Role]:
        """Of an arm: who answers it, and as what."""
        if is_candidates is self._is_watched:  # the champion's own
            return champion, "champion"
        other = self._candidate if is_candidates else self._against
        if other is None:  # it is not open here
            return champion, "champion"
        return other, "canary" if is_candidates else "previous"

    def _overridden(
        self,
        exposures: StageExposures,
        champion: ServedModel,
        override: Override,
        began_s: float,
    ) -> Routed:
        model, route = self._way(champion, self._is_watched)
        if override == "canary":
            if self._is_watched:
                raise no_canary()
            if self._candidate is None:
                raise ModelNotReady("the candidate is not open in this worker yet")
            model, route = self._candidate, "canary"
        return Routed(model, route, exposures.pass_by(route, model.id, began_s, "override"))

    def _all(self) -> Sequence[StageExposures]:
        """Of the stage that goes on, and of those that are over."""
        return (*self._ended, *([] if self._exposures is None else [self._exposures]))

    @property
    def stages(self) -> Collection[int]:
        """In which generations those of the release under way began."""
        return [] if self._rollout is None else [stage.began for stage in self._rollout.stages]

    async def claim(self) -> None:
        """Find out whose keys were seen elsewhere. To be called soon after there is something."""
        for exposures in self._all():
            await exposures.claim()

    async def settle(self, is_last: bool = False) -> None:
        """Count what can be counted now. To be called every second, and when the worker ends."""
        for exposures in self._all():
            await exposures.settle(is_last)
            if exposures.is_over:
                with suppress(StateUnavailable):  # it will be forgotten all the same
                    await self._first_seen.forget(exposures.name)

    def take(self) -> Mapping[str, ExposureTable]:
        """What was counted since it was taken the last time, by the name of the table."""
        taken = {exposures.name: exposures.take() for exposures in self._all()}
        self._ended = [exposures for exposures in self._ended if not exposures.is_over]
        return {name: table for name, table in taken.items() if table is not None}

    def report(self) -> dict[str, Any] | None:
        """How this worker routes, as JSON, and what it has counted in this stage; None while no
        release is under way."""
        rollout, exposures = self._rollout, self._exposures
        if rollout is None or exposures is None:
            return None
        return {
            "share": self._share,
            "hold_out": self._hold_out,
            "is_watched": rollout.is_watched,
            "candidate": _shown(rollout.candidate, self._candidate),
            "against": _shown(rollout.against, self._against),
            "counted": exposures.counted.as_json(),
        }


def no_canary() -> InvalidInput:
    """The refusal of a request that asks for what there is not."""
    return InvalidInput(f"{OVERRIDE}: no candidate answers requests now", field=OVERRIDE)


def _shown(chosen: Chosen, model: ServedModel | None) -> dict[str, Any]:
    return {"version": str(chosen.version), "is_open": model is not None}
