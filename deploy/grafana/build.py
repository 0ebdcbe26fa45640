"""Writes the Grafana dashboard: `python deploy/grafana/build.py`; `--check` only compares.

Plain dictionaries in Grafana's own dashboard format, so that it needs nothing but Python.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, Literal, TypeAlias

Json: TypeAlias = dict[str, Any]
Query: TypeAlias = tuple[str, str]
"""A PromQL expression and the legend of its series."""

DASHBOARD = Path(__file__).parent / "dashboards" / "hikyaku.json"
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
GRID_COLUMNS = 24

MODEL = 'model=~"$model"'
STAGES = ("parse", "features", "queue", "execution", "respond")
ANSWERED = 'code="ok"'
REFUSED = 'code!="ok"'
COMPARED = 'outcome="compared"'
OUR_FAULT = (
    'code=~"backend_error|internal|overloaded|features_unavailable|model_not_ready|'
    'shutting_down|deadline_exceeded"'
)


def rate(metric: str, *matchers: str) -> str:
    return f"rate({metric}{{{', '.join((MODEL, *matchers))}}}[$__rate_interval])"


def total(by: str, metric: str, *matchers: str) -> str:
    return f"sum by ({by}) ({rate(metric, *matchers)})"


def quantile(q: float, by: str, histogram: str, *matchers: str) -> str:
    return f"histogram_quantile({q}, {total(f'{by}, le', f'{histogram}_bucket', *matchers)})"


def mean(by: str, histogram: str, *matchers: str) -> str:
    return (
        f"{total(by, f'{histogram}_sum', *matchers)} / {total(by, f'{histogram}_count', *matchers)}"
    )


def of_the_process(expression: str) -> str:
    """Every process has metrics of these names: those of Hikyaku's alone."""
    return f"{expression} and on (job, instance) hikyaku_ready"


def panel(
    kind: str,
    title: str,
    queries: list[Query],
    *,
    width: int = 8,
    about: str = "",
    shape: Literal["time_series", "heatmap", "table"] = "time_series",
    **more: Any,
) -> Json:
    """`shape` is the form of the answer that the kind of panel needs; a table shows one instant."""
    instant = shape == "table"
    targets = [
        {
            "refId": chr(ord("A") + index),
            "datasource": DATASOURCE,
            "expr": expression,
            "legendFormat": legend,
            "format": shape,
            "instant": instant,
            "range": not instant,
        }
        for index, (expression, legend) in enumerate(queries)
    ]
    document = {
        "type": kind,
        "title": title,
        "description": about,
        "datasource": DATASOURCE,
        "targets": targets,
        "gridPos": {"h": 8, "w": width, "x": 0, "y": 0},
        "fieldConfig": {"defaults": {}, "overrides": []},
        "options": {},
    }
    return document | more


def graph(
    title: str,
    queries: list[Query],
    unit: str,
    *,
    width: int = 8,
    about: str = "",
    stack: str = "none",
    at_least: float | None = 0,
    at_most: float | None = None,
) -> Json:
    """Lines over time; `stack` is Grafana's: none, normal or percent. Without `at_least` and
    `at_most` the axis ends where the lines do."""
    custom: Json = {"lineWidth": 1, "showPoints": "never", "stacking": {"mode": stack}}
    custom["fillOpacity"] = 0 if stack == "none" else 40
    defaults: Json = {"unit": unit, "custom": custom}
    if at_least is not None:
        defaults["min"] = at_least
    if at_most is not None:
        defaults["max"] = at_most
    return panel(
        "timeseries",
        title,
        queries,
        width=width,
        about=about,
        fieldConfig={"defaults": defaults, "overrides": []},
        options={
            "legend": {"displayMode": "list", "placement": "bottom"},
            "tooltip": {"mode": "multi", "sort": "none" if stack != "none" else "desc"},
        },
    )


def traffic() -> list[Json]:
    requests = "hikyaku_requests_total"
    failed, all_of_them = total("model", requests, OUR_FAULT), total("model", requests)
    return [
        graph("Answers", [(total("model", requests, ANSWERED), "{{model}}")], "reqps"),
        graph(
            "Refusals by code",
            [(total("code", requests, REFUSED), "{{code}}")],
            "reqps",
            stack="normal",
        ),
        graph(
            "Share of requests that fail by our fault",
            [(f"({failed} or 0 * {all_of_them}) / {all_of_them}", "{{model}}")],
            "percentunit",
            about="Codes answered with a 5xx; the other refusals are the caller's to repair.",
        ),
    ]


