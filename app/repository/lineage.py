"""The lineage of a version: from its number to code, data, features, metrics and machine."""

from collections.abc import Mapping
from typing import Any

from app.errors import printable
from app.repository.manifest import PLAN_FILE, Environment, File, Manifest, Run, Source


def lineage(manifest: Manifest, sha256: str) -> dict[str, Any]:
    """What a manifest with this digest says of where its version came from, as JSON.

    What only serving needs (category tables, means, golden rows) is left to the manifest.
    `trained` is None where the training did not say how it ran.
    """
    training = manifest.training
    run = training.run
    plan = manifest.files.get(PLAN_FILE)
    return {
        "model": manifest.model,
        "version": str(manifest.version),
        "sha256": sha256,
        "published": {
            "at": manifest.published_at,
            "by": manifest.published_by,
            "source": manifest.source.model_dump(),
            "environment": manifest.environment.model_dump(mode="json"),
        },
        "trained": None if run is None else _trained(run),
        "fingerprint": manifest.fingerprint,
        "code": {} if run is None else _files(run.code),
        "data": {
            "window": training.data_window.model_dump(),
            "files": {} if run is None else _files(run.data),
        },
        "features": {
            **manifest.features.model_dump(mode="json"),
            "plan_sha256": None if plan is None else plan.sha256,
            "inputs": list(manifest.feature_order),
        },
        "hyperparameters": dict(training.hyperparameters),
        "metrics": dict(training.metrics),
        "golden": {
            "rows": len(training.golden.predictions),
            "tolerance": training.golden.tolerance,
        },
        "signature": dict(manifest.signature),
        "files": _files(manifest.files),
    }


def as_text(manifest: Manifest, sha256: str) -> str:
    """The same for people, one fact a line."""
    run = manifest.training.run
    window = manifest.training.data_window
    sections = [
        _section(
            f"{manifest.model} version {manifest.version}",
            {
                "manifest": f"sha256 {sha256}",
                "published": f"{manifest.published_at} by {manifest.published_by}",
                "published from": _checkout(manifest.source),
                **{name: _file(file) for name, file in manifest.files.items()},
            },
        ),
        "how it was trained: training.json did not say" if run is None else _run_text(run),
        _section(
            "data",
            {
                "window": f"{window.start} to {window.end}, {window.rows:,} rows",
                **({} if run is None else {n: _file(file) for n, file in run.data.items()}),
            },
        ),
        _features_text(manifest),
        _section("hyperparameters", manifest.training.hyperparameters),
        _section("metrics, on held-out rows", manifest.training.metrics),
    ]
    if run is None:
        sections.append(_environment_text("environment of the publication", manifest.environment))
    else:
        sections.append(_environment_text("environment of the training", run.environment))
    return "\n\n".join(sections)


def _trained(run: Run) -> dict[str, Any]:
    document = run.model_dump(mode="json")
    return {name: document[name] for name in document.keys() - {"code", "data"}}


def _files(files: Mapping[str, File]) -> dict[str, Any]:
    return {name: file.model_dump() for name, file in files.items()}


def _run_text(run: Run) -> str:
    facts: dict[str, Any] = {
        "finished": run.finished_at,
        "command": " ".join(run.command),
        "commit": _checkout(run.source),
        **{f"seed {name}": value for name, value in run.seeds.items()},
        **{name: _file(file) for name, file in run.code.items()},
    }
    return _section("training", facts)


def _features_text(manifest: Manifest) -> str:
    features = manifest.features
    views = {
        f"view {name}": f"by {', '.join(view.join_keys)}; {_age(view.ttl_s)}; "
        + ", ".join(f"{feature} {dtype}" for feature, dtype in view.features.items())
        for name, view in features.views.items()
    }
    service = features.service or "none: the model reads no stored feature"
    inputs = f"{len(manifest.feature_order)}: {', '.join(manifest.feature_order)}"
    return _section("features", {"feature service": service, **views, "model inputs": inputs})


def _environment_text(title: str, environment: Environment) -> str:
    lock = environment.lock
    return _section(
        title,
        {
            "python": f"{environment.implementation} {environment.python}",
            "platform": f"{environment.platform} ({environment.machine})",
            "processor": f"{environment.processor}, {environment.cpus} to run on",
            **environment.variables,
            "lock file": "none" if lock is None else f"{lock.file}, sha256 {lock.sha256}",
            "packages": ", ".join(f"{n} {version}" for n, version in environment.packages.items()),
        },
    )


def _section(title: str, facts: Mapping[str, Any]) -> str:
    width = max((len(name) for name in facts), default=0)
    # Whoever has written the manifest could else write to the terminal what he likes.
    lines = (printable(f"  {name:{width}}  {value}") for name, value in facts.items())
    return "\n".join([printable(title), *lines])


def _file(file: File) -> str:
    return f"sha256 {file.sha256}, {file.bytes:,} bytes"


def _checkout(source: Source) -> str:
    if not source.commit:
        return "outside a checkout"
    if not source.diff_sha256:
        return f"commit {source.commit}"
    return f"commit {source.commit} (uncommitted changes: sha256 {source.diff_sha256})"


def _age(ttl_s: float | None) -> str:
    return "never too old" if ttl_s is None else f"ttl {ttl_s:g} s"
