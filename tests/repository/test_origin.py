"""What a training is made from: its code, data, checkout, packages."""

import hashlib
import importlib.metadata
import subprocess
from pathlib import Path

import pytest

from app.repository.manifest import Run
from app.repository.origin import RunRecord, environment, publisher, source_of
from tests.tiny_models import contract, write_contract


def git(folder: Path, *arguments: str) -> bytes:
    identity = ("-c", "user.name=x", "-c", "user.email=x@y")
    return subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True
    ).stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    git(tmp_path, "init", "--quiet")
    (tmp_path / "code.py").write_text("a = 1\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message", "first")
    return tmp_path


def test_a_clean_checkout_is_its_commit(checkout: Path) -> None:
    source = source_of(checkout)
    assert source.commit == git(checkout, "rev-parse", "HEAD").decode().strip()
    assert source.diff_sha256 == ""


def test_uncommitted_changes_have_a_digest_that_no_setting_of_git_changes(checkout: Path) -> None:
    (checkout / "code.py").write_text("a = 2\n")
    source = source_of(checkout)
    git(checkout, "config", "diff.noprefix", "true")
    git(checkout, "config", "color.ui", "always")
    assert source.commit.endswith("-dirty")
    assert source == source_of(checkout)
    (checkout / "code.py").write_text("a = 3\n")
    assert source.diff_sha256 not in {"", source_of(checkout).diff_sha256}


def test_outside_a_checkout_there_is_no_commit(tmp_path: Path) -> None:
    assert source_of(tmp_path).commit == ""


def record(folder: Path, lock: Path | None = None) -> Run:
    write_contract(folder / "models" / "tiny", contract("binary"))
    (folder / "models" / "tiny" / "train.py").write_text("pass\n")
    (folder / "data").mkdir()
    (folder / "data" / "rows.csv").write_text("1,2\n")
    made = RunRecord(
        folder / "models" / "tiny",
        folder / "feature_repo",
        data=[folder / "data" / "rows.csv"],
        seeds={"split": 7},
        lock=lock,
    )
    (folder / "data" / "rows.csv").write_text("while it trained\n")
    return made.finished()


def test_a_run_names_its_data_as_model_yaml_would_as_they_were_before_it(tmp_path: Path) -> None:
    run = record(tmp_path)
    (name, file), *others = run.data.items()
    assert (name, others) == ("../../data/rows.csv", [])
    assert (file.sha256, file.bytes) == (hashlib.sha256(b"1,2\n").hexdigest(), 4)
    assert run.seeds == {"split": 7}


def test_a_model_without_a_feature_service_depends_on_no_feature_repository(
    tmp_path: Path,
) -> None:
    (tmp_path / "feature_repo").mkdir()
    (tmp_path / "feature_repo" / "definitions.py").touch()
    assert list(record(tmp_path).code) == ["app/features/encoding.py", "tiny/train.py"]


@pytest.mark.parametrize(("pinned", "named"), [("{numpy}", True), ("1.0", False)])
def test_a_lock_file_is_named_where_the_packages_are_those_that_it_pins(
    tmp_path: Path, pinned: str, named: bool
) -> None:
    lock = tmp_path / "train.txt"
    version = pinned.format(numpy=importlib.metadata.version("numpy"))
    lock.write_text(f"numpy=={version} \\\n    --hash=sha256:00\nnever-installed==1.0\n")
    found = record(tmp_path, lock).environment.lock
    assert (found is not None) == named
    if found is not None:
        assert found.sha256 == hashlib.sha256(lock.read_bytes()).hexdigest()


def test_an_environment_holds_what_was_imported_and_what_was_asked_for() -> None:
    packages = environment(also=["pytest-xdist", "no-such-package"]).packages
    assert packages["numpy"] == importlib.metadata.version("numpy")
    assert "pytest-xdist" in packages
    assert "no-such-package" not in packages


def test_threads_are_recorded_where_they_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert environment().variables["OMP_NUM_THREADS"] == "1"


def test_a_publisher_is_a_user_on_a_host() -> None:
    user, _, host = publisher().partition("@")
    assert user
    assert host
