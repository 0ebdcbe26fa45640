"""A candidate that answers some requests itself is still compared with the champion alone."""

from pathlib import Path

from app.labels.keeper import NoLabels
from app.predictor import Asker
from app.release.state import Chosen, ShadowState
from app.shadow.pair_log import NoPairLog
from app.shadow.shadow import Shadow
from app.shadow.trial import Records
from app.telemetry.metrics import Metrics
from tests.shadow.lanes import lane


async def test_candidates_are_shown_what_the_champion_answers_and_nothing_else(
    tmp_path: Path,
) -> None:
    async with lane(tmp_path) as setting:
        answer = await setting.ask({"a": 1, "b": 2}, {"a": 2, "b": 2})
        shadow = Shadow(Records(Metrics(), NoPairLog(), NoLabels()), lambda: 0.0)
        state = ShadowState(Chosen(1, "c"), 1.0, 1)
        shadow.show(setting.lane.candidate, state)
        for route in ("canary", "previous"):
            shadow.offer(Asker("0" * 32, route=route), answer)
        assert shadow.pending_rows == 0
        shadow.offer(Asker("0" * 32, route="champion"), answer)
        assert shadow.pending_rows == 2
        await shadow.hide(state.chosen)
