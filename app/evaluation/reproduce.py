"""Trains a published version again from its manifest, and says what came out differently."""

import asyncio
import importlib.metadata
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from app.backends import open_backend
from app.contract import Contract, Isolation, OnnxOptions, TritonOptions, load_contract
from app.deadline import Deadline
from app.errors import (
    ConfigurationError,
    HikyakuError,
    InvalidModel,
    RequestError,
)
from app.features.encoding import Encoder
from app.features.plan import FeaturePlan, plan_from_json
from app.instances import InstanceDecoder
from app.local.processes import child
from app.outputs import OutputReader
from app.repository.layout import CONTRACT_FILE
from app.repository.manifest import (
    MANIFEST_FILE,
    MODEL_FILE,
    PLAN_FILE,
    File,
    Golden,
    Manifest,
    Training,
    describe,
    golden_tensors,
    read_training,
    signature_of,
)
from app.repository.origin import THREAD_VARIABLES, environment, source_of, training_code
from app.repository.publish import TRAINING_FILE
from app.repository.vault import VaultedVersion

TRAINING_CODE = "train.py"
PUBLISHED_FILE = "golden predictions of the published file"

# Sums in another order differ by this much; another model differs by more.
_SAME_TO = 1e-9
_EXECUTION_S = 60.0
_MEMORY_MB = 2_048
_SHOWN = 6

_INGREDIENTS = {
    *(
        "inputs of model.yaml",
        "commit",
        "uncommitted changes",
        "code",
        "data",
        "data that was read",
    ),
    *("python", "implementation", "platform", "machine", "processor", "cpus", "packages"),
}

Outcome: TypeAlias = Literal["same", "differs", "unknown"]
Numbers: TypeAlias = Mapping[str, float]
Predictions: TypeAlias = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Comparison:
    """One thing as the manifest has it, beside what is there now.

    Where `decides`, the version is reproduced only if it is the same. What else differs (a package,
    the processor, a file of code) may be why, and need not matter.
    """

    what: str
    outcome: Outcome
    detail: str
    decides: bool


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
        _train(published, code, Path(folder))
        after = list(_after(published, contract, Path(folder)))
    _show("what came out", after)
    conclusion = _conclusion([*before, *after])
    print("\n".join(conclusion), flush=True)
    reproduced = not _decisive([*before, *after])
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
    inputs = manifest.inputs == contract.inputs_document()
    yield Comparison(
        "inputs of model.yaml", "same" if inputs else "differs", _columns(manifest), decides=False
    )
    run = manifest.training.run
    if run is None:
        yield Comparison(
            "training", "unknown", "the version does not say how it was trained", decides=False
        )
        return
    source = source_of(code)
    yield _compared("commit", run.source.commit, source.commit)
    yield _compared("uncommitted changes", run.source.diff_sha256, source.diff_sha256)
    files = training_code(contract, code, feature_repo)
    yield _files("code", run.code, files, decides=False)
    yield _files("data", run.data, {name: code / name for name in run.data}, decides=True)
    then, now = run.environment, environment(also=run.environment.packages)
    for name in ("python", "implementation", "platform", "machine", "processor", "cpus"):
        yield _compared(name, getattr(then, name), getattr(now, name))
    yield _packages(then.packages)


def _after(published: VaultedVersion, contract: Contract, artifact: Path) -> Iterator[Comparison]:
    """What the new training left in `artifact`, beside the version."""
    manifest = published.manifest
    then, now = manifest.training, read_training(artifact / TRAINING_FILE)
    if then.run is not None and now.run is not None:
        yield _digests("data that was read", then.run.data, now.run.data)
    yield _compared("hyperparameters", then.hyperparameters, now.hyperparameters, decides=True)
    window = (then.data_window.model_dump(), now.data_window.model_dump())
    yield _compared("data window", *window, decides=True)
    yield _numbers("categories", _flat(then.categories), _flat(now.categories))
    yield _numbers("means", then.means, now.means)
    for name in sorted({*then.metrics, *now.metrics}):
        metric = [{name: one.metrics[name]} if name in one.metrics else {} for one in (then, now)]
        yield _numbers(f"metric {name}", *metric)
    model = describe(artifact / MODEL_FILE)
    same_file = model == manifest.files[MODEL_FILE]
    yield Comparison(
        MODEL_FILE, "same" if same_file else "differs", f"sha256 {model.sha256}", decides=False
    )
    plan = plan_from_json((published.folder / PLAN_FILE).read_bytes())
    again = _golden("golden predictions", artifact / MODEL_FILE, now, manifest, contract, plan)
    yield again
    if again.outcome == "differs":
        file = published.folder / MODEL_FILE
        yield replace(_golden(PUBLISHED_FILE, file, then, manifest, contract, plan), decides=False)


