"""A repository on S3: the store is moto's, and what stands before it fails as real ones do."""

import asyncio
import itertools
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from app.errors import InvalidModel, RepositoryUnavailable
from app.features.plan import NO_FEATURES
from app.repository.publish import publish
from app.repository.store import Shelf, open_repository
from app.repository.vault import Vault
from loadtests.s3_gate import Gate, s3_behind_a_gate
from tests.tiny_models import contract, training, write_artifact, write_contract


@pytest.fixture(scope="module")
def store() -> Iterator[Gate]:
    with s3_behind_a_gate() as gate:
        yield gate


@pytest.fixture
def s3(
    store: Gate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[str]:
    """The URL of a repository in a bucket of its own, with the contract of a tiny model."""
    environment = {
        "AWS_ENDPOINT_URL": store.url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    bucket = request.node.name.replace("_", "-")[:60].rstrip("-")
    write_contract(tmp_path / "contract", contract("binary"))
    files = fsspec.filesystem("s3", skip_instance_cache=True)
    files.mkdir(bucket)
    content = (tmp_path / "contract" / "model.yaml").read_bytes()
    files.pipe_file(f"{bucket}/models/tiny/model.yaml", content)
    yield f"s3://{bucket}/models"
    store.repair()


def publish_to(url: str, folder: Path) -> int:
    artifact = write_artifact(folder / "artifact", "binary", training("binary"))
    publication = publish(f"{url}/tiny", artifact, NO_FEATURES, "tiny", isolated=False)
    return asyncio.run(publication).version


def test_a_version_on_s3_is_published_and_taken(s3: str, tmp_path: Path) -> None:
    assert [publish_to(s3, tmp_path) for _ in range(2)] == [1, 2]
    repository = open_repository(s3)
    assert (repository.models(), repository.versions("tiny")) == (["tiny"], [1, 2])
    assert repository.current("tiny") == 2
    copy = Vault(tmp_path / "vault", repository).take("tiny", 2)
    content = (tmp_path / "artifact" / "model.onnx").read_bytes()
    assert (copy.folder / "model.onnx").read_bytes() == content
    with pytest.raises(InvalidModel, match=r"tiny/3/manifest\.json: No such file"):
        repository.manifest("tiny", 3)


def test_a_number_is_given_to_one_of_two_publishers(s3: str, tmp_path: Path) -> None:
    """Both have seen that it is free: only the store can tell who was first."""
    (tmp_path / "plan.json").write_bytes(b"{}")
    (tmp_path / "manifest.json").write_bytes(b"{}")
    shelves = [open_repository(s3) for _ in range(2)]
    together = threading.Barrier(len(shelves))
    taken: list[bool] = []

    def add(shelf: Shelf) -> None:
        together.wait()
        taken.append(shelf.add("tiny", 1, tmp_path))

    threads = [threading.Thread(target=add, args=(shelf,)) for shelf in shelves]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == [False, True]


def test_a_version_whose_last_answer_was_lost_is_published_once(
    s3: str, store: Gate, tmp_path: Path
) -> None:
    """The client asks again, and the store says that the object is there already."""
    changes = itertools.count(1)
    store.after = lambda: next(changes) != 4  # of config.pbtxt, plan, model and manifest the last
    assert publish_to(s3, tmp_path) == 1
    repository = open_repository(s3)
    assert (repository.versions("tiny"), repository.current("tiny")) == ([1], 1)


def test_a_store_that_does_not_answer_is_not_one_without_versions(s3: str, store: Gate) -> None:
    repository = open_repository(s3)
    assert repository.current("tiny") is None
    for status in (500, 503, 403):
        store.fault = lambda path, status=status: status
        with pytest.raises(RepositoryUnavailable):
            repository.current("tiny")


def test_half_of_a_listing_is_none(s3: str, store: Gate) -> None:
    store.cut = True
    store.fault = lambda path: 500 if "continuation-token" in path else None
    repository = open_repository(s3)
    with pytest.raises(RepositoryUnavailable):
        repository.models()


def test_a_bucket_that_is_gone_is_not_an_empty_repository(s3: str) -> None:
    repository = open_repository("s3://another-bucket/models")
    with pytest.raises(RepositoryUnavailable):
        repository.models()
    with pytest.raises(RepositoryUnavailable):
        repository.current("tiny")


def test_an_object_that_vanishes_while_it_is_read_is_named(
    s3: str, store: Gate, tmp_path: Path
) -> None:
    publish_to(s3, tmp_path)
    store.fault = lambda path: 404 if "model.onnx" in path else None
    with pytest.raises(InvalidModel, match=r"model\.onnx: No such file"):
        Vault(tmp_path / "vault", open_repository(s3)).take("tiny", 1)
