"""The sections of a report about who was right, once labels have come.

They are written from `quality_document` (app/labels/document.py), of which any number may be null.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from app.comparison.intervals import wilson
from app.evaluation import charts
from app.evaluation.charts import Estimate, Point, Role
from app.evaluation.page import KeyFigure, Part, Plot, Section, Table
from app.evaluation.wording import (
    NONE,
    Wording,
    between,
    count,
    duration,
    instant,
    interval_of,
    percent,
    plain,
    points,
    signed,
    value_at,
    with_interval,
)

Document: TypeAlias = Mapping[str, Any]

_LOSSES = {
    "log_loss": "log loss",
    "brier": "Brier score",
    "error_rate": "error rate",
    "mean_absolute_error": "mean absolute error",
    "mean_squared_error": "mean squared error",
}
_LABEL = {"label_rate": "share of true labels", "accuracy": "accuracy", "mean_label": "mean label"}
_LONG_WINDOW = 12
_ROUND_S = (
    *(60.0, 300.0, 900.0, 3_600.0, 10_800.0, 21_600.0, 43_200.0, 86_400.0),
    *(86_400.0 * days for days in (2, 7, 14, 30, 90, 180, 360)),
)


def pair_of(quality: Document, champion: Document | None, candidate: Document) -> Document | None:
    """What is known of the candidate beside this champion."""
    for pair in quality["pairs"]:
        both = (pair["champion_version"], pair["candidate_version"])
        if champion is not None and both == (_identity(champion), _identity(candidate)):
            found: Document = pair
            return found
    return None


def pair_section(quality: Document, pair: Document) -> Section:
    """The losses of both on the same labelled rows."""
    parts: list[Part] = [_losses(quality, pair)]
    first = quality["losses"][0]
    series: list[tuple[str, Role, Sequence[Point]]] = [
        ("champion", "champion", _reliability(pair["champion"]["calibration"])),
        ("candidate", "candidate", _reliability(pair["candidate"]["calibration"])),
    ]
    if any(part for _, _, part in series):
        parts.append(
            Plot(
                "Reliability",
                charts.reliability(series),
                "Rows by what was said: the share of them that came true, with its 95 % interval. "
                "Below the dotted line more was said than came true.",
            )
        )
    segments = [{"name": "all rows", **pair}, *pair["segments"]]
    if len(segments) > 1:
        level = percent(quality["level"])
        parts.append(
            Plot(
                f"Difference of the {_LOSSES[first]} by segment",
                charts.forest(
                    [_estimate(segment, first) for segment in segments],
                    x_title=f"{_LOSSES[first]}, candidate less champion, {level} interval",
                    tick=charts.number,
                ),
                "Left of 0 the candidate loses less: it was the better one on these rows.",
            )
        )
    lead = [
        f"{count(pair['rows'])} rows that both answered and whose label is known, in "
        f"{count(pair['clusters'])} groups of requests that followed each other, which the "
        f"intervals take as one observation each. Predictions from {instant(pair['first'])} to "
        f"{instant(pair['last'])}, feature time. Of {count(pair['shown'])} rows that the candidate "
        f"was shown, {percent(pair['coverage'])} have a label; {count(pair['missing'])} have none "
        f"past their horizon, {count(pair['void'])} never will. Of {count(pair['unscored'])} with "
        "a label one of the two gave no finite number: these are in no figure."
    ]
    return Section("Who was right", lead, parts, _key_figures(quality, pair))


def labels_section(quality: Document, version: Document) -> Section:
    """How many labels there are of a version's predictions, and what the late ones change."""
    arriving = version["as_labels_arrive"]
    parts: list[Part] = [_coverage(quality, version)]
    within = [
        Point(each["within_s"], each["share"], says=_says(each, "within_s", "share"))
        for each in _until_all_came(arriving["within"])
    ]
    if within:
        drawn = charts.curve(
            [("labels that have come", "other", within)],
            x_title="time since the prediction",
            y_title="share of the labels",
            x_tick=duration,
            y_tick=charts.share,
            log=True,
            x_ticks=_ROUND_S,
        )
        says = "How long after its prediction a label comes, of those that came by the horizon."
        parts.append(Plot("Delay of the labels", drawn, says))
    parts += _bias(quality, arriving)
    lead = [
        f"Of version {version['version']}, predictions from {instant(version['first'])} to "
        f"{instant(version['last'])}, feature time, whose horizon has passed. A label enters when "
        "the horizon of its prediction has passed, and not when it comes: what is late may be "
        "late because of its outcome."
    ]
    return Section("Labels", lead, parts)


