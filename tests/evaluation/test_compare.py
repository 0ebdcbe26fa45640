"""Two versions on the same recorded rows: the numbers are those of the rows, one by one."""

import asyncio
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from onnx import numpy_helper

from app.comparison.document import comparison_document
from app.comparison.pairs import Pairs
from app.comparison.table import ComparisonTable
from app.errors import HikyakuError
from app.evaluation.compare import Files, compare
from app.features.plan import NO_FEATURES
from app.repository.publish import publish
from app.repository.store import Repository, open_repository
from tests.tiny_models import binary, onnx_model, stored, training, write_artifact, write_model

SEGMENTS = {"b": {"edges": [0.0]}}
WEIGHT = 0.8


def candidate(a: float, b: float) -> float:
    """The probability of version 2."""
    return binary(a, float(np.float32(WEIGHT)) * b)


@dataclass(frozen=True)
class Published:
    folder: Path

    @property
    def repository(self) -> Repository:
        return open_repository(str(self.folder / "models"))


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    """`tiny`, which weighs `b` by 1 in version 1 and by WEIGHT in version 2."""
    folder = tmp_path_factory.mktemp("compare")
    shadow = {"block_rows": 4}
    asyncio.run(write_model(folder / "models", "tiny", "binary", segments=SEGMENTS, shadow=shadow))
    document = training("binary")
    golden = document["golden"]
    golden["predictions"] = [{"probability": candidate(**row)} for row in golden["instances"]]
    artifact = write_artifact(folder / "artifact", "binary", document)
    model = onnx_model("binary")
    weights = next(each for each in model.graph.initializer if each.name == "difference")
    weights.CopyFrom(
        numpy_helper.from_array(np.array([[1.0], [-WEIGHT]], np.float32), "difference")
    )
    (artifact / "model.onnx").write_bytes(model.SerializeToString())
    asyncio.run(publish(folder / "models" / "tiny", artifact, NO_FEATURES, "tiny", isolated=False))
    return Published(folder)


def compared_by(repository: Repository, rows: pa.Table, folder: Path) -> dict[str, Any]:
    """What version 2 of `tiny` is told to say beside version 1."""
    pq.write_table(rows, folder / "rows.parquet")
    report = folder / "report.json"
    files = Files(report)
    compare(repository, None, "tiny", (1, 2), folder / "rows.parquet", files, isolated=False)
    document = json.loads(report.read_text())
    assert [document["champion"]["version"], document["candidates"][0]["version"]] == ["1", "2"]
    comparison: dict[str, Any] = document["candidates"][0]["comparison"]
    return comparison


def test_the_document_is_that_of_the_pairs_that_the_server_would_have_made(
    published: Published, tmp_path: Path
) -> None:
    random = np.random.default_rng(6)
    block = np.sort(random.integers(0, 9, 30))
    table = pa.table({"a": random.normal(size=30), "b": random.normal(size=30), "block": block})
    a, b = (table.column(name).to_numpy().astype(np.float32) for name in ("a", "b"))
    said = [[f(*row) for row in zip(a, b, strict=True)] for f in (binary, candidate)]
    champion, other = (np.array(scores).astype(np.float32).astype(float) for scores in said)
    pairs = Pairs(
        block.astype(np.int32),
        champion,
        other,
        (champion >= 0.5).astype(np.int32),
        (other >= 0.5).astype(np.int32),
        np.zeros(30, np.bool_),
        (b[:, np.newaxis] >= 0).astype(np.int32),
        np.full(30, np.nan),
        np.full(30, np.nan),
    )
    expected = ComparisonTable.empty((("b=..0", "b=0..", "b=other"),), 2, True)
    expected.add(pairs, 0.0)
    told = compared_by(published.repository, table, tmp_path)
    compared = comparison_document(expected, (False, True))
    assert len(np.unique(block)) == 9
    for unlike in ("execution_time", "first_s", "last_s"):
        told.pop(unlike), compared.pop(unlike)
    for name in ("rows", "blocks", "flips", "decisions"):
        assert told[name] == compared[name], name
    assert [each["decisions"] for each in told["segments"]] == [
        each["decisions"] for each in compared["segments"]
    ]
    assert told["difference"]["mean"] == pytest.approx(compared["difference"]["mean"], abs=1e-7)


def test_features_are_taken_from_their_columns_and_not_found_without_one(tmp_path: Path) -> None:
    for _ in range(2):
        asyncio.run(write_model(tmp_path / "models", "tiny", "stored"))
    table = pa.table(
        {
            "driver_id": [1, 9],
            "city": ["kyoto", None],
            "distance": [5.0, 0.0],
            "driver:rating": [4.0, None],
            "driver:trips": [7, 3],
        }
    )
    told = compared_by(open_repository(str(tmp_path / "models")), table, tmp_path)
    scores = [stored(4.0, 7, None, 5.0), stored(None, 3, None, 0.0)]
    assert told["champion"]["mean"] == pytest.approx(sum(scores) / 2)
    assert told["difference"]["equal"] == 2


def test_rows_that_a_server_would_refuse_are_named(published: Published, tmp_path: Path) -> None:
    rows = pa.table({"a": [1.0, 2.0], "b": [1.0, None]})
    with pytest.raises(HikyakuError, match=r"rows from 0 on: instances\[1\]\.b: expected"):
        compared_by(published.repository, rows, tmp_path)


def test_recorded_pairs_are_compared_as_they_are(published: Published, tmp_path: Path) -> None:
    pairs = pa.table(
        {
            "block": [0, 0, 1],
            "champion": [0.2, 0.6, 0.4],
            "candidate": [0.3, 0.4, None],
            "champion_decision": [0, 1, 0],
            "candidate_decision": [0, 0, -1],
            "failed": [False, False, True],
            "segments": [[0], [1], [1]],
        }
    )
    pq.write_table(pairs, tmp_path / "pairs.parquet")
    report, page = tmp_path / "report.json", tmp_path / "report.html"
    command = [sys.executable, "-m", "app.cli", "compare", "tiny", "--html", str(page)]
    finished = subprocess.run(
        [*command, "--pairs", str(tmp_path / "pairs.parquet"), "--json", str(report)],
        env=os.environ | {"MODEL_REPOSITORY": str(published.folder / "models")},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    assert "3 rows in 2 blocks" in finished.stdout
    assert "<svg" in page.read_text(encoding="utf-8")
    document = json.loads(report.read_text())
    assert (document["output"], document["threshold"]) == ("probability", 0.5)
    comparison = document["candidates"][0]["comparison"]
    assert comparison["decisions"] == [
        {"champion": False, "candidate": False, "rows": 1},
        {"champion": True, "candidate": False, "rows": 1},
    ]
    assert comparison["failed"]["rows"] == 1
    assert comparison["difference"]["mean"] == pytest.approx(-0.05)
