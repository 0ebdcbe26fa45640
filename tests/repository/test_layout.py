"""Names: which can be those of models, of versions and of a version's files."""

import pytest

from app.repository.layout import is_file_name, is_model_name, is_version


@pytest.mark.parametrize("name", ["fraud", "flight_delay-2.1", "0", "A" * 64])
def test_these_can_be_models(name: str) -> None:
    assert is_model_name(name)


@pytest.mark.parametrize(
    "name", ["", "två", "a b", "-a", ".a", "..", "a/b", "a%2e", "a" * 65, "a\n", "a\0", "\u202ea"]
)
def test_these_cannot_be_models(name: str) -> None:
    assert not is_model_name(name)


@pytest.mark.parametrize("name", ["1", "10", "999999999"])
def test_these_are_versions(name: str) -> None:
    assert is_version(name)


@pytest.mark.parametrize(
    "name", ["", ".staging-1", "0", "01", "-1", "1.5", "1.0", " 2", "v1", "latest", "1\n", "\u0661"]
)
def test_these_are_no_versions(name: str) -> None:
    assert not is_version(name)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx_data", "weights/0.bin", "_a", "a+b=c"])
def test_these_can_be_files_of_a_version(name: str) -> None:
    assert is_file_name(name)


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../a", "a/../b", "/a", "a/", "a//b", ".a", "a/.b", "a\\b", "~", "a\0", "a\n"],
)
def test_these_cannot_be_files_of_a_version(name: str) -> None:
    assert not is_file_name(name)