def _key_figures(quality: Document, pair: Document) -> list[KeyFigure]:
    figures = [
        KeyFigure("Rows with a label", count(pair["rows"]), f"of {count(pair['shown'])} shown")
    ]
    for name in quality["losses"]:
        difference = pair["difference"][name]
        interval = interval_of(difference)
        figures.append(
            KeyFigure(
                f"Difference of the {_LOSSES[name]}",
                signed(difference["value"], interval),
                f"{between(interval, signed)}; below 0 the candidate is better",
            )
        )
    return figures


def _losses(quality: Document, pair: Document) -> Table:
    champion, candidate = pair["champion"], pair["candidate"]
    rows = []
    for name in quality["losses"]:
        ours, theirs = champion["losses"][name], candidate["losses"][name]
        difference = pair["difference"][name]
        rows.append((_LOSSES[name], _cell(ours), _cell(theirs), _cell(difference, signed)))
    if champion["auc"] is not None or candidate["auc"] is not None:
        apart = _less(value_at(candidate, "auc", "value"), value_at(champion, "auc", "value"))
        rows.append(("AUC", _cell(champion["auc"]), _cell(candidate["auc"]), signed(apart)))
    if champion["calibration"] is not None:
        ours, theirs = champion["calibration_error"], candidate["calibration_error"]
        rows.append(("calibration error", plain(ours), plain(theirs), signed(_less(theirs, ours))))
    label = next(name for name in _LABEL if name in pair)
    rows.append((_LABEL[label], _cell(pair[label], _label_wording(label)), NONE, NONE))
    note = (
        f"In brackets the {percent(quality['level'])} interval. That of a difference is of the "
        "rows paired, and much narrower than those of the two suggest. Losses: less is better. "
        "AUC: the chance that a true row has the higher score; its interval takes the rows as "
        "independent (DeLong), and its difference has none here."
        if champion["auc"] is not None
        else f"In brackets the {percent(quality['level'])} interval. Losses: less is better."
    )
    head = ("on the same rows", "champion", "candidate", "candidate less champion")
    return Table("Both against the truth", head, rows, note, wide=True)


def _coverage(quality: Document, version: Document) -> Table:
    arriving = version["as_labels_arrive"]
    rows = [
        ("predictions past their horizon", count(version["due"])),
        ("with a label", f"{count(version['labelled'])} ({percent(version['coverage'])})"),
        ("never to have one", count(version["void"])),
        ("missing", count(version["missing"])),
        ("without a finite score", count(version["unscored"])),
    ]
    label = next(name for name in _LABEL if name in version)
    rows.append((_LABEL[label], _cell(version[label], _label_wording(label))))
    rows.append(("mean score", _cell(version["score"])))
    rows += [(_LOSSES[name], _cell(version["losses"][name])) for name in quality["losses"]]
    if version["auc"] is not None:
        rows.append(("AUC", _cell(version["auc"])))
    for share, delay_s in (arriving["delay_s"] or {}).items():
        rows.append((f"delay, {percent(float(share))} quantile", duration(delay_s)))
    for which, delay_s in arriving["mean_delay_s"].items():
        name = "mean delay" if which == "all" else f"mean delay of {which} labels"
        rows.append((name, duration(delay_s)))
    return Table(f"Labels of version {version['version']}", ("", "value and interval"), rows)


