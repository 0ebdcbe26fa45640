"""How good predictions were, as sums and counts that add."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from app.comparison.grid import is_finite
from app.evidence.harms import LOSS_STEPS
from app.labels.auc import ScoreCounts
from app.labels.bucket import Kept, Version
from app.labels.form import LabelForm

FloatArray: TypeAlias = NDArray[np.float64]

LOSSES: Mapping[Literal["binary", "class", "number"], tuple[str, ...]] = {
    "binary": ("log_loss", "brier"),
    "class": ("log_loss", "brier", "error_rate"),
    "number": ("mean_absolute_error", "mean_squared_error"),
}
"""What is lost by a row, in order. The Brier loss of classes is half the sum of the squares over
all of them, which is that of a probability where there are two."""
CLIP = float(np.finfo(np.float64).eps)
"""A probability counts as at least this, and at most one less this, in the log loss."""
BINS = 20
"""Of equal width, of the reliability of probabilities."""
MOST_GRID = 1_000
"""Steps of `LOSS_STEPS`: what the difference of a block could have been is rounded up to these."""
MOST_VERSIONS = 16
"""Of which quality is known: those that predicted last. Twice as many pairs."""

_HOUR_S = 3_600
DELAY_EDGES_S: tuple[float, ...] = (
    *(60 * m for m in (1, 2, 5, 10, 15, 20, 30, 45)),
    *(_HOUR_S * h for h in (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 16, 18, 20, 24)),
    *(24 * _HOUR_S * d for d in (1.5, 2, 3, 4, 5, 7, 10, 14, 21, 28, 60, 90, 180, 366)),
)
"""Delays are told apart by these."""

COUNTS = ("due", "labelled", "void", "unscored")
PAIR_COUNTS = ("shown", "labelled", "void", "unscored")
CLUSTERED = 6
"""Numbers of a `ClusterSums` (app/comparison/intervals.py): clusters, n, n^2, s, s^2, n s."""
TABLE = 3
"""The form of a table. Those of another one are kept elsewhere, and not read."""

LossCounts: TypeAlias = dict[tuple[int, int, int], int]
"""How many buckets have a mean difference of the Brier loss, candidate less champion, between the
first two, in steps of 1 / `LOSS_STEPS`, whose absolute value could not be above the third."""


class VersionQuality(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Of a version as champion.

    `cells`: for all rows, and then for each segment, `COUNTS` and cluster sums of the label, the
    score and each loss. `bins`: rows, sum of the scores and of the labels in each. `delays`: for
    each of `DELAY_EDGES_S` and beyond, see `delay_columns`. Instants of predictions.
    """

    cells: FloatArray
    bins: FloatArray
    delays: FloatArray
    scores: ScoreCounts
    first_s: float
    last_s: float

    def __add__(self, other: "VersionQuality") -> "VersionQuality":
        return VersionQuality(
            self.cells + other.cells,
            self.bins + other.bins,
            self.delays + other.delays,
            self.scores + other.scores,
            min(self.first_s, other.first_s),
            max(self.last_s, other.last_s),
        )


