"""The vault: only what was published, for as long as it is just that."""

import asyncio
import os
import shutil
import stat
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from app.errors import InvalidModel, RepositoryUnavailable
from app.repository.files import regular_files
from app.repository.manifest import read_manifest
from app.repository.store import Repository, open_repository
from app.repository.vault import Vault, VaultedVersion
from tests.tiny_models import write_model


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two versions of one model."""
    folder = tmp_path_factory.mktemp("published") / "models"
    for _ in range(2):
        asyncio.run(write_model(folder, "tiny", "binary"))
    return folder


@pytest.fixture
def version_dir(tmp_path: Path, published: Path) -> Path:
    shutil.copytree(published, tmp_path / "models")
    return tmp_path / "models" / "tiny" / "1"


@pytest.fixture
def vault(tmp_path: Path, version_dir: Path) -> Vault:
    return Vault(tmp_path / "vault", open_repository(str(tmp_path / "models")))


def test_a_copy_is_private_and_whole(vault: Vault, version_dir: Path, tmp_path: Path) -> None:
    copy = vault.take("tiny", 1)
    assert copy.folder == tmp_path / "vault" / copy.sha256
    assert regular_files(copy.folder) == ["manifest.json", "model.onnx", "plan.json"]
    for name in regular_files(copy.folder):
        assert (copy.folder / name).read_bytes() == (version_dir / name).read_bytes()
        assert stat.S_IMODE((copy.folder / name).stat().st_mode) == 0o400
    for folder in (copy.folder, copy.folder.parent):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_version_is_copied_once(vault: Vault) -> None:
    first = vault.take("tiny", 1)
    written = (first.folder / "model.onnx").stat().st_ino
    assert vault.take("tiny", 1, first.sha256) == first
    assert (first.folder / "model.onnx").stat().st_ino == written


def test_a_copy_serves_while_the_repository_is_gone(vault: Vault, tmp_path: Path) -> None:
    copy = vault.take("tiny", 1)
    shutil.rmtree(tmp_path / "models")
    assert vault.take("tiny", 1, copy.sha256) == copy
    with pytest.raises(RepositoryUnavailable):
        vault.take("tiny", 2)


def test_another_manifest_than_the_one_that_was_chosen_is_refused(vault: Vault) -> None:
    chosen = vault.take("tiny", 1).sha256
    with pytest.raises(InvalidModel, match=r"2/manifest\.json: is not the one that was chosen"):
        vault.take("tiny", 2, chosen)


@pytest.mark.parametrize("sha256", ["", "0" * 63, "../" + "0" * 61, "A" * 64])
def test_what_is_no_digest_is_not_looked_for(vault: Vault, sha256: str) -> None:
    with pytest.raises(InvalidModel, match="no sha256"):
        vault.take("tiny", 1, sha256)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.chmod(0o600)
    path.write_bytes(content)


def _lengthen(path: Path) -> None:
    path.chmod(0o600)
    path.write_bytes(path.read_bytes() + b"\0" * 3_000_000)


def _cut(path: Path) -> None:
    path.chmod(0o600)
    path.write_bytes(path.read_bytes()[:-1])


def _empty(path: Path) -> None:
    path.chmod(0o600)
    path.write_bytes(b"")


def _link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def _unlink(path: Path) -> None:
    path.unlink()


def _make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


HARMS = [_flip, _lengthen, _cut, _empty, _link, _unlink, _make_folder]


@pytest.mark.parametrize("name", ["model.onnx", "plan.json", "manifest.json"])
@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_file_of_the_repository_is_refused_by_its_name(
    vault: Vault, version_dir: Path, name: str, harm: Callable[[Path], None]
) -> None:
    harm(version_dir / name)
    with pytest.raises(InvalidModel, match=rf"1/{name}: "):
        vault.take("tiny", 1)
    assert vault.take("tiny", 2).manifest.version == 2


@pytest.mark.parametrize("name", ["model.onnx", "plan.json", "manifest.json"])
@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("again", [True, False], ids=["same process", "next process"])
def test_a_damaged_copy_is_replaced(
    vault: Vault, tmp_path: Path, name: str, harm: Callable[[Path], None], again: bool
) -> None:
    repository = open_repository(str(tmp_path / "models"))
    copy = vault.take("tiny", 1)
    content = (copy.folder / name).read_bytes()
    harm(copy.folder / name)
    second = vault if again else Vault(tmp_path / "vault", repository)
    assert second.take("tiny", 1, copy.sha256) == copy
    assert (copy.folder / name).read_bytes() == content
    assert regular_files(copy.folder) == ["manifest.json", "model.onnx", "plan.json"]


def test_a_file_that_is_not_of_the_version_does_not_stay_beside_it(vault: Vault) -> None:
    copy = vault.take("tiny", 1)
    (copy.folder / "weights").touch()
    assert vault.take("tiny", 1) == copy
    assert not (copy.folder / "weights").exists()


def test_a_manifest_of_another_version_is_refused(vault: Vault, version_dir: Path) -> None:
    shutil.copytree(version_dir, version_dir.with_name("3"))
    with pytest.raises(InvalidModel, match=r"3/manifest\.json: describes version 1 of 'tiny'"):
        vault.take("tiny", 3)


def test_a_plan_that_is_too_large_to_be_read_is_not_copied(vault: Vault, version_dir: Path) -> None:
    """The server reads it, and no file may fill its memory."""
    manifest, _ = read_manifest(version_dir)
    plan = manifest.files["plan.json"].model_copy(update={"bytes": 1 << 30})
    large = manifest.model_copy(update={"files": {**manifest.files, "plan.json": plan}})
    (version_dir / "manifest.json").write_bytes(large.to_json())
    with pytest.raises(InvalidModel, match=r"plan\.json is larger than 16,777,216 bytes"):
        vault.take("tiny", 1)


class Endless:
    """A repository whose model file never ends; it counts what was read of it."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self.read_bytes = 0

    def pieces(self, model: str, version: int, name: str) -> Iterator[bytes]:
        while name == "model.onnx":
            self.read_bytes += 1_000
            yield b"\0" * 1_000
        yield from self._repository.pieces(model, version, name)

    def models(self) -> list[str]:
        return list(self._repository.models())

    def contract(self, model: str) -> bytes:
        return self._repository.contract(model)

    def current(self, model: str) -> int | None:
        return self._repository.current(model)

    def versions(self, model: str) -> list[int]:
        return list(self._repository.versions(model))

    def manifest(self, model: str, version: int) -> bytes:
        return self._repository.manifest(model, version)

    def seal(self, model: str, version: int) -> bytes | None:
        return self._repository.seal(model, version)

    def where(self, model: str, *parts: object) -> str:
        return self._repository.where(model, *parts)