def latency() -> list[Json]:
    duration = "hikyaku_request_duration_seconds"
    return [
        graph(
            "Time to answer",
            [
                (quantile(q, "model", duration), f"p{q * 100:.0f} {{{{model}}}}")
                for q in (0.5, 0.9, 0.99)
            ],
            "s",
            width=12,
        ),
        graph(
            "Mean time by stage",
            [
                (mean("stage", "hikyaku_stage_duration_seconds", f'stage="{stage}"'), "{{stage}}")
                for stage in STAGES
            ],
            "s",
            width=12,
            stack="normal",
            about="The stages of an answered request, in order, add up to its duration.",
        ),
    ]


def batching() -> list[Json]:
    rows = "hikyaku_batch_rows"
    return [
        graph(
            "Rows of an execution",
            [
                (mean("model", rows), "mean {{model}}"),
                (quantile(0.9, "model", rows), "p90 {{model}}"),
            ],
            "short",
        ),
        graph(
            "Rows that wait",
            [(f"sum by (model) (hikyaku_queued_rows{{{MODEL}}})", "{{model}}")],
            "short",
            about="At the instant of each scrape, over all replicas.",
        ),
        graph("Executions", [(total("model", f"{rows}_count"), "{{model}}")], "ops"),
        graph(
            "Time of an execution",
            [
                (quantile(0.5, "model", "hikyaku_execution_duration_seconds"), "p50 {{model}}"),
                (quantile(0.99, "model", "hikyaku_execution_duration_seconds"), "p99 {{model}}"),
            ],
            "s",
        ),
        graph(
            "Wait for an execution",
            [
                (quantile(0.5, "model", "hikyaku_queue_delay_seconds"), "p50 {{model}}"),
                (quantile(0.99, "model", "hikyaku_queue_delay_seconds"), "p99 {{model}}"),
            ],
            "s",
            about="Of the first row of each batch.",
        ),
        graph(
            "Outputs that are no finite number",
            [(total("model, output", "hikyaku_not_finite_values_total"), "{{model}} {{output}}")],
            "ops",
            about="Refused, or answered as null where model.yaml says `when_not_finite: null`.",
        ),
        graph(
            "Executions that fail or repeat",
            [
                (total("model, outcome", "hikyaku_failed_executions_total"), "{{outcome}}"),
                (total("model", "hikyaku_repeated_executions_total"), "repeated"),
                (total("model, event", "hikyaku_backend_events_total"), "{{event}}"),
            ],
            "ops",
            about="A batch that fails is run again in parts, to find the row that makes it fail.",
        ),
        graph(
            "Requests not executed",
            [
                (total("model, reason", "hikyaku_queue_refusals_total"), "refused: {{reason}}"),
                (total("model", "hikyaku_left_queue_total"), "left or expired"),
            ],
            "ops",
        ),
    ]


def predictions() -> list[Json]:
    histogram = "hikyaku_prediction"
    one_output = 'output=~"$output"'
    shown = 'le=~"$prediction_range"'
    return [
        panel(
            "heatmap",
            "Predictions of $output",
            [(total("le", f"{histogram}_bucket", one_output, shown), "{{le}}")],
            width=12,
            about="How often each value is predicted, per second.",
            shape="heatmap",
            options={
                "calculate": False,
                "color": {"mode": "scheme", "scheme": "Oranges", "steps": 64},
                "filterValues": {"le": 1e-9},
                "yAxis": {"axisPlacement": "left"},
                "rowsFrame": {"layout": "auto"},
                "tooltip": {"mode": "single", "yHistogram": True},
            },
        ),
        graph(
            "Quantiles of the predictions",
            [
                (
                    quantile(q, "model, role, output", histogram, one_output),
                    f"p{q * 100:.0f} {{{{model}}}} {{{{role}}}} {{{{output}}}}",
                )
                for q in (0.1, 0.5, 0.9)
            ],
            "short",
            width=12,
            about="A shift without a release is drift, or a feature that has gone missing.",
        ),
    ]


