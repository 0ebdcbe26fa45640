"""Which operators the installed ONNX Runtime knows."""

import os
from collections.abc import Mapping

# As in onnx_session, whichever of the two is imported first.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

from onnxruntime.capi import onnxruntime_pybind11_state as runtime


def known_operators() -> Mapping[str, Mapping[str, int]]:
    """By domain, which is empty for ONNX's own, and name: since which version it is there."""
    since: dict[str, dict[str, int]] = {}
    for schema in runtime.get_all_operator_schema():
        operators = since.setdefault(schema.domain, {})
        version = schema.since_version
        operators[schema.name] = min(version, operators.get(schema.name, version))
    return since


def newest_versions() -> Mapping[str, int]:
    """By domain, the newest version of its operators."""
    newest: dict[str, int] = {}
    for schema in runtime.get_all_operator_schema():
        newest[schema.domain] = max(schema.since_version, newest.get(schema.domain, 1))
    return newest