def _train(published: VaultedVersion, code: Path, artifact: Path) -> None:
    """Run train.py in a process of its own, which says itself how far it is."""
    manifest = artifact / MANIFEST_FILE
    manifest.write_bytes(published.manifest.to_json())
    command = [sys.executable, str(code / TRAINING_CODE), "--output", str(artifact)]
    command += ["--like", str(manifest)]
    inherited = {name: v for name, v in os.environ.items() if name not in THREAD_VARIABLES}
    run = published.manifest.training.run
    as_then = {} if run is None else run.environment.variables
    settings = "".join(f", {name}={value}" for name, value in as_then.items())
    print(f"\ntraining again: {code / TRAINING_CODE}{settings}", flush=True)
    started_s = time.monotonic()
    with child(command, {**inherited, **as_then}) as process:
        if process.wait() != 0:
            raise HikyakuError(f"{code / TRAINING_CODE} failed; what it said is above")
    print(f"  took {time.monotonic() - started_s:.0f} s", flush=True)


def _golden(
    what: str,
    model: Path,
    training: Training,
    manifest: Manifest,
    contract: Contract,
    plan: FeaturePlan,
) -> Comparison:
    """What the model file says of the manifest's golden rows, with the tables of its training."""
    golden = manifest.training.golden
    try:
        said = asyncio.run(_predicted(model, training, golden, manifest, contract, plan))
    except (InvalidModel, RequestError) as exc:
        return Comparison(what, "differs", f"cannot be made: {exc}", decides=True)
    if len(said) != len(golden.predictions):
        detail = f"the manifest has {len(golden.predictions)} for {len(said)} rows"
        return Comparison(what, "differs", detail, decides=True)
    gaps = [_gap(one, two) for one, two in zip(said, golden.predictions, strict=True)]
    over = [row for row, gap in enumerate(gaps) if not gap <= golden.tolerance]
    largest = f"largest difference {max(gaps, default=0.0):.3g}, tolerance {golden.tolerance:g}"
    if over:
        detail = f"{len(over)} of {len(gaps)} rows ({_some(map(str, over))}): {largest}"
        return Comparison(what, "differs", detail, decides=True)
    return Comparison(what, "same", f"{len(gaps)} rows: {largest}", decides=True)


async def _predicted(
    model: Path,
    training: Training,
    golden: Golden,
    manifest: Manifest,
    contract: Contract,
    plan: FeaturePlan,
) -> Predictions:
    """As the server would, in a process of its own: the file may be anybody's."""
    options = contract.backend
    if isinstance(options, TritonOptions):
        options = options.failover or OnnxOptions(use="onnx")
    isolated = options.isolated or Isolation(memory_mb=_MEMORY_MB)
    backend = await open_backend(
        options.model_copy(update={"isolated": isolated}), model, signature_of(manifest)
    )
    try:
        encoder = Encoder(contract.inputs, training.categories)
        rows = golden_tensors(golden, InstanceDecoder(contract, plan), plan, encoder)
        outputs = OutputReader(contract.outputs, None, backend.signature)
        return outputs.read(await backend.execute(rows, Deadline.after(_EXECUTION_S))).predictions
    finally:
        await backend.close()


def _gap(said: Any, expected: Any) -> float:
    """The largest difference of two predictions; infinite where they are not alike."""
    if isinstance(expected, Mapping):
        if not isinstance(said, Mapping) or said.keys() != expected.keys():
            return math.inf
        return max((_gap(said[name], expected[name]) for name in expected), default=0.0)
    if not isinstance(said, int | float) or not isinstance(expected, int | float):
        return math.inf
    return abs(said - expected)


def _compared(what: str, then: Any, now: Any, *, decides: bool = False) -> Comparison:
    """Where both are mappings, name by name."""
    if then == now:
        return Comparison(what, "same", _brief(then), decides)
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        names = [name for name in {**then, **now} if then.get(name) != now.get(name)]
        changes = (f"{n} was {_brief(then.get(n))}, is {_brief(now.get(n))}" for n in names)
        return Comparison(what, "differs", _some(changes), decides)
    return Comparison(what, "differs", f"was {_brief(then)}, is {_brief(now)}", decides)


