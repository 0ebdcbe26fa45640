"""The plan of a release, from the contract of its model."""

from app.contract import Contract, Release
from app.evidence.plan import Margins, Plan

_MINUTE_S = 60.0
_HOUR_S = 3_600.0


def plan_of(contract: Contract) -> Plan:
    """As model.yaml says now. From the start of a release on its own copy holds."""
    release = contract.release
    return Plan(
        kind=release.kind,
        stages=_shares(release),
        margins=Margins(**release.margins.model_dump()),
        least_answers=release.least_answers,
        least_s=release.least_minutes * _MINUTE_S,
        most_s=release.most_hours * _HOUR_S,
        at_the_end=release.at_the_end,
        judges_labels=_judges_labels(contract),
        segments=tuple(
            name for key, segment in contract.segments.items() for name in segment.names(key)
        ),
    )


def watch_s_of(release: Release) -> float:
    """Seconds."""
    return release.watch_hours * _HOUR_S


def _judges_labels(contract: Contract) -> bool:
    """Of a number there is no Brier loss."""
    return contract.labels is not None and contract.labels.kind != "number"


def _shares(release: Release) -> tuple[float, ...]:
    """Of the stages before the candidate answers all: 100 % is what the last of them leads to."""
    percentages = [stage for stage in release.stages[1:-1] if not isinstance(stage, str)]
    return (0.0, *(percentage / 100 for percentage in percentages))
