"""Lineage: what a manifest says of its version, for programs and for people."""

import json
from pathlib import Path

from app.repository.lineage import as_text, lineage
from app.repository.manifest import Environment, File, Manifest, Run, Source
from tests.tiny_models import DRIVERS, write_model

COMMIT = "c0ffee" + "0" * 34
RUN = Run(
    command=["python", "train.py"],
    finished_at="2013-09-01T12:00:00+00:00",
    source=Source(commit=f"{COMMIT}-dirty", diff_sha256="d1ff"),
    code={"tiny/train.py": File(sha256="a" * 64, bytes=10)},
    data={"../../data/rows.csv": File(sha256="b" * 64, bytes=1_000_000)},
    seeds={"random_state": 2013},
    environment=Environment(
        python="3.11.7",
        implementation="CPython",
        platform="Linux",
        machine="x86_64",
        processor="a processor",
        cpus=2,
        variables={"OMP_NUM_THREADS": "2"},
        packages={"scikit-learn": "1.9.1"},
    ),
)


async def published(folder: Path, run: Run | None) -> Manifest:
    manifest = await write_model(folder / "models", "tiny", "stored")
    training = manifest.training.model_copy(update={"run": run})
    return manifest.model_copy(update={"training": training})


async def test_a_lineage_leads_from_the_version_to_all_that_it_was_made_from(
    tmp_path: Path,
) -> None:
    manifest = await published(tmp_path, RUN)
    document = json.loads(json.dumps(lineage(manifest, "f" * 64)))
    assert (document["model"], document["version"]) == ("tiny", "1")
    assert document["sha256"] == "f" * 64
    assert document["published"]["by"] == manifest.published_by
    trained = document["trained"]
    assert trained["source"] == {"commit": f"{COMMIT}-dirty", "diff_sha256": "d1ff"}
    assert trained["seeds"] == {"random_state": 2013}
    assert trained["environment"]["packages"] == {"scikit-learn": "1.9.1"}
    assert document["code"] == {"tiny/train.py": {"sha256": "a" * 64, "bytes": 10}}
    assert document["data"]["window"] == manifest.training.data_window.model_dump()
    assert list(document["data"]["files"]) == ["../../data/rows.csv"]
    assert document["features"]["service"] == DRIVERS.feature_service
    assert document["features"]["views"]["driver"] == {
        "join_keys": ["driver_id"],
        "ttl_s": 3600.0,
        "features": {"rating": "Float32", "trips": "Int64"},
    }
    assert document["features"]["plan_sha256"] == manifest.files["plan.json"].sha256
    assert document["features"]["inputs"] == [*DRIVERS.references, "distance"]
    assert document["hyperparameters"] == {"kind": "stored"}
    assert document["metrics"] == {"auc": 1.0}
    assert document["golden"] == {"rows": 3, "tolerance": 1e-5}


async def test_the_text_for_people_names_the_same(tmp_path: Path) -> None:
    text = as_text(await published(tmp_path, RUN), "f" * 64)
    for fact in (
        "tiny version 1",
        "f" * 64,
        f"commit {COMMIT}-dirty (uncommitted changes: sha256 d1ff)",
        f"../../data/rows.csv  sha256 {'b' * 64}, 1,000,000 bytes",
        "2013-01-01 to 2013-09-01, 3 rows",
        "by driver_id; ttl 3600 s; rating Float32, trips Int64",
        "by city; never too old; demand Float32",
        "seed random_state  2013",
        "OMP_NUM_THREADS  2",
        "scikit-learn 1.9.1",
    ):
        assert fact in text


async def test_a_training_that_said_nothing_is_called_that(tmp_path: Path) -> None:
    manifest = await published(tmp_path, None)
    document = lineage(manifest, "f" * 64)
    assert (document["trained"], document["code"], document["data"]["files"]) == (None, {}, {})
    assert "training.json did not say" in as_text(manifest, "f" * 64)


async def test_what_a_manifest_says_does_nothing_to_a_terminal(tmp_path: Path) -> None:
    manifest = await published(tmp_path, None)
    text = as_text(manifest.model_copy(update={"published_by": "\x1b]0;\n\x1b[2J"}), "f" * 64)
    assert text.replace("\n", "").isprintable()
