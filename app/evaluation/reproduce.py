"""Trains a published version again from its manifest, and says what came out differently."""

import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from app.backends import open_backend
from app.contract import Contract, Isolation, OnnxOptions, TritonOptions, load_contract
from app.deadline import Deadline
from app.errors import ConfigurationError, HikyakuError, InvalidModel, RequestError
from app.evaluation.comparison import (
    Comparison,
    Outcome,
    compare_digests,
    compare_files,
    compare_numbers,
    compare_packages,
    compare_predictions,
    compare_values,
    decisive,
)
from app.features.encoding import Encoder
from app.features.plan import FeaturePlan, plan_from_json
from app.instances import InstanceDecoder
from app.local.processes import child
from app.outputs import OutputReader
from app.repository.files import regular_files
from app.repository.layout import CONTRACT_FILE
from app.repository.manifest import (
    MANIFEST_FILE,
    MODEL_FILE,
    PLAN_FILE,
    Manifest,
    Training,
    golden_tensors,
    read_training,
    signature_of,
)
from app.repository.origin import THREAD_VARIABLES, environment, source_of, training_code
from app.repository.publish import TRAINING_FILE
from app.repository.vault import VaultedVersion

TRAINING_CODE = "train.py"

_FILES = "files of the model"
_AGAIN = "golden predictions"
_PUBLISHED = "golden predictions of the published file"

_EXECUTION_S = 60.0
_MEMORY_MB = 2_048


def reproduce(
    published: VaultedVersion, code: Path, feature_repo: Path, report_file: Path | None
) -> int:
    """Train the version again with `code`'s train.py, and print what differs before and after.

    Returns 0 when it was reproduced: from the same data, with the same window, tables and metrics,
    and the golden rows predicted within their tolerance; else 1. Raises `HikyakuError` when it
    cannot be trained.
    """
    manifest = published.manifest
    if not (code / TRAINING_CODE).is_file():
        raise ConfigurationError(f"{code / TRAINING_CODE}: no such file: --code names its folder")
    contract = load_contract(code / CONTRACT_FILE)
    print(f"{manifest.model} version {manifest.version}, manifest sha256 {published.sha256}")
    before = list(_before(manifest, contract, code, feature_repo))
    _show("what goes in, and with what", before)
    with tempfile.TemporaryDirectory(prefix="hikyaku-") as folder:
        artifact = _trained(published, code, Path(folder))
        after = list(_after(published, contract, artifact))
    _show("what came out", after)
    conclusion = _conclusion(before, after)
    print("\n".join(conclusion), flush=True)
    reproduced = not decisive([*before, *after])
    if report_file is not None:
        report = {
            "model": manifest.model,
            "version": str(manifest.version),
            "sha256": published.sha256,
            "reproduced": reproduced,
            "before": [asdict(comparison) for comparison in before],
            "after": [asdict(comparison) for comparison in after],
            "conclusion": conclusion,
        }
        report_file.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if reproduced else 1


def _before(
    manifest: Manifest, contract: Contract, code: Path, feature_repo: Path
) -> Iterator[Comparison]:
    """What can be told without training."""
    inputs: Outcome = "same" if manifest.inputs == contract.inputs_document() else "differs"
    columns = f"{len(manifest.feature_order)} columns"
    yield Comparison("inputs of model.yaml", inputs, columns, decides=False)
    run = manifest.training.run
    if run is None:
        unknown = "the version does not say how it was trained"
        yield Comparison("training", "unknown", unknown, decides=False)
        return
    source = source_of(code)
    yield compare_values("commit", run.source.commit, source.commit)
    yield compare_values("uncommitted changes", run.source.diff_sha256, source.diff_sha256)
    files = training_code(contract, code, feature_repo)
    yield compare_files("code", run.code, files, decides=False)
    yield compare_files("data", run.data, {name: code / name for name in run.data}, decides=True)
    then, now = run.environment, environment(also=run.environment.packages)
    for name in ("python", "implementation", "platform", "machine", "processor", "cpus"):
        yield compare_values(name, getattr(then, name), getattr(now, name))
    yield compare_packages(then.packages, now.packages)


def _trained(published: VaultedVersion, code: Path, folder: Path) -> Path:
    """Run train.py in a process of its own, which says itself how far it is; what it left."""
    artifact, manifest = folder / "artifact", folder / MANIFEST_FILE
    artifact.mkdir()
    manifest.write_bytes(published.manifest.to_json())
    command = [sys.executable, str(code / TRAINING_CODE), "--output", str(artifact)]
    command += ["--like", str(manifest)]
    inherited = {name: v for name, v in os.environ.items() if name not in THREAD_VARIABLES}
    run = published.manifest.training.run
    said = {} if run is None else run.environment.variables
    # Whoever wrote the manifest must not say what else this process loads (LD_PRELOAD).
    as_then = {name: said[name] for name in THREAD_VARIABLES if name in said}
    settings = "".join(f", {name}={value}" for name, value in as_then.items())
    print(f"\ntraining again: {code / TRAINING_CODE}{settings}", flush=True)
    started_s = time.monotonic()
    with child(command, {**inherited, **as_then}) as process:
        if process.wait() != 0:
            raise HikyakuError(f"{code / TRAINING_CODE} failed; what it said is above")
    print(f"  took {time.monotonic() - started_s:.0f} s", flush=True)
    return artifact


