"""The report of a comparison, for whoever is on call and whoever trained the model."""

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from app import __version__
from app.evaluation.page import Page, Section, as_html
from app.evaluation.report_comparison import Subject, comparison_sections
from app.evaluation.report_quality import labels_section, pair_of, pair_section
from app.evaluation.wording import NONE, percent, value_at


def report_html(document: Mapping[str, Any]) -> str:
    """Of what `GET /v1/models/{name}/comparison` answers, or `hikyaku compare` writes."""
    champion, candidates = document["champion"], document["candidates"]
    versions = [f"version {_version(each)}" for each in candidates] or ["no candidate"]
    title = f"{document['model']}: {', '.join(versions)} beside version {_version(champion)}"
    sections = [
        section
        for candidate in candidates
        for section in _of_candidate(candidate, document, several=len(candidates) > 1)
    ]
    sections += _of_labels(document)
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return as_html(
        Page(
            title,
            [
                "The champion answers; a candidate is shown the same rows, and its answers go to "
                "nobody. This report says how they differ. It gives no verdict."
            ],
            sections,
            f"Made by Hikyaku {__version__}, {now}.",
        )
    )


def _of_candidate(
    candidate: Mapping[str, Any], document: Mapping[str, Any], *, several: bool
) -> list[Section]:
    champion = document["champion"]
    subject = Subject(
        f"champion, version {_version(champion)}",
        f"candidate, version {_version(candidate)}",
        document.get("output") or value_at(document, "quality", "output") or "score",
        document.get("threshold"),
    )
    lead = [f"Champion: {_identity(champion)}. Candidate: {_identity(candidate)}."]
    if candidate.get("share") is not None:
        lead.append(f"The candidate is shown {percent(candidate['share'])} of the requests.")
    opening = Section(f"Candidate: version {_version(candidate)}", lead, opens=True)
    comparison = candidate.get("comparison")
    if comparison is None:
        return [replace(opening, lead=[*lead, "Nothing has been counted yet."])]
    first, *others = comparison_sections(comparison, subject, opening)
    quality = document.get("quality")
    pair = None if quality is None else pair_of(quality, champion, candidate)
    if quality is not None and pair is not None:
        others = [pair_section(quality, pair), *others]
    if not several:
        return [first, *others]
    of = f"version {_version(candidate)}"
    return [first, *(replace(each, title=f"{each.title}, {of}") for each in others)]


def _of_labels(document: Mapping[str, Any]) -> list[Section]:
    """Of the champion; of another version that served before while nothing is due of it."""
    quality = document.get("quality")
    if quality is None or not quality["versions"]:
        return []
    version = value_at(document["champion"], "version")
    own = [each for each in quality["versions"] if each["version"] == version]
    return [labels_section(quality, (own or quality["versions"])[0])]


def _identity(chosen: Mapping[str, Any] | None) -> str:
    """The version, and as much of the digest of its manifest as tells it apart."""
    sha256 = value_at(chosen, "sha256")
    return f"version {_version(chosen)}" + (f" (manifest {sha256[:12]}…)" if sha256 else "")


def _version(chosen: Mapping[str, Any] | None) -> str:
    """A dash where it is not known who it was."""
    version = value_at(chosen, "version")
    return NONE if version is None else str(version)
