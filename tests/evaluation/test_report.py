"""The report of a comparison: whole, by itself, and safe to open."""

import dataclasses
import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from app.comparison.document import comparison_document
from app.comparison.pairs import NO_DECISION, Pairs
from app.comparison.table import ComparisonTable
from app.errors import ConfigurationError, HikyakuError
from app.evaluation.report import report
from app.evaluation.report_page import report_html
from app.labels.bucket import Kept, Version
from app.labels.document import quality_document
from app.labels.form import LabelForm
from app.labels.quality import QualityTable, judged

HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)></style>{{ 7 * 7 }}'
ORIGINS = ("origin=EWR", "origin=JFK", "origin=other")


def pairs(rows: int, *, block_rows: int = 8, decides: bool = True) -> Pairs:
    """Of rows of two segments; the candidate says 0.1 more."""
    random = np.random.default_rng(7)
    champion = random.uniform(0, 0.9, rows)
    candidate = champion + 0.1
    decided = [
        (scores >= 0.5).astype(np.int32) if decides else np.full(rows, NO_DECISION, np.int32)
        for scores in (champion, candidate)
    ]
    return Pairs(
        np.arange(rows, dtype=np.int32) // block_rows,
        champion,
        candidate,
        *decided,
        np.zeros(rows, bool),
        (np.arange(rows, dtype=np.int32) % 2)[:, np.newaxis],
        random.uniform(1e-5, 2e-5, rows),
        random.uniform(2e-5, 4e-5, rows),
    )


def counted(*, rows: int = 400, origins: tuple[str, ...] = ORIGINS, **how: Any) -> dict[str, Any]:
    table = ComparisonTable.empty((origins,), 2 if how.get("decides", True) else 0, True)
    if rows:
        table.add(pairs(rows, **how), 1_388_534_400.0)
    table.drop("timed_out", 12)
    return comparison_document(table, (False, True))


def document(comparison: dict[str, Any] | None, **more: Any) -> dict[str, Any]:
    candidate = {"version": "2", "sha256": "b" * 64, "share": 0.25, "trial": "t"}
    return {
        "model": "flights",
        "champion": {"version": "1", "sha256": "a" * 64},
        "candidates": [candidate | {"comparison": comparison}],
        "quality": None,
        **more,
    }


def quality(
    kind: Literal["binary", "class", "number"] = "binary",
    *,
    labelled: float = 0.9,
    clusters: int = 40,
    origins: tuple[str, ...] = ORIGINS,
) -> dict[str, Any]:
    """Of 25 predictions a cluster by version 1, which version 2 was shown; late labels are true."""
    classes = ("red", "green", "blue") if kind == "class" else ()
    form = LabelForm(kind, "probability", classes, (origins,))
    random = np.random.default_rng(5)
    buckets = []
    for _ in range(clusters):
        rows = np.zeros(25, form.row)
        rows["predicted_s"] = 1_388_534_400 + random.uniform(0, 86_400, 25)
        numbers = random.dirichlet(np.ones(form.width), 25) if classes else random.random((25, 1))
        rows["numbers"] = numbers.reshape(rows["numbers"].shape)
        rows["segments"] = random.integers(0, 2, (25, 1))
        labels = (random.random(25) < numbers[:, 0]).astype(float)
        arrived_s = rows["predicted_s"] + 3_600 * (1 + 2 * labels)
        is_labelled = random.random(25) < labelled
        buckets.append(
            Kept(
                names=[bytes([row]) for row in range(25)],
                rows=rows,
                versions={0: Version(1, "a" * 64), 1: Version(2, "b" * 64)},
                labels=np.where(is_labelled, labels, np.nan),
                is_labelled=is_labelled,
                arrived_s=np.where(is_labelled, arrived_s, np.nan),
                candidates={1: np.clip(numbers * 0.9, 0, 1)},
                shown={1: np.ones(25, np.bool_)},
            )
        )
    table = judged(form, buckets) if buckets else QualityTable()
    return quality_document(form, table)


