"""Below ASGI and through it, the same requests get the same answers. `make prove-two-doors` asks
fifty thousand."""

import asyncio
from pathlib import Path

import uvloop

from loadtests.prove_two_doors import compare


def test_both_doors_answer_the_same(tmp_path: Path) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:  # what serves in production
        result = runner.run(compare(tmp_path, 700, seed=20))
    assert result.different == []
    assert {200, 400, 404, 405, 413} <= result.statuses.keys()  # or little was compared
