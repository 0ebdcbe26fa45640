"""Dashboards and rules speak of the metrics that exist, and leave none out."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.api.answers import STATUS_OF
from app.telemetry.metrics import STAGES, Metrics, PushMetrics

DEPLOY = Path(__file__).parent.parent.parent / "deploy"
DASHBOARDS = sorted((DEPLOY / "grafana" / "dashboards").glob("*.json"))
RULES = yaml.safe_load((DEPLOY / "prometheus" / "rules.yml").read_text())

_SERIES_OF = {
    "counter": ["{}_total"],
    "gauge": ["{}"],
    "histogram": ["{}_bucket", "{}_count", "{}_sum"],
}


def metric_families() -> dict[str, set[str]]:
    """Each metric, and the names of its series in a scrape."""
    return {
        family.name: {series.format(family.name) for series in _SERIES_OF[family.type]}
        for metrics in (Metrics(), PushMetrics())
        for family in metrics.registry.collect()
        if family.type in _SERIES_OF
    }


def named_metrics(expression: str) -> set[str]:
    """Metrics of a process that the expression names; recorded ones are told by their colons."""
    names = re.sub(r'"[^"]*"', '""', expression)  # the value of a label is none
    return set(re.findall(r"(?<![\w:])(?:hikyaku|process|python)_\w+(?![\w:])", names))


def recorded_metrics(expression: str) -> set[str]:
    return set(re.findall(r"[a-z_]+:\w+:\w+", expression))


def rules() -> list[dict[str, Any]]:
    return [rule for group in RULES["groups"] for rule in group["rules"]]


def panel_expressions() -> Iterator[str]:
    for path in DASHBOARDS:
        dashboard = json.loads(path.read_text())
        for panel in dashboard["panels"]:
            yield from (target["expr"] for target in panel.get("targets", []))
        for variable in dashboard["templating"]["list"]:
            if variable["type"] == "query":
                yield variable["definition"]


def expressions() -> list[str]:
    return [*panel_expressions(), *(rule["expr"] for rule in rules())]


def test_every_metric_on_a_dashboard_or_in_a_rule_exists() -> None:
    series = set().union(*metric_families().values())
    named = set().union(*map(named_metrics, expressions()))
    assert named - series == set()


def test_every_recorded_metric_that_is_used_is_recorded() -> None:
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    used = set().union(*map(recorded_metrics, expressions()))
    assert used == recorded


def test_every_metric_of_ours_is_on_a_dashboard_or_in_a_rule() -> None:
    named = set().union(*map(named_metrics, expressions()))
    unseen = {
        family
        for family, series in metric_families().items()
        if family.startswith("hikyaku_") and not series & named
    }
    assert unseen == set()


@pytest.mark.parametrize("where", ["dashboard", "rules"])
def test_our_fault_is_every_code_that_is_answered_with_a_5xx(where: str) -> None:
    texts = panel_expressions() if where == "dashboard" else (rule["expr"] for rule in rules())
    lists = {codes for text in texts for codes in re.findall(r'code=~"([^"]+)"', text)}
    ours = {code for code, status in STATUS_OF.items() if status >= 500}
    assert [set(codes.split("|")) for codes in lists] == [ours]


def test_the_stages_are_shown_in_the_order_of_the_path() -> None:
    shown = [stage for text in panel_expressions() for stage in re.findall(r'stage="(\w+)"', text)]
    assert tuple(dict.fromkeys(shown)) == STAGES


def test_bounds_in_rules_are_bounds_of_the_buckets() -> None:
    metrics = Metrics()
    metrics.request_duration.labels("m").observe(0)
    bounds = {
        sample.labels["le"]
        for family in metrics.registry.collect()
        if family.name == "hikyaku_request_duration_seconds"
        for sample in family.samples
        if "le" in sample.labels
    }
    named = {le for rule in rules() for le in re.findall(r'\ble="([^"]+)"', rule["expr"])}
    assert named
    assert named <= bounds


def test_the_dashboard_is_what_build_py_makes() -> None:
    build = DEPLOY / "grafana" / "build.py"
    checked = subprocess.run([sys.executable, build, "--check"], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