def candidates() -> list[Json]:
    """Of versions that are shown what the champion answers."""
    rows, duration = "hikyaku_shadow_rows_total", "hikyaku_shadow_execution_duration_seconds"
    difference = "hikyaku_shadow_difference"
    compared = total("model", rows, COMPARED)
    flips = total("model", "hikyaku_shadow_flips_total")
    waiting = f"sum by (model) (hikyaku_shadow_pending_rows{{{MODEL}}})"
    return [
        graph(
            "Rows offered to candidates",
            [(total("model, outcome", rows), "{{model}} {{outcome}}")],
            "ops",
            stack="normal",
            about="compared: both gave a finite number. failed: the candidate raised an error or "
            "died. not_finite: it answered NaN or infinity. Others were dropped, by the reason.",
        ),
        graph(
            "Share of decisions that differ",
            [(f"({flips} or 0 * {compared}) / {compared}", "{{model}}")],
            "percentunit",
            about="Of the rows compared. Where a model is trained anew, 1 to 4 % are usual.",
        ),
        graph(
            "Difference of the scores",
            [
                (mean("model", difference), "mean {{model}}"),
                *(
                    (quantile(q, "model", difference), f"p{q * 100:.0f} {{{{model}}}}")
                    for q in (0.05, 0.95)
                ),
            ],
            "short",
            at_least=None,
            about="Candidate less champion, on the same rows. `hikyaku report` has intervals.",
        ),
        graph(
            "Time of a candidate's block",
            [
                (quantile(0.5, "model", duration), "p50 {{model}}"),
                (quantile(0.99, "model", duration), "p99 {{model}}"),
            ],
            "s",
            about="At the lowest priority, in a process of its own: no answer waits for it.",
        ),
        graph(
            "Rows that wait for candidates",
            [(waiting, "{{model}}")],
            "short",
            about="At the instant of each scrape, over all replicas.",
        ),
        graph(
            "What happened to candidates, and to their counts",
            [
                (total("model, event", "hikyaku_shadow_events_total"), "{{model}} {{event}}"),
                ("sum (rate(hikyaku_unwritten_comparisons_total[$__rate_interval]))", "unwritten"),
                (
                    "sum by (kind) (rate(hikyaku_refused_tables_total[$__rate_interval]))",
                    "left out: {{kind}}",
                ),
            ],
            "ops",
            about="Counts that could not be written are written later; those left out are lost.",
        ),
        graph(
            "Events told to receivers of webhooks",
            [
                (
                    "sum by (outcome) (rate(hikyaku_webhook_deliveries_total[$__rate_interval]))",
                    "{{outcome}}",
                ),
            ],
            "ops",
            about="Of `retried` each attempt counts. The log says why one was not delivered.",
        ),
        graph(
            "Events that wait for receivers of webhooks",
            [("sum (hikyaku_webhook_waiting_events)", "waiting")],
            "short",
            about="At the instant of each scrape, over all replicas.",
        ),
    ]


def canary() -> list[Json]:
    """Of requests while a release is under way."""
    requests, outside = "hikyaku_canary_requests_total", "hikyaku_canary_outside_total"
    duration = "hikyaku_canary_request_duration_seconds"
    exposures = "hikyaku_canary_exposures_total"
    misrouted = total("model", "hikyaku_canary_misrouted_total")
    return [
        graph(
            "Requests by who answers",
            [(total("model, route, outcome", requests), "{{model}} {{route}} {{outcome}}")],
            "reqps",
            stack="normal",
            about="canary: the candidate. previous: the version before, while the new one is "
            "watched. left: the caller did not wait.",
        ),
        graph(
            "Time to the answer by who answers",
            [
                (
                    quantile(q, "model, route", duration),
                    f"p{q * 100:.0f} {{{{model}}}} {{{{route}}}}",
                )
                for q in (0.5, 0.99)
            ],
            "s",
            about="Of all requests. The evidence is about the first of each key.",
        ),
        graph(
            "First exposures of keys",
            [(total("model, arm, outcome", exposures), "{{model}} {{arm}} {{outcome}}")],
            "ops",
            about="What the evidence is made of: each routing key once in a stage.",
        ),
        graph(
            "Requests that are no evidence",
            [
                (total("model, reason", outside), "{{model}} {{reason}}"),
                (misrouted, "{{model}} misrouted"),
            ],
            "ops",
            about="unavailable: who was seen elsewhere was not known. misrouted is a defect.",
        ),
    ]


