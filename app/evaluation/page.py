"""A report as one HTML file: sections of figures, tables and plots, with nothing outside of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from jinja2 import Environment, PackageLoader, StrictUndefined

_TEMPLATE = "report.html"
_templates = Environment(
    loader=PackageLoader("app", "evaluation"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


@dataclass(frozen=True, slots=True)
class KeyFigure:
    """A number to see first; `says` is its interval, or what it is of."""

    name: str
    value: str
    says: str


@dataclass(frozen=True, slots=True)
class Table:
    """Cells as text. With `says_last` the last column is sentences."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    says_last: bool = False
    wide: bool = False


@dataclass(frozen=True, slots=True)
class Plot:
    """`drawn` is an SVG element of app/evaluation/charts.py, whose texts are escaped; `says` tells
    how to read it."""

    title: str
    drawn: str
    says: str
    wide: bool = False


Part: TypeAlias = Table | Plot


@dataclass(frozen=True, slots=True)
class Section:
    """`opens`: the first section of a candidate."""

    title: str
    lead: Sequence[str]
    parts: Sequence[Part] = ()
    figures: Sequence[KeyFigure] = ()
    opens: bool = False


@dataclass(frozen=True, slots=True)
class Page:
    """`made` says from what, and when."""

    title: str
    lead: Sequence[str]
    sections: Sequence[Section]
    made: str


def as_html(page: Page) -> str:
    """The page; every text is escaped."""
    return _templates.get_template(_TEMPLATE).render(page=page) + "\n"
