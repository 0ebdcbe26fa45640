"""The rules by which others end a canary, on the answers of many rollouts at once.

Repeated tests of two proportions; the defaults of Argo Rollouts (analysis: `failureLimit: 0`) and
Flagger (`threshold` checks fail), both with a success rate of 99 %; and Kayenta's judge, a
Mann-Whitney test at 0.98 with a tolerance of 0.25 of the shift, for one metric, higher being worse.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from loadtests.equal_versions import Answers, Bools, Floats, Sample

Z_LEVELS = (0.01, 0.05)
LOOKS = 100
CHECKS = 20
_SUCCESS = 0.99
_FLAGGER_THRESHOLD = 10
_KAYENTA_LEVEL, _KAYENTA_TOLERANCE = 0.98, 0.25
_KAYENTA_AFTER = (5, 10, 15, 20)
"""Checks after which it judges all up to then."""


@dataclass(frozen=True, slots=True)
class Ledger:
    """`[rollouts, intervals]`: answers of both, and how many of them were bad."""

    ours: Floats
    ours_bad: Floats
    theirs: Floats
    theirs_bad: Floats

    def by(self, intervals: int) -> "Ledger":
        return Ledger(
            *(
                of.reshape(len(of), intervals, -1).sum(axis=2)
                for of in (self.ours, self.ours_bad, self.theirs, self.theirs_bad)
            )
        )


def ledger(answers: Answers) -> Ledger:
    rollouts, observations = answers.bad.shape
    size = observations // LOOKS
    ours, bad = (
        of[:, : size * LOOKS].reshape(rollouts, LOOKS, size)
        for of in (answers.candidate, answers.bad)
    )
    ours_n, all_bad, ours_bad = (
        np.count_nonzero(of, axis=2).astype(np.float64) for of in (ours, bad, ours & bad)
    )
    return Ledger(ours_n, ours_bad, size - ours_n, all_bad - ours_bad)


def of_answers(answers: Answers, *, are_errors: bool) -> Mapping[str, Bools]:
    """Which of the rollouts each rule rolls back."""
    looks = ledger(answers)
    checks = looks.by(CHECKS)
    found = {
        f"z {level:g}": reached.any(axis=1)
        for level, reached in zip(Z_LEVELS, _two_proportions(looks), strict=True)
    }
    if are_errors:
        with np.errstate(invalid="ignore"):  # no answers: no measurement
            failed = 1 - checks.ours_bad / checks.ours < _SUCCESS
        found["Argo"] = failed.any(axis=1)
        found["Flagger"] = failed.sum(axis=1) >= _FLAGGER_THRESHOLD
    found["Kayenta"] = kayenta(
        checks.ours_bad / np.maximum(checks.ours, 1),
        checks.theirs_bad / np.maximum(checks.theirs, 1),
    )
    return found


def of_sample(sample: Sample) -> Mapping[str, Bools]:
    """Repeated tests of the mean, as though all that was summed were independent."""
    mean = sample.sums / sample.n
    variance = np.maximum(sample.squares / sample.n - mean**2, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        z = (mean - sample.margin) / np.sqrt(variance / sample.n)
    return {f"z {level:g}": (z > _quantile(level)).any(axis=1) for level in Z_LEVELS}


def _two_proportions(looks: Ledger) -> list[Bools]:
    n, bad, of_n, of_bad = (
        np.cumsum(of, axis=1) for of in (looks.ours, looks.ours_bad, looks.theirs, looks.theirs_bad)
    )
    pooled = (bad + of_bad) / (n + of_n)
    with np.errstate(divide="ignore", invalid="ignore"):
        z = (bad / n - of_bad / of_n) / np.sqrt(pooled * (1 - pooled) * (1 / n + 1 / of_n))
    return [z > _quantile(level) for level in Z_LEVELS]


def kayenta(ours: Floats, theirs: Floats) -> Bools:
    """Series `[rollouts, checks]` of a metric of both: whether it is high after any judgement."""
    high = np.zeros(len(ours), np.bool_)
    for after in _KAYENTA_AFTER:
        n = min(after, ours.shape[1])
        differences = np.sort(
            (ours[:, :n, np.newaxis] - theirs[:, np.newaxis, :n]).reshape(len(ours), -1), axis=1
        )
        spread = _quantile((1 - _KAYENTA_LEVEL) / 2) * (n * n * (2 * n + 1) / 12) ** 0.5
        lowest = differences[:, max(int(n * n / 2 - spread), 0)]
        shift: NDArray[np.float64] = np.median(differences, axis=1)
        high |= lowest > _KAYENTA_TOLERANCE * np.abs(shift)
    return high


def _quantile(level: float) -> float:
    return NormalDist().inv_cdf(1 - level)
