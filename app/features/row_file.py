"""Pushes the rows of a parquet or CSV file, a batch at a time."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pa_parquet
from redis.exceptions import RedisError

from app.errors import ConfigurationError, HikyakuError
from app.features.push import PushTarget
from app.features.push_progress import Progress

_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class _RowFile:
    """A file that is being read. `from_text`: all its columns are text."""

    path: Path
    columns: list[str]
    batches: Iterator[pa.RecordBatch]
    from_text: bool


def push_file(target: PushTarget, path: Path, *, batch_rows: int, progress: Progress) -> None:
    """Write the file's rows, at most `batch_rows` at once; memory does not grow with the file.

    A file ending in .csv (or .csv.gz) is CSV in UTF-8 with a header, in which an empty field is
    null and "" is empty text; any other must be parquet. Raises `ConfigurationError` that names the
    column and the first row at fault: the batches before that row's are written then, neither it
    nor anything after it. `HikyakuError` when the online store fails. After either the whole file
    may be pushed again.
    """
    with ExitStack() as stack:
        file = _open(path, batch_rows, stack)
        fault = target.fault_of_columns(file.columns)
        if fault is not None:
            raise ConfigurationError(f"{path}: {fault}")
        for batch in _batches(file, progress):
            columns = dict(zip(batch.schema.names, batch.columns, strict=True))
            checked, faults = target.check(columns, from_text=file.from_text)
            if faults:
                row = min(faults)
                raise ConfigurationError(
                    f"{path}: row {progress.written.rows + row + 1}: {faults[row]}"
                    f"{_so_far(progress)}"
                )
            try:
                progress.add(target.write(checked))
            except RedisError as exc:
                raise HikyakuError(
                    f"the online store failed: {exc or type(exc).__name__}{_so_far(progress)}"
                ) from exc


def _so_far(progress: Progress) -> str:
    rows = progress.written.rows
    return f" ({rows:,} rows before it were written; pushing the whole file again is safe)"


def _open(path: Path, batch_rows: int, stack: ExitStack) -> _RowFile:
    try:
        if path.name.endswith((".csv", ".csv.gz")):
            reader = stack.enter_context(_csv(path))
            return _RowFile(path, reader.schema.names, _slices(reader, batch_rows), True)
        # Without a buffer the whole stretch of a column in a row group is read at once.
        parquet = stack.enter_context(pa_parquet.ParquetFile(path, buffer_size=_BLOCK_BYTES))
    except pa.ArrowException as exc:
        raise ConfigurationError(f"{path}: cannot be read: {exc}") from exc
    columns = [name for name in parquet.schema_arrow.names if not _is_index(name)]
    batches = parquet.iter_batches(batch_rows, columns=columns, use_threads=False)
    return _RowFile(path, columns, batches, False)


def _is_index(column: str) -> bool:
    """pandas keeps a frame's index as a column of this name."""
    return column.startswith("__index_level_")


def _csv(path: Path) -> pa_csv.CSVStreamingReader:
    """All columns as text: what they are is for the views to say."""
    parse = pa_csv.ParseOptions(newlines_in_values=True)
    with pa_csv.open_csv(path, parse_options=parse) as header:
        names = header.schema.names
    if len(set(names)) < len(names):
        raise ConfigurationError(f"{path}: two columns have one name: {', '.join(names)}")
    return pa_csv.open_csv(
        path,
        read_options=pa_csv.ReadOptions(block_size=_BLOCK_BYTES, use_threads=False),
        parse_options=parse,
        convert_options=pa_csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()),
            null_values=[""],
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
        ),
    )


def _slices(blocks: Iterator[pa.RecordBatch], rows: int) -> Iterator[pa.RecordBatch]:
    for block in blocks:
        for first in range(0, block.num_rows, rows):
            yield block.slice(first, rows)


def _batches(file: _RowFile, progress: Progress) -> Iterator[pa.RecordBatch]:
    """The file's batches; one that cannot be read is refused by the rows before it."""
    while True:
        try:
            batch = next(file.batches, None)
        except (pa.ArrowException, OSError) as exc:
            raise ConfigurationError(
                f"{file.path}: cannot be read after row {progress.written.rows}: {exc}"
                f"{_so_far(progress)}"
            ) from exc
        if batch is None:
            return
        yield batch
