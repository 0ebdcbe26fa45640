"""The tables of workers in files: workers that are killed."""

from pathlib import Path

from loadtests.prove_tables import misbehave_in_files


async def test_whatever_goes_wrong_numbers_count_once(tmp_path: Path) -> None:
    """`make prove-tables` goes on for a minute."""
    result = await misbehave_in_files(tmp_path, 1.5, seed=3)
    assert result.faults == []
    assert min(result.done[what] for what in ("folded", "writes", "writes cancelled")) > 0
