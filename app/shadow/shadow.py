"""The candidates of one model in this worker."""

from collections.abc import Callable, Collection, Mapping
from functools import partial

from app.comparison.pairs import FloatArray, Pairs
from app.comparison.table import ComparisonTable
from app.predictor import Answer, Asker
from app.release.state import Chosen, ShadowState
from app.served_model import Candidate, ServedModel, VersionId
from app.shadow.block import Block
from app.shadow.lane import Lane
from app.shadow.pair_log import PairLog, Rows
from app.shadow.sampling import SamplingPolicy, policy_of
from app.shadow.trial import Trial, TrialId
from app.telemetry.metrics import Metrics


class Shadow:
    """An `Observer` that shows every candidate its share of what the champion answers.

    `feature_now_s` says feature time, seconds since 1970.
    """

    def __init__(
        self, metrics: Metrics, feature_now_s: Callable[[], float], pair_log: PairLog
    ) -> None:
        self._metrics = metrics
        self._pair_log = pair_log
        self._feature_now_s = feature_now_s
        self._shown: dict[Chosen, _Shown] = {}
        self._lanes: list[Lane] = []
        self._ended: list[Trial] = []
        """Of candidates that are shown nothing any more; what they counted last is not told yet."""

    def offer(self, asker: Asker, answer: Answer) -> None:
        for lane in self._lanes:
            lane.offer(asker, answer)

    @property
    def candidates(self) -> Mapping[Chosen, ShadowState]:
        """Those that are shown requests, and as what."""
        return {chosen: shown.state for chosen, shown in self._shown.items()}

    @property
    def pending_rows(self) -> int:
        """Rows that wait for a candidate."""
        return sum(lane.pending_rows for lane in self._lanes)

    def show(self, candidate: Candidate, state: ShadowState) -> None:
        """From now on. Raises `InvalidModel` for segments that no instance has."""
        self._shown[state.chosen] = _Shown(
            candidate, state, self._metrics, self._feature_now_s, self._pair_log
        )
        self._lanes = [shown.lane for shown in self._shown.values()]

    def change(self, state: ShadowState) -> None:
        """Of a candidate that is shown requests: another share of them, or another trial."""
        shown = self._shown[state.chosen]
        if state.began != shown.state.began:
            self._ended += shown.end()
        shown.follow(state)

    async def hide(self, chosen: Chosen) -> None:
        """It is shown nothing more, and executes nothing when this returns."""
        shown = self._shown.pop(chosen)
        self._lanes = [shown.lane for shown in self._shown.values()]
        await shown.lane.close()
        self._ended += shown.end()

    def take(self) -> Mapping[TrialId, ComparisonTable]:
        """What was counted since it was taken the last time, of what has ended meanwhile too."""
        trials, self._ended = self._ended, []
        for shown in self._shown.values():
            trials += shown.trials
        taken = {trial.id: trial.take() for trial in trials}
        return {trial: table for trial, table in taken.items() if table is not None}


class _Shown:
    """A candidate that is shown requests: what comes of them is counted by champion."""

    def __init__(
        self,
        candidate: Candidate,
        state: ShadowState,
        metrics: Metrics,
        feature_now_s: Callable[[], float],
        pair_log: PairLog,
    ) -> None:
        self.state = state
        self._pair_log = pair_log
        self._candidate = candidate
        self._metrics = metrics
        self._trials: dict[VersionId, Trial] = {}
        self._latest: tuple[ServedModel, Trial] | None = None
        self.lane = Lane(candidate, self._policy(), self, feature_now_s)

    @property
    def trials(self) -> Collection[Trial]:
        return self._trials.values()

    def follow(self, state: ShadowState) -> None:
        self.state = state
        self.lane.policy = self._policy()

    def end(self) -> list[Trial]:
        """What is counted from now on is of other trials."""
        trials = list(self._trials.values())
        self._trials.clear()
        self._latest = None
        return trials

    def pairs(self, block: Block, pairs: Pairs, numbers: FloatArray, took_s: float) -> None:
        trial = self._trial(block.champion)
        trial.count(pairs, took_s)
        self._pair_log.note(pairs, partial(_rows, trial, block))

    def dropped(self, champion: ServedModel, reason: str, rows: int) -> None:
        self._trial(champion).drop(reason, rows)

    def _policy(self) -> SamplingPolicy:
        candidate = self._candidate
        return policy_of(candidate.contract.shadow, self.state.share, candidate.id.model)

    def _trial(self, champion: ServedModel) -> Trial:
        if self._latest is not None and self._latest[0] is champion:
            return self._latest[1]
        trial = self._trials.get(champion.id)
        if trial is None:
            trial_id = TrialId.of(champion, self._candidate, self.state.began)
            contract = self._candidate.contract
            trial = Trial(trial_id, contract, self.lane.segment_names, self._metrics)
            self._trials[champion.id] = trial
        self._latest = champion, trial
        return trial


def _rows(trial: Trial, block: Block) -> Rows:
    ids = [o.asker.request_id for o in block.offered for _ in range(o.start, o.stop)]
    instances = [instance for o in block.offered for instance in range(o.start, o.stop)]
    return Rows(
        trial.id.candidate.model, str(trial.id), ids, instances, trial.names, trial.decisions
    )
