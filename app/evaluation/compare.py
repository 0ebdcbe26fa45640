"""Has two versions answer the same recorded rows, and tells what `GET …/comparison` would."""

import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from app.clock import WallClock
from app.comparison.document import comparison_document
from app.comparison.pairs import NO_DECISION, FloatArray, Pairs, scores
from app.comparison.segments import SegmentReader
from app.comparison.table import ComparisonTable, Names
from app.contract import Contract, parse_contract
from app.deadline import Deadline, DeadlineSweep
from app.errors import BackendError, ConfigurationError, HikyakuError, RequestError
from app.evaluation.report_page import report_html
from app.features.static_source import StaticSource
from app.repository.layout import CONTRACT_FILE
from app.repository.load import VersionOpener
from app.repository.signing import TrustedKeys
from app.repository.store import Repository
from app.repository.vault import Vault
from app.repository.verify import verify_version
from app.served_model import Candidate
from app.telemetry.metrics import Metrics
from app.tensors import take_rows

BLOCK_COLUMN = "block"

_ROWS_AT_ONCE = 8_192
_EXECUTION_S = 600.0
_PAIR_COLUMNS = ("champion", "candidate", "champion_decision", "candidate_decision", "failed")


class Files(NamedTuple):
    """Where the comparison is written, too: as JSON, and drawn as HTML."""

    document: Path | None = None
    report: Path | None = None


def compare(
    repository: Repository,
    trusted: TrustedKeys | None,
    name: str,
    versions: tuple[int, int],
    rows_file: Path,
    files: Files,
    *,
    isolated: bool = True,
) -> int:
    """Execute both versions, the champion first, on each row of a parquet file, and print how they
    differ.

    A column is a field of the instance or a stored feature, as `view:feature`; features without a
    column are NOT_FOUND. Rows that follow each other with the same `block` are one execution;
    without that column `shadow.block_rows` are. Raises `HikyakuError` for a version that must not
    be loaded, and for rows that a server would refuse. `isolated`: whether they are verified in
    processes of their own; False for models whose author is the caller, in tests.
    """
    table = _read(rows_file)
    contract = _contract(repository, name)
    with tempfile.TemporaryDirectory(prefix="hikyaku-") as folder:
        vault = Vault(Path(folder), repository, trusted)
        compared = asyncio.run(_compared(vault, contract, name, versions, table, isolated))
    _tell(name, compared, contract, files)
    return 0


def compare_pairs(repository: Repository, name: str, pairs_file: Path, files: Files) -> int:
    """The same of what both have said already: a parquet file with the columns `block`, `champion`,
    `candidate`, `champion_decision`, `candidate_decision`, `failed`, and where there are any
    `segments` (a list of each row's), `champion_s` and `candidate_s` (app/comparison/pairs.py)."""
    contract = _contract(repository, name)
    table = _read(pairs_file)
    missing = [
        column for column in (BLOCK_COLUMN, *_PAIR_COLUMNS) if column not in table.schema.names
    ]
    if missing:
        raise ConfigurationError(f"{pairs_file}: has no column {', '.join(missing)}")
    segments = tuple(segment.names(key) for key, segment in contract.segments.items())
    counted = _empty(segments, contract)
    counted.add(_recorded(table, len(segments)), time.time())
    _tell(name, _Compared([], counted), contract, files)
    return 0


@dataclass(frozen=True, slots=True)
class _Compared:
    versions: Sequence[Mapping[str, str]]
    """Who was compared, the champion first; nobody where it was recorded by others."""
    table: ComparisonTable


async def _compared(
    vault: Vault,
    contract: Contract,
    name: str,
    versions: tuple[int, int],
    table: pa.Table,
    isolated: bool,
) -> _Compared:
    async with AsyncExitStack() as stack:
        opener = VersionOpener(
            StaticSource,  # which has nothing: every feature is NOT_FOUND until a row gives it
            await stack.enter_async_context(DeadlineSweep()),
            Metrics(),
            WallClock(),
            drain_s=0.0,
            workers=1,
        )
        opened = []
        for version in versions:
            vaulted = await asyncio.to_thread(vault.take, name, version)
            await verify_version(vaulted, contract, isolated=isolated)
            # Executed in a process of its own, as the shadow does.
            candidate = await opener.open_candidate(vaulted, contract, lambda event: None, stack)
            opened.append(candidate)
        champion, candidate = opened
        _check_columns(opened, table)
        segments = SegmentReader(contract, champion.decoder.required)
        counted = _empty(segments.names, contract)
        for part in _parts(table, contract.shadow.block_rows):
            await _count(champion, candidate, segments, part, counted)
        told = [{"version": str(one.id.version), "sha256": one.id.sha256} for one in opened]
        return _Compared(told, counted)


