"""Numbers of a report as a person reads them, with the digits that their interval supports."""

import math
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, TypeAlias

NONE = "—"
"""Stands where there is no number."""
_DIGITS = 4
_MOST_DECIMALS = 8

Interval: TypeAlias = Sequence[float] | None
Wording: TypeAlias = Callable[[float | None, Interval], str]


def count(value: float | None) -> str:
    return NONE if value is None else f"{value:,.0f}"


def plain(
    value: float | None,
    interval: Interval = None,
    *,
    decimals: int | None = None,
    signed: bool = False,
) -> str:
    """A number with so many decimals, else as its interval supports, else with four digits."""
    if value is None or not math.isfinite(value):
        return NONE
    if decimals is None:
        decimals = _decimals(value, interval)
    return _decimal(value, decimals, signed=signed)


def signed(value: float | None, interval: Interval = None) -> str:
    return plain(value, interval, signed=True)


def percent(value: float | None, interval: Interval = None) -> str:
    if value is None or not math.isfinite(value):
        return NONE
    ends = None if interval is None else [end * 100 for end in interval]
    return f"{plain(value * 100, ends)} %"


def points(value: float | None) -> str:
    """A difference of shares, in percentage points."""
    return NONE if value is None else plain(value * 100, decimals=2, signed=True) + " pp"


def duration(value: float | None, interval: Interval = None) -> str:
    """Seconds in the unit that suits them."""
    if value is None or not math.isfinite(value):
        return NONE
    size = abs(value)
    for unit, least in (("d", 172_800.0), ("h", 3_600.0), ("min", 60.0), ("s", 1.0), ("ms", 1e-3)):
        if size >= least:
            in_s = {"d": 86_400.0, "h": 3_600.0, "min": 60.0}.get(unit, least)
            return f"{value / in_s:.3g} {unit}"
    return f"{value * 1e6:.3g} µs"


def between(interval: Interval, wording: Wording = plain) -> str:
    """The ends of an interval, in the words of the number that it belongs to."""
    if interval is None:
        return NONE
    low, high = interval
    return f"{wording(low, interval)} to {wording(high, interval)}"


def with_interval(value: float | None, interval: Interval, wording: Wording = plain) -> str:
    """A number and its interval in one cell."""
    if value is None or interval is None:
        return wording(value, interval)
    return f"{wording(value, interval)} ({between(interval, wording)})"


def instant(at: float | str | None) -> str:
    """Of the Unix time, or of RFC 3339, to the minute."""
    if at is None:
        return NONE
    when = datetime.fromisoformat(at) if isinstance(at, str) else datetime.fromtimestamp(at, UTC)
    return when.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")


def interval_of(found: Mapping[str, Any] | None) -> tuple[float, float] | None:
    """The bounds that stand beside a number."""
    low, high = value_at(found, "low"), value_at(found, "high")
    return None if low is None or high is None else (low, high)


def value_at(document: Mapping[str, Any] | None, *path: str) -> Any:
    """What lies at the path, None where a part of it is not there."""
    found: Any = document
    for name in path:
        if not isinstance(found, Mapping):
            return None
        found = found.get(name)
    return found


def _decimal(value: float, decimals: int, *, signed: bool) -> str:
    if decimals > _MOST_DECIMALS:
        return f"{value:{'+' if signed else ''}.2e}"
    text = f"{abs(value):,.{decimals}f}"
    if not any(digit in text for digit in "123456789"):
        return text  # nothing has no sign
    return f"\u2212{text}" if value < 0 else f"+{text}" if signed else text


def _decimals(value: float, interval: Interval) -> int:
    """Two digits of half the interval; four of a number without one."""
    half = 0.0 if interval is None else (interval[1] - interval[0]) / 2
    if half > 0 and math.isfinite(half):
        return max(1 - math.floor(math.log10(half)), 0)
    if value == 0 or float(value).is_integer():
        return 0
    return max(_DIGITS - 1 - math.floor(math.log10(abs(value))), 0)
