"""Roll back, promote or hold, and why."""

import random

import msgspec
import pytest

from app.evidence.counts import Arm, Counts, PairedCounts, StageCounts
from app.evidence.plan import Margins, Plan, Stage
from app.evidence.verdict import Reading, Verdict, guardrails, judge

PLAN = Plan(
    stages=(0.0, 0.5),
    margins=Margins(errors=0.01, slow=0.05, median=0.1),
    least_answers=1_000,
    least_s=60.0,
    most_s=3_600.0,
)
EQUIVALENT = msgspec.structs.replace(PLAN, kind="equivalent")
LABELLED = msgspec.structs.replace(PLAN, judges_labels=True)
SEGMENTED = msgspec.structs.replace(PLAN, segments=("carrier=AA", "carrier=UA"))

SHOWN = PairedCounts(rows=32_000, errors=((32, 0, 1_000),), not_finite=((32, 0, 1_000),))
SAME = msgspec.structs.replace(SHOWN, flips=((32, 0, 1_000),), shift=((0, 1, 1_000),))
GOOD_LOSS = ((-20, -19, 1_000, 2_000),)
HALF = Stage(share=0.5, keys=8, slow_s=0.1, median_s=0.05)
SHADOW = StageCounts(Stage(share=0.0, keys=1, slow_s=None), seconds=600.0)
ARM = Arm(assigned=20_000, resolved=20_000)
EXPOSED = StageCounts(
    HALF,
    candidate=ARM,
    champion=ARM,
    errors=((0, 0, 5_000),),
    slow=((0, 0, 5_000),),
    median=((2, 2, 5_000),),
    seconds=600.0,
)


def shadow(paired: PairedCounts = SHOWN, **counts: object) -> Counts:
    return Counts({"": paired}, (msgspec.structs.replace(SHADOW, **counts),))


def exposed(paired: PairedCounts = SHOWN, **counts: object) -> Counts:
    return Counts({"": paired}, (SHADOW, msgspec.structs.replace(EXPOSED, **counts)))


def reading(
    verdict: Verdict, guardrail: str, segment: str = "", stage: int | None = None
) -> Reading:
    [found] = [
        each
        for each in verdict.readings
        if (each.guardrail, each.segment, each.stage) == (guardrail, segment, stage)
    ]
    return found


def only_reason(verdict: Verdict, action: str) -> str:
    assert verdict.action == action, verdict.reasons
    [reason] = verdict.reasons
    return reason


def test_a_stage_is_promoted_when_every_guardrail_is_within_its_margin() -> None:
    assert "every guardrail" in only_reason(judge(PLAN, shadow()), "promote")
    assert "50%" in only_reason(judge(PLAN, exposed()), "promote")


def test_silence_holds_until_the_time_is_up() -> None:
    nothing = Counts({}, (SHADOW,))
    verdict = judge(PLAN, nothing)
    assert verdict.action == "hold"
    assert "0 answers" in verdict.reasons[0]
    late = Counts({}, (msgspec.structs.replace(SHADOW, seconds=3_600.0),))
    verdict = judge(PLAN, late)
    assert verdict.action == "rollback"
    assert "3,600 s" in verdict.reasons[0]
    holds = judge(msgspec.structs.replace(PLAN, at_the_end="hold"), late)
    assert holds.action == "hold"
    assert "3,600 s" in holds.reasons[0]


def test_a_stage_that_can_be_promoted_when_the_time_is_up_is_promoted() -> None:
    assert judge(PLAN, shadow(seconds=9_999.0)).action == "promote"


def test_a_stage_has_a_least_number_of_answers_and_a_least_time() -> None:
    few = msgspec.structs.replace(SHOWN, rows=999)
    assert "999 answers" in only_reason(judge(PLAN, shadow(few)), "hold")
    assert "59 s of 60 s" in only_reason(judge(PLAN, shadow(seconds=59.0)), "hold")
    # Once it answers, these are its own answers, not what it is shown.
    arm = Arm(assigned=999, resolved=999)
    few_answered = exposed(candidate=arm, champion=arm)
    assert "999 answers" in only_reason(judge(PLAN, few_answered), "hold")


@pytest.mark.parametrize("guardrail", ["errors", "slow", "median"])
def test_exposures_that_are_worse_have_a_candidate_rolled_back(guardrail: str) -> None:
    worse = exposed(**{guardrail: ((2, 0, 400), (0, 0, 400))})
    reason = only_reason(judge(PLAN, worse), "rollback")
    assert reason.startswith(f"{guardrail} of exposures in stage 1")


@pytest.mark.parametrize("guardrail", ["errors", "slow", "median"])
def test_exposures_that_are_not_shown_to_be_no_worse_hold(guardrail: str) -> None:
    reason = only_reason(judge(PLAN, exposed(**{guardrail: ()})), "hold")
    assert reason.startswith(f"{guardrail} of exposures in stage 1: not yet shown")


