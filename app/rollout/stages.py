"""The release state from one stage of a release to the next."""

import msgspec

from app.evidence.feasibility import Traffic, keys_of
from app.evidence.plan import Pace, Plan, Stage
from app.release.state import BegunStage, ReleaseState, Rollout, ShadowState


def started(state: ReleaseState, rollout: Rollout, share: float, now_s: float) -> ReleaseState:
    """The first stage: the candidate is shown this share of the requests. `rollout` is without
    stages; `now_s` are seconds since 1970, here and below."""
    generation = state.generation + 1
    first = BegunStage(Stage(rollout.plan.stages[0], 1, None), generation, now_s)
    others = tuple(each for each in state.shadows if each.chosen != rollout.candidate)
    return msgspec.structs.replace(
        state,
        generation=generation,
        shadows=(*others, ShadowState(rollout.candidate, share, generation)),
        rollout=msgspec.structs.replace(rollout, began=generation, stages=(first,)),
        quarantined=tuple(
            each for each in state.quarantined if each.chosen.sha256 != rollout.candidate.sha256
        ),
    )


def next_share(plan: Plan, share: float) -> float:
    """After the stage of this share; 1 is all of them."""
    return min((each for each in plan.stages if each > share), default=1.0)


def advanced(
    state: ReleaseState, share: float, pace: Pace | None, traffic: Traffic, now_s: float
) -> ReleaseState:
    """The candidate answers this share of the keys, below 1, in blocks that suit the traffic."""
    rollout = state.rollout
    assert rollout is not None
    generation = state.generation + 1
    stage = BegunStage(_stage(share, pace, traffic), generation, now_s)
    return msgspec.structs.replace(
        state,
        generation=generation,
        preparing=None,
        rollout=msgspec.structs.replace(rollout, stages=(*rollout.stages, stage)),
    )


def paused(state: ReleaseState, by: str, now_s: float) -> ReleaseState:
    """Nothing is promoted until it is resumed."""
    assert state.rollout is not None
    rollout = msgspec.structs.replace(state.rollout, paused=by, paused_since_s=now_s)
    return msgspec.structs.replace(state, generation=state.generation + 1, rollout=rollout)


def resumed(state: ReleaseState, now_s: float) -> ReleaseState:
    """The time of the pause is no time of the stage."""
    rollout = state.rollout
    assert rollout is not None
    *before, last = rollout.stages
    began_s = last.began_s + max(now_s - max(rollout.paused_since_s, last.began_s), 0.0)
    last = msgspec.structs.replace(last, began_s=began_s)
    rollout = msgspec.structs.replace(
        rollout, paused="", paused_since_s=0.0, stages=(*before, last)
    )
    return msgspec.structs.replace(state, generation=state.generation + 1, rollout=rollout)


def taken_over(
    state: ReleaseState, pace: Pace | None, traffic: Traffic, now_s: float
) -> ReleaseState:
    """The candidate is the champion; the one before stays ready, and answers the keys of the
    control while the new one is watched."""
    rollout = state.rollout
    assert rollout is not None
    generation = state.generation + 1
    share = 1 - rollout.control
    after = msgspec.structs.replace(
        state,
        generation=generation,
        champion=rollout.candidate,
        previous=rollout.against,
        preparing=None,
        shadows=tuple(each for each in state.shadows if each.chosen != rollout.candidate),
        rollout=None,
        decided=generation,
    )
    if share == 1 or not rollout.watch_s:
        return after
    stage = _stage(share, pace, traffic)
    watched = msgspec.structs.replace(
        rollout,
        stages=(*rollout.stages, BegunStage(stage, generation, now_s)),
        watched_since_s=now_s,
        paused="",
    )
    return msgspec.structs.replace(after, rollout=watched)


def watched_anew(state: ReleaseState, traffic: Traffic, now_s: float) -> ReleaseState:
    """The test of the watch begins again: what was counted is over."""
    rollout = state.rollout
    assert rollout is not None
    generation = state.generation + 1
    before = rollout.stages[-1].stage
    stage = msgspec.structs.replace(before, keys=keys_of(before.share, traffic))
    again = BegunStage(stage, generation, now_s)
    return msgspec.structs.replace(
        state,
        generation=generation,
        rollout=msgspec.structs.replace(rollout, stages=(*rollout.stages[:-1], again)),
    )


def ended(state: ReleaseState) -> ReleaseState:
    """Nobody watches any more; the version before stays ready."""
    return msgspec.structs.replace(state, generation=state.generation + 1, rollout=None)


def _stage(share: float, pace: Pace | None, traffic: Traffic) -> Stage:
    slow_s, median_s = (None, None) if pace is None else pace
    return Stage(share, keys_of(share, traffic), slow_s, median_s)
