"""The folders of a repository: which are models, which are versions, which is current."""

from pathlib import Path

import pytest

from app.errors import InvalidModel
from app.repository.layout import current_version, model_folders, versions


def _model(repository: Path, name: str) -> Path:
    folder = repository / name
    folder.mkdir()
    (folder / "model.yaml").touch()
    return folder


def test_folders_with_a_model_yaml_are_models(tmp_path: Path) -> None:
    fraud, delay = _model(tmp_path, "fraud"), _model(tmp_path, "flight_delay-2.1")
    (tmp_path / "notes").mkdir()
    (tmp_path / "README.md").touch()
    assert model_folders(tmp_path) == {"flight_delay-2.1": delay, "fraud": fraud}


@pytest.mark.parametrize("name", ["två", "a b", "-a", "a%2e", "a" * 65])
def test_a_name_that_cannot_be_part_of_a_url_is_refused(tmp_path: Path, name: str) -> None:
    _model(tmp_path, name)
    with pytest.raises(InvalidModel, match=name):
        model_folders(tmp_path)


def test_a_repository_that_does_not_exist_is_refused_by_the_name_of_its_setting(
    tmp_path: Path,
) -> None:
    with pytest.raises(InvalidModel, match="MODEL_REPOSITORY"):
        model_folders(tmp_path / "nowhere")


def test_versions_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for name in ("10", "9", "1"):
        (tmp_path / name).mkdir()
    assert versions(tmp_path) == [1, 9, 10]


@pytest.mark.parametrize("name", [".staging-1", "0", "01", "-1", "1.5", "v1", "\u0661"])
def test_other_folders_are_no_versions(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    assert versions(tmp_path) == []


def test_no_version_is_current_before_the_first_is_published(tmp_path: Path) -> None:
    assert current_version(tmp_path) is None


@pytest.mark.parametrize("content", ["12", "12\n", " 12 \n"])
def test_current_names_a_version(tmp_path: Path, content: str) -> None:
    (tmp_path / "CURRENT").write_text(content)
    assert current_version(tmp_path) == 12


@pytest.mark.parametrize("content", [b"", b"latest", b"../1", b"0", b"1 2", b"1\n2", b"\xff"])
def test_a_current_that_names_no_version_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "CURRENT").write_bytes(content)
    with pytest.raises(InvalidModel, match="CURRENT"):
        current_version(tmp_path)