def labels() -> list[Json]:
    """Of models that are told the truth, and how good they were by it."""
    delay, quality = "hikyaku_label_delay_seconds", "hikyaku_quality"
    taken = f"max by (model) (hikyaku_label_bytes{{{MODEL}}})"
    allowed = f"max by (model) (hikyaku_label_limit_bytes{{{MODEL}}})"

    def figures(matcher: str) -> str:
        return f"max by (model, role, figure) ({quality}{{{MODEL}, {matcher}}})"

    return [
        graph(
            "Loss",
            [(figures('figure!="auc"'), "{{model}} {{role}} {{figure}}")],
            "short",
            about="Of all predictions of the version whose horizon has passed and whose label is "
            "known; less is better. The champion's rows and the candidate's need not be the same: "
            "`hikyaku report` compares them on the same rows.",
        ),
        graph(
            "AUC",
            [(figures('figure="auc"'), "{{model}} {{role}}")],
            "short",
            at_least=None,
            at_most=1,
        ),
        graph(
            "Share of predictions with a label",
            [(f"max by (model) (hikyaku_quality_coverage{{{MODEL}}})", "{{model}}")],
            "percentunit",
            at_most=1,
            about="Of the champion's, once their horizon has passed. Labels that are known never "
            "to come are among those without.",
        ),
        graph(
            "Predictions judged",
            [
                (
                    f"max by (model, role) (hikyaku_quality_rows{{{MODEL}}})",
                    "{{model}} {{role}}",
                )
            ],
            "short",
            width=6,
        ),
        graph(
            "Labels told",
            [(total("model, outcome", "hikyaku_labels_total"), "{{model}} {{outcome}}")],
            "ops",
            width=6,
            stack="normal",
        ),
        graph(
            "Delay of labels",
            [
                (quantile(0.5, "model", delay), "p50 {{model}}"),
                (quantile(0.95, "model", delay), "p95 {{model}}"),
            ],
            "s",
            width=6,
            about="From the prediction to its label, by feature time.",
        ),
        graph(
            "Predictions kept for labels",
            [
                (
                    total("model, outcome", "hikyaku_label_predictions_total"),
                    "{{model}} {{outcome}}",
                ),
            ],
            "ops",
            width=6,
            stack="normal",
            about="kept, or why not. full: they have reached labels.max_megabytes of model.yaml.",
        ),
        graph(
            "Room for predictions that wait for labels",
            [(f"{taken} / {allowed}", "{{model}}")],
            "percentunit",
            width=6,
            at_most=1,
            about="In the state Redis, of labels.max_megabytes of model.yaml.",
        ),
    ]


def features() -> list[Json]:
    values, age = "hikyaku_feature_values_total", "hikyaku_feature_age_seconds"
    answers = f"sum ({rate('hikyaku_requests_total', ANSWERED)})"
    degraded = total("feature_view, status", "hikyaku_degraded_requests_total")
    by_view, present = total("feature_view", values), 'status="PRESENT"'
    return [
        graph(
            "Share of answers that are degraded",
            [(f"{degraded} / on () group_left () {answers}", "{{feature_view}} {{status}}")],
            "percentunit",
            at_most=1,
            about="An answer counts once for each view and status that it rests on.",
        ),
        graph(
            "What was known of the values read",
            [(total("status", values), "{{status}}")],
            "percentunit",
            stack="percent",
        ),
        graph(
            "Share of a view's values that are not there",
            [
                (
                    f"1 - ({total('feature_view', values, present)} or 0 * {by_view}) / {by_view}",
                    "{{feature_view}}",
                )
            ],
            "percentunit",
            at_most=1,
        ),
        graph(
            "Missing values replaced",
            [
                (
                    total("feature_view, policy", "hikyaku_substituted_values_total"),
                    "{{feature_view}} {{policy}}",
                )
            ],
            "ops",
            about="What the model got in their place, as model.yaml says; the rest are nulls.",
        ),
        *(
            graph(
                f"Age of the rows read, {name}",
                [(quantile(q, "feature_view", age), "{{feature_view}}")],
                "s",
                about="By feature time: a replay clock's, where there is one.",
            )
            for q, name in ((0.1, "p10"), (0.5, "p50"), (0.9, "p90"))
        ),
        graph(
            "Age of the newest row read",
            [
                (
                    f"min by (feature_view) (hikyaku_feature_newest_age_seconds{{{MODEL}}})",
                    "{{feature_view}}",
                )
            ],
            "s",
            about="By feature time. It grows while nobody writes the view, or nobody asks for it.",
        ),
    ]


