"""Plots as SVG elements that take their colours from the page's style sheet, dark or light.

They are drawn here and not by a plotting library: a picture of that has its colours and the size of
its text fixed, and a report must be made where only the service is installed.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, TypeAlias
from xml.etree import ElementTree as xml

Side: TypeAlias = Literal["champion", "candidate"]
Role: TypeAlias = Side | Literal["difference", "other"]
"""The class of what is drawn: its colour."""

WIDTH, HEIGHT = 560.0, 330.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 58.0, 14.0, 14.0, 46.0
_LINE = 22.0
_TICKS = 6
_LETTER = 6.8  # wide on average, at the style sheet's size
_MOST_LETTERS = 30


@dataclass(frozen=True, slots=True)
class Scale:
    """Numbers from `low` to `high` lie on pixels from `start` to `end`; `log` has decades apart
    evenly, and then `low` is above 0."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    @classmethod
    def over(
        cls, values: Sequence[float], start: float, end: float, *, log: bool = False
    ) -> "Scale":
        """Holds all the values, of which some may be alike, or none there."""
        low, high = min(values, default=0.0), max(values, default=1.0)
        if high <= low:
            room = abs(low) * 0.5 or 0.5
            low, high = (low / 2, high * 2) if log else (low - room, high + room)
        return cls(low, high, start, end, log)

    def __call__(self, value: float) -> float:
        """The pixel; of a value beyond an end, that end."""
        value = min(max(value, self.low), self.high)
        if self.log:
            part = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            part = (value - self.low) / (self.high - self.low)
        return self.start + part * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round numbers between the ends."""
        if self.log:
            return self._powers()
        step = _round_step((self.high - self.low) / _TICKS)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]

    def _powers(self) -> list[float]:
        low, high = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        factors = (1, 2, 5) if high - low <= 3 else (1,)
        every = [factor * 10.0**power for power in range(low, high + 1) for factor in factors]
        return [value for value in every if self.low <= value <= self.high]


@dataclass(frozen=True, slots=True)
class Series:
    """`values` of one role: of each bin, or of each point."""

    name: str
    role: Role
    values: Sequence[float]


@dataclass(frozen=True, slots=True)
class Point:
    """`y` at `x`, and where there is an interval its ends; `says` is shown when pointed at."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    says: str = ""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A line of a forest plot; without a `value` there are no rows."""

    name: str
    value: float | None
    low: float | None
    high: float | None
    says: str
    heading: bool = False


def share(value: float) -> str:
    """A share of 1 as a tick."""
    return f"{number(value * 100)} %"


def number(value: float) -> str:
    """A number as a tick."""
    if value and not 1e-4 <= abs(value) < 1e6:
        text = f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e")
    else:
        text = f"{round(value, 10):,.10g}"
    return text.replace("-", "\u2212") if value < 0 else text


