"""What a quality table says, as JSON (docs/labels.md)."""

from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from typing import Any

import numpy as np

from app.clock import as_rfc3339
from app.comparison.intervals import ClusterSums
from app.evidence.harms import LOSS_STEPS
from app.labels.auc import ScoreCounts
from app.labels.form import LabelForm
from app.labels.losses import loss_counts
from app.labels.quality import (
    BINS,
    CLIP,
    CLUSTERED,
    COUNTS,
    DELAY_EDGES_S,
    LOSSES,
    PAIR_COUNTS,
    FloatArray,
    LossCounts,
    PairQuality,
    QualityTable,
    VersionQuality,
    columns,
    delay_columns,
    pair_columns,
)
from app.labels.recorder import LiveQuality

LEVEL = 0.95
_SHARES = {"label_rate", "accuracy", "error_rate"}
_DELAY_QUANTILES = (0.5, 0.9, 0.99)


def quality_document(form: LabelForm, table: QualityTable) -> dict[str, Any]:
    """Versions and pairs, those that predicted last first. It holds nothing that JSON has no word
    for: what is not known is null."""
    return {
        "kind": form.kind,
        "output": form.score,
        "level": LEVEL,
        "losses": list(LOSSES[form.kind]),
        "log_loss_clip": CLIP,
        "versions": [
            _version(form, name, quality) for name, quality in _newest_first(table.versions)
        ],
        "pairs": [_pair(form, name, pair) for name, pair in _newest_first(table.pairs)],
    }


def live_quality(
    form: LabelForm, table: QualityTable, champion: str
) -> tuple[float | None, Mapping[str, LiveQuality]]:
    """The champion's coverage, and by role the figures of it and of the candidate beside it that
    predicted last. Nothing of a champion (`2:<sha256>`) is known until its first horizon: until
    then it is the version that predicted last."""
    roles: dict[str, LiveQuality] = {}
    coverage = None
    names = [champion, *(name for name, _ in _newest_first(table.versions))]
    for name in [name for name in names if name in table.versions][:1]:
        document = _version(form, name, table.versions[name])
        coverage = document["coverage"]
        roles["champion"] = _live(document)
        pairs = {pair: of for pair, of in table.pairs.items() if pair.startswith(name)}
        for pair, of in _newest_first(pairs)[:1]:
            both = _pair(form, pair, of)
            roles["candidate"] = _live({"rows": both["rows"], **both["candidate"]})
    return coverage, roles


def _live(document: Mapping[str, Any]) -> LiveQuality:
    figures = {name: loss["value"] for name, loss in document["losses"].items()}
    figures["auc"] = None if document["auc"] is None else document["auc"]["value"]
    known = {name: value for name, value in figures.items() if value is not None}
    return LiveQuality(document["rows"], known)


def _newest_first(of: Mapping[str, Any]) -> Sequence[tuple[str, Any]]:
    return sorted(of.items(), key=lambda item: -item[1].last_s)


def _version(form: LabelForm, name: str, quality: VersionQuality) -> dict[str, Any]:
    cells = quality.cells.reshape(-1, columns(form))
    whole, *segments = (_cell(form, cell) for cell in cells)
    names = [name for dimension in form.segments for name in dimension]
    return {
        **_named(name),
        "first": _instant(quality.first_s),
        "last": _instant(quality.last_s),
        **whole,
        "auc": _auc(quality.scores),
        **_calibration(quality.bins),
        "segments": [
            {"name": segment, **cell} for segment, cell in zip(names, segments, strict=True)
        ],
        "as_labels_arrive": _delays(form, quality.delays, whole["due"]),
    }


def _cell(form: LabelForm, cell: FloatArray) -> dict[str, Any]:
    due, labelled, void, unscored = (int(count) for count in cell[: len(COUNTS)])
    label, score, *losses = _clusters(cell[len(COUNTS) :])
    return {
        "due": due,
        "labelled": labelled,
        "void": void,
        "missing": due - labelled - void,
        "coverage": labelled / due if due else None,
        "unscored": unscored,
        "rows": int(label.n),
        "clusters": int(label.clusters),
        _label_name(form): _mean(label, _label_name(form)),
        "score": _mean(score),
        "losses": _means(LOSSES[form.kind], losses),
    }


def _pair(form: LabelForm, names: str, pair: PairQuality) -> dict[str, Any]:
    champion, candidate, began = names.split(" ")
    cells = pair.cells.reshape(-1, pair_columns(form))
    whole, *segments = (
        _pair_cell(form, cell, pair.blocks.get(group, {})) for group, cell in enumerate(cells)
    )
    for side, scores, bins in (
        ("champion", pair.champion_scores, pair.champion_bins),
        ("candidate", pair.candidate_scores, pair.candidate_bins),
    ):
        whole[side] |= {"auc": _auc(scores), **_calibration(bins)}
    of_segments = [name for dimension in form.segments for name in dimension]
    return {
        "champion_version": _named(champion),
        "candidate_version": _named(candidate),
        "began": int(began),
        "first": _instant(pair.first_s),
        "last": _instant(pair.last_s),
        **whole,
        "segments": [
            {"name": segment, **cell} for segment, cell in zip(of_segments, segments, strict=True)
        ],
    }