def _bias(quality: Document, arriving: Document) -> list[Part]:
    """The label and each loss by the labels that are there, beside those of the horizon."""
    at_horizon = arriving["at_horizon"]
    within = _until_all_came(arriving["within"])
    if not within or at_horizon is None:
        return []
    # In much longer windows the labels that have not come yet are too few to matter.
    last_s = _LONG_WINDOW * within[-1]["within_s"]
    windows = [each for each in arriving["window"] if each["window_s"] <= last_s]
    label = next(name for name in _LABEL if name in at_horizon)
    drawn: list[Part] = []
    told: list[tuple[str, tuple[str, ...]]] = [(_LABEL[label], (label,))]
    told += [(_LOSSES[name], ("losses", name)) for name in quality["losses"]]
    wordings = [_label_wording(label)] + [plain] * len(quality["losses"])
    for (name, path), wording in zip(told, wordings, strict=True):
        exact = value_at(at_horizon, *path)
        curve = [
            Point(
                each["window_s"],
                value_at(each, *path),
                says=f"labels of the last {duration(each['window_s'])}: "
                f"{wording(value_at(each, *path), None)}, {percent(each['share'])} of them there",
            )
            for each in windows
        ]
        tick = charts.share if wording is percent else charts.number
        drawn.append(
            Plot(
                f"{name[0].upper()}{name[1:]}, by labels as they arrive",
                charts.curve(
                    [("labels that are there", "other", curve)],
                    x_title="predictions of the last …",
                    y_title=name,
                    x_tick=duration,
                    y_tick=tick,
                    log=True,
                    x_ticks=_ROUND_S,
                    level=(exact, f"at the horizon: {wording(exact, None)}"),
                ),
                "What the labels would say that are there when one looks at the predictions of a "
                "last while, beside all labels at the horizon. What is between them is the bias of "
                "not waiting.",
            )
        )
    return [*drawn, _bias_table(told, wordings, windows, at_horizon)]


def _bias_table(
    told: Sequence[tuple[str, tuple[str, ...]]],
    wordings: Sequence[Wording],
    windows: Sequence[Document],
    at_horizon: Document,
) -> Table:
    chosen = [each for each in windows if each["window_s"] in _ROUND_S]
    rows = []
    for each in chosen:
        cells = [duration(each["window_s"]), percent(each["share"])]
        for (_, path), wording in zip(told, wordings, strict=True):
            found, exact = value_at(each, *path), value_at(at_horizon, *path)
            cells.append(f"{wording(found, None)} ({_apart(found, exact, wording)})")
        rows.append(cells)
    exactly = [
        wording(value_at(at_horizon, *path), None)
        for (_, path), wording in zip(told, wordings, strict=True)
    ]
    rows.append(["at the horizon", "", *exactly])
    return Table(
        "The bias of not waiting",
        ("predictions of the last", "labels there", *(name for name, _ in told)),
        rows,
        "In brackets how far it is from all labels at the horizon.",
        wide=True,
    )


def _estimate(segment: Document, loss: str) -> Estimate:
    found = segment["difference"][loss]
    low, high = interval_of(found) or (None, None)
    says = f"{segment['name']}: {with_interval(found['value'], interval_of(found), signed)}, "
    says += f"{count(segment['rows'])} rows"
    heading = segment["name"] == "all rows"
    return Estimate(segment["name"], found["value"], low, high, says, heading)


def _reliability(calibration: Sequence[Document] | None) -> list[Point]:
    drawn = []
    for part in calibration or ():
        rows, true = part["rows"], part["label_rate"]
        low, high = wilson(true * rows, rows) or (None, None)
        says = f"said {percent(part['mean_score'])}, came true {percent(true)}, {count(rows)} rows"
        drawn.append(Point(part["mean_score"], true, low, high, says))
    return drawn


def _cell(found: Document | None, wording: Wording = plain) -> str:
    return with_interval(value_at(found, "value"), interval_of(found), wording)


def _label_wording(label: str) -> Wording:
    return plain if label == "mean_label" else percent


def _until_all_came(within: Sequence[Document]) -> list[Document]:
    """What comes after the first that has all labels says nothing new."""
    before = [each for each in within if each["share"] < 1]
    return [*before, *within[len(before) : len(before) + 1]]


def _apart(found: float | None, exact: float | None, wording: Wording) -> str:
    apart = _less(found, exact)
    return points(apart) if wording is percent else plain(apart, decimals=4, signed=True)


def _less(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def _says(each: Document, time: str, share: str) -> str:
    return f"{percent(each[share])} within {duration(each[time])}"


def _identity(version: Document) -> dict[str, str]:
    return {"version": str(version["version"]), "sha256": version["sha256"]}
