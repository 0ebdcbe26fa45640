"""Whose quality the metrics tell, of versions that predict side by side."""

import numpy as np
import pytest

from app.labels.bucket import Kept, Version
from app.labels.document import live_quality
from app.labels.form import LabelForm
from app.labels.quality import QualityTable, judged, version_name

FORM = LabelForm("binary", "p", (), ())
CHAMPION, CANARY = Version(1, "11" * 32), Version(2, "22" * 32)
SHOWN = Version(2, "22" * 32, 7)


def predicted(version: Version, rows: int, at_s: float) -> QualityTable:
    """So many, by it, when the canary's process was shown them too, and what came of them."""
    of = np.zeros(rows, FORM.row)
    of["numbers"], of["predicted_s"] = 0.5, at_s
    names = [row.to_bytes(2) for row in range(rows)]
    labels = np.arange(rows) % 2.0
    known, shown = np.ones(rows, np.bool_), np.ones(rows, np.bool_)
    said = np.full((rows, 1), 0.75)
    arrived_s = np.full(rows, at_s + 1)
    versions = {0: version, 1: SHOWN}
    return judged(
        FORM, [Kept(names, of, versions, labels, known, arrived_s, {1: said}, {1: shown})]
    )


SIDE_BY_SIDE = predicted(CHAMPION, 30, at_s=1) + predicted(CANARY, 10, at_s=2)


def test_the_champion_is_the_version_that_serves_whoever_predicted_last() -> None:
    champion = version_name(CHAMPION.number, CHAMPION.sha256)
    coverage, roles = live_quality(FORM, SIDE_BY_SIDE, champion)
    assert coverage == 1.0
    assert (roles["champion"].rows, roles["candidate"].rows) == (30, 30)
    assert roles["champion"].figures["brier"] == pytest.approx(0.25)
    assert roles["candidate"].figures["brier"] == pytest.approx((0.75**2 + 0.25**2) / 2)


def test_until_the_first_horizon_of_a_champion_it_is_the_version_that_predicted_last() -> None:
    _, roles = live_quality(FORM, SIDE_BY_SIDE, version_name(9, "99" * 32))
    assert roles["champion"].rows == 10
