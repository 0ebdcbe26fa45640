"""Draws what prove_evidence has measured, as the pictures of docs/canary.md.

python -m loadtests.evidence_plots evidence.json docs/plots
"""

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from app.evaluation import charts, page
from app.evaluation.charts import Point, Role, Series
from loadtests.prove_evidence import FalseRollbacks, Report

_STYLE_SHEET = Path(page.__file__).parent / "report.html"
_COMPARED = {
    "0.5 % fail": "independent, 0.5 % fail",
    "hourly": "failures by the hour",
    "bursts": "bursts of both",
    "own bursts": "bursts of one, half a block",
    "keys": "sticky keys, some always fail",
    "load": "latency, load as AR(1)",
}
_LENGTHS = {"half": 0.5, "once": 1.0, "twice": 2.0, "5 times": 5.0}
_EFFECTS: Mapping[str, tuple[str, Role]] = {
    "errors 5 x": ("2.5 % fail", "candidate"),
    "errors 2 x": ("1 % fail", "difference"),
    "errors 1.5 x": ("0.75 % fail", "champion"),
}


def pictures(report: Report) -> Iterator[tuple[str, str]]:
    """Names of files and SVG elements."""
    yield "canary-false-rollbacks", _false_rollbacks(report)
    yield "canary-delay", _delay(report)
    yield "canary-bursts", _bursts(report)


def _false_rollbacks(report: Report) -> str:
    of = {each.case: each for each in report.false}
    cases = [of[case] for case in _COMPARED.values()]
    rules: list[tuple[str, Role]] = [("z 0.01", "candidate"), ("Argo", "difference")]
    series = [
        Series("Hikyaku", "champion", [each.ours / each.rollouts for each in cases]),
        *(
            Series(_SHOWN[rule], role, [each.rules.get(rule, 0.0) for each in cases])
            for rule, role in rules
        ),
        Series("Kayenta", "other", [each.rules["Kayenta"] for each in cases]),
    ]
    y_title = "equal versions rolled back"
    return charts.columns(list(_COMPARED), series, y_title=y_title, tick=charts.share)


_SHOWN = {"z 0.01": "z-test, p < 0.01 at each look", "Argo": "Argo Rollouts, success ≥ 99 %"}


def _delay(report: Report) -> str:
    series = []
    for effect, (name, role) in _EFFECTS.items():
        [found] = [
            each
            for each in report.found
            if each.effect == effect and each.case == "canary 10%, blocks of 20"
        ]
        points = [
            Point(answers, 0.05 * (place + 1), says=f"{name}: {answers:,.0f} answers")
            for place, answers in enumerate(found.answers_by)
        ]
        series.append((name, role, points))
    return charts.curve(
        series,
        x_title="answers of the candidate",
        y_title="rolled back by then",
        x_tick=charts.number,
        y_tick=charts.share,
        log=True,
    )


def _bursts(report: Report) -> str:
    series: list[tuple[str, Role, list[Point]]] = []
    kinds: list[tuple[str, Role, str]] = [
        ("blocks of 20 keys", "candidate", "a block"),
        ("blocks of 250 keys", "champion", "a large block"),
    ]
    for name, role, block in kinds:
        points = [
            _burst(length, each)
            for each in report.false
            for says, length in _LENGTHS.items()
            if each.case == f"bursts of one, {says} {block}"
        ]
        series.append((name, role, sorted(points, key=lambda point: point.x)))
    return charts.curve(
        series,
        x_title="length of a burst, in blocks",
        y_title="rolled back",
        x_tick=charts.number,
        y_tick=charts.share,
        log=True,
    )


def _burst(length: float, of: FalseRollbacks) -> Point:
    return Point(length, of.ours / of.rollouts, says=f"{of.ours} of {of.rollouts:,}")


def standing_alone(svg: str) -> str:
    """An SVG element as a file of its own, in the colours of the reports."""
    lines = _STYLE_SHEET.read_text().split("<style>")[1].split("</style>")[0].splitlines()
    roots = lines[: lines.index("* { box-sizing: border-box; }")]
    style = "\n".join([*roots, *(line for line in lines if line.startswith("svg "))])
    font = "svg { background: var(--paper); font-family: system-ui, sans-serif; }"
    opened = svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    head, rest = opened.split(">", 1)
    return f"{head}><style>{style}\n{font}</style>{rest}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("report", type=Path)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    report = msgspec.json.decode(args.report.read_bytes(), type=Report)
    args.folder.mkdir(parents=True, exist_ok=True)
    for name, svg in pictures(report):
        (args.folder / f"{name}.svg").write_text(standing_alone(svg))


if __name__ == "__main__":
    main()