def _check_columns(versions: Sequence[Candidate], table: pa.Table) -> None:
    """Raises `ConfigurationError` for fields without a column; features may go without one."""
    columns = set(table.schema.names)
    without: dict[str, None] = {}
    for version in versions:
        fields = [field for field in version.decoder.required if field not in columns]
        if fields:
            raise ConfigurationError(f"version {version.id.version} needs: {', '.join(fields)}")
        features = version.source.plan.references
        without |= dict.fromkeys(name for name in features if name not in columns)
    if without:
        print(f"without a column, and so NOT_FOUND: {', '.join(without)}", flush=True)


@dataclass(frozen=True, slots=True)
class _Part:
    """Rows of whole blocks. `first` is the place of the first row in the file, `starts` the places
    of each block's first row among these."""

    rows: pa.Table
    first: int
    starts: Sequence[int]


def _parts(table: pa.Table, block_rows: int) -> Iterator[_Part]:
    """Whole blocks, as many as make some thousands of rows."""
    rows = table.num_rows
    if BLOCK_COLUMN in table.schema.names:
        numbers = table.column(BLOCK_COLUMN).to_numpy()
        starts = [0, *(np.flatnonzero(numbers[1:] != numbers[:-1]) + 1).tolist()]
    else:
        starts = list(range(0, rows, block_rows))
    begun: list[int] = []
    for start, stop in pairwise([*starts, rows]):
        begun.append(start)
        if stop - begun[0] >= _ROWS_AT_ONCE or stop == rows:
            part = table.slice(begun[0], stop - begun[0])
            yield _Part(part, begun[0], [place - begun[0] for place in begun])
            begun = []


async def _count(
    champion: Candidate,
    candidate: Candidate,
    segments: SegmentReader,
    part: _Part,
    counted: ComparisonTable,
) -> None:
    """What the champion does not answer, no candidate would have been shown."""
    ours, theirs = await _said(champion, part), await _said(candidate, part)
    champion_scores, candidate_scores = scores(ours.numbers, theirs.numbers)
    begins = np.zeros(part.rows.num_rows, dtype=np.int32)
    begins[part.starts[1:]] = 1
    pairs = Pairs(
        np.cumsum(begins, dtype=np.int32),
        champion_scores,
        candidate_scores,
        ours.decisions,
        theirs.decisions,
        theirs.failed,
        segments.read(ours.fields, part.rows.num_rows),
        ours.row_s,
        theirs.row_s,
    )
    if ours.failed.any():
        counted.drop("champion_failed", int(ours.failed.sum()))
        answered = ~ours.failed
        pairs = Pairs(*(getattr(pairs, column)[answered] for column in Pairs.__slots__))
    counted.add(pairs, time.time())


class _Said:
    """What a version says about rows; NaN and no decision where it fails."""

    def __init__(self, fields: Mapping[str, Sequence[Any]], rows: int, labels: int | None) -> None:
        self.fields = fields
        self.numbers: FloatArray = np.full((rows,) if labels is None else (rows, labels), np.nan)
        self.decisions = np.full(rows, NO_DECISION, np.int32)
        self.failed = np.ones(rows, dtype=np.bool_)
        self.row_s = np.full(rows, np.nan)


async def _said(version: Candidate, part: _Part) -> _Said:
    """The rows take the way of a request: typed decoding, the contract's missing values, encoding.
    Raises `HikyakuError` for those that do not go that way."""
    contract = version.contract
    try:
        instances = version.decoder.decode(_request(version, part.rows), max_instances=sys.maxsize)
        if version.source.plan.views:
            features = await version.fetch(instances, Deadline.after(_EXECUTION_S))
            _, inputs = version.encode(instances, features, 0.0)
        else:
            inputs = version.encode_fields(instances)
    except RequestError as exc:
        where = f"version {version.id.version}, in the rows from {part.first} on"
        raise HikyakuError(f"{where}: {exc}") from exc
    labels = contract.outputs[contract.score].labels
    said = _Said(instances.fields, instances.count, None if labels is None else len(labels))
    for start, stop in pairwise([*part.starts, instances.count]):
        began_s = time.perf_counter()
        try:
            outputs = await version.backend.execute(
                take_rows(inputs, start, stop), Deadline.after(_EXECUTION_S)
            )
        except BackendError:
            continue
        said.row_s[start:stop] = (time.perf_counter() - began_s) / (stop - start)
        said.numbers[start:stop] = version.outputs.numbers(contract.score, outputs)
        said.decisions[start:stop] = version.outputs.decisions(outputs)
        said.failed[start:stop] = False
    return said


