"""The log of pairs: what stands in it, and what does not."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from app.comparison.pairs import NO_DECISION, Pairs
from app.shadow.pair_log import LoggedPair, PairFiles, Rows, read_pairs


def pairs(champion: Sequence[float], candidate: Sequence[float]) -> Pairs:
    """Decided at 0.5; the last row was not answered; odd rows are of segment 1."""
    count = len(champion)
    decisions = [
        np.where(np.isfinite(numbers), np.array(numbers) >= 0.5, NO_DECISION).astype(np.int32)
        for numbers in (champion, candidate)
    ]
    return Pairs(
        np.zeros(count, np.int32),
        np.array(champion, float),
        np.array(candidate, float),
        *decisions,
        np.arange(count) == count - 1,
        np.arange(count, dtype=np.int32)[:, None] % 2,
        np.full(count, 1e-4),
        np.full(count, 2e-4),
    )


def rows(count: int, request: str = "ab") -> Rows:
    segments = (("origin=EWR", "origin=other"),)
    return Rows("m", "1-2-3", [request] * count, range(count), segments, [False, True, None])


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


async def test_a_pair_is_read_as_it_was_counted(tmp_path: Path) -> None:
    log = PairFiles(tmp_path / "log", "host/1", 1_000_000)
    log.note(pairs([0.1, 0.7, 0.3], [0.1 + 0.2, np.nan, np.nan]), lambda: rows(3))
    log.note(pairs([0.5], [0.0]), lambda: rows(1, "cd"))
    await log.append(7)
    await log.append(8)
    log.note(pairs([0.5], [0.0]), lambda: rows(1, "ef"))
    await log.append(9)
    await log.close()
    found = list(read_pairs(tmp_path / "log", "host/1"))
    assert {worker for worker, _ in found} == {"host/1"}
    logged = [pair for _, pair in found]
    ids = [(pair.write, pair.block, pair.request_id, pair.instance) for pair in logged]
    assert ids == [
        (7, 0, "ab", 0),
        (7, 0, "ab", 1),
        (7, 0, "ab", 2),
        (7, 1, "cd", 0),
        (9, 2, "ef", 0),
    ]
    of = ("m", "1-2-3", 7, "ab")
    assert logged[:3] == [
        LoggedPair(*of, 0, 0, 0.1, 0.1 + 0.2, False, False, False, ("origin=EWR",), 1e-4, 2e-4),
        LoggedPair(*of, 1, 0, 0.7, None, True, None, False, ("origin=other",), 1e-4, 2e-4),
        LoggedPair(*of, 2, 0, 0.3, None, False, None, True, ("origin=EWR",), 1e-4, 2e-4),
    ]


async def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    log = PairFiles(tmp_path, "w", 1_000_000)
    log.note(pairs([0.1, 0.2], [0.1, 0.2]), lambda: rows(2))
    await log.append(1)
    await log.close()
    path = tmp_path / "w.0.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    assert [pair.instance for _, pair in read_pairs(tmp_path)] == [0]


async def test_the_oldest_files_go_when_there_are_too_many(tmp_path: Path) -> None:
    (tmp_path / "gone.0.jsonl").write_bytes(b"{}\n" * 5_000)
    log = PairFiles(tmp_path, "w", 100_000)
    for write in range(1, 101):
        log.note(pairs([0.1] * 20, [0.1] * 20), lambda: rows(20))
        await log.append(write)
    await log.close()
    writes = [pair.write for _, pair in read_pairs(tmp_path)]
    assert writes == sorted(writes)
    assert writes[0] > 1
    assert writes[-1] == 100
    assert 60_000 < size_of(tmp_path) <= 100_000


async def test_what_cannot_be_logged_is_told_and_harms_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "log"
    folder.write_text("no folder")
    log = PairFiles(folder, "w", 100_000)
    log.note(pairs([0.1], [0.1]), lambda: rows(1))
    await log.append(1)
    folder.unlink()
    log.note(pairs([0.1], [0.1]), lambda: rows(1))
    await log.append(2)
    await log.close()
    assert [pair.write for _, pair in read_pairs(folder)] == [2]
    assert caplog.messages == ["pairs are not logged"]


async def test_blocks_are_numbered_for_years(tmp_path: Path) -> None:
    log = PairFiles(tmp_path, "w", 100_000)
    for _ in range(2):
        noted = pairs([0.1], [0.1])
        log.note(replace(noted, block=noted.block + np.int32(2**31 - 1)), lambda: rows(1))
    await log.append(1)
    await log.close()
    assert [pair.block for _, pair in read_pairs(tmp_path)] == [2**31 - 1, 2**32 - 1]


async def test_a_file_that_another_worker_has_removed_is_not_written_any_more(
    tmp_path: Path,
) -> None:
    log = PairFiles(tmp_path, "w", 100_000)
    for write in (1, 2):
        log.note(pairs([0.1], [0.1]), lambda: rows(1))
        await log.append(write)
        if write == 1:
            (tmp_path / "w.0.jsonl").unlink()
    await log.close()
    assert [pair.write for _, pair in read_pairs(tmp_path)] == [2]
