"""Versions of flight_delay that were trained up to a day, published unless they are there.

    python -m loadtests.flight_versions

makes the champion (through August) the current version, and a candidate (through September) beside
it. What is trained from something else than is there now does not count.
"""

import subprocess
import sys
import tempfile
from datetime import datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

from app.config import Settings, load_settings
from app.contract import load_contract
from app.errors import ConfigurationError, HikyakuError, InvalidModel
from app.repository.layout import CONTRACT_FILE
from app.repository.manifest import read_manifest
from app.repository.publish import fingerprint
from app.repository.store import is_url, open_repository

MODEL = "flight_delay"
CHAMPION_UNTIL, CANDIDATE_UNTIL = "2013-09-01", "2013-10-01"
BROKEN_UNTIL = "2013-01-15"
_ZONE = ZoneInfo("America/New_York")


def main() -> int:
    champion, candidate = champion_and_candidate(load_settings())
    print(f"• {MODEL}: version {champion} is the champion, version {candidate} the candidate")
    return 0


def champion_and_candidate(settings: Settings) -> tuple[int, int]:
    """Their versions, trained and published where they were not there. Takes minutes then."""
    if is_url(settings.model_repository):
        raise ConfigurationError("MODEL_REPOSITORY: must be a folder here, not a URL")
    folder = Path(settings.model_repository, MODEL)
    current = open_repository(settings.model_repository).current(MODEL)
    champion = _published(folder, settings, CHAMPION_UNTIL)
    if champion is None:
        champion = _publish(folder, settings, CHAMPION_UNTIL, keep_current=False)
    elif champion != current:
        raise ConfigurationError(
            f"{folder}: version {champion} was trained through August, but CURRENT names {current}"
        )
    candidate = _published(folder, settings, CANDIDATE_UNTIL)
    if candidate is None:
        candidate = _publish(folder, settings, CANDIDATE_UNTIL, keep_current=True)
    return champion, candidate


def broken_candidate(settings: Settings) -> int:
    """A version that has seen two weeks only, and predicts badly."""
    folder = Path(settings.model_repository, MODEL)
    broken = _published(folder, settings, BROKEN_UNTIL)
    if broken is None:
        broken = _publish(folder, settings, BROKEN_UNTIL, keep_current=True)
    return broken


def _published(folder: Path, settings: Settings, until: str) -> int | None:
    """The newest version that was trained on the requests before this day."""
    end = datetime.fromisoformat(until).replace(tzinfo=_ZONE)
    due = fingerprint(load_contract(folder / CONTRACT_FILE), folder, settings.feature_repo)
    for version in reversed(open_repository(settings.model_repository).versions(MODEL)):
        try:
            manifest, _ = read_manifest(folder / str(version))
        except InvalidModel:
            continue  # of another release of this software
        last = datetime.fromisoformat(manifest.training.data_window.end)
        if manifest.fingerprint == due and end - timedelta(days=1) < last < end:
            return version
    return None


def _publish(folder: Path, settings: Settings, until: str, *, keep_current: bool) -> int:
    print(f"• {MODEL}: train on what was asked before {until}, and publish", flush=True)
    with tempfile.TemporaryDirectory() as artifact:
        _python(str(folder / "train.py"), "--output", artifact, "--until", until)
        kept = ["--keep-current"] if keep_current else []
        _python("-m", "app.cli", "publish", MODEL, artifact, *kept)
    version = _published(folder, settings, until)
    if version is None:
        raise HikyakuError(f"{folder}: what was published is not what was trained until {until}")
    return version


def _python(*arguments: str) -> None:
    """In a process of its own: what it imported and allocated is gone after it."""
    if subprocess.run([sys.executable, *arguments], check=False).returncode != 0:
        raise HikyakuError(f"`{' '.join(arguments)}` failed; what it said is above")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except HikyakuError as exc:
        sys.exit(str(exc))