def pushing() -> list[Json]:
    """Of jobs that run `hikyaku features push --stream`, whatever models read what they write."""
    window = "[$__rate_interval]"
    rows, duration = "hikyaku_push_rows_total", "hikyaku_push_batch_duration_seconds"
    newest = "max by (feature_view) (hikyaku_push_newest_event_timestamp_seconds)"
    return [
        graph(
            "Rows pushed",
            [
                (
                    f"sum by (feature_view, result) (rate({rows}{window}))",
                    "{{feature_view}} {{result}}",
                )
            ],
            "ops",
            width=6,
            about="not_newer: what was stored is as new. Much of it is a push that was repeated.",
        ),
        graph(
            "Entries refused",
            [(f"sum (rate(hikyaku_push_refused_entries_total{window}))", "refused")],
            "ops",
            width=6,
            about="Kept in the stream KEY:refused, each with its reason.",
        ),
        graph(
            "Mean time of a batch",
            [
                (
                    f"sum (rate({duration}_sum{window})) / sum (rate({duration}_count{window}))",
                    "mean",
                )
            ],
            "s",
            width=6,
        ),
        graph(
            "Since the newest event written",
            [(f"time() - {newest}", "{{feature_view}}")],
            "s",
            width=6,
            about="By wall time.",
        ),
    ]


def process() -> list[Json]:
    ready = {"0": {"text": "not ready", "color": "red"}, "1": {"text": "ready", "color": "green"}}
    versions = panel(
        "table",
        "Loaded versions",
        [(f"hikyaku_model_info{{{MODEL}}}", "")],
        width=16,
        shape="table",
        transformations=[
            {
                "id": "organize",
                "options": {
                    "excludeByName": {"Time": True, "Value": True, "__name__": True, "job": True},
                    "indexByName": {"model": 0, "role": 1, "version": 2, "sha256": 3},
                },
            }
        ],
    )
    return [
        panel(
            "stat",
            "Ready",
            [("hikyaku_ready", "{{instance}}")],
            about="As of the last request to /v2/health/ready.",
            fieldConfig={
                "defaults": {"mappings": [{"type": "value", "options": ready}]},
                "overrides": [],
            },
            options={"colorMode": "background", "reduceOptions": {"calcs": ["lastNotNull"]}},
        ),
        versions,
        graph(
            "Versions asked for",
            [
                (
                    "sum by (outcome) "
                    f"(increase(hikyaku_loads_total{{{MODEL}}}[$__rate_interval]))",
                    "{{outcome}}",
                )
            ],
            "short",
            about="By an operator, or by CURRENT of the repository.",
        ),
        graph(
            "Mean time of a load",
            [
                (
                    f"sum (rate(hikyaku_load_duration_seconds_sum{{{MODEL}}}[$__rate_interval])) / "
                    f"sum (rate(hikyaku_load_duration_seconds_count{{{MODEL}}}[$__rate_interval]))",
                    "mean",
                )
            ],
            "s",
            about="From asking for a version until every worker serves it, or it was refused.",
        ),
        graph(
            "Version under release",
            [
                (f"hikyaku_canary_share{{{MODEL}}}", "{{model}} share of the keys"),
                (
                    total("model, action", "hikyaku_release_decisions_total"),
                    "{{model}} {{action}} a second",
                ),
            ],
            "short",
            about="Which share of the routing keys it answers, and what was done on evidence.",
        ),
        graph(
            "Evidence about it",
            [
                (
                    f"hikyaku_release_evidence{{{MODEL}}}",
                    "{{model}} {{guardrail}} against {{claim}}",
                )
            ],
            "short",
            about="Base-10 logarithm of E. Against no_worse some 3.8 rolls it back; against worse "
            "1.3 of every guardrail lets it go on.",
        ),
        graph(
            "Release state",
            [
                (f"hikyaku_release_generation{{{MODEL}}}", "{{instance}} {{model}} generation"),
                ("hikyaku_release_state_age_seconds", "{{instance}} read s ago"),
            ],
            "short",
            about="Every worker of every replica should be at the same generation within a second.",
        ),
        graph(
            "Connections",
            [
                ("hikyaku_open_connections", "{{instance}} open"),
                (
                    "sum by (reason) (rate(hikyaku_closed_connections_total[$__rate_interval]))",
                    "closed per second: {{reason}}",
                ),
            ],
            "short",
            about="Closed by the service, or cut off, and why.",
        ),
        graph(
            "Memory",
            [(of_the_process("process_resident_memory_bytes"), "{{instance}} {{worker}}")],
            "bytes",
        ),
        graph(
            "CPU",
            [
                (
                    of_the_process("rate(process_cpu_seconds_total[$__rate_interval])"),
                    "{{instance}} {{worker}}",
                )
            ],
            "percentunit",
            about="100 % is one core, which is all that one worker can use for its event loop.",
        ),
        graph(
            "Open file descriptors",
            [(of_the_process("process_open_fds"), "{{instance}} {{worker}}")],
            "short",
        ),
    ]


