"""A plan says beforehand what it needs, and that is what it takes."""

import math

import msgspec
import numpy as np
import pytest

from app.evidence.feasibility import LEAST_SECONDS_A_BLOCK, Traffic, keys_of, needs
from app.evidence.harms import Exposures, of_rates
from app.evidence.plan import Margins, Plan

PLAN = Plan(
    stages=(0.0, 0.5),
    margins=Margins(errors=0.02, slow=0.05, median=0.4),
    least_answers=1,
    least_s=0.0,
)
TRAFFIC = Traffic(per_s=10.0, rows=4.0, bad_share=0.01, slow_share=0.02)


def test_labels_have_to_come_before_a_candidate_goes_on() -> None:
    plan = Plan(stages=(0.0,), judges_labels=True)
    [at_once] = needs(plan, Traffic(100.0))
    [later] = needs(plan, Traffic(100.0, labels_after_s=86_400.0))
    assert (at_once.because_of, later.because_of) == ("loss", "loss")
    assert later.seconds == pytest.approx(at_once.seconds + 86_400)
    [of_few] = needs(plan, Traffic(100.0, shown=0.5, labelled=0.1))
    assert of_few.requests == pytest.approx(20 * at_once.requests)


def test_a_shadow_stage_is_through_after_what_was_said() -> None:
    need = needs(PLAN, TRAFFIC)[0]
    at = math.log(1 / PLAN.promotion_alpha)
    blocks = math.ceil(need.requests / TRAFFIC.rows)
    assert of_rates({(4, 0): blocks}, 0.02).no_worse >= at
    assert of_rates({(4, 0): blocks // 2}, 0.02).no_worse < at
    assert need.seconds == need.requests / 10.0
    assert need.because_of == "errors"


def test_a_stage_of_exposures_is_through_after_what_was_said() -> None:
    """95 of 100 times; more often, as E may reach it earlier and with another bet."""
    need = needs(PLAN, TRAFFIC)[1]
    exposures = Exposures(need.keys, 0.5)
    blocks = math.ceil(need.requests / need.keys)
    rng = np.random.default_rng(8)
    passed = {blocks: 0, blocks // 4: 0}
    bad = rng.multinomial(need.keys, [0.005, 0.005, 0.99], size=(200, blocks))[:, :, :2]
    for rollout in bad:
        for some in passed:
            kinds, counts = np.unique(rollout[:some], axis=0, return_counts=True)
            of = {(int(a), int(b)): int(n) for (a, b), n in zip(kinds, counts, strict=True)}
            at = math.log(1 / PLAN.promotion_alpha)
            passed[some] += exposures.evidence(of, 0.02).no_worse >= at
    assert passed[blocks] >= 186
    assert passed[blocks // 4] < 100


def test_a_champion_without_a_bad_answer_is_provided_for() -> None:
    clean = msgspec.structs.replace(TRAFFIC, bad_share=0.0)
    some = needs(PLAN, TRAFFIC)[1]
    assert 0 < needs(PLAN, clean)[1].requests < some.requests


@pytest.mark.parametrize("per_s", [0.0, 1.0])
def test_a_margin_below_what_is_counted_can_never_be_shown(per_s: float) -> None:
    tiny = msgspec.structs.replace(PLAN, kind="equivalent", margins=Margins(shift=0.0004))
    need = needs(tiny, Traffic(per_s))[0]
    assert need.requests == math.inf
    assert need.seconds == math.inf
    assert need.because_of == "shift"


def test_without_traffic_nothing_is_ever_through() -> None:
    assert [need.seconds for need in needs(PLAN, Traffic(0.0))] == [math.inf, math.inf]


def test_the_least_answers_and_the_least_time_are_waited_for() -> None:
    answers = msgspec.structs.replace(PLAN, least_answers=10_000_000)
    assert [need.requests for need in needs(answers, TRAFFIC)] == [1e7, 2e7]
    lasts = msgspec.structs.replace(PLAN, least_s=1e6)
    assert [need.seconds for need in needs(lasts, TRAFFIC)] == [1e6, 1e6]
    assert {need.because_of for need in needs(lasts, TRAFFIC)} == {"least_s"}


def test_a_block_lasts_as_long_as_what_fails_together() -> None:
    assert keys_of(0.0, Traffic(4_000.0)) == 1
    assert keys_of(0.1, Traffic(4.0)) == 20
    assert keys_of(0.5, Traffic(4.0)) == 8
    assert keys_of(0.1, Traffic(4_000.0)) == 4_000 * LEAST_SECONDS_A_BLOCK
    assert keys_of(0.1, Traffic(4_000.0, workers=4)) == 1_000 * LEAST_SECONDS_A_BLOCK


def test_larger_blocks_need_more_exposures() -> None:
    requests = [needs(PLAN, Traffic(per_s))[1].requests for per_s in (10.0, 400.0, 4_000.0)]
    assert requests == sorted(requests)