def _files(
    what: str, then: Mapping[str, File], now: Mapping[str, Path], *, decides: bool
) -> Comparison:
    """The files that are there now, of which those of another size are not read."""
    changes = [f"{name} is new" for name in now.keys() - then.keys()]
    for name, file in then.items():
        path = now.get(name)
        if path is None or not path.is_file():
            changes.append(f"{name} is gone")
        elif path.stat().st_size != file.bytes or describe(path) != file:
            changes.append(f"{name} has another content")
    if changes:
        return Comparison(what, "differs", _some(sorted(changes)), decides)
    return Comparison(what, "same", _size(then), decides)


def _digests(what: str, then: Mapping[str, File], now: Mapping[str, File]) -> Comparison:
    changes = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    if changes:
        return Comparison(what, "differs", _some(sorted(changes)), decides=True)
    return Comparison(what, "same", _size(then), decides=True)


def _packages(then: Mapping[str, str]) -> Comparison:
    changes = []
    for name, version in then.items():
        try:
            now = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            now = "not installed"
        if now != version:
            changes.append(f"{name} was {version}, is {now}")
    if changes:
        return Comparison("packages", "differs", "; ".join(changes), decides=False)
    return Comparison("packages", "same", f"{len(then)}", decides=False)


def _numbers(what: str, then: Numbers, now: Numbers) -> Comparison:
    """By name; the same to what rounding in another order makes of them."""
    gone = [f"{name} is gone" for name in sorted(then.keys() - now.keys())]
    new = [f"{name} is new" for name in sorted(now.keys() - then.keys())]
    other = [
        f"{name} was {then[name]:.9g}, is {now[name]:.9g} ({now[name] - then[name]:+.2g})"
        for name in then
        if name in now and not math.isclose(then[name], now[name], rel_tol=_SAME_TO, abs_tol=1e-12)
    ]
    if gone or new or other:
        return Comparison(what, "differs", _some([*gone, *new, *other]), decides=True)
    detail = f"{len(then)} numbers" if len(then) != 1 else f"{next(iter(then.values())):.9g}"
    return Comparison(what, "same", detail, decides=True)


def _flat(tables: Mapping[str, Numbers]) -> dict[str, float]:
    return {
        f"{name}={key}": value for name, table in tables.items() for key, value in table.items()
    }


def _decisive(comparisons: Iterable[Comparison]) -> list[Comparison]:
    return [one for one in comparisons if one.decides and one.outcome != "same"]


def _conclusion(comparisons: Sequence[Comparison]) -> list[str]:
    """In words: whether it was reproduced, and where that leads."""
    differing = {one.what for one in comparisons if one.outcome == "differs"}
    decisive = [one.what for one in _decisive(comparisons)]
    if not decisive:
        return [f"reproduced, {_how_close(differing)}"]
    lines = [f"not reproduced: {', '.join(decisive)} differ from what the manifest says"]
    if PUBLISHED_FILE in differing:
        lines.append("the published model.onnx does not predict the golden rows so either")
    if MODEL_FILE not in differing:
        lines.append("the new model.onnx is the published one, byte for byte")
    if differing.isdisjoint(_INGREDIENTS):
        lines.append(
            "nothing of what goes in differs: the manifest is not that of this model, or the "
            "training is not deterministic"
        )
    return lines


def _how_close(differing: set[str]) -> str:
    if MODEL_FILE not in differing:
        return "byte for byte"
    return "though not byte for byte: the same metrics, the golden rows within their tolerance"


def _show(title: str, comparisons: Sequence[Comparison]) -> None:
    width = max(len(one.what) for one in comparisons)
    print(f"\n{title}")
    for one in comparisons:
        print(f"  {one.what:{width}}  {one.outcome:7}  {one.detail}")
    sys.stdout.flush()


def _columns(manifest: Manifest) -> str:
    return f"{len(manifest.feature_order)} columns"


def _size(files: Mapping[str, File]) -> str:
    return f"{len(files)} files, {sum(file.bytes for file in files.values()):,} bytes"


def _brief(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {one}" for name, one in value.items())
    return "none" if value is None or value == "" else str(value)


def _some(words: Iterable[str]) -> str:
    """The first few, and how many more."""
    listed = list(words)
    more = len(listed) - _SHOWN
    return "; ".join(listed[:_SHOWN]) + (f"; and {more:,} more" if more > 0 else "")
