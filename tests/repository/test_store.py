"""What every model repository promises its readers, in a folder and on an object store."""

import asyncio
import errno
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest

from app.errors import ConfigurationError, InvalidModel, RepositoryUnavailable
from app.features.plan import NO_FEATURES
from app.repository.files import regular_files
from app.repository.publish import publish
from app.repository.store import Shelf, open_repository
from tests.tiny_models import training, write_artifact, write_model


class Place:
    """A repository of either kind with a tiny model of one version, and a way to change it by
    hand."""

    def __init__(self, location: str, repository: Shelf) -> None:
        self.location = location
        self.repository = repository

    def put(self, name: str, content: bytes) -> None:
        files, root = fsspec.core.url_to_fs(self.location)
        if not self.location.startswith("memory://"):
            Path(root, name).parent.mkdir(parents=True, exist_ok=True)
        files.pipe_file(f"{root}/{name}", content)

    def remove(self, name: str) -> None:
        files, root = fsspec.core.url_to_fs(self.location)
        files.rm(f"{root}/{name}".rstrip("/"), recursive=True)

    def publish(self, folder: Path) -> int:
        artifact = write_artifact(folder / "artifact", "binary", training("binary"))
        model = Path(self.location, "tiny") if "://" not in self.location else None
        publication = publish(
            model or f"{self.location}/tiny", artifact, NO_FEATURES, "tiny", isolated=False
        )
        return asyncio.run(publication).version


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one version of one model."""
    folder = tmp_path_factory.mktemp("published") / "models"
    asyncio.run(write_model(folder, "tiny", "binary"))
    return folder


@pytest.fixture(params=["folder", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path, published: Path) -> Place:
    location = (
        str(tmp_path / "models")
        if request.param == "folder"
        else f"memory://{uuid.uuid4().hex}/models"
    )
    made = Place(location, open_repository(location))
    for name in regular_files(published):
        made.put(name, (published / name).read_bytes())
    return made


def test_a_published_version_can_be_read(place: Place, published: Path) -> None:
    repository = place.repository
    assert repository.models() == ["tiny"]
    assert b"probabilities" in repository.contract("tiny")
    assert (repository.current("tiny"), repository.versions("tiny")) == (1, [1])
    assert b'"version": 1,' in repository.manifest("tiny", 1)
    assert repository.seal("tiny", 1) is None
    content = (published / "tiny" / "1" / "model.onnx").read_bytes()
    assert b"".join(repository.pieces("tiny", 1, "model.onnx")) == content


def test_versions_are_numbered_and_current_follows(place: Place, tmp_path: Path) -> None:
    assert [place.publish(tmp_path) for _ in range(2)] == [2, 3]
    assert (place.repository.current("tiny"), place.repository.versions("tiny")) == (3, [1, 2, 3])


def test_a_version_without_a_manifest_is_none_and_its_number_stays_free_of_others(
    place: Place, tmp_path: Path
) -> None:
    place.put("tiny/2/model.onnx", b"of a publisher that was killed")
    assert place.repository.versions("tiny") == [1]
    assert place.publish(tmp_path) == 3


def test_a_number_that_another_publisher_took_first_is_not_taken_again(
    place: Place, tmp_path: Path
) -> None:
    with place.repository.staging("tiny") as staging:
        for name in ("model.onnx", "plan.json", "manifest.json"):
            (staging / name).write_bytes(b"ours")
        assert not place.repository.add("tiny", 1, staging)
    assert b"ours" not in b"".join(place.repository.pieces("tiny", 1, "model.onnx"))


def test_the_same_content_is_not_written_again(place: Place) -> None:
    place.repository.put("tiny", "CURRENT", b"1\n")
    assert place.repository.current("tiny") == 1


@pytest.mark.parametrize("content", [b"", b"latest", b"../1", b"0", b"1 2", b"\xff", b"1" * 65])
def test_a_current_that_names_no_version_is_refused(place: Place, content: bytes) -> None:
    place.put("tiny/CURRENT", content)
    with pytest.raises(InvalidModel, match="CURRENT"):
        place.repository.current("tiny")


def test_without_a_current_none_is_named(place: Place) -> None:
    place.remove("tiny/CURRENT")
    assert place.repository.current("tiny") is None


def test_a_version_that_is_not_there_is_refused_by_its_name(place: Place) -> None:
    with pytest.raises(InvalidModel, match=r"tiny/7/manifest\.json: No such file"):
        place.repository.manifest("tiny", 7)
    with pytest.raises(InvalidModel, match="tiny/1/weights: No such file"):
        list(place.repository.pieces("tiny", 1, "weights"))


def _emptied(place: Place) -> None:
    place.remove("tiny")


def _gone(place: Place) -> None:
    place.remove("")


@pytest.mark.parametrize("lose", [_emptied, _gone])
@pytest.mark.parametrize(
    "ask",
    [
        lambda repository: repository.contract("tiny"),
        lambda repository: repository.current("tiny"),
        lambda repository: repository.versions("tiny"),
        lambda repository: repository.manifest("tiny", 1),
        lambda repository: list(repository.pieces("tiny", 1, "model.onnx")),
    ],
    ids=["contract", "current", "versions", "manifest", "pieces"],
)
def test_a_model_that_cannot_be_seen_at_all_is_not_taken_for_one_without_versions(
    place: Place, lose: Callable[[Place], None], ask: Callable[[Shelf], Any]
) -> None:
    """Its folder may just not be mounted."""
    lose(place)
    with pytest.raises(RepositoryUnavailable):
        ask(place.repository)


WRONG_NAMES = [
    *("", ".", "..", "../tiny", "tiny/../tiny", "/etc", "tiny/", "a\0b", "två", "a b", "-a"),
    *("a%2e", "a" * 65, "tiny\n", "\u202etiny", "~", "*"),
]


@pytest.mark.parametrize("name", WRONG_NAMES)
def test_a_name_that_no_model_can_have_is_not_looked_for(place: Place, name: str) -> None:
    repository = place.repository
    for ask in (repository.contract, repository.current, repository.versions, repository.highest):
        with pytest.raises(InvalidModel, match="letters, digits"):
            ask(name)
    with pytest.raises(InvalidModel, match="letters, digits"):
        repository.manifest(name, 1)


@pytest.mark.parametrize("version", [0, -1, 1_000_000_000, 1.5, "1/..", "01", " 1", "\u0661"])
def test_a_number_that_no_version_can_have_is_not_looked_for(place: Place, version: Any) -> None:
    with pytest.raises(InvalidModel, match="numbered from 1"):
        place.repository.manifest("tiny", version)


def test_a_model_whose_name_cannot_be_one_is_refused(place: Place) -> None:
    place.put("two words/model.yaml", b"")
    with pytest.raises(InvalidModel, match="two words"):
        place.repository.models()


def test_other_files_and_folders_are_no_models(place: Place) -> None:
    place.put("README.md", b"")
    place.put(".git/config", b"")
    assert place.repository.models() == ["tiny"]


@pytest.fixture
def repository(tmp_path: Path, published: Path) -> Shelf:
    shutil.copytree(published, tmp_path / "models")
    return open_repository(f"file://{tmp_path / 'models'}")


def _make_pipe(_: Path, path: Path) -> None:
    os.mkfifo(path)


def _read_all(repository: Shelf) -> None:
    repository.contract("tiny")
    repository.manifest("tiny", 1)


@pytest.mark.parametrize("name", ["tiny/model.yaml", "tiny/1/manifest.json", "tiny/1", "tiny"])
@pytest.mark.parametrize("make", [os.symlink, _make_pipe])
def test_no_link_or_pipe_in_a_folder_is_followed(
    tmp_path: Path, repository: Shelf, name: str, make: Callable[[Path, Path], None]
) -> None:
    path = tmp_path / "models" / name
    path.rename(tmp_path / "moved")
    make(tmp_path / "moved", path)
    with pytest.raises(InvalidModel, match="symbolic link"):
        _read_all(repository)


def test_the_folder_itself_may_be_a_link(tmp_path: Path, repository: Shelf) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "models")
    assert open_repository(str(tmp_path / "link")).models() == ["tiny"]


def test_a_linked_model_is_refused_where_models_are_listed(
    tmp_path: Path, repository: Shelf
) -> None:
    (tmp_path / "models" / "other").symlink_to(tmp_path / "models" / "tiny")
    with pytest.raises(InvalidModel, match="other: a symbolic link"):
        repository.models()


def test_a_folder_that_is_not_there_names_its_setting(tmp_path: Path) -> None:
    with pytest.raises(RepositoryUnavailable, match="MODEL_REPOSITORY"):
        open_repository(str(tmp_path / "nowhere")).models()


def test_what_a_killed_publisher_left_is_removed_after_a_day(
    tmp_path: Path, repository: Shelf
) -> None:
    model = tmp_path / "models" / "tiny"
    for name, age_s in (("old", 86_500), ("young", 1_000)):
        staging = model / f".staging-{name}"
        staging.mkdir()
        (staging / "model.onnx").touch()
        since = staging.stat().st_mtime - age_s
        os.utime(staging, (since, since))
    with repository.staging("tiny"):
        pass
    assert sorted(path.name for path in model.glob(".staging-*")) == [".staging-young"]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("gs://bucket/models", "needs the extra `gcs`"),
        ("abacus://bucket/models", "abacus"),
    ],
)
def test_a_url_that_cannot_be_used_says_what_is_needed(url: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        open_repository(url)


def test_an_error_of_the_disk_is_no_missing_version(tmp_path: Path) -> None:
    """A path that is too long stands for whatever a file system may say."""
    repository = open_repository(str(tmp_path / ("a" * 300)))
    with pytest.raises(RepositoryUnavailable, match=os.strerror(errno.ENAMETOOLONG)):
        repository.current("tiny")