def test_nothing_is_slow_where_it_is_not_known_what_is() -> None:
    stage = Stage(share=0.5, keys=8, slow_s=None)
    assert judge(PLAN, exposed(stage=stage, slow=(), median=())).action == "promote"


def test_errors_of_a_candidate_that_is_shown_requests_have_it_rolled_back() -> None:
    paired = msgspec.structs.replace(SHOWN, errors=((32, 4, 200), (32, 0, 200)))
    assert only_reason(judge(PLAN, shadow(paired)), "rollback").startswith("errors: more than")


def test_one_answer_that_is_no_number_is_too_much_without_a_margin() -> None:
    paired = msgspec.structs.replace(SHOWN, not_finite=((32, 1, 1), (32, 0, 999)))
    assert only_reason(judge(PLAN, shadow(paired)), "rollback").startswith("1 answers")
    allowed = msgspec.structs.replace(PLAN, margins=Margins(errors=0.01, not_finite=0.01))
    assert judge(allowed, shadow(paired)).action == "promote"


def test_what_forbids_the_candidate_at_once_has_it_rolled_back_in_its_words() -> None:
    counts = msgspec.structs.replace(shadow(), trips=("3 restarts in 60 s",))
    assert only_reason(judge(PLAN, counts), "rollback") == "3 restarts in 60 s"


def test_what_forbids_a_promotion_holds_in_its_words() -> None:
    counts = msgspec.structs.replace(shadow(), blocked=("paused by anna",))
    assert only_reason(judge(PLAN, counts), "hold") == "paused by anna"


def test_a_rollback_does_not_wait_for_anything() -> None:
    paired = msgspec.structs.replace(SHOWN, rows=64, errors=((32, 32, 20),))
    counts = msgspec.structs.replace(
        shadow(paired, seconds=0.5), blocked=("paused by anna",), trips=()
    )
    assert judge(PLAN, counts).action == "rollback"


@pytest.mark.parametrize(
    ("harm", "name"),
    [
        ({"flips": ((32, 3, 1_000),)}, "flips"),
        ({"shift": ((200, 201, 1_000),)}, "shift up"),
        ({"shift": ((-201, -200, 1_000),)}, "shift down"),
    ],
)
def test_another_answer_is_harm_of_an_equivalent_version_and_shown_of_a_retrained_one(
    harm: dict[str, object], name: str
) -> None:
    paired = msgspec.structs.replace(SAME, **harm)
    assert only_reason(judge(EQUIVALENT, shadow(paired)), "rollback").startswith(name)
    retrained = judge(PLAN, shadow(paired))
    assert retrained.action == "promote"
    shown = reading(retrained, name)
    assert shown.worse > shown.rolls_back_at
    assert not shown.decides


def test_an_equivalent_version_is_to_be_shown_to_say_the_same() -> None:
    assert judge(EQUIVALENT, shadow(SAME)).action == "promote"
    verdict = judge(EQUIVALENT, shadow(SHOWN))
    assert verdict.action == "hold"
    assert [reason.split(":")[0] for reason in verdict.reasons] == [
        "flips",
        "shift up",
        "shift down",
    ]


def test_labels_decide_when_they_are_there() -> None:
    assert only_reason(judge(LABELLED, shadow()), "hold").startswith("loss: not yet shown")
    good = msgspec.structs.replace(SHOWN, loss=GOOD_LOSS, labels_due=64_000)
    assert judge(LABELLED, shadow(good)).action == "promote"
    bad = msgspec.structs.replace(SHOWN, loss=((400, 401, 1_000, 2_000),), labels_due=64_000)
    assert only_reason(judge(LABELLED, shadow(bad)), "rollback").startswith("loss: more than")


@pytest.mark.parametrize(("missing", "action"), [(640, "promote"), (641, "hold")])
def test_more_than_a_hundredth_of_the_labels_missing_holds(missing: int, action: str) -> None:
    paired = msgspec.structs.replace(
        SHOWN, loss=GOOD_LOSS, labels_due=64_000, labels_missing=missing
    )
    verdict = judge(LABELLED, shadow(paired))
    assert verdict.action == action
    if action == "hold":
        assert only_reason(verdict, "hold") == "641 of 64,000 labels are missing"


@pytest.mark.parametrize("arm", ["candidate", "champion"])
def test_more_than_a_hundredth_of_the_exposures_lost_holds(arm: str) -> None:
    lost = Arm(assigned=20_000, resolved=19_799, lost=201)
    assert "201 of 20,000" in only_reason(judge(PLAN, exposed(**{arm: lost})), "hold")
    assert judge(PLAN, exposed(**{arm: Arm(20_000, 19_800, 200)})).action == "promote"


