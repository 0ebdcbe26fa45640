"""What is told about a candidate, recomputed from the log of its pairs: the short forms of
`make prove-comparison`."""

import asyncio
import json
import random
import sys
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

from app.comparison.document import comparison_document
from app.comparison.table import ComparisonTable
from app.release.store import open_tables
from app.shadow.pair_log import read_pairs
from loadtests.paired_models import INPUTS, MODEL, instance, publish_both
from loadtests.prove_comparison import Answered, Report, judge, recomputed
from tests.shadow.conftest import Service, serving
from tests.shadow.pair_worker import KINDS, NAME, NAMES, TRIAL


async def test_what_a_service_tells_is_what_its_pairs_say(tmp_path: Path) -> None:
    await publish_both(tmp_path / "models")
    settings = {"HIKYAKU_COMPARISON_LOG": str(tmp_path / "pairs")}
    report, rng = Report(), random.Random(2013)

    async def ask(service: Service) -> None:
        rows = [(rng.randrange(INPUTS), rng.randrange(INPUTS)) for _ in range(rng.randint(1, 8))]
        answer = await service.predict(*(instance(*row) for row in rows))
        report.answered[answer["request_id"]] = Answered(rows, time.monotonic())

    def all_told(told: Mapping[str, Any]) -> bool:
        rows = sum(len(answered.rows) for answered in report.answered.values())
        return rows == told["rows"] + sum(told["dropped"].values())

    async with AsyncExitStack() as stack:
        one = await stack.enter_async_context(serving(tmp_path, MODEL, **settings))
        await one.shadow(2)
        async with serving(tmp_path, MODEL, **settings) as other:
            await other.until_shown(by=2)
            for _ in range(20):
                await asyncio.gather(*(ask(service) for service in (one, other) for _ in range(2)))
            await one.compared(all_told)
        await asyncio.gather(*(ask(one) for _ in range(10)))
        await one.compared(all_told)
        [report.document] = await one.candidates()
    judge(report, tmp_path / "pairs")
    assert report.violations == []
    assert report.counted > 300
    judge(report, tmp_path / "pairs", alter=True)
    for way in ("as one table", "by loops"):
        assert any(way in violation for violation in report.violations)


async def test_of_workers_that_are_killed_what_they_had_written_counts(tmp_path: Path) -> None:
    async def killed(number: int) -> None:
        rng = random.Random(number)
        arguments = ("-m", "tests.shadow.pair_worker", str(tmp_path), f"w{number}", str(number))
        worker = await asyncio.create_subprocess_exec(
            sys.executable, *arguments, stdout=asyncio.subprocess.PIPE
        )
        assert worker.stdout is not None
        for _ in range(rng.randint(1, 20)):
            await worker.stdout.readline()
        await asyncio.sleep(rng.uniform(0, 0.005))
        worker.kill()
        await worker.wait()

    await asyncio.gather(*map(killed, range(2)))
    async with open_tables(None, tmp_path, "reader", KINDS, lambda kind: None) as tables:
        stored = (await tables.read(""))[NAME]
    table = reduce(add, map(ComparisonTable.decode, stored.contents))
    told = json.loads(json.dumps(comparison_document(table, (False, True))))
    logged = [(w, pair) for w, pair in read_pairs(tmp_path / "pairs") if pair.trial == TRIAL]
    assert recomputed(told, stored.writes, logged, NAMES) == []
    assert len({worker for worker, _ in logged}) == 2
