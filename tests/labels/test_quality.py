"""What was judged by labels is what an offline look at the same rows says."""

import json
import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score

from app.clock import ReplayClock
from app.errors import InvalidInput
from app.labels.auc import MOST_SCORES, ScoreCounts
from app.labels.feedback import Outcome
from app.served_model import ServedModel
from tests.labels.label_workers import CANDIDATE, HOUR_S, Worker, advance, clock, tiny_model

EXACT = 1e-9


class Flights:
    """Rows whose truth depends on `a`, and comes the later the more it is so."""

    def __init__(self, rows: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.a = np.round(rng.normal(size=rows), 2)
        self.b = (np.arange(rows) % 3 == 0).astype(float)
        self.instances = [{"a": a, "b": b} for a, b in zip(self.a, self.b, strict=True)]
        self.scores = 1 / (1 + np.exp(self.b - self.a))
        """What was answered, once it was."""
        self.candidate = np.clip(self.scores + rng.normal(scale=0.1, size=rows), 0.01, 0.99)
        self.late = rng.random(rows) < self.scores
        self.delay_s = np.where(self.late, 1.5, 0.5) * HOUR_S * rng.random(rows)
        self.fate = rng.choice(["told", "void", "missing"], rows, p=[0.8, 0.1, 0.1])


@pytest.fixture
async def model(tmp_path: Path) -> AsyncIterator[ServedModel]:
    async with tiny_model(tmp_path, segments={"b": {"edges": [0.5]}}) as model:
        yield model


async def play(workers: list[Worker], flights: Flights, time: ReplayClock, seed: int) -> None:
    """Predictions by either worker, five at a time; labels shuffled, and told twice in part, at the
    worker that is not the one that predicted, until all horizons have passed."""
    rng = np.random.default_rng(seed)
    began_s = time.now_s()
    due: list[tuple[float, str, int, bool | None]] = []
    for number, start in enumerate(range(0, len(flights.a), 5)):
        worker = workers[number % len(workers)]
        rows = range(start, min(start + 5, len(flights.a)))
        request = await worker.predict(*(flights.instances[row] for row in rows))
        flights.scores[list(rows)] = worker.answered[request]
        worker.compare(request, flights.candidate[list(rows)])
        for at, row in enumerate(rows):
            label = None if flights.fate[row] == "void" else bool(flights.late[row])
            if flights.fate[row] != "missing":
                due.append((time.now_s() + flights.delay_s[row], request, at, label))
        advance(time, 10)
    for worker in workers:
        await worker.writer.write()
    while due:
        until_s = time.now_s() + 0.2 * HOUR_S
        some = [each for each in due if each[0] <= until_s]
        due = [each for each in due if each[0] > until_s]
        rng.shuffle(some)  # type: ignore[arg-type]  # a list is shuffled in place
        told = [(request, at, label) for _, request, at, label in some]
        for worker in workers:
            outcomes = await worker.tell_all(told[: len(told) if worker is workers[0] else 20])
            assert set(outcomes) <= {Outcome.ACCEPTED, Outcome.DUPLICATE}
        advance(time, until_s - time.now_s())
        await workers[-1].mature()
    advance(time, 3 * HOUR_S)
    await workers[0].mature()
    assert time.now_s() > began_s


async def test_shuffled_delayed_labels_give_the_figures_of_the_same_rows_offline(
    url: str, model: ServedModel
) -> None:
    time = clock()
    workers = [Worker(url, model, time) for _ in range(2)]
    flights = Flights(1_500, 1)
    await play(workers, flights, time, 1)
    document = await workers[0].quality()
    for worker in workers:
        worker.close()
    json.dumps(document, allow_nan=False)
    [version] = document["versions"]
    assert version["due"] == 1_500
    assert version["void"] == (flights.fate == "void").sum()
    assert version["missing"] == (flights.fate == "missing").sum()
    judged = flights.fate == "told"
    assert_same(version, flights.scores[judged], flights.late[judged])
    for b, segment in enumerate(version["segments"][:2]):
        of_it = judged & (flights.b == b)
        assert segment["rows"] == of_it.sum()
        assert segment["losses"]["brier"]["value"] == pytest.approx(
            brier_score_loss(flights.late[of_it], flights.scores[of_it]), abs=EXACT
        )
    [pair] = document["pairs"]
    assert pair["candidate_version"]["sha256"] == CANDIDATE.sha256
    assert pair["shown"] == 1_500
    assert_same(pair["champion"], flights.scores[judged], flights.late[judged])
    assert_same(pair["candidate"], flights.candidate[judged], flights.late[judged])
    for name, loss in (("brier", brier_score_loss), ("log_loss", log_loss)):
        truth = flights.late[judged]
        difference = loss(truth, flights.candidate[judged]) - loss(truth, flights.scores[judged])
        told = pair["difference"][name]
        assert told["value"] == pytest.approx(difference, abs=EXACT)
        assert told["low"] < told["value"] < told["high"]
    blocks = pair["blocks"]["counts"]
    assert sum(buckets for *_, buckets in blocks) == pair["clusters"]
    assert all(-most <= low <= high <= most for low, high, most, _ in blocks)


def assert_same(
    told: dict[str, Any], scores: NDArray[np.float64], truth: NDArray[np.bool_]
) -> None:
    assert told["auc"]["value"] == pytest.approx(roc_auc_score(truth, scores), abs=EXACT)
    assert told["losses"]["log_loss"]["value"] == pytest.approx(log_loss(truth, scores), abs=EXACT)
    assert told["losses"]["brier"]["value"] == pytest.approx(
        brier_score_loss(truth, scores), abs=EXACT
    )


async def test_what_labels_say_as_they_arrive_is_told_beside_what_they_say_at_the_horizon(
    url: str, model: ServedModel
) -> None:
    time = clock()
    worker = Worker(url, model, time)
    flights = Flights(1_000, 2)
    flights.fate[:] = "told"
    await play([worker], flights, time, 2)
    [version] = (await worker.quality())["versions"]
    worker.close()
    told = version["as_labels_arrive"]
    assert told["at_horizon"]["label_rate"] == pytest.approx(flights.late.mean(), abs=EXACT)
    rates = {each["within_s"]: each["label_rate"] for each in told["within"]}
    within = told["within"]
    # The late ones are told late: of those that came soon fewer are.
    assert rates[1_800] < flights.late.mean() - 0.05
    assert within[-1]["share"] == 1
    assert within[-1]["label_rate"] == pytest.approx(flights.late.mean(), abs=EXACT)
    windows = {each["window_s"]: each for each in told["window"]}
    assert windows[HOUR_S]["label_rate"] < windows[24 * HOUR_S]["label_rate"]
    assert windows[HOUR_S]["share"] < windows[24 * HOUR_S]["share"] < 1
    assert told["mean_delay_s"]["true"] > told["mean_delay_s"]["false"]


async def test_classes_and_numbers_are_judged_by_their_own_losses(url: str, tmp_path: Path) -> None:
    rows = [{"a": float(a), "b": float(b)} for a in range(-3, 4) for b in range(-2, 3)]
    time = clock()
    labels = {"kind": "class", "horizon": {"after_s": 60}}
    async with tiny_model(tmp_path / "c", kind="multiclass", labels=labels) as model:
        worker = Worker(url, model, time)
        request = await worker.keep(*rows)
        names = ["left", "right", "neither"]
        truth = [names[n % 3] for n in range(len(rows))]
        assert set(await worker.tell_all([(request, n, t) for n, t in enumerate(truth)])) == {
            Outcome.ACCEPTED
        }
        advance(time, 100)
        await worker.mature()
        [version] = (await worker.quality())["versions"]
        worker.close()
    said = np.array([[row["a"], row["b"], 0] for row in rows], np.float32)
    powers = np.exp(said)
    shares = powers / powers.sum(axis=1, keepdims=True)
    losses = version["losses"]
    numbers = np.arange(len(rows)) % 3
    assert losses["log_loss"]["value"] == pytest.approx(
        -np.log(shares[np.arange(len(rows)), numbers]).mean(), rel=1e-5
    )
    assert losses["error_rate"]["value"] == (shares.argmax(axis=1) != numbers).mean()
    assert version["accuracy"]["value"] == pytest.approx(1 - losses["error_rate"]["value"])

    labels = {"kind": "number", "horizon": {"after_s": 60}}
    async with tiny_model(tmp_path / "n", kind="regression", labels=labels) as model:
        worker = Worker(url, model, time)
        request = await worker.keep(*rows)
        await worker.tell_all([(request, n, n / 2) for n in range(len(rows))])
        advance(time, 100)
        await worker.mature()
        [version] = (await worker.quality())["versions"]
        worker.close()
    errors = np.array([row["a"] + 2 * row["b"] - n / 2 for n, row in enumerate(rows)])
    losses = version["losses"]
    assert losses["mean_absolute_error"]["value"] == pytest.approx(np.abs(errors).mean())
    assert losses["mean_squared_error"]["value"] == pytest.approx((errors**2).mean())


async def test_rows_that_a_candidate_fails_on_are_counted_among_those_it_was_shown(
    url: str, model: ServedModel
) -> None:
    """A candidate that gives no number where it would be wrong must not look as if it had not been
    asked."""
    time = clock()
    worker = Worker(url, model, time)
    requests = [await worker.predict({"a": 1.0, "b": 0.0}) for _ in range(10)]
    for request in requests[:8]:
        worker.compare(request, np.array([np.nan if request in requests[:3] else 0.4]))
    await worker.writer.write()
    await worker.tell_all([(request, 0, True) for request in requests[1:9]])
    advance(time, 3 * HOUR_S)
    await worker.mature()
    [pair] = (await worker.quality())["pairs"]
    worker.close()
    told = {name: pair[name] for name in ("shown", "labelled", "missing", "unscored", "rows")}
    assert told == {"shown": 8, "labelled": 7, "missing": 1, "unscored": 2, "rows": 5}


async def test_numbers_beyond_all_measure_do_not_end_what_is_told(url: str, tmp_path: Path) -> None:
    labels = {"kind": "number", "horizon": {"after_s": 60}}
    time = clock()
    async with tiny_model(tmp_path, kind="regression", labels=labels) as model:
        worker = Worker(url, model, time)
        request = await worker.keep({"a": 1.0, "b": 0.0}, {"a": 2.0, "b": 0.0})
        for label in (10**400, -1e39, math.inf):
            with pytest.raises(InvalidInput, match=r"a number up to 3.4e\+38 either way"):
                await worker.tell(request, label)
        assert await worker.tell(request, 3e38) is Outcome.ACCEPTED
        advance(time, 100)
        await worker.mature()
        document = await worker.quality()
        worker.close()
    json.dumps(document, allow_nan=False)
    assert document["versions"][0]["losses"]["mean_squared_error"]["value"] == 3e38**2


def test_the_area_of_parts_is_that_of_the_whole_with_delongs_interval() -> None:
    rng = np.random.default_rng(3)
    truth = rng.random(5_000) < 0.3
    scores = np.round(rng.normal(size=5_000) + truth, 1)  # many are equal
    parts = np.array_split(np.arange(5_000), 7)
    counts = ScoreCounts()
    for part in parts:
        counts += ScoreCounts.of(scores[part], truth[part])
    auc = counts.auc()
    assert auc is not None
    assert auc.value == pytest.approx(roc_auc_score(truth, scores), abs=EXACT)
    assert auc.least == auc.most == auc.value
    # DeLong, DeLong and Clarke-Pearson (1988), every pair looked at.
    positive, negative = scores[truth], scores[~truth]
    psi = (positive[:, None] > negative) + 0.5 * (positive[:, None] == negative)
    error = math.sqrt(
        psi.mean(axis=1).var(ddof=1) / len(positive) + psi.mean(axis=0).var(ddof=1) / len(negative)
    )
    assert auc.low == pytest.approx(auc.value - 1.959963984540054 * error, abs=EXACT)


def test_of_very_many_scores_the_area_is_known_within_bounds() -> None:
    rng = np.random.default_rng(4)
    rows = 3 * MOST_SCORES
    truth = rng.random(rows) < 0.3
    scores = rng.normal(size=rows) + truth
    counts = ScoreCounts.of(scores, truth)
    assert len(counts.content) <= 12 * MOST_SCORES
    auc = counts.auc()
    assert auc is not None
    assert auc.least < roc_auc_score(truth, scores.astype(np.float32)) < auc.most
    assert auc.most - auc.least < 1e-3