class Elements(HTMLParser):
    """The elements of a page with their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += f"{data}\n"


def test_the_report_has_the_figures_of_the_comparison() -> None:
    comparison = counted()
    page = Elements(report_html(document(comparison)))
    flips, difference = comparison["flips"], comparison["difference"]
    assert "flights: version 2 beside version 1" in page.text
    assert f"{flips['rows']} of 400 rows" in page.text
    assert f"{comparison['difference']['mean']:+.4g}"[:5] in page.text
    assert f"{difference['root_mean_square']:.4g}" in page.text
    assert "dropped: timed_out" in page.text
    assert "25 % of the requests" in page.text
    assert {"origin=EWR", "origin=JFK"} <= set(page.text.split())
    assert [tag for tag, _ in page.found].count("svg") == 6


def test_the_report_says_who_was_right_and_what_not_waiting_would_have_said() -> None:
    found = quality()
    text = Elements(report_html(document(counted(), quality=found))).text
    (pair,), (version,) = found["pairs"], found["versions"]
    for name, losses in (("log loss", "log_loss"), ("Brier score", "brier")):
        assert name in text
        for side in ("champion", "candidate"):
            assert f"{pair[side]['losses'][losses]['value']:.3f}" in text
    assert f"{pair['champion']['auc']['value']:.3f}" in text
    assert "Reliability" in text
    assert f"{100 * version['coverage']:.2f} %" in text
    at_once = next(w for w in version["as_labels_arrive"]["window"] if w["window_s"] == 10_800)
    late = at_once["label_rate"] - version["as_labels_arrive"]["at_horizon"]["label_rate"]
    assert late < -0.1
    assert f"{100 * late:.2f} pp".replace("-", "\u2212") in text


@pytest.mark.parametrize(
    "found",
    [
        quality(clusters=0),
        quality(clusters=1),
        quality(labelled=0.0),
        quality("class"),
        quality("number"),
    ],
    ids=["nothing due", "one cluster", "no label came", "classes", "numbers"],
)
def test_what_labels_do_not_say_is_a_dash(found: dict[str, Any]) -> None:
    text = Elements(report_html(document(counted(), quality=found))).text
    assert "None" not in text
    assert "nan" not in text.split()
    assert "Scores" in text


def test_labels_of_another_champion_say_nothing_of_this_one() -> None:
    other = document(counted(), quality=quality(), champion={"version": "9", "sha256": "c" * 64})
    text = Elements(report_html(other)).text
    assert "Who was right" not in text
    assert "Of version 1, predictions from" in text


def test_the_report_is_one_file_that_loads_nothing() -> None:
    page = report_html(document(counted(), quality=quality()))
    elements = Elements(page)
    assert {tag for tag, _ in elements.found}.isdisjoint({"script", "iframe", "object", "img"})
    links = [
        value
        for _, attributes in elements.found
        for name, value in attributes.items()
        if name in {"href", "src", "srcset", "xlink:href"}
    ]
    assert all(link is not None and link.startswith(("#", "data:")) for link in links)
    assert "url(" not in page
    assert "@import" not in page


@pytest.mark.parametrize(
    "comparison",
    [
        None,
        counted(rows=0),
        counted(rows=1),
        counted(rows=8),
        counted(decides=False),
    ],
    ids=["nothing written", "no rows", "one row", "one block", "no decision"],
)
def test_what_is_not_known_is_a_dash(comparison: dict[str, Any] | None) -> None:
    text = Elements(report_html(document(comparison))).text
    assert "None" not in text
    assert "nan" not in text.split()
    assert "—" in text or comparison is None


def test_a_model_without_candidates_has_a_report_too() -> None:
    page = report_html(document(None) | {"candidates": [], "champion": None})
    assert "no candidate beside version —" in Elements(page).text


def test_two_candidates_each_have_their_sections() -> None:
    both = document(counted())
    both["candidates"].append(both["candidates"][0] | {"version": "3"})
    text = Elements(report_html(both)).text
    assert "Scores, version 2" in text
    assert "Scores, version 3" in text


def test_versions_that_say_the_same_are_said_to() -> None:
    table = ComparisonTable.empty((ORIGINS,), 2, True)
    said = pairs(64)
    same = dataclasses.replace(
        said, candidate=said.champion, candidate_decision=said.champion_decision
    )
    table.add(same, 0.0)
    text = Elements(report_html(document(comparison_document(table)))).text
    assert "Both gave every row the same score." in text
    assert "+0" not in text
    assert "Distribution of the difference" not in text


def test_many_decisions_are_told_by_their_most_frequent_changes() -> None:
    comparison = counted()
    names = [f"class {number}" for number in range(20)]
    comparison["decisions"] = [
        {"champion": one, "candidate": "class 0", "rows": rows} for rows, one in enumerate(names, 1)
    ]
    text = Elements(report_html(document(comparison))).text
    assert "class 19 → class 0" in text
    assert "12 most frequent of 19 changes" in text


def test_names_do_nothing_in_the_page() -> None:
    comparison = counted(origins=(HOSTILE, "<b>origin</b>", "other"))
    comparison["dropped"] = {HOSTILE: 3}
    comparison["decisions"][0]["champion"] = HOSTILE
    labels = quality(origins=(HOSTILE, "<b>origin</b>", "other"))
    hostile = document(comparison, model=HOSTILE, output=HOSTILE, quality=labels)
    hostile["candidates"][0] |= {"version": HOSTILE, "sha256": HOSTILE}
    page = Elements(report_html(hostile))
    assert {tag for tag, _ in page.found}.isdisjoint({"script", "img", "b"})
    assert not any(name.startswith("on") for _, attributes in page.found for name in attributes)
    assert "{{ 7 * 7 }}" in page.text


def test_a_browser_opens_the_report_without_a_complaint(tmp_path: Path) -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not on PATH; Debian's package chromium has it")
    page = tmp_path / "report.html"
    page.write_text(report_html(document(counted(), quality=quality())), encoding="utf-8")
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    own = [f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--dump-dom"]
    told = subprocess.run(
        [chromium, *quiet, *own, page.as_uri()], capture_output=True, text=True, timeout=60
    )
    assert "What became of the rows" in told.stdout
    assert "CONSOLE" not in told.stderr


@contextmanager
def answering(status: int, body: Any) -> Iterator[str]:
    """A service that answers every request alike; its address."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = json.dumps({**body, "asked": self.path}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_the_report_is_drawn_from_what_the_service_answers(tmp_path: Path) -> None:
    output = tmp_path / "report.html"
    with answering(200, document(counted())) as url:
        report("flights", 2, url, None, output)
    assert "flights: version 2 beside version 1" in output.read_text(encoding="utf-8")


