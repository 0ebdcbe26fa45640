"""The candidates of one model in this worker."""

from collections.abc import Callable, Collection, Mapping

from app.comparison.segments import SegmentReader
from app.comparison.table import ComparisonTable
from app.predictor import Answer, Asker
from app.release.state import Chosen, ShadowState
from app.served_model import Candidate, ServedModel
from app.shadow.block import Block, Said
from app.shadow.lane import Lane
from app.shadow.sampling import SamplingPolicy, policy_of
from app.shadow.trial import Records, Trial, TrialId


class Shadow:
    """An `Observer` that shows every candidate its share of what the champion answers.

    `feature_now_s` says feature time, seconds since 1970.
    """

    def __init__(self, records: Records, feature_now_s: Callable[[], float]) -> None:
        self._records = records
        self._feature_now_s = feature_now_s
        self._shown: dict[Chosen, _Shown] = {}
        self._lanes: list[Lane] = []
        self._ended: list[Trial] = []
        """Of candidates that are shown nothing any more; what they counted last is not told yet."""

    def offer(self, asker: Asker, answer: Answer) -> None:
        if asker.route != "champion":
            return
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
        self._shown[state.chosen] = _Shown(candidate, state, self._records, self._feature_now_s)
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
        records: Records,
        feature_now_s: Callable[[], float],
    ) -> None:
        self.state = state
        self._candidate = candidate
        self._records = records
        self._segments = SegmentReader(candidate.contract, candidate.decoder.required)
        self._trials: dict[TrialId, Trial] = {}
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

    def answered(self, block: Block, said: Said) -> None:
        self._trial(block.champion).count(block, said)

    def dropped(self, champion: ServedModel, reason: str, rows: int) -> None:
        self._trial(champion).drop(reason, rows)

    def _policy(self) -> SamplingPolicy | None:
        candidate = self._candidate
        return policy_of(candidate.contract.shadow, self.state.share, candidate.id.model)

    def _trial(self, champion: ServedModel) -> Trial:
        if self._latest is not None and self._latest[0] is champion:
            return self._latest[1]
        trial_id = TrialId.of(champion, self._candidate, self.state.began)
        trial = self._trials.get(trial_id)
        if trial is None:
            contract = self._candidate.contract
            trial = self._trials[trial_id] = Trial(
                trial_id, contract, self._segments, self._records
            )
        self._latest = champion, trial
        return trial
