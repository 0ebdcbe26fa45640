"""The commands that fill the online store, as processes of their own."""

import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import redis

from tests.features.pushed_repository import Pushed

pytestmark = pytest.mark.system

ROOT = Path(__file__).parent.parent.parent
ROW = {
    "driver_id": "1",
    "known_at": "2013-06-01T12:00:00Z",
    "stars": "4.5",
    "trips": "7",
    "plate": "",
    "active": "true",
}


def command(pushed: Pushed, *arguments: str) -> "subprocess.Popen[str]":
    ours = {name: value for name, value in os.environ.items() if "PROMETHEUS" not in name}
    return subprocess.Popen(
        [sys.executable, "-m", "app.cli", "features", *arguments],
        env=ours
        | {"FEATURE_REDIS_URL": pushed.redis_url, "HIKYAKU_FEATURE_REPO": str(pushed.repo)},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_file_is_pushed_and_its_rows_are_summed_up(
    pushed: Pushed, driver_id: int, tmp_path: Path
) -> None:
    path = tmp_path / "rows.csv"
    row = ROW | {"driver_id": str(driver_id)}
    path.write_text(f"{','.join(row)}\n{','.join(row.values())}\n")
    with command(pushed, "push", "tracked", str(path)) as process:
        said, refused = process.communicate(timeout=120)
    assert (process.returncode, refused) == (0, "")
    assert re.search(r"pushed 1 rows to tracked in .*, newest event 2013-06-01T12:00:00", said)
    assert "ratings: 1 stored, 0 not newer" in said


def test_a_stream_is_consumed_until_told_to_stop(pushed: Pushed, driver_id: int) -> None:
    key = f"command-{driver_id}"
    with redis.Redis.from_url(pushed.redis_url) as client:
        client.xadd(key, ROW | {"driver_id": str(driver_id)})
        client.xadd(key, ROW | {"trips": "many"})
        with command(pushed, "push", "tracked", "--stream", key, "--metrics-port", "0") as process:
            assert process.stdout is not None
            address = re.search(r"http://\S+", process.stdout.readline())
            assert address is not None
            # The batch is refused, acknowledged and counted in this order, on another thread.
            while not (
                client.exists(f"{key}:refused") and "refused_entries_total 1" in scrape(address[0])
            ):
                assert process.poll() is None
            process.send_signal(signal.SIGTERM)
            said, complaints = process.communicate(timeout=120)
    assert (process.returncode, complaints) == (0, "")
    assert f"1 entries were refused: see {key}:refused" in said
    assert "pushed 1 rows to tracked" in said


def scrape(address: str) -> str:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(address, timeout=5) as answer:
        return str(answer.read().decode())


def test_a_load_says_what_it_did_with_each_view(pushed: Pushed) -> None:
    # Not `city`: another test begins where its last load has ended.
    with command(pushed, "materialize", "--views", "driver", "driver_in_city") as process:
        said, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert re.findall(r"(\w+): [\d,]+ rows stored, [\d.]+ s", said) == ["driver", "driver_in_city"]
