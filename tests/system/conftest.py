"""The whole product on three weeks of summer: what `make run` does, in a folder of its own."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

ROOT = Path(__file__).parent.parent.parent
WEEKS = (pd.Timestamp("2013-08-18", tz="UTC"), pd.Timestamp("2013-09-06", tz="UTC"))


@dataclass
class Running:
    """`hikyaku up` while it serves: its address and everything that it has said so far."""

    address: str
    said: str


@dataclass(frozen=True)
class Workspace:
    """A checkout's models/ and feature_repo/, with the history of these weeks."""

    folder: Path
    port: int

    def environment(self) -> dict[str, str]:
        ours = {name: value for name, value in os.environ.items() if "REDIS_URL" not in name}
        return ours | {"HIKYAKU_PORT": str(self.port), "PYTHONPATH": str(ROOT)}

    def hikyaku(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "app.cli", *arguments],
            cwd=self.folder,
            env=self.environment(),
            capture_output=True,
            text=True,
        )

    @contextmanager
    def up(self) -> Iterator[Running]:
        """Run `hikyaku up` until it serves; leave it as Ctrl-C would."""
        process = subprocess.Popen(
            [sys.executable, "-m", "app.cli", "up"],
            cwd=self.folder,
            env=self.environment() | {"PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        running = Running(f"http://127.0.0.1:{self.port}", "")
        try:
            for line in process.stdout:
                running.said += line
                if line.startswith("Serving on"):
                    break
            else:
                pytest.fail(f"it did not come up:\n{running.said}")
            yield running
        finally:
            process.send_signal(signal.SIGINT)
            rest, _ = process.communicate(timeout=30)
            running.said += rest
        assert process.returncode == 0

    def processes(self) -> list[str]:
        """Command lines of the processes that work in this folder."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                if (entry / "cwd").resolve().is_relative_to(self.folder):
                    found.append((entry / "cmdline").read_text().replace("\0", " "))
            except OSError:
                continue  # it ended meanwhile, or is not ours to look at
        return found


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    folder = tmp_path_factory.mktemp("workspace")
    model = folder / "models" / "flight_delay"
    model.mkdir(parents=True)
    for name in ("model.yaml", "train.py"):
        shutil.copy(ROOT / "models" / "flight_delay" / name, model)
    repo = folder / "feature_repo"
    (repo / "data").mkdir(parents=True)
    for path in [*(ROOT / "feature_repo").glob("*.py"), ROOT / "feature_repo/feature_store.yaml"]:
        shutil.copy(path, repo)
    _slice_history(ROOT / "feature_repo" / "data", repo / "data")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return Workspace(folder, probe.getsockname()[1])


def _slice_history(source: Path, target: Path) -> None:
    assert (source / "history.json").is_file(), "no history of features: `make test` builds it"
    for path in source.glob("*.parquet"):
        frame = pd.read_parquet(path)
        at = frame["request_time" if path.stem == "flights" else "event_timestamp"]
        frame[at.between(*WEEKS)].to_parquet(target / path.name, index=False)
    history: dict[str, Any] = json.loads((source / "history.json").read_text())
    history["end"] = WEEKS[1].isoformat()
    (target / "history.json").write_text(json.dumps(history))
