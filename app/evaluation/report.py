"""Fetches the comparison of a model from the service, or reads it from a file, and draws it."""

import json
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from app.errors import ConfigurationError, HikyakuError
from app.evaluation.report_page import report_html

_WITHIN_S = 30.0


def report(
    model: str, candidate: int | None, url: str, json_file: Path | None, output: Path
) -> None:
    """Write the report of the candidates, or of one of them, to `output`.

    Raises `HikyakuError` with a sentence when there is nothing to draw.
    """
    if json_file is None:
        document = _fetched(model, candidate, url)
    else:
        document = _read(json_file, model, candidate)
    try:
        page = report_html(document)
    except (KeyError, TypeError) as exc:
        where = url if json_file is None else json_file
        raise HikyakuError(f"{where}: another release told this comparison: no {exc}") from exc
    output.write_text(page, encoding="utf-8")


def _fetched(model: str, candidate: int | None, url: str) -> dict[str, Any]:
    address = f"{url.rstrip('/')}/v1/models/{urllib.parse.quote(model, safe='')}/comparison"
    if candidate is not None:
        address += f"?candidate={candidate}"
    if not address.startswith(("http://", "https://")):
        raise ConfigurationError(f"--url {url}: must begin with http:// or https://")
    try:
        with urllib.request.urlopen(address, timeout=_WITHIN_S) as answer:
            return _document(answer.read(), address)
    except urllib.error.HTTPError as exc:
        with exc:
            raise HikyakuError(f"{address}: {_refusal(exc)}") from exc
    except (urllib.error.URLError, TimeoutError) as exc:
        raise HikyakuError(f"{address}: no answer: {exc}") from exc


def _refusal(exc: urllib.error.HTTPError) -> str:
    """The sentence of a refusal of ours, else the status."""
    try:
        return str(json.loads(exc.read())["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"status {exc.code}"


def _read(path: Path, model: str, candidate: int | None) -> dict[str, Any]:
    try:
        document = _document(path.read_bytes(), str(path))
    except OSError as exc:
        raise ConfigurationError(f"{path}: {exc.strerror}") from exc
    if document["model"] != model:
        raise ConfigurationError(f"{path}: of the model {document['model']!r}")
    if candidate is None:
        return document
    chosen = [each for each in document["candidates"] if each["version"] == str(candidate)]
    if not chosen:
        raise ConfigurationError(f"{path}: has no candidate of version {candidate}")
    return {**document, "candidates": chosen}


def _document(content: bytes, where: str) -> dict[str, Any]:
    try:
        document = json.loads(content)
    except ValueError as exc:
        raise HikyakuError(f"{where}: no JSON: {exc}") from exc
    if not isinstance(document, dict) or not {"model", "champion", "candidates"} <= document.keys():
        raise HikyakuError(f"{where}: is no comparison")
    return document
