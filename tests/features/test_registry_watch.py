"""The registry is compared with the served plans, and whatever goes wrong with that is told."""

import asyncio
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from app.errors import ConfigurationError
from app.features.plan import FeaturePlan
from app.features.registry_watch import RegistryWatch, registry_file, require_registry
from app.telemetry.metrics import Metrics
from tests.tiny_models import DRIVERS

PLANS = {"tiny": DRIVERS}


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """A repository whose registry is a file that is there."""
    (tmp_path / "feature_store.yaml").write_text("registry: registry.db\n")
    (tmp_path / "registry.db").write_bytes(b"definitions")
    return tmp_path


class Child:
    """A program in the place of the comparison: it notes its turns in a file and then does what
    the `program` does."""

    def __init__(self, folder: Path, program: str) -> None:
        self._turns = folder / "turns"
        note = f"import os, sys, time; open({str(self._turns)!r}, 'a').write(f'{{os.getpid()}}\\n')"
        self.command = (sys.executable, "-c", f"{note}\n{program}")

    def turns(self) -> list[int]:
        """The process id of each turn."""
        return [int(line) for line in self._turns.read_text().split()] if self.was_called() else []

    def was_called(self) -> bool:
        return self._turns.exists() and self._turns.read_text().endswith("\n")


def answering(text: str) -> str:
    return f"print({text!r})"


def watch(
    repo: Path,
    child: Child,
    plans: Mapping[str, FeaturePlan] = PLANS,
    metrics: Metrics | None = None,
    **settings: Any,
) -> RegistryWatch:
    return RegistryWatch(
        repo, 300, lambda: plans, metrics or Metrics(), command=child.command, **settings
    )


def outdated_metric(metrics: Metrics) -> float | None:
    return metrics.registry.get_sample_value("hikyaku_plan_outdated", {"model": "tiny"})


async def test_a_difference_is_told_and_logged_once(
    repo: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = Metrics()
    child = Child(tmp_path, answering('{"tiny": "view driver: ttl_s was 1, is 2"}'))
    watching = watch(repo, child, metrics=metrics)
    assert (watching.state, outdated_metric(metrics)) == ("not done yet", None)
    for content in (b"1", b"22"):
        (repo / "registry.db").write_bytes(content)
        await watching.check()
    assert watching.outdated == {"tiny": "view driver: ttl_s was 1, is 2"}
    assert (watching.state, outdated_metric(metrics)) == ("done", 1)
    assert len(child.turns()) == 2
    assert [record.message for record in caplog.records] == ["plan outdated"]


async def test_a_plan_that_matches_is_not_outdated(repo: Path, tmp_path: Path) -> None:
    metrics = Metrics()
    watching = watch(repo, Child(tmp_path, answering('{"tiny": null}')), metrics=metrics)
    await watching.check()
    assert (watching.outdated, watching.state) == ({}, "done")
    assert outdated_metric(metrics) == 0


async def test_a_registry_that_nobody_wrote_is_not_compared_again(
    repo: Path, tmp_path: Path
) -> None:
    child = Child(tmp_path, answering('{"tiny": null}'))
    watching = watch(repo, child)
    for _ in range(3):
        await watching.check()
    assert len(child.turns()) == 1
    os.utime(repo / "registry.db", (1, 1))
    await watching.check()
    assert len(child.turns()) == 2


async def test_a_registry_elsewhere_is_compared_each_time(repo: Path, tmp_path: Path) -> None:
    (repo / "feature_store.yaml").write_text("registry: s3://bucket/registry.db\n")
    child = Child(tmp_path, answering('{"tiny": null}'))
    watching = watch(repo, child)
    for _ in range(2):
        await watching.check()
    assert len(child.turns()) == 2


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("print('loading', file=sys.stderr)\nsys.exit('no such store')", "no such store (exit"),
        ("os.abort()", "no word (exit status -6)"),
        (answering("yes"), "not JSON"),
        (answering("[]"), "not about the plans"),
        (answering('{"other": null}'), "not about the plans"),
        ("time.sleep(60)", "not done within 0 s"),
    ],
    ids=["refusal", "crash", "no JSON", "a list", "another model", "hang"],
)
async def test_a_check_that_fails_is_no_outdated_plan(
    repo: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, program: str, said: str
) -> None:
    metrics = Metrics()
    child = Child(tmp_path, program)
    watching = watch(repo, child, metrics=metrics, timeout_s=0.3 if "sleep" in program else 60)
    for _ in range(2):
        await watching.check()
    assert watching.state.startswith("failed: ")
    assert said in watching.state
    assert (watching.outdated, outdated_metric(metrics)) == ({}, None)
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