def test_a_refusal_of_the_service_is_told_in_its_words(tmp_path: Path) -> None:
    refusal = {"error": {"code": "not_found", "message": "flights has no candidate of version 7"}}
    with (
        answering(404, refusal) as url,
        pytest.raises(HikyakuError, match=r"candidate=7: flights has no candidate of version 7"),
    ):
        report("flights", 7, url, None, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_the_report_is_drawn_from_a_file_of_that_model(tmp_path: Path) -> None:
    kept, output = tmp_path / "comparison.json", tmp_path / "report.html"
    kept.write_text(json.dumps(document(counted())))
    report("flights", None, "", kept, output)
    assert "Segments" in output.read_text(encoding="utf-8")
    with pytest.raises(ConfigurationError, match="of the model 'flights'"):
        report("other", None, "", kept, output)
    with pytest.raises(ConfigurationError, match="has no candidate of version 3"):
        report("flights", 3, "", kept, output)


@pytest.mark.parametrize("content", ["", "[]", '{"model": "flights"}'])
def test_a_file_of_something_else_is_refused(tmp_path: Path, content: str) -> None:
    kept = tmp_path / "comparison.json"
    kept.write_text(content)
    with pytest.raises(HikyakuError, match=str(kept)):
        report("flights", None, "", kept, tmp_path / "report.html")


def test_a_comparison_of_another_release_is_refused_with_what_it_lacks(tmp_path: Path) -> None:
    kept, output = tmp_path / "kept.json", tmp_path / "report.html"
    candidate = {"version": "2", "comparison": {"rows": 1}}
    document = {"model": "flights", "champion": {"version": "1"}, "candidates": [candidate]}
    kept.write_text(json.dumps(document))
    with pytest.raises(HikyakuError, match=r"kept\.json.*another release"):
        report("flights", None, "", kept, output)
    assert not output.exists()


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="nowhere"):
        report("flights", None, "", tmp_path / "nowhere.json", tmp_path / "report.html")