class PairQuality(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Of a champion and a candidate, about rows of the champion that the candidate was shown.

    `cells`: for all rows, and then for each segment, `PAIR_COUNTS` and cluster sums of the label,
    and for each loss that of the champion, of the candidate, and candidate less champion.
    `blocks`: for all rows (0) and each segment (its number from 1 on).
    """

    cells: FloatArray
    champion_bins: FloatArray
    candidate_bins: FloatArray
    champion_scores: ScoreCounts
    candidate_scores: ScoreCounts
    blocks: dict[int, LossCounts]
    first_s: float
    last_s: float

    def __add__(self, other: "PairQuality") -> "PairQuality":
        blocks = {group: dict(counts) for group, counts in self.blocks.items()}
        for group, counts in other.blocks.items():
            mine = blocks.setdefault(group, {})
            for block, count in counts.items():
                mine[block] = mine.get(block, 0) + count
        return PairQuality(
            self.cells + other.cells,
            self.champion_bins + other.champion_bins,
            self.candidate_bins + other.candidate_bins,
            self.champion_scores + other.champion_scores,
            self.candidate_scores + other.candidate_scores,
            blocks,
            min(self.first_s, other.first_s),
            max(self.last_s, other.last_s),
        )


class QualityTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of predictions whose horizon has passed, of one form. By version (`2:<sha256>`), and by
    champion, candidate and its trial (`pair_name`)."""

    versions: dict[str, VersionQuality] = {}
    pairs: dict[str, PairQuality] = {}
    table: int = TABLE

    def __add__(self, other: "QualityTable") -> "QualityTable":
        versions = dict(self.versions)
        for version, quality in other.versions.items():
            versions[version] = versions[version] + quality if version in versions else quality
        pairs = dict(self.pairs)
        for pair, both in other.pairs.items():
            pairs[pair] = pairs[pair] + both if pair in pairs else both
        return QualityTable(versions, pairs)

    def of_the_last(self) -> "QualityTable":
        """Without the versions that have not predicted for longest, where there are many."""
        return QualityTable(
            _last(self.versions, MOST_VERSIONS), _last(self.pairs, 2 * MOST_VERSIONS)
        )

    def encode(self) -> bytes:
        return _encoder.encode(self)

    @classmethod
    def decode(cls, content: bytes) -> "QualityTable":
        """Raises `ValueError` for a table of another software's."""
        table = _decoder.decode(content)
        if table.table != TABLE:
            raise ValueError(f"a quality table of form {table.table}, not {TABLE}")
        return table


def added(tables: Sequence[QualityTable]) -> QualityTable:
    """All of them together. Two by two: added one after the other, the scores of the first would be
    sorted in again for each of the others."""
    if len(tables) < 2:
        return tables[0] if tables else QualityTable()
    middle = len(tables) // 2
    return added(tables[:middle]) + added(tables[middle:])


def _last(of: dict[str, Any], most: int) -> dict[str, Any]:
    names = sorted(of, key=lambda name: of[name].last_s)[-most:]
    return {name: of[name] for name in names}


def _as_bytes(value: Any) -> bytes:
    return np.asarray(value, "<f8").tobytes()


def _as_array(_: type, content: Any) -> FloatArray:
    return np.frombuffer(content, "<f8")


_encoder = msgspec.msgpack.Encoder(enc_hook=_as_bytes)
_decoder = msgspec.msgpack.Decoder(QualityTable, dec_hook=_as_array)


def version_name(number: int, sha256: str) -> str:
    """`2:<sha256>`."""
    return f"{number}:{sha256}"


def pair_name(champion: str, candidate: str, began: int | None) -> str:
    """`2:<sha256> 3:<sha256> 17`: of what the candidate said in the trial that began in this
    generation of the release state; 0 where that is not known."""
    return f"{champion} {candidate} {began or 0}"


def columns(form: LabelForm) -> int:
    """Of `VersionQuality.cells`, whose rows are all rows and then the segments."""
    return len(COUNTS) + CLUSTERED * (2 + len(LOSSES[form.kind]))


def pair_columns(form: LabelForm) -> int:
    """Of `PairQuality.cells`."""
    return len(PAIR_COUNTS) + CLUSTERED * (1 + 3 * len(LOSSES[form.kind]))


def delay_columns(form: LabelForm) -> tuple[str, ...]:
    """Of `VersionQuality.delays`. `delay` sums are of rows with a label and a score; `x_delay` are
    sums of the delay times x."""
    names = ("label", "score", *LOSSES[form.kind])
    return ("void", "rows", "delay", *names, *(f"{name}_delay" for name in names))


def judged(form: LabelForm, buckets: Sequence[Kept]) -> QualityTable:
    """Of these predictions, labelled or not. A bucket is a cluster and a block."""
    return _Judged(form, buckets).table()


class _Judged:
    """All rows of some buckets side by side."""

    def __init__(self, form: LabelForm, buckets: Sequence[Kept]) -> None:
        self._form = form
        self._rows = np.concatenate([bucket.rows for bucket in buckets])
        self._cluster = np.repeat(np.arange(len(buckets)), [len(b.names) for b in buckets])
        self._clusters = len(buckets)
        self._labels = np.concatenate([bucket.labels for bucket in buckets])
        self._is_labelled = np.concatenate([bucket.is_labelled for bucket in buckets])
        self._delay_s = np.concatenate([bucket.arrived_s for bucket in buckets])
        self._delay_s = np.maximum(self._delay_s - self._rows["predicted_s"], 0.0)
        sizes = [len(names) for names in form.segments]
        firsts = 1 + np.concatenate([[0], np.cumsum(sizes)]).astype(int)[:-1]
        self._groups = 1 + sum(sizes)
        whole = np.zeros(len(self._rows), int)
        self._in_groups = np.column_stack([whole, self._rows["segments"] + firsts])
        """`[rows, 1 + dimensions]`: the groups that each row belongs to."""
        self._by_version: dict[Version, NDArray[np.bool_]] = {}
        self._by_candidate: dict[Version, FloatArray] = {}
        self._shown: dict[Version, NDArray[np.bool_]] = {}
        start = 0
        for bucket in buckets:
            place = slice(start, start + len(bucket.names))
            start = place.stop
            for index, version in bucket.versions.items():
                self._of_version(version)[place] |= bucket.rows["version"] == index
            for index, numbers in bucket.candidates.items():
                if index in bucket.versions:
                    candidate = bucket.versions[index]
                    self._of_candidate(candidate)[place] = numbers
                    self._shown[candidate][place] = bucket.shown[index]

    def _of_version(self, version: Version) -> NDArray[np.bool_]:
        return self._by_version.setdefault(version, np.zeros(len(self._rows), np.bool_))

    def _of_candidate(self, version: Version) -> FloatArray:
        self._shown.setdefault(version, np.zeros(len(self._rows), np.bool_))
        shape = (len(self._rows), self._form.width)
        return self._by_candidate.setdefault(version, np.full(shape, np.nan))

    def table(self) -> QualityTable:
        versions = {}
        pairs = {}
        for champion, mine in self._by_version.items():
            if not mine.any():
                continue
            versions[version_name(champion.number, champion.sha256)] = self._version(mine)
            for candidate, numbers in self._by_candidate.items():
                shown = mine & self._shown[candidate]
                if shown.any():
                    pair = pair_name(
                        version_name(champion.number, champion.sha256),
                        version_name(candidate.number, candidate.sha256),
                        candidate.began,
                    )
                    pairs[pair] = self._pair(shown, numbers)
        return QualityTable(versions, pairs)

    def _version(self, mine: NDArray[np.bool_]) -> VersionQuality:
        numbers = self._rows["numbers"]
        is_scored = is_finite(numbers).all(axis=1)
        has_truth = self._is_labelled & np.isfinite(self._labels)
        is_void = self._is_labelled & ~has_truth
        kept = mine & has_truth & is_scored
        said = _Said(self._form, numbers[kept], self._labels[kept])
        counts = [mine, mine & has_truth, mine & is_void, mine & has_truth & ~is_scored]
        values = (said.labels, said.scores, *said.losses)
        cells = [*(self._counted(of) for of in counts), *self._clustered(kept, values)]
        predicted_s = self._rows["predicted_s"][mine]
        return VersionQuality(
            np.column_stack(cells).ravel(),
            said.bins(),
            self._delays(mine & is_void, kept, said),
            said.counts(),
            float(predicted_s.min()),
            float(predicted_s.max()),
        )

    def _pair(self, shown: NDArray[np.bool_], candidate: FloatArray) -> PairQuality:
        champion = self._rows["numbers"]
        is_scored = is_finite(np.hstack([champion, candidate])).all(axis=1)
        has_truth = self._is_labelled & np.isfinite(self._labels)
        is_void = self._is_labelled & ~has_truth
        kept = shown & has_truth & is_scored
        labels = self._labels[kept]
        one = _Said(self._form, champion[kept], labels)
        other = _Said(self._form, candidate[kept], labels)
        differences = [b - a for a, b in zip(one.losses, other.losses, strict=True)]
        values = [labels]
        for mine, theirs, difference in zip(one.losses, other.losses, differences, strict=True):
            values += [mine, theirs, difference]
        counts = (shown, shown & has_truth, shown & is_void, shown & has_truth & ~is_scored)
        cells = [*(self._counted(of) for of in counts), *self._clustered(kept, values)]
        predicted_s = self._rows["predicted_s"][shown]
        losses = dict(zip(LOSSES[self._form.kind], differences, strict=True))
        return PairQuality(
            np.column_stack(cells).ravel(),
            one.bins(),
            other.bins(),
            one.counts(),
            other.counts(),
            self._blocks(kept, candidate, losses["brier"]) if "brier" in losses else {},
            float(predicted_s.min(initial=np.inf)),
            float(predicted_s.max(initial=-np.inf)),
        )

    def _counted(self, rows: NDArray[np.bool_]) -> FloatArray:
        groups = self._in_groups[rows].ravel()
        return np.bincount(groups, minlength=self._groups).astype(np.float64)

    def _by_cluster(
        self, rows: NDArray[np.bool_], values: Sequence[FloatArray]
    ) -> Sequence[tuple[FloatArray, FloatArray]]:
        """For each of the values `[clusters, groups]`: how many rows, and the sum of theirs."""
        groups = self._in_groups[rows]
        places = (self._cluster[rows, np.newaxis] * self._groups + groups).ravel()
        shape = (self._clusters, self._groups)
        size = self._clusters * self._groups
        n = np.bincount(places, minlength=size).astype(np.float64).reshape(shape)
        times = groups.shape[1]
        sums = (np.bincount(places, np.repeat(each, times), size) for each in values)
        return [(n, s.astype(np.float64).reshape(shape)) for s in sums]

    def _clustered(
        self, rows: NDArray[np.bool_], values: Sequence[FloatArray]
    ) -> Sequence[FloatArray]:
        """For each of the values `[groups, 6]`."""
        clustered = []
        for n, s in self._by_cluster(rows, values):
            sums = (n > 0, n, n * n, s, s * s, n * s)
            clustered.append(np.column_stack([numbers.sum(axis=0) for numbers in sums]))
        return clustered

    def _blocks(
        self, rows: NDArray[np.bool_], candidate: FloatArray, differences: FloatArray
    ) -> dict[int, LossCounts]:
        most = _most_difference(self._form, self._rows["numbers"][rows], candidate[rows])
        # It is reckoned in another way, and the same but for the last bit.
        most = np.maximum(most, np.abs(differences))
        (n, of_losses), (_, of_most) = self._by_cluster(rows, [differences, most])
        clusters, groups = np.nonzero(n)
        means = LOSS_STEPS * of_losses[clusters, groups] / n[clusters, groups]
        bounds = LOSS_STEPS * of_most[clusters, groups] / n[clusters, groups]
        numbers = (np.floor(means), np.ceil(means), np.ceil(bounds / MOST_GRID) * MOST_GRID)
        columns = (each.astype(int).tolist() for each in numbers)
        blocks: dict[int, LossCounts] = {}
        for (group, *block), count in Counter(zip(groups.tolist(), *columns, strict=True)).items():
            low, high, bound = block
            blocks.setdefault(group, {})[low, high, bound] = count
        return blocks

    def _delays(
        self, void: NDArray[np.bool_], kept: NDArray[np.bool_], said: "_Said"
    ) -> FloatArray:
        size = len(DELAY_EDGES_S) + 1
        delay_s = self._delay_s[kept]
        at = np.searchsorted(DELAY_EDGES_S, delay_s)
        values = (said.labels, said.scores, *said.losses)
        sums = [
            np.bincount(np.searchsorted(DELAY_EDGES_S, self._delay_s[void]), minlength=size),
            np.bincount(at, minlength=size),
            np.bincount(at, weights=delay_s, minlength=size),
            *(np.bincount(at, weights=each, minlength=size) for each in values),
            *(np.bincount(at, weights=each * delay_s, minlength=size) for each in values),
        ]
        return np.column_stack(sums).astype(np.float64).ravel()


class _Said:
    """What a version said about rows with a label: labels, scores and losses as numbers a row.

    The label of a probability is 0 or 1, and its score is it; the score of classes is the
    probability of the true one, and the label whether the most probable one is that.
    """

    def __init__(self, form: LabelForm, numbers: FloatArray, labels: FloatArray) -> None:
        self._form = form
        match form.kind:
            case "binary":
                self.labels, self.scores = labels, numbers[:, 0]
                p = np.clip(self.scores, 0.0, 1.0)
                clipped = np.clip(p, CLIP, 1 - CLIP)
                log_loss = -np.where(labels == 1, np.log(clipped), np.log(1 - clipped))
                self.losses = [log_loss, (p - labels) ** 2]
            case "class":
                truth = np.zeros(numbers.shape)
                truth[np.arange(len(labels)), labels.astype(int)] = 1
                self.scores = numbers[truth == 1]
                is_wrong = (numbers.argmax(axis=1) != labels).astype(np.float64)
                self.labels = 1 - is_wrong
                log_loss = -np.log(np.clip(self.scores, CLIP, 1))
                brier = ((np.clip(numbers, 0, 1) - truth) ** 2).sum(axis=1) / 2
                self.losses = [log_loss, brier, is_wrong]
            case "number":
                self.labels, self.scores = labels, numbers[:, 0]
                error = self.scores - labels
                self.losses = [np.abs(error), error**2]

    def bins(self) -> FloatArray:
        if self._form.kind != "binary":
            return np.zeros(0)
        at = np.clip(self.scores * BINS, 0, BINS - 1).astype(int)
        weights = (None, self.scores, self.labels)
        bins = np.column_stack([np.bincount(at, w, BINS) for w in weights])
        return bins.astype(np.float64).ravel()

    def counts(self) -> ScoreCounts:
        if self._form.kind != "binary" or not len(self.labels):
            return ScoreCounts()
        return ScoreCounts.of(self.scores, self.labels == 1)


def _most_difference(form: LabelForm, champion: FloatArray, candidate: FloatArray) -> FloatArray:
    """`[rows]`: how far the Brier losses can lie apart, whatever the label is. A probability is
    that of one of two classes."""
    mine, theirs = np.clip(champion, 0, 1), np.clip(candidate, 0, 1)
    if form.kind == "binary":
        mine, theirs = np.hstack([mine, 1 - mine]), np.hstack([theirs, 1 - theirs])
    # Of the class k it is half the sum of all squares, less the probability of k, and 1/2.
    whole = (theirs**2 - mine**2).sum(axis=1, keepdims=True) / 2
    most: FloatArray = np.abs(whole - (theirs - mine)).max(axis=1)
    return most