def test_a_file_that_does_not_end_is_read_no_further_than_its_size(
    tmp_path: Path, version_dir: Path
) -> None:
    repository = Endless(open_repository(str(tmp_path / "models")))
    with pytest.raises(InvalidModel, match=r"model\.onnx: is not the file"):
        Vault(tmp_path / "vault", repository).take("tiny", 1)
    assert repository.read_bytes == 1_000


def test_a_refused_version_leaves_no_copy(vault: Vault, version_dir: Path, tmp_path: Path) -> None:
    _flip(version_dir / "plan.json")
    with pytest.raises(InvalidModel):
        vault.take("tiny", 1)
    left = [name for name in os.listdir(tmp_path / "vault") if not name.startswith(".lock-")]
    assert left == []


def test_a_vault_that_cannot_be_written_says_so(tmp_path: Path, version_dir: Path) -> None:
    (tmp_path / "file").touch()
    vault = Vault(tmp_path / "file" / "vault", open_repository(str(tmp_path / "models")))
    with pytest.raises(RepositoryUnavailable, match="copies cannot be kept"):
        vault.take("tiny", 1)


def test_several_takers_at_once_share_one_copy(tmp_path: Path, version_dir: Path) -> None:
    """Each with a vault of its own, as the processes of a service have."""
    repository = open_repository(str(tmp_path / "models"))
    vaults = [Vault(tmp_path / "vault", repository) for _ in range(8)]
    together = threading.Barrier(len(vaults))

    def take(vault: Vault) -> VaultedVersion:
        together.wait()
        return vault.take("tiny", 1)

    with ThreadPoolExecutor(len(vaults)) as threads:
        (copy, *others) = threads.map(take, vaults)
    assert others == [copy] * 7
    folders = [name for name in os.listdir(tmp_path / "vault") if not name.startswith(".")]
    assert folders == [copy.sha256]


def test_what_nobody_needs_is_removed_with_what_is_beside_it(vault: Vault, tmp_path: Path) -> None:
    kept, other = vault.take("tiny", 1), vault.take("tiny", 2)
    beside = tmp_path / "vault" / f"{other.sha256}.verified"
    beside.touch()
    vault.prune([kept.sha256], unused_s=0)
    assert not other.folder.exists()
    assert not beside.exists()
    assert vault.take("tiny", 1) == kept
    assert vault.take("tiny", 2) == other


def test_what_was_taken_just_now_stays(vault: Vault) -> None:
    """Another process may be about to open it."""
    copy = vault.take("tiny", 1)
    vault.prune([])
    assert copy.folder.exists()


def test_what_another_service_of_the_machine_keeps_stays(vault: Vault, tmp_path: Path) -> None:
    """Its isolated processes read the files again when they are replaced."""
    copy = vault.take("tiny", 1)
    os.utime(copy.folder, (0, 0))
    Vault(tmp_path / "vault", open_repository(str(tmp_path / "models"))).prune([copy.sha256])
    vault.prune([])
    assert copy.folder.exists()
