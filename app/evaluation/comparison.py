"""What a manifest says beside what is there now, one thing at a time."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from app.repository.manifest import File, Golden, describe

# Sums in another order differ by this much; another model differs by more.
_SAME_TO = 1e-9
_SHOWN = 6

Outcome: TypeAlias = Literal["same", "differs", "unknown"]
Numbers: TypeAlias = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Comparison:
    """`detail` is what both say, or what differs.

    Where `decides`, a version is reproduced only if it is the same. What else differs (a package,
    the processor, a file of code) may be why, and need not matter.
    """

    what: str
    outcome: Outcome
    detail: str
    decides: bool


def compare_values(what: str, then: Any, now: Any, *, decides: bool = False) -> Comparison:
    """Equal or not; of mappings it is told by name what is not."""
    if then == now:
        return Comparison(what, "same", _brief(then), decides)
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        names = [name for name in {**then, **now} if then.get(name) != now.get(name)]
        changes = [f"{n} was {_brief(then.get(n))}, is {_brief(now.get(n))}" for n in names]
        return Comparison(what, "differs", _first(changes), decides)
    return Comparison(what, "differs", f"was {_brief(then)}, is {_brief(now)}", decides)


def compare_files(
    what: str, then: Mapping[str, File], now: Mapping[str, Path], *, decides: bool
) -> Comparison:
    """Byte for byte. A file of another size is not read."""
    changes = [f"{name} is new" for name in now.keys() - then.keys()]
    for name, file in then.items():
        path = now.get(name)
        if path is None or not path.is_file():
            changes.append(f"{name} is gone")
        elif path.stat().st_size != file.bytes or describe(path) != file:
            changes.append(f"{name} has another content")
    return _of_changes(what, sorted(changes), _size(then), decides)


def compare_digests(what: str, then: Mapping[str, File], now: Mapping[str, File]) -> Comparison:
    """Of files that both have read; it decides."""
    changes = sorted(name for name in {**then, **now} if then.get(name) != now.get(name))
    return _of_changes(what, changes, _size(then), decides=True)


def compare_packages(then: Mapping[str, str], now: Mapping[str, str]) -> Comparison:
    """The versions of then; other packages need not be known."""
    changes = [
        f"{name} was {version}, is {now.get(name, 'not installed')}"
        for name, version in then.items()
        if now.get(name) != version
    ]
    if changes:
        return Comparison("packages", "differs", "; ".join(changes), decides=False)
    return Comparison("packages", "same", f"{len(then)} of them", decides=False)


def compare_numbers(what: str, then: Numbers, now: Numbers) -> Comparison:
    """By name, the same to what rounding in another order makes of them; it decides."""
    changes = [f"{name} is gone" for name in then if name not in now]
    changes += [f"{name} is new" for name in now if name not in then]
    changes += [
        f"{name} was {then[name]:.9g}, is {now[name]:.9g} ({now[name] - then[name]:+.2g})"
        for name in then
        if name in now and not math.isclose(then[name], now[name], rel_tol=_SAME_TO, abs_tol=1e-12)
    ]
    alike = f"{next(iter(then.values())):.9g}" if len(then) == 1 else f"{len(then)} numbers"
    return _of_changes(what, changes, alike, decides=True)


def compare_predictions(
    what: str, golden: Golden, said: Sequence[Mapping[str, Any]], *, decides: bool
) -> Comparison:
    """Row by row, within the tolerance of the golden ones."""
    if len(said) != len(golden.predictions):
        detail = f"{len(golden.predictions)} golden predictions for {len(said)} rows"
        return Comparison(what, "differs", detail, decides)
    gaps = [_gap(one, two) for one, two in zip(said, golden.predictions, strict=True)]
    over = [row for row, gap in enumerate(gaps) if not gap <= golden.tolerance]
    largest = f"largest difference {max(gaps, default=0.0):.3g}, tolerance {golden.tolerance:g}"
    if over:
        rows = _first([str(row) for row in over])
        detail = f"{len(over)} of {len(gaps)} rows ({rows}): {largest}"
        return Comparison(what, "differs", detail, decides)
    return Comparison(what, "same", f"{len(gaps)} rows: {largest}", decides)


def decisive(comparisons: Iterable[Comparison]) -> list[Comparison]:
    """Those for which a version is not reproduced."""
    return [one for one in comparisons if one.decides and one.outcome != "same"]


def _gap(said: Any, expected: Any) -> float:
    """The largest difference of two predictions; infinite where they are not alike."""
    if isinstance(expected, Mapping):
        if not isinstance(said, Mapping) or said.keys() != expected.keys():
            return math.inf
        return max((_gap(said[name], expected[name]) for name in expected), default=0.0)
    if not isinstance(said, int | float) or not isinstance(expected, int | float):
        return math.inf
    return abs(said - expected)


def _of_changes(what: str, changes: Sequence[str], alike: str, decides: bool) -> Comparison:
    if changes:
        return Comparison(what, "differs", _first(changes), decides)
    return Comparison(what, "same", alike, decides)


def _size(files: Mapping[str, File]) -> str:
    size = sum(file.bytes for file in files.values())
    return f"{len(files)} {'file' if len(files) == 1 else 'files'}, {size:,} bytes"


def _brief(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {one}" for name, one in value.items())
    return "none" if value is None or value == "" else str(value)


def _first(words: Sequence[str]) -> str:
    """The first few, and how many more."""
    more = len(words) - _SHOWN
    return "; ".join(words[:_SHOWN]) + (f"; and {more:,} more" if more > 0 else "")