def test_an_answer_by_another_route_than_its_key_says_holds() -> None:
    assert "another route" in only_reason(judge(PLAN, exposed(misrouted=1)), "hold")


def test_exposures_that_are_shared_out_otherwise_than_asked_for_hold() -> None:
    more = Arm(assigned=21_500, resolved=21_500)
    assert "not 50%" in only_reason(judge(PLAN, exposed(candidate=more)), "hold")
    by_chance = Arm(assigned=20_200, resolved=20_200)
    assert judge(PLAN, exposed(candidate=by_chance)).action == "promote"


def test_suspicion_of_another_stage_or_segment_holds() -> None:
    # Enough to doubt the candidate, too little to roll it back.
    doubtful = msgspec.structs.replace(EXPOSED, errors=((1, 0, 45),))
    plan = msgspec.structs.replace(PLAN, stages=(0.0, 0.5, 0.6))
    counts = Counts({"": SHOWN}, (SHADOW, doubtful, EXPOSED))
    reason = only_reason(judge(plan, counts), "hold")
    assert reason.startswith("errors of exposures in stage 1: under suspicion")

    segment = PairedCounts(rows=64, errors=((8, 1, 1), (8, 8, 1)))
    counts = Counts({"": SHOWN, "carrier=AA": segment}, (SHADOW,))
    reason = only_reason(judge(SEGMENTED, counts), "hold")
    assert reason.startswith("errors in carrier=AA: under suspicion")


def test_harm_in_a_segment_has_a_candidate_rolled_back() -> None:
    segment = PairedCounts(rows=640, errors=((8, 8, 80),))
    counts = Counts({"": SHOWN, "carrier=UA": segment}, (SHADOW,))
    assert only_reason(judge(SEGMENTED, counts), "rollback").startswith("errors in carrier=UA")


def test_harm_that_only_large_executions_have_is_not_averaged_away() -> None:
    # 0.5 % of the executions, and 14 % of the rows.
    paired = msgspec.structs.replace(SHOWN, errors=((1, 0, 9_950), (32, 32, 50)))
    verdict = judge(PLAN, shadow(paired))
    assert reading(verdict, "errors").no_worse > reading(verdict, "errors").promotes_at
    assert (
        only_reason(verdict, "hold") == "errors: 1,600 of 11,550 rows, a larger share than 1.000%"
    )


def test_the_guardrails_share_the_probability_of_a_false_rollback() -> None:
    assert guardrails(PLAN) == (4, 0)
    assert guardrails(Plan()) == (7, 0)
    assert guardrails(EQUIVALENT) == (7, 0)
    assert guardrails(msgspec.structs.replace(LABELLED, segments=("a", "b"))) == (5, 4)
    of_all = judge(PLAN, shadow())
    assert reading(of_all, "errors").rolls_back_at == pytest.approx(3 + 0.6021, abs=1e-4)
    split = judge(SEGMENTED, shadow())
    assert reading(split, "errors").rolls_back_at == pytest.approx(3 + 0.9031, abs=1e-4)
    segment = reading(split, "errors", "carrier=AA")
    assert segment.rolls_back_at == pytest.approx(3 + 0.6021, abs=1e-4)
    assert segment.promotes_at == pytest.approx(1.3010, abs=1e-4)


def test_a_version_that_is_watched_after_a_plan_without_shares_has_its_guardrails_counted() -> None:
    plan = msgspec.structs.replace(PLAN, stages=(0.0,))
    watched = msgspec.structs.replace(EXPOSED, stage=Stage(share=0.95, keys=40, slow_s=0.1))
    verdict = judge(plan, Counts({}, (watched,)))
    assert reading(verdict, "slow", stage=0).rolls_back_at == pytest.approx(3 + 0.6021, abs=1e-4)


def test_a_verdict_is_the_same_in_whatever_order_and_parts_the_counts_came() -> None:
    errors = [(n, min(n // 7, 1), 1 + n) for n in range(1, 33)]
    split = [(n, harmed, part) for n, harmed, count in errors for part in (1, count - 1) if part]
    whole = judge(PLAN, shadow(msgspec.structs.replace(SHOWN, errors=errors)))
    for seed in range(5):
        random.Random(seed).shuffle(split)
        assert judge(PLAN, shadow(msgspec.structs.replace(SHOWN, errors=split))) == whole


def test_a_verdict_survives_the_log() -> None:
    counts = exposed(errors=((1, 0, 30), (0, 0, 4_000)))
    logged = msgspec.json.decode(msgspec.json.encode(counts), type=Counts)
    assert judge(PLAN, logged) == judge(PLAN, counts)
