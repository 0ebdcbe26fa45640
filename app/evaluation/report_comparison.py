"""The sections of a report about what two versions said of the same rows.

They are written from `comparison_document` (app/comparison/document.py), of which any number may be
null.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from app.evaluation import charts
from app.evaluation.charts import Estimate, Series
from app.evaluation.page import KeyFigure, Part, Plot, Section, Table
from app.evaluation.wording import (
    NONE,
    between,
    count,
    duration,
    instant,
    interval_of,
    percent,
    plain,
    signed,
    value_at,
    with_interval,
)

Document: TypeAlias = Mapping[str, Any]

_MOST_BARS = 48
_MOST_DECISIONS = 12
_NARROW = 4
_DROPS = {
    "timed_out": "the candidate had not answered in time",
    "queue_full": "too many rows waited for it: the oldest make room",
    "overloaded": "the champion's queue was long: its callers go first",
    "not_ready": "nothing was there that executes the candidate",
    "features_unavailable": "the features that it alone reads could not be read in time",
    "not_comparable": "its inputs cannot be made of what the champion was asked",
    "ended": "the comparison ended while they waited",
    "champion_failed": "the champion gave no answer: no candidate would have been shown them",
    "defect": "a defect of the service, which its log names",
}


class Subject(NamedTuple):
    """What is compared: both as they are called in the report, by which output, and from which
    score on the decision is true."""

    champion: str
    candidate: str
    output: str
    at_least: float | None


def comparison_sections(comparison: Document, subject: Subject, opening: Section) -> list[Section]:
    """The `opening` with the key figures of the comparison, and a section for each question."""
    opened = Section(
        opening.title,
        [*opening.lead, _counted(comparison)],
        [_rows(comparison)],
        _key_figures(comparison),
        opens=True,
    )
    if not comparison["compared"]:
        return [opened]
    sections = [
        _scores(comparison, subject),
        _difference(comparison),
        _decisions(comparison),
        _segments(comparison),
        _time(comparison),
    ]
    return [opened, *(section for section in sections if section.parts)]


def _counted(comparison: Document) -> str:
    first, last = comparison["first_s"], comparison["last_s"]
    if first is None or last is None:
        return "Nothing has been counted yet."
    return (
        f"Counted from {instant(first)} to {instant(last)}, in {count(comparison['blocks'])} "
        f"blocks of rows that were executed together. Intervals are at "
        f"{percent(comparison['level'])} and take each block as one observation, so that rows "
        "which fail or shift together do not look like many."
    )


def _key_figures(comparison: Document) -> list[KeyFigure]:
    difference, flips = comparison["difference"], comparison["flips"]
    absolute, failed = difference["mean_absolute"], comparison["failed"]
    decides = bool(comparison["decisions"])
    interval, of_flips = interval_of(difference), interval_of(flips)
    return [
        KeyFigure(
            "Rows compared",
            count(comparison["compared"]),
            f"of {count(comparison['rows'] + sum(comparison['dropped'].values()))} offered",
        ),
        KeyFigure(
            "Decisions that differ",
            percent(flips["share"], of_flips) if decides else NONE,
            f"{between(of_flips, percent)}; {count(flips['rows'])} rows"
            if decides
            else "the model decides nothing",
        ),
        KeyFigure(
            "Mean difference",
            signed(difference["mean"], interval),
            f"{between(interval, signed)}; candidate less champion",
        ),
        KeyFigure(
            "Mean size of the difference",
            plain(absolute["mean"], interval_of(absolute)),
            between(interval_of(absolute)),
        ),
        KeyFigure(
            "Rank correlation",
            plain(value_at(comparison, "association", "spearman")),
            "Spearman's: 1 where both order the rows alike",
        ),
        KeyFigure(
            "Failed rows",
            percent(failed["share"], interval_of(failed)),
            f"{between(interval_of(failed), percent)}; {count(failed['rows'])} rows",
        ),
    ]


def _rows(comparison: Document) -> Table:
    """What became of every row that was offered."""
    dropped = comparison["dropped"]
    failed, not_finite = comparison["failed"], comparison["not_finite"]
    rows = [
        ("compared", count(comparison["compared"]), "both gave a finite number"),
        ("failed", count(failed["rows"]), "the candidate gave an error or died on them"),
        (
            "not finite",
            count(not_finite["rows"]),
            "the candidate answered NaN or infinity",
        ),
        (
            "champion not finite",
            count(comparison["champion_not_finite"]["rows"]),
            "nothing can be said of these",
        ),
        *(
            (f"dropped: {reason}", count(number), _DROPS.get(reason, ""))
            for reason, number in dropped.items()
        ),
    ]
    return Table(
        "What became of the rows",
        ("", "rows", "why"),
        rows,
        "Dropped rows were never compared: nobody waits for a candidate. They are no errors of it, "
        "and few of them do no harm unless they are rows of one kind.",
        says_last=True,
        wide=True,
    )


def _scores(comparison: Document, subject: Subject) -> Section:
    parts: list[Part] = []
    of_scores = comparison["histograms"]["scores"]
    edges = _edges(of_scores, of_scores["champion"]["rows"])
    if len(edges) > 1:
        series = [
            Series(subject.champion, "champion", _shares(of_scores["champion"])),
            Series(subject.candidate, "candidate", _shares(of_scores["candidate"])),
        ]
        parts.append(
            Plot(
                "Scores of both",
                charts.distributions(edges, series, x_title=subject.output),
                "How often each score is given. Two outlines on each other do not mean that the "
                "same row gets the same score: that is the plot beside."
                + _beyond(of_scores["champion"], of_scores["candidate"]),
            )
        )
        parts += _joint(comparison, edges, subject)
    parts += [_score_table(comparison, subject), *_distance(comparison)]
    lead = ["What both say of the same rows, each by itself and together."]
    return Section("Scores", lead, parts)


def _joint(comparison: Document, edges: Sequence[float], subject: Subject) -> list[Part]:
    joint = comparison["joint"]
    if joint is None or not joint["cells"]:
        return []
    drawn = charts.heat(
        *_on_even_cells(joint, edges),
        x_title=f"{subject.output} of the champion",
        y_title=f"{subject.output} of the candidate",
        threshold=subject.at_least,
    )
    says = (
        "Each row once: the darker, the more rows, by the logarithm. On the dotted line both say "
        "the same; a cloud beside it is a shift, a wide one is disagreement row by row."
    )
    if subject.at_least is not None:
        says += f" The dashed lines are the threshold, {charts.number(subject.at_least)}."
    return [Plot("Both scores of each row", drawn, says)]


def _on_even_cells(
    joint: Document, edges: Sequence[float]
) -> tuple[list[float], list[list[float]]]:
    """The cells of the joint grid, whose bins grow with the numbers, laid on even ones: a part of a
    bin gets its part of the rows."""
    even = np.linspace(edges[0], edges[-1], min(len(edges) - 1, _MOST_BARS) + 1)
    low, high = np.array(joint["low"]), np.array(joint["high"])
    champion, candidate, rows = np.array(joint["cells"], dtype=np.int64).T
    cells = np.zeros((len(low), len(low)))
    cells[champion, candidate] = rows
    # What is exactly 0 is a bin of no width.
    width = np.maximum(high - low, np.finfo(np.float64).tiny)[:, np.newaxis]
    overlap = np.minimum(high[:, np.newaxis], even[1:]) - np.maximum(low[:, np.newaxis], even[:-1])
    parts = np.clip(overlap, 0, None) / width
    points = low == high
    parts[points] = (low[points, np.newaxis] >= even[:-1]) & (low[points, np.newaxis] < even[1:])
    return even.tolist(), (parts.T @ cells @ parts).round(2).tolist()


def _score_table(comparison: Document, subject: Subject) -> Table:
    champion, candidate = comparison["champion"], comparison["candidate"]
    rows = [
        (name, plain(champion[key]), plain(candidate[key]))
        for name, key in (("mean", "mean"), ("standard deviation", "standard_deviation"))
    ]
    rows += [
        (_quantile_name(name), plain(value), plain(candidate["quantiles"].get(name)))
        for name, value in champion["quantiles"].items()
    ]
    return Table(
        "Their distributions in numbers",
        (subject.output, subject.champion, subject.candidate),
        rows,
        "Quantiles are off by 1.6 % of themselves at most.",
    )


def _distance(comparison: Document) -> list[Part]:
    found = comparison["score_distance"]
    if found is None:
        return []
    association = comparison["association"]
    rows = [
        (
            "population stability index",
            plain(found["psi"]),
            f"of two independent samples of one distribution, of this size, 99 % lie below "
            f"{plain(found['psi_null_99'])}; in practice {found['psi_practical']:g} counts as "
            "different",
        ),
        (
            "Kullback-Leibler divergence",
            f"{plain(found['kl_champion_candidate'])} / {plain(found['kl_candidate_champion'])}",
            "in nats, champion from candidate and the other way round; the index is their sum",
        ),
        (
            "Jensen-Shannon distance",
            plain(found["js_distance"]),
            "root of the divergence; 0 alike, 0.83 nothing in common",
        ),
        (
            "Kolmogorov-Smirnov distance",
            plain(found["ks"]),
            "largest difference of the shares of rows below a score",
        ),
        (
            "Spearman's rank correlation",
            plain(association["spearman"]),
            "of the same rows: 1 where both order them alike",
        ),
        (
            "Kendall's tau-b",
            plain(association["kendall_tau_b"]),
            "by how much more often both order two rows alike than otherwise",
        ),
    ]
    note = (
        f"Descriptors, over {count(found['bins'])} bins at the champion's deciles; nothing is "
        "decided by them. The first four compare the two distributions, and their usual tests hold "
        "between different rows only. Here the rows are the same: the paired difference is what "
        "counts, and both distributions may be alike though every prediction has changed."
    )
    head = ("", "value", "how to read it")
    return [Table("How far apart", head, rows, note, says_last=True, wide=True)]


def _difference(comparison: Document) -> Section:
    difference = comparison["difference"]
    drawn = comparison["histograms"]["difference"]
    edges = _edges(drawn, drawn["rows"])
    alike = difference["equal"] == comparison["compared"]
    parts: list[Part] = []
    if len(edges) > 1 and not alike:
        series = [Series("candidate less champion", "difference", _shares(drawn))]
        parts.append(
            Plot(
                "Distribution of the difference",
                charts.distributions(edges, series, x_title="difference of the scores"),
                "Of each row, candidate less champion: to the right of 0 the candidate says more."
                + _beyond(drawn),
            )
        )
    absolute = difference["mean_absolute"]
    rows = [
        ("mean", signed(difference["mean"], interval_of(difference)), _between(difference)),
        (
            "mean of its size",
            plain(absolute["mean"], interval_of(absolute)),
            between(interval_of(absolute)),
        ),
        ("standard deviation", plain(difference["standard_deviation"]), NONE),
        ("root mean square", plain(difference["root_mean_square"]), NONE),
        ("smallest", signed(difference["min"]), NONE),
        *(
            (_quantile_name(name), signed(value), NONE)
            for name, value in difference["quantiles"].items()
        ),
        ("largest", signed(difference["max"]), NONE),
        ("rows with equal scores", count(difference["equal"]), NONE),
    ]
    interval = f"{percent(comparison['level'])} interval"
    parts.append(
        Table("The difference in numbers", ("candidate less champion", "", interval), rows)
    )
    lead = ["How the score of a row changes from the champion to the candidate."]
    if alike:
        lead = ["Both gave every row the same score."]
    return Section("Difference", lead, parts)


def _decisions(comparison: Document) -> Section:
    parts = [_decision_table(comparison)] if comparison["decisions"] else []
    flips = comparison["flips"]
    lead = [
        f"On {count(flips['rows'])} of {count(comparison['compared'])} rows the candidate decides "
        f"otherwise: {with_interval(flips['share'], interval_of(flips), percent)}."
    ]
    return Section("Decisions", lead, parts)


def _decision_table(comparison: Document) -> Table:
    cells = comparison["decisions"]
    known = list(dict.fromkeys(_decision(cell[side]) for side in _SIDES for cell in cells))
    if len(known) > _MOST_DECISIONS:
        return _changes(cells)
    by = {(_decision(c["champion"]), _decision(c["candidate"])): c["rows"] for c in cells}
    rows = [(theirs, *(count(by.get((ours, theirs), 0)) for ours in known)) for theirs in known]
    note = (
        "Rows by what the champion decided (across) and the candidate (down); off the diagonal "
        "the two differ."
    )
    head = ("candidate ↓ champion →", *known)
    return Table("Both decisions", head, rows, note, wide=len(known) > _NARROW)


def _changes(cells: Sequence[Document]) -> Table:
    """Of more decisions than a matrix shows."""
    changed = [cell for cell in cells if cell["champion"] != cell["candidate"]]
    changed.sort(key=lambda cell: -cell["rows"])
    rows = [
        (f"{_decision(c['champion'])} → {_decision(c['candidate'])}", count(c["rows"]))
        for c in changed[:_MOST_DECISIONS]
    ]
    note = f"The {len(rows)} most frequent of {len(changed)} changes."
    return Table("Decisions that differ", ("champion → candidate", "rows"), rows, note)


def _segments(comparison: Document) -> Section:
    segments = comparison["segments"]
    if not segments:
        return Section("Segments", [])
    all_rows = {"name": "all rows", **comparison}
    each = [all_rows, *segments]
    decides = bool(comparison["decisions"])
    level = percent(comparison["level"])
    parts: list[Part] = [
        Plot(
            "Mean difference by segment",
            charts.forest(
                [_estimate(group, group["difference"], "mean", signed) for group in each],
                x_title=f"mean difference of the scores, {level} interval",
                tick=charts.number,
            ),
            "Candidate less champion. Where a line crosses 0, the rows so far are in keeping with "
            "no shift; with many segments some lines miss it by chance.",
        )
    ]
    if decides:
        parts.append(
            Plot(
                "Decisions that differ by segment",
                charts.forest(
                    [_estimate(group, group["flips"], "share", percent) for group in each],
                    x_title=f"share of rows decided otherwise, {level} interval",
                    tick=charts.share,
                ),
                "A candidate that is like the champion over all may be another model for one kind "
                "of row.",
            )
        )
    rows = [
        (
            group["name"],
            count(group["rows"]),
            count(group["failed"]["rows"]),
            with_interval(group["flips"]["share"], interval_of(group["flips"]), percent)
            if decides
            else NONE,
            with_interval(group["difference"]["mean"], interval_of(group["difference"]), signed),
            plain(group["difference"]["mean_absolute"]["mean"]),
            plain(value_at(group, "score_distance", "psi")),
        )
        for group in each
    ]
    head = (
        "",
        "rows",
        "failed",
        "decided otherwise",
        "mean difference",
        "its mean size",
        "stability index",
    )
    parts.append(Table("Segments in numbers", head, rows, wide=True))
    lead = ["The segments that model.yaml declares; a row is in one segment of each kind."]
    return Section("Segments", lead, parts)


def _estimate(group: Document, found: Document, key: str, wording: Any) -> Estimate:
    low, high = interval_of(found) or (None, None)
    says = f"{group['name']}: {with_interval(found[key], interval_of(found), wording)}, "
    says += f"{count(group['compared'])} rows"
    heading = group["name"] == "all rows"
    return Estimate(group["name"], found[key], low, high, says, heading)


def _time(comparison: Document) -> Section:
    times = comparison["execution_time"]
    if not times["rows"]:
        return Section("Compute time", [])
    told = {name: _in_seconds(times[name]) for name in _SIDES}
    columns = list(told["champion"])
    series = [
        Series(name, name, [told[name][column] or 0.0 for column in columns]) for name in _SIDES
    ]
    rows = [
        (column, duration(told["champion"][column]), duration(told["candidate"][column]))
        for column in columns
    ]
    rows.append(("ratio of the means", NONE, plain(times["ratio_of_means"])))
    parts: list[Part] = [
        Plot(
            "Execution time of a row",
            charts.columns(columns, series, y_title="time of a row", tick=charts.seconds),
            "The time of an execution over its rows. No verdict: the candidate runs in a process "
            "of its own at the lowest priority, and in blocks of another size than the champion's "
            "batches.",
        ),
        Table("Compute time in numbers", ("of a row", *_SIDES), rows),
    ]
    lead = [f"Of {count(times['rows'])} rows of which both times are known."]
    return Section("Compute time", lead, parts)


_SIDES: tuple[charts.Side, charts.Side] = ("champion", "candidate")


def _in_seconds(times: Document) -> dict[str, float | None]:
    every = {"mean": times["mean_ms"]}
    every |= {_quantile_name(name): value for name, value in times["quantiles_ms"].items()}
    return {name: None if value is None else value / 1e3 for name, value in every.items()}


def _edges(histogram: Document, bars: Sequence[int]) -> list[float]:
    if not bars:
        return []
    return [histogram["first"] + place * histogram["width"] for place in range(len(bars) + 1)]


def _shares(bars: Document) -> list[float]:
    total = sum(bars["rows"]) + bars["below"] + bars["above"]
    return [rows / total if total else 0.0 for rows in bars["rows"]]


def _beyond(*bars: Document) -> str:
    """A sentence about what is not drawn."""
    rows = sum(one["below"] + one["above"] for one in bars)
    return f" {count(rows)} further out are not drawn." if rows else ""


def _between(found: Document) -> str:
    return between(interval_of(found), signed)


def _quantile_name(name: str) -> str:
    """`p50` is the median."""
    return "median" if name == "p50" else f"{name.removeprefix('p')} % quantile"


def _decision(decision: Any) -> str:
    if decision is None:
        return "none"
    return str(decision).lower() if isinstance(decision, bool) else str(decision)