ROWS = {
    "Traffic": traffic,
    "Latency": latency,
    "Batching": batching,
    "Predictions": predictions,
    "Candidates": candidates,
    "Release": canary,
    "Labels": labels,
    "Features": features,
    "Features pushed from streams": pushing,
    "Process": process,
}


def dashboard() -> Json:
    return {
        "uid": "hikyaku",
        "title": "Hikyaku",
        "schemaVersion": 41,
        "editable": False,
        "refresh": "5s",
        "time": {"from": "now-15m", "to": "now"},
        "timezone": "browser",
        "graphTooltip": 1,  # one crosshair for all panels
        "templating": {"list": variables()},
        "panels": laid_out(),
    }


def variables() -> list[Json]:
    def values(name: str, metric: str, **more: Any) -> Json:
        query = f"label_values({metric}, {name})"
        return {
            "name": name,
            "type": "query",
            "datasource": DATASOURCE,
            "definition": query,
            "query": {"query": query, "refId": "variable"},
            "refresh": 2,  # whenever the time range changes
            "sort": 1,
        } | more

    ranges = {"0 to 1": "[01][.][0-9]+", "all": ".+"}
    options = [{"text": text, "value": value} for text, value in ranges.items()]
    return [
        {"name": "datasource", "type": "datasource", "query": "prometheus"},
        # `unknown` too, under which refusals for models that nobody serves are counted
        values("model", "hikyaku_requests_total", includeAll=True, allValue=".+", multi=True)
        | {"current": {"text": ["All"], "value": ["$__all"]}},
        values("output", f"hikyaku_prediction_count{{{MODEL}}}"),
        {
            "name": "prediction_range",
            "label": "predictions",
            "type": "custom",
            "query": ", ".join(f"{text} : {value}" for text, value in ranges.items()),
            "options": options,
            "current": options[0],
        },
    ]


def laid_out() -> list[Json]:
    """Every panel of every row, in lines of 24 columns from left to right."""
    panels: list[Json] = []
    y = 0
    for title, build in ROWS.items():
        panels.append({"type": "row", "title": title, "panels": [], "collapsed": False})
        panels[-1]["gridPos"] = {"h": 1, "w": GRID_COLUMNS, "x": 0, "y": y}
        y += 1
        x = 0
        for document in build():
            place = document["gridPos"]
            if x + place["w"] > GRID_COLUMNS:
                x, y = 0, y + place["h"]
            place |= {"x": x, "y": y}
            x += place["w"]
            panels.append(document)
        y += panels[-1]["gridPos"]["h"]
    return [document | {"id": number} for number, document in enumerate(panels, start=1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if it differs")
    check = parser.parse_args().check
    text = json.dumps(dashboard(), indent=1) + "\n"
    if not check:
        DASHBOARD.write_text(text)
    elif DASHBOARD.read_text() != text:
        sys.exit(f"{DASHBOARD}: not what {Path(__file__).name} makes; run it")


if __name__ == "__main__":
    main()