def _request(version: Candidate, rows: pa.Table) -> bytes:
    """The body of a request for all of them, with the features that the rows give."""
    plan = version.source.plan
    wanted = [*version.decoder.required, *plan.references]
    columns = {name: _values(rows, name) for name in wanted if name in rows.schema.names}
    named = [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]
    return msgspec.json.encode({"instances": named})


def _values(rows: pa.Table, name: str) -> list[Any]:
    column = rows.column(name)
    if pa.types.is_timestamp(column.type):  # Python's datetime knows no nanoseconds
        column = column.cast(pa.timestamp("us", column.type.tz), safe=False)
    values: list[Any] = column.to_pylist()
    return values


def _recorded(table: pa.Table, dimensions: int) -> Pairs:
    def column(name: str) -> NDArray[Any]:
        if name not in table.schema.names:
            return np.full(table.num_rows, np.nan)
        values: NDArray[Any] = table.column(name).to_numpy()
        return values

    segments = np.zeros((table.num_rows, dimensions), dtype=np.int32)
    if dimensions:
        segments[:] = np.stack(column("segments").tolist())
    return Pairs(
        column(BLOCK_COLUMN),
        column("champion"),
        column("candidate"),
        column("champion_decision"),
        column("candidate_decision"),
        column("failed"),
        segments,
        column("champion_s"),
        column("candidate_s"),
    )


def _read(path: Path) -> pa.Table:
    try:
        return pq.read_table(path)
    except (pa.ArrowException, FileNotFoundError) as exc:
        raise ConfigurationError(f"{path}: no parquet file: {exc}") from exc


def _contract(repository: Repository, name: str) -> Contract:
    return parse_contract(repository.contract(name), repository.where(name, CONTRACT_FILE))


def _decisions(contract: Contract) -> Sequence[bool | str]:
    """By their numbers."""
    if contract.decision is None:
        return ()
    return contract.outputs[contract.decision.output].labels or (False, True)


def _empty(names: Names, contract: Contract) -> ComparisonTable:
    decisions = len(_decisions(contract))
    return ComparisonTable.empty(names, decisions, contract.score_is_probability)


def _tell(name: str, compared: _Compared, contract: Contract, files: Files) -> None:
    nobody: Mapping[str, str | None] = {"version": None, "sha256": None}
    champion, candidate = compared.versions or (nobody, nobody)
    comparison = comparison_document(compared.table, _decisions(contract))
    document = {
        "model": name,
        "output": contract.score,
        "threshold": contract.threshold,
        "champion": champion,
        "candidates": [{**candidate, "share": None, "trial": None, "comparison": comparison}],
        "quality": None,
    }
    if files.document is not None:
        files.document.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    if files.report is not None:
        files.report.write_text(report_html(document), encoding="utf-8")
    print("\n".join(_as_text(comparison)), flush=True)


def _as_text(comparison: Mapping[str, Any]) -> Iterator[str]:
    yield f"{comparison['rows']:,} rows in {comparison['blocks']:,} blocks"
    for name in ("failed", "not_finite", "flips"):
        share = comparison[name]
        yield f"  {name:12} {share['rows']:>8,}  {_between(share, 'share', '.4%')}"
    for reason, rows in comparison["dropped"].items():
        yield f"  dropped      {rows:>8,}  {reason}"
    difference = comparison["difference"]
    yield f"  difference   {_between(difference, 'mean', '+.6f')}"
    yield f"  absolute     {_between(difference['mean_absolute'], 'mean', '.6f')}"
    quantiles = difference["quantiles"].items()
    yield "  quantiles    " + "  ".join(f"{name} {_number(q, '+.4f')}" for name, q in quantiles)
    order = comparison["association"]
    yield f"  rank correlation {_number(order['spearman'], '.4f')}"
    distance = comparison["score_distance"]
    if distance is not None:
        yield f"  PSI {distance['psi']:.4f} (in practice from {distance['psi_practical']} on), " + (
            f"KS {distance['ks']:.4f}, JS {distance['js']:.5f}"
        )
    times = comparison["execution_time"]
    champion, candidate = (_number(times[of]["mean_ms"], ".4f") for of in ("champion", "candidate"))
    yield f"  execution    {champion} and {candidate} ms a row"
    for segment in comparison["segments"]:
        yield f"  {segment['name']:24} {segment['rows']:>8,} rows  flips " + (
            f"{_between(segment['flips'], 'share', '.3%')}  "
            f"difference {_between(segment['difference'], 'mean', '+.5f')}"
        )


def _between(estimate: Mapping[str, float | None], what: str, form: str) -> str:
    low, high = (_number(estimate[end], form) for end in ("low", "high"))
    return f"{_number(estimate[what], form)} [{low}, {high}]"


def _number(value: float | None, form: str) -> str:
    return "unknown" if value is None else format(value, form)