def _after(published: VaultedVersion, contract: Contract, artifact: Path) -> Iterator[Comparison]:
    """What the new training left in `artifact`, beside the version."""
    manifest = published.manifest
    then, now = manifest.training, read_training(artifact / TRAINING_FILE)
    if then.run is not None and now.run is not None:
        yield compare_digests("data that was read", then.run.data, now.run.data)
    yield compare_values("hyperparameters", then.hyperparameters, now.hyperparameters, decides=True)
    window = (then.data_window.model_dump(), now.data_window.model_dump())
    yield compare_values("data window", *window, decides=True)
    yield compare_numbers("categories", _flat(then.categories), _flat(now.categories))
    yield compare_numbers("means", then.means, now.means)
    for name in sorted({*then.metrics, *now.metrics}):
        metric = [{name: one.metrics[name]} if name in one.metrics else {} for one in (then, now)]
        yield compare_numbers(f"metric {name}", *metric)
    files = {name: file for name, file in manifest.files.items() if name != PLAN_FILE}
    written = {name: artifact / name for name in regular_files(artifact) if name != TRAINING_FILE}
    yield compare_files(_FILES, files, written, decides=False)
    plan = plan_from_json((published.folder / PLAN_FILE).read_bytes())
    again = _golden(_AGAIN, artifact, now, manifest, contract, plan, decides=True)
    yield again
    if again.outcome == "differs":  # whose fault is it?
        folder = published.folder
        yield _golden(_PUBLISHED, folder, then, manifest, contract, plan, decides=False)


def _golden(
    what: str,
    folder: Path,
    training: Training,
    manifest: Manifest,
    contract: Contract,
    plan: FeaturePlan,
    *,
    decides: bool,
) -> Comparison:
    """What a folder's model file says of the manifest's golden rows, with its training's tables."""
    try:
        said = asyncio.run(
            _predicted(folder / MODEL_FILE, training.categories, manifest, contract, plan)
        )
    except (InvalidModel, RequestError) as exc:
        return Comparison(what, "differs", f"cannot be made: {exc}", decides)
    return compare_predictions(what, manifest.training.golden, said, decides=decides)


async def _predicted(
    model: Path,
    categories: Mapping[str, Mapping[str, float]],
    manifest: Manifest,
    contract: Contract,
    plan: FeaturePlan,
) -> Sequence[Mapping[str, Any]]:
    """As the server would, in a process of its own: the file may be anybody's."""
    options = contract.backend
    if isinstance(options, TritonOptions):
        options = options.failover or OnnxOptions(use="onnx")
    isolated = options.isolated or Isolation(memory_mb=_MEMORY_MB)
    backend = await open_backend(
        options.model_copy(update={"isolated": isolated}), model, signature_of(manifest)
    )
    try:
        encoder, decoder = Encoder(contract.inputs, categories), InstanceDecoder(contract, plan)
        rows = golden_tensors(manifest.training.golden, decoder, plan, encoder)
        outputs = OutputReader(contract.outputs, None, backend.signature)
        return outputs.read(await backend.execute(rows, Deadline.after(_EXECUTION_S))).predictions
    finally:
        await backend.close()


def _flat(tables: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    return {
        f"{name}={key}": value for name, table in tables.items() for key, value in table.items()
    }


def _conclusion(before: Sequence[Comparison], after: Sequence[Comparison]) -> list[str]:
    """In words: whether it was reproduced, and where that leads."""
    differing = {one.what for one in [*before, *after] if one.outcome == "differs"}
    deciding = [one.what for one in decisive([*before, *after])]
    if not deciding and _FILES not in differing:
        return ["reproduced, byte for byte"]
    if not deciding:
        return ["reproduced: the same metrics, and the golden rows within their tolerance"]
    lines = [f"not reproduced: {', '.join(deciding)} differ from what the manifest says"]
    if _PUBLISHED in differing:
        lines.append("the published model.onnx does not predict the golden rows so either")
    if _FILES not in differing:
        lines.append("the new model.onnx is the published one, byte for byte")
    if not any(one.outcome == "differs" for one in before):
        lines.append(
            "nothing of what goes in differs: the manifest is not that of this model, or the "
            "training is not deterministic"
        )
    return lines


def _show(title: str, comparisons: Sequence[Comparison]) -> None:
    width = max(len(one.what) for one in comparisons)
    print(f"\n{title}")
    for one in comparisons:
        print(f"  {one.what:{width}}  {one.outcome:7}  {one.detail}")
    sys.stdout.flush()
