"""The time line of a release as one SVG: which share the candidate answered, and the evidence."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from pathlib import Path

_WIDTH, _HEIGHT = 860, 470
_LEFT, _RIGHT = 62, 190
_SHARE, _EVIDENCE = (24, 110), (150, 420)
"""Top and bottom of both panels."""
_LEAST, _MOST = -4.0, 6.0
"""Of the logarithms that are drawn; beyond these a line lies on the edge."""
_COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#a463f2", "#97bbf5", "#9c6b4e")
_STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#333}.frame{fill:none;stroke:#bbb}"
    ".level{stroke:#888;stroke-dasharray:4 3}path{fill:none;stroke-width:1.8}"
    "svg{background:#fff}"
)


@dataclass(frozen=True)
class Moment:
    """How the release stood."""

    at_s: float
    """Feature time, seconds since 1970."""
    share: float | None
    """Of the keys that the candidate answers; None where no release is under way."""
    version: int
    """The champion."""
    worse: Mapping[str, float]
    """By guardrail, base-10 logarithm of E against the claim that it is no worse."""
    no_worse: Mapping[str, float]
    """The same against the claim that it is worse by the margin."""


def draw(path: Path, title: str, moments: Sequence[Moment], rolls_back_at: float) -> None:
    """Of a release that has begun and ended between the first moment and the last one."""
    first_s, last_s = moments[0].at_s, moments[-1].at_s

    def x(at_s: float) -> float:
        return _LEFT + (at_s - first_s) / (last_s - first_s) * (_WIDTH - _LEFT - _RIGHT)

    def share_y(share: float) -> float:
        return _SHARE[1] - share * (_SHARE[1] - _SHARE[0])

    def log_y(value: float) -> float:
        part = (min(max(value, _LEAST), _MOST) - _LEAST) / (_MOST - _LEAST)
        return _EVIDENCE[1] - part * (_EVIDENCE[1] - _EVIDENCE[0])

    parts = [f"<title>{escape(title)}</title><style>{_STYLE}</style>"]
    parts.append(f'<text x="{_LEFT}" y="15">{escape(title)}</text>')
    for top, bottom in (_SHARE, _EVIDENCE):
        width = _WIDTH - _LEFT - _RIGHT
        parts.append(
            f'<rect class="frame" x="{_LEFT}" y="{top}" width="{width}" height="{bottom - top}"/>'
        )
    for share in (0.0, 0.5, 1.0):
        parts.append(f'<text x="8" y="{share_y(share) + 4:.1f}">{share:.0%}</text>')
    for value in range(int(_LEAST), int(_MOST) + 1, 2):
        parts.append(f'<text x="22" y="{log_y(value) + 4:.1f}">{value}</text>')
    for name, level in (("rolled back", rolls_back_at), ("promoted", 1.301)):
        y = log_y(level)
        end = _WIDTH - _RIGHT
        parts.append(f'<line class="level" x1="{_LEFT}" x2="{end}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT + 4}" y="{y - 4:.1f}">{name}</text>')
    for month in _months(first_s, last_s):
        at = datetime.fromtimestamp(month, UTC)
        parts.append(f'<text x="{x(month):.1f}" y="{_EVIDENCE[1] + 18}">{at:%d %b}</text>')
    steps = [(x(moment.at_s), share_y(_answered(moment, moments[0]))) for moment in moments]
    parts.append(_line(_stepped(steps), "#222", ""))
    names = sorted({name for moment in moments for name in (*moment.worse, *moment.no_worse)})
    right, top = _WIDTH - _RIGHT + 10, _EVIDENCE[0] + 12
    parts.append(f'<text x="{right}" y="{_SHARE[0] + 12}">answered by the candidate</text>')
    parts.append(f'<text x="{right}" y="{top}">log10 E, — within the margin,</text>')
    parts.append(f'<text x="{right}" y="{top + 16}">· · it is worse:</text>')
    for number, name in enumerate(names):
        colour = _COLOURS[number % len(_COLOURS)]
        for of_claim, dashes in (("no_worse", ""), ("worse", "2 3")):
            found = [
                (x(moment.at_s), log_y(getattr(moment, of_claim)[name]))
                for moment in moments
                if name in getattr(moment, of_claim)
            ]
            if found:
                parts.append(_line(found, colour, dashes))
        parts.append(
            f'<text x="{right}" y="{top + 38 + 16 * number}" style="fill:{colour}">'
            f"{escape(name)}</text>"
        )
    body = "\n".join(parts)
    size = f'viewBox="0 0 {_WIDTH} {_HEIGHT}"'
    path.write_text(f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n{body}\n</svg>\n')


def _answered(moment: Moment, first: Moment) -> float:
    if moment.share is not None:
        return moment.share
    return float(moment.version != first.version)


def _stepped(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    """Level from each point to the next one."""
    stepped = [points[0]]
    for x, y in points[1:]:
        stepped += [(x, stepped[-1][1]), (x, y)]
    return stepped


def _line(points: Sequence[tuple[float, float]], colour: str, dashes: str) -> str:
    places = " L".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'<path d="M{places}" stroke="{colour}"{dashed}/>'


def _months(first_s: float, last_s: float) -> Sequence[float]:
    """The first of each month, and the fifteenth."""
    first = datetime.fromtimestamp(first_s, UTC)
    months = [divmod(first.month - 1 + later, 12) for later in range(6)]
    days = [
        datetime(first.year + years, month + 1, day, tzinfo=UTC)
        for years, month in months
        for day in (1, 15)
    ]
    return [day.timestamp() for day in days if first_s <= day.timestamp() <= last_s]
