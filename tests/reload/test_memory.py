"""What does not fit is refused before it is opened."""

import os
from pathlib import Path

import pytest

from app.errors import InvalidModel
from app.reload.memory import free_bytes, give_back, require_room


def test_what_fits_is_let_in() -> None:
    free = free_bytes()
    assert free is not None
    require_room(1, "tiny version 2")


def test_what_does_not_fit_is_refused_with_both_figures_and_a_way_out() -> None:
    with pytest.raises(
        InvalidModel, match=r"tiny version 2 would take [\d,]+ MB and [\d,]+ MB are"
    ):
        require_room(1 << 60, "tiny version 2")
    with pytest.raises(InvalidModel, match="unload a version that does not serve"):
        require_room(1 << 60, "tiny version 2")


def test_what_was_freed_is_given_back() -> None:
    blocks = [bytes(32 << 10) for _ in range(4_000)]
    # The last block keeps the C library from shrinking its heap by itself.
    last = blocks.pop()
    blocks.clear()
    kept = _resident_bytes()
    give_back()
    assert _resident_bytes() < kept - (64 << 20)
    assert last


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