def seconds(value: float) -> str:
    """A duration as a tick."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size * 0.9999:
            return f"{number(value / size)} {unit}"
    return f"{number(round(value * 1e6, 6))} µs"


def distributions(
    edges: Sequence[float],
    series: Sequence[Series],
    *,
    x_title: str,
    log: bool = False,
    tick: Callable[[float], str] = number,
) -> str:
    """Shares of the rows in the bins between the `edges`, of all series on one axis."""
    plot = _Plot("; ".join(f"distribution of {one.name}" for one in series))
    plot.x = Scale.over(edges, _LEFT, WIDTH - _RIGHT, log=log)
    plot.y = Scale(0, _top(value for one in series for value in one.values), plot.bottom, _TOP)
    plot.axes(x_title, "share of rows", tick, share)
    for one in series:
        outline = [f"M{plot.x(edges[0]):.1f},{plot.bottom:.1f}"]
        for (left, right), value in zip(pairwise(edges), one.values, strict=True):
            outline.append(f"V{plot.y(value):.1f}H{plot.x(right):.1f}")
            says = f"{one.name}, {tick(left)} to {tick(right)}: {share(_rounded(value))}"
            plot.spot(plot.x(left), plot.y(value), plot.x(right), plot.bottom, says)
        outline.append(f"V{plot.bottom:.1f}")
        plot.path("".join(outline), f"area {one.role}")
    plot.legend([(one.name, one.role) for one in series])
    return plot.finished()


def columns(
    names: Sequence[str], series: Sequence[Series], *, y_title: str, tick: Callable[[float], str]
) -> str:
    """Values side by side over their names."""
    plot = _Plot(f"{y_title}: {'; '.join(one.name for one in series)}")
    plot.x = Scale(0, max(len(names), 1), _LEFT, WIDTH - _RIGHT)
    top = _top(value for one in series for value in one.values)
    plot.y = Scale(0, top * 1.2, plot.bottom, _TOP)  # the legend lies above
    plot.axes("", y_title, lambda value: "", tick)
    plot.names(names)
    width = 0.8 / max(len(series), 1)
    for place, one in enumerate(series):
        for index, value in enumerate(one.values):
            left = index + 0.1 + place * width
            says = f"{one.name}, {names[index]}: {tick(_rounded(value))}"
            plot.bar(plot.x(left), plot.y(value), plot.x(left + width), says, one.role)
    plot.legend([(one.name, one.role) for one in series])
    return plot.finished()


def heat(
    edges: Sequence[float],
    counts: Sequence[Sequence[float]],
    *,
    x_title: str,
    y_title: str,
    threshold: float | None = None,
) -> str:
    """How many rows lie in each cell of a square: `counts[x][y]`; the darker, the more, by the
    logarithm. The threshold of the decision is drawn on both axes."""
    plot = _Plot(f"rows by {x_title} and {y_title}", height=430.0)
    side = plot.bottom - _TOP
    plot.x = Scale.over(edges, _LEFT, _LEFT + side)
    plot.y = Scale.over(edges, plot.bottom, _TOP)
    plot.axes(x_title, y_title, number, number, right=_LEFT + side)
    most = math.log1p(max((count for column in counts for count in column), default=0) or 1)
    for (left, right), column in zip(pairwise(edges), counts, strict=True):
        for (low, high), count in zip(pairwise(edges), column, strict=True):
            if count:
                says = f"{x_title} {number(left)} to {number(right)}, "
                says += f"{y_title} {number(low)} to {number(high)}: {count:,.0f} rows"
                corners = plot.x(left), plot.y(high), plot.x(right), plot.y(low)
                plot.cell(*corners, says, 0.12 + 0.88 * math.log1p(count) / most)
    plot.line((edges[0], edges[0]), (edges[-1], edges[-1]), "guide")
    if threshold is not None and edges[0] < threshold < edges[-1]:
        plot.line((threshold, edges[0]), (threshold, edges[-1]), "threshold")
        plot.line((edges[0], threshold), (edges[-1], threshold), "threshold")
    return plot.finished()


def forest(
    estimates: Sequence[Estimate],
    *,
    x_title: str,
    tick: Callable[[float], str],
    zero: float | None = 0.0,
) -> str:
    """A line for each estimate with its interval; `zero` is where nothing differs."""
    letters = max((len(one.name) for one in estimates), default=0)
    left = 20 + _LETTER * min(letters, _MOST_LETTERS)
    plot = _Plot(x_title, height=_TOP + _BOTTOM + _LINE * max(len(estimates), 1))
    ends = [end for one in estimates for end in (one.low, one.value, one.high) if end is not None]
    scale = Scale.over([*ends, *([] if zero is None else [zero])], left + 6, WIDTH - _RIGHT - 6)
    room = (scale.high - scale.low) * 0.03
    plot.x = Scale(scale.low - room, scale.high + room, left + 6, WIDTH - _RIGHT)
    plot.y = Scale(0, max(len(estimates), 1), _TOP, plot.bottom)
    plot.vertical_axis(x_title, tick)
    if zero is not None:
        plot.line((zero, 0), (zero, len(estimates)), "zero")
    for index, one in enumerate(estimates):
        plot.estimate(index + 0.5, one, left)
    return plot.finished()


def reliability(series: Sequence[tuple[str, Role, Sequence[Point]]]) -> str:
    """What was said against how often it came true; on the diagonal both are alike."""
    plot = _Plot("reliability: predicted probability and the share that came true", height=430.0)
    side = plot.bottom - _TOP
    points = [point for _, _, part in series for point in part]
    ends = [end for point in points for end in (point.x, point.y, point.high) if end is not None]
    high = min(_ceiling(max(ends, default=1.0)), 1.0)
    plot.x = Scale(0, high, _LEFT, _LEFT + side)
    plot.y = Scale(0, high, plot.bottom, _TOP)
    title = "mean of the predicted probabilities"
    plot.axes(title, "share that came true", share, share, right=_LEFT + side)
    plot.line((0, 0), (high, high), "guide")
    for _, role, part in series:
        plot.points(part, role)
    # Below the diagonal, where little is drawn.
    top = plot.bottom - 18 * len(series) - 8
    plot.legend([(name, role) for name, role, _ in series], right=_LEFT + side - 8, top=top)
    return plot.finished()


def curve(
    series: Sequence[tuple[str, Role, Sequence[Point]]],
    *,
    x_title: str,
    y_title: str,
    x_tick: Callable[[float], str],
    y_tick: Callable[[float], str],
    x_ticks: Sequence[float] = (),
    log: bool = False,
    level: tuple[float, str] | None = None,
) -> str:
    """Lines through points; `level` is a value to hold them against, and its name. `x_ticks` are
    round numbers of which those are named that lie on the axis, and are far enough apart."""
    plot = _Plot("; ".join(name for name, _, _ in series))
    points = [point for _, _, part in series for point in part]
    plot.x = Scale.over([point.x for point in points], _LEFT, WIDTH - _RIGHT, log=log)
    ends = [end for point in points for end in (point.low, point.y, point.high) if end is not None]
    within = Scale.over([*ends, *([] if level is None else [level[0]])], plot.bottom, _TOP)
    room = (within.high - within.low) * 0.08
    # The legend's lines lie above what is drawn.
    top = within.high + room * (1 + 1.2 * (len(series) + (level is not None)))
    plot.y = Scale(within.low - room, top, plot.bottom, _TOP)
    plot.axes(x_title, y_title, x_tick, y_tick, x_ticks=x_ticks)
    names: list[tuple[str, str]] = [(name, role) for name, role, _ in series]
    if level is not None:
        plot.line((plot.x.low, level[0]), (plot.x.high, level[0]), "threshold")
        names.append((level[1], "threshold"))
    for _, role, part in series:
        plot.points(part, role)
    plot.legend(names)
    return plot.finished()


class _Plot:
    """One picture: its scales are set before something is drawn by them."""

    x: Scale
    y: Scale

    def __init__(self, label: str, *, height: float = HEIGHT) -> None:
        size = {"viewBox": f"0 0 {WIDTH:g} {height:g}", "role": "img", "aria-label": label}
        self._svg = xml.Element("svg", size)
        self.bottom = height - _BOTTOM
        self._spots: list[xml.Element] = []

    def axes(
        self,
        x_title: str,
        y_title: str,
        x_tick: Callable[[float], str],
        y_tick: Callable[[float], str],
        *,
        right: float = WIDTH - _RIGHT,
        x_ticks: Sequence[float] = (),
    ) -> None:
        for value in self.y.ticks():
            y = self.y(value)
            self._line(_LEFT, y, right, y, "grid")
            self._text(_LEFT - 6, y + 4, y_tick(value), "end")
        self._horizontal(x_tick, _LEFT, right, x_ticks)
        self._text((_LEFT + right) / 2, self.bottom + 38, x_title, "middle", "title")
        middle = (self.bottom + _TOP) / 2
        turned = self._text(13, middle, y_title, "middle", "title")
        turned.set("transform", f"rotate(-90 13 {middle:.1f})")

    def vertical_axis(self, x_title: str, tick: Callable[[float], str]) -> None:
        """For lines that have a name in place of a number."""
        for value in self.x.ticks():
            self._line(self.x(value), _TOP, self.x(value), self.bottom, "grid")
        self._horizontal(tick, self.x.start, self.x.end)
        middle = (self.x.start + self.x.end) / 2
        self._text(middle, self.bottom + 38, x_title, "middle", "title")

    def names(self, names: Sequence[str]) -> None:
        """Under the columns; where they would overlap, some."""
        widest = max((len(name) for name in names), default=0) * _LETTER + 8
        room = (self.x.end - self.x.start) / max(len(names), 1)
        every = max(1, math.ceil(widest / room))
        for index in range(0, len(names), every):
            self._text(self.x(index + 0.5), self.bottom + 17, names[index], "middle")

    def legend(
        self,
        names: Sequence[tuple[str, str]],
        *,
        right: float = WIDTH - _RIGHT - 6,
        top: float = _TOP,
    ) -> None:
        for index, (name, role) in enumerate(names):
            y = top + 12 + 18 * index
            self._text(right - 20, y, _shortened(name), "end", "halo")
            self._line(right - 14, y - 4, right, y - 4, f"key {role}")

    def path(self, d: str, role: str) -> None:
        self._element("path", role, d=d)

    def line(self, start: tuple[float, float], end: tuple[float, float], role: str) -> None:
        self._line(self.x(start[0]), self.y(start[1]), self.x(end[0]), self.y(end[1]), role)

    def points(self, points: Sequence[Point], role: Role) -> None:
        if points:
            places = " ".join(f"{self.x(p.x):.1f},{self.y(p.y):.1f}" for p in points)
            self._element("polyline", f"line {role}", points=places)
        for point in points:
            x, y = self.x(point.x), self.y(point.y)
            if point.low is not None and point.high is not None:
                self._line(x, self.y(point.low), x, self.y(point.high), f"whisker {role}")
            dot = self._element("circle", f"dot {role}", cx=f"{x:.1f}", cy=f"{y:.1f}", r="3.2")
            xml.SubElement(dot, "title").text = point.says

    def estimate(self, place: float, one: Estimate, left: float) -> None:
        y, role = self.y(place), "heading" if one.heading else ""
        self._text(left - 4, y + 4, _shortened(one.name), "end", role)
        if one.value is None:
            self._text(self.x.start + 8, y + 4, "no rows", "start", "title halo")
            return
        if one.low is not None and one.high is not None:
            self._line(self.x(one.low), y, self.x(one.high), y, "whisker difference")
        place_of = {"cx": f"{self.x(one.value):.1f}", "cy": f"{y:.1f}"}
        self._element("circle", "dot difference", r="4.4" if one.heading else "3.4", **place_of)
        self.spot(0, y - _LINE / 2, WIDTH, y + _LINE / 2, one.says)

    def bar(self, left: float, top: float, right: float, says: str, role: Role) -> None:
        # What is not nothing shows.
        top = min(top, self.bottom - 0.7) if top < self.bottom else top
        self._box(left, top, right, self.bottom, f"bar {role}", says)

    def cell(
        self, left: float, top: float, right: float, bottom: float, says: str, depth: float
    ) -> None:
        self._box(left, top, right, bottom, "cell", says).set("fill-opacity", f"{depth:.3f}")

    def spot(self, left: float, top: float, right: float, bottom: float, says: str) -> None:
        """Says something where pointed at, and lies above all that is drawn."""
        spot = self._box(left, top, right, bottom, "spot", says)
        self._svg.remove(spot)
        self._spots.append(spot)

    def finished(self) -> str:
        self._svg.extend(self._spots)
        return xml.tostring(self._svg, encoding="unicode")

    def _horizontal(
        self,
        tick: Callable[[float], str],
        left: float,
        right: float,
        ticks: Sequence[float] = (),
    ) -> None:
        self._line(left, self.bottom, right, self.bottom, "axis")
        free = left - 20
        for value in ticks or self.x.ticks():
            text, x = tick(value), self.x(value)
            if text and x > free and self.x.low <= value <= self.x.high:
                free = x + _LETTER * (len(text) + 1)
                self._line(x, self.bottom, x, self.bottom + 4, "axis")
                # Nothing is drawn beyond the picture.
                middle = min(x, WIDTH - _LETTER * len(text) / 2)
                self._text(middle, self.bottom + 17, text, "middle")

    def _box(
        self, left: float, top: float, right: float, bottom: float, role: str, says: str
    ) -> xml.Element:
        size = {"width": f"{max(right - left, 0):.1f}", "height": f"{max(bottom - top, 0):.1f}"}
        box = self._element("rect", role, x=f"{left:.1f}", y=f"{top:.1f}", **size)
        xml.SubElement(box, "title").text = says
        return box

    def _line(self, x1: float, y1: float, x2: float, y2: float, role: str) -> None:
        ends = {"x1": f"{x1:.1f}", "y1": f"{y1:.1f}", "x2": f"{x2:.1f}", "y2": f"{y2:.1f}"}
        self._element("line", role, **ends)

    def _text(self, x: float, y: float, text: str, anchor: str, role: str = "") -> xml.Element:
        place = {"x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor}
        element = self._element("text", role, **place)
        element.text = text
        return element

    def _element(self, name: str, role: str, **attributes: str) -> xml.Element:
        return xml.SubElement(self._svg, name, {"class": role, **attributes})


def _top(values: Iterable[float]) -> float:
    highest = max(values, default=0.0)
    return highest * 1.1 or 1.0


def _ceiling(value: float) -> float:
    step = _round_step(value / _TICKS)
    return math.ceil(value / step) * step


def _round_step(least: float) -> float:
    """1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least * 0.9999)


def _shortened(name: str) -> str:
    return name if len(name) <= _MOST_LETTERS else f"{name[: _MOST_LETTERS - 1]}…"


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")