def _pair_cell(form: LabelForm, cell: FloatArray, blocks: LossCounts) -> dict[str, Any]:
    shown, labelled, void, unscored = (int(count) for count in cell[: len(PAIR_COUNTS)])
    label, *losses = _clusters(cell[len(PAIR_COUNTS) :])
    names = LOSSES[form.kind]
    document: dict[str, Any] = {
        "shown": shown,
        "labelled": labelled,
        "void": void,
        "missing": shown - labelled - void,
        "coverage": labelled / shown if shown else None,
        "unscored": unscored,
        "rows": int(label.n),
        "clusters": int(label.clusters),
        _label_name(form): _mean(label, _label_name(form)),
        "champion": {"losses": _means(names, losses[::3])},
        "candidate": {"losses": _means(names, losses[1::3])},
        "difference": dict(zip(names, map(_mean, losses[2::3]), strict=True)),
        "blocks": {"steps": LOSS_STEPS, "counts": loss_counts(blocks)},
    }
    return document


def _label_name(form: LabelForm) -> str:
    return {"binary": "label_rate", "class": "accuracy", "number": "mean_label"}[form.kind]


def _clusters(numbers: FloatArray) -> list[ClusterSums]:
    return [ClusterSums(*each) for each in numbers.reshape(-1, CLUSTERED).tolist()]


def _means(names: Iterable[str], sums: Iterable[ClusterSums]) -> dict[str, Any]:
    return {name: _mean(of, name) for name, of in zip(names, sums, strict=True)}


def _mean(sums: ClusterSums, name: str = "") -> dict[str, float | None]:
    interval = sums.share_interval(LEVEL) if name in _SHARES else sums.interval(LEVEL)
    low, high = (None, None) if interval is None else interval
    return {"value": sums.mean(), "low": low, "high": high}


def _auc(scores: ScoreCounts) -> dict[str, Any] | None:
    auc = scores.auc()
    return None if auc is None else auc._asdict()


def _calibration(bins: FloatArray) -> dict[str, Any]:
    """Of probabilities: the mean score and the share of true ones in each bin that has rows; and
    their mean distance, weighted by rows."""
    if not len(bins):
        return {"calibration": None, "calibration_error": None}
    points = [
        {
            "from": place / BINS,
            "to": (place + 1) / BINS,
            "rows": int(rows),
            "mean_score": score / rows,
            "label_rate": label / rows,
        }
        for place, (rows, score, label) in enumerate(bins.reshape(BINS, 3).tolist())
        if rows
    ]
    total = sum(point["rows"] for point in points)
    distance = sum(
        point["rows"] * abs(point["mean_score"] - point["label_rate"]) for point in points
    )
    return {"calibration": points, "calibration_error": distance / total if total else None}


def _delays(form: LabelForm, delays: FloatArray, due: int) -> dict[str, Any]:
    """What would be said by labels as they arrive, beside what is said at the horizon: by those
    that came within some time of their prediction, and by all that are there when one looks at the
    predictions of a last few hours of steady traffic."""
    names = delay_columns(form)
    table = delays.reshape(-1, len(names))
    column = {name: table[:, place] for place, name in enumerate(names)}
    told = ("label", "score", *LOSSES[form.kind])
    total = column["rows"].sum()
    within = []
    windows = []
    for place, edge_s in enumerate(DELAY_EDGES_S, 1):
        sums = {name: float(values[:place].sum()) for name, values in column.items()}
        if not sums["rows"]:
            continue
        figures = {name: sums[name] / sums["rows"] for name in told}
        within.append({"within_s": edge_s, "share": sums["rows"] / total, **_told(form, figures)})
        # Of predictions evenly spread over the window a label that takes d is there for those that
        # are older than d: window less d of the window.
        rows = edge_s * sums["rows"] - sums["delay"]
        if rows > 0:
            figures = {name: (edge_s * sums[name] - sums[f"{name}_delay"]) / rows for name in told}
            share = rows / (edge_s * due)
            windows.append({"window_s": edge_s, "share": share, **_told(form, figures)})
    at_horizon = {name: float(column[name].sum() / total) for name in told} if total else None
    return {
        "void": int(column["void"].sum()),
        "delay_s": _quantiles(column["rows"]),
        "mean_delay_s": _mean_delays(form, column),
        "within": within,
        "window": windows,
        "at_horizon": None if at_horizon is None else _told(form, at_horizon),
    }


def _told(form: LabelForm, figures: Mapping[str, float]) -> dict[str, Any]:
    label, score, *_ = figures.values()
    losses = {name: figures[name] for name in LOSSES[form.kind]}
    return {_label_name(form): label, "score": score, "losses": losses}


def _mean_delays(form: LabelForm, column: Mapping[str, FloatArray]) -> dict[str, float | None]:
    sums = {name: float(values.sum()) for name, values in column.items()}
    rows, delay = sums["rows"], sums["delay"]
    means = {"all": delay / rows if rows else None}
    if form.kind == "binary":
        true, of_true = sums["label"], sums["label_delay"]
        means["true"] = of_true / true if true else None
        means["false"] = (delay - of_true) / (rows - true) if rows > true else None
    return means


def _quantiles(rows: FloatArray) -> dict[str, float] | None:
    """Evenly between the edges; beyond the last one, that."""
    if not rows.any():
        return None
    edges = np.array([0.0, *DELAY_EDGES_S, DELAY_EDGES_S[-1]])
    shares = np.concatenate([[0.0], np.cumsum(rows) / rows.sum()])
    return {f"{q:g}": float(np.interp(q, shares, edges)) for q in _DELAY_QUANTILES}


def _named(version: str) -> dict[str, str]:
    number, _, sha256 = version.partition(":")
    return {"version": number, "sha256": sha256}


def _instant(at_s: float) -> str | None:
    return as_rfc3339(at_s) if isfinite(at_s) else None
