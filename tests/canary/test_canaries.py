"""The canaries of a worker: what they count is written, and removed when it is old."""

from pathlib import Path

from app.canary.canaries import Canaries
from app.canary.canary import Canary
from app.canary.file_first_seen import FileFirstSeen
from app.canary.table import KIND, ExposureTable, table_name
from app.release.store import open_tables
from app.telemetry.metrics import Metrics
from tests.canary.releases import release


async def test_stages_that_ended_long_ago_are_removed_and_none_of_a_release(tmp_path: Path) -> None:
    kinds = {KIND: ExposureTable.decode}
    metrics = Metrics()
    async with open_tables(None, tmp_path, "w", kinds, lambda kind: None) as tables:
        by_model: dict[str, Canary] = {}
        canaries = Canaries(by_model, FileFirstSeen(tmp_path), tables, metrics)
        canaries.canary("m").follow(release(0.1, stage_began=2), None, None)
        names = [table_name("m", began) for began in range(1, 30)]
        await tables.write({name: ExposureTable(misrouted=1) for name in names})
        await tables.write({table_name("another", 1): ExposureTable(misrouted=1)})
        await canaries.tidy()
        left = await tables.read(f"{KIND}:")
        of_model = {table_name("m", began) for began in (2, *range(14, 30))}
        assert left.keys() == of_model | {table_name("another", 1)}
        assert canaries.canary("m") is by_model["m"]
