"""`hikyaku up`: what stops it is one sentence, said before anything is prepared."""

import fcntl
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

pytestmark = pytest.mark.system

ROOT = Path(__file__).parents[2]


def up(folder: Path, settings: Mapping[str, str]) -> "subprocess.CompletedProcess[str]":
    """Run `hikyaku up` in a folder, with these settings and no others."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("HIKYAKU_") and not name.endswith("_REDIS_URL")
    }
    return subprocess.run(
        [sys.executable, "-m", "app.cli", "up"],
        cwd=folder,
        env=inherited | {"PYTHONPATH": str(ROOT), **settings},
        capture_output=True,
        text=True,
        timeout=60,
    )


def assert_one_sentence(ended: "subprocess.CompletedProcess[str]", *words: str) -> None:
    assert ended.returncode == 1
    assert ended.stdout == ""
    (sentence,) = ended.stderr.splitlines()
    assert sentence.startswith("hikyaku: ")
    for word in words:
        assert word in sentence


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        ended = up(tmp_path, {"HIKYAKU_PORT": port})
    assert_one_sentence(ended, f"127.0.0.1:{port}", "HIKYAKU_PORT")
    assert _left_in(tmp_path) == []


@pytest.mark.parametrize("history", [None, "{", "[]"])
def test_a_history_that_is_missing_or_unreadable(tmp_path: Path, history: str | None) -> None:
    repo = tmp_path / "features"
    (repo / "data").mkdir(parents=True)
    if history is not None:
        (repo / "data" / "history.json").write_text(history)
    ended = up(tmp_path, {"HIKYAKU_FEATURE_REPO": str(repo), "HIKYAKU_PORT": "0"})
    assert_one_sentence(ended, str(repo / "data" / "history.json"), "make run")
    assert _left_in(tmp_path) == [repo]


def test_a_setting_that_is_mistyped(tmp_path: Path) -> None:
    assert_one_sentence(up(tmp_path, {"HIKYAKU_PROT": "8001"}), "HIKYAKU_PROT", "HIKYAKU_PORT")


def test_two_in_one_folder(tmp_path: Path) -> None:
    (tmp_path / ".hikyaku").mkdir()
    with (tmp_path / ".hikyaku" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert_one_sentence(up(tmp_path, {}), "another `hikyaku up` runs in this folder")


def _left_in(folder: Path) -> list[Path]:
    """What a refused start left behind, beside the folder of its lock."""
    return [path for path in folder.iterdir() if path.name != ".hikyaku"]