async def test_what_was_found_before_a_failure_stays(repo: Path, tmp_path: Path) -> None:
    watching = watch(repo, Child(tmp_path, answering('{"tiny": "all is new"}')))
    await watching.check()
    (repo / "registry.db").unlink()
    await watching.check()
    assert watching.outdated == {"tiny": "all is new"}
    assert f"failed: {repo / 'registry.db'}" in watching.state


async def test_a_registry_that_is_gone_is_not_made_anew(repo: Path, tmp_path: Path) -> None:
    child = Child(tmp_path, answering('{"tiny": null}'))
    (repo / "registry.db").unlink()
    await watch(repo, child).check()
    assert child.turns() == []


async def test_without_a_repository_or_a_plan_there_is_nothing_to_compare(tmp_path: Path) -> None:
    child = Child(tmp_path, answering('{"tiny": null}'))
    gateway = watch(tmp_path / "nowhere", child)
    await gateway.check()
    assert gateway.state == f"{tmp_path / 'nowhere' / 'feature_store.yaml'} is not there"
    without_features = watch(tmp_path, child, plans={})
    await without_features.check()
    assert without_features.state == "no model reads stored features"
    assert child.turns() == []


async def test_leaving_ends_a_child_that_still_works(repo: Path, tmp_path: Path) -> None:
    child = Child(tmp_path, "time.sleep(600)")
    async with asyncio.timeout(30):
        async with watch(repo, child):
            while not child.was_called():  # noqa: ASYNC110  (another process tells, by a file)
                await asyncio.sleep(0.01)
    (process,) = child.turns()
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


async def test_it_can_be_switched_off(repo: Path, tmp_path: Path) -> None:
    child = Child(tmp_path, answering('{"tiny": null}'))
    async with RegistryWatch(repo, 0, lambda: PLANS, Metrics(), command=child.command) as watching:
        await asyncio.sleep(0)
    assert watching.state == "off"
    assert child.turns() == []


@pytest.mark.parametrize(
    ("settings", "file"),
    [
        ("registry: registry.db", "registry.db"),
        ("registry: /srv/registry.db", "/srv/registry.db"),
        ("registry: {path: data/it.db}", "data/it.db"),
        ("registry: {registry_type: file, path: data/it.db}", "data/it.db"),
        ("registry: $REGISTRY_OF_THE_TEST/it.db", "from_environment/it.db"),
        ("project: p", "data/registry.db"),
        ("registry: s3://bucket/registry.db", None),
        ("registry: {registry_type: sql, path: 'postgresql://host/db'}", None),
        ("registry: {registry_type: remote, path: 'host:6570'}", None),
    ],
)
def test_the_registrys_file_is_found_without_feast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: str, file: str | None
) -> None:
    monkeypatch.setenv("REGISTRY_OF_THE_TEST", "from_environment")
    (tmp_path / "feature_store.yaml").write_text(settings)
    assert registry_file(tmp_path) == (None if file is None else tmp_path / file)


@pytest.mark.parametrize("settings", [b"a: [", b"\xff\xfe", b"text", b""])
def test_settings_that_cannot_be_read_are_named(tmp_path: Path, settings: bytes) -> None:
    (tmp_path / "feature_store.yaml").write_bytes(settings)
    with pytest.raises(ConfigurationError, match=r"feature_store\.yaml"):
        require_registry(tmp_path)


def test_a_registry_that_is_gone_is_refused_by_its_name(repo: Path) -> None:
    require_registry(repo)
    require_registry(repo / "nowhere")  # a gateway need not hold the repository
    (repo / "registry.db").unlink()
    with pytest.raises(ConfigurationError, match=r"registry\.db.*hikyaku features apply"):
        require_registry(repo)
