"""Watches Feast's registry for definitions that no longer match the plans that are served."""

import asyncio
import json
import logging
import os
import sys
from asyncio.subprocess import PIPE
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, Self, TypeAlias

import yaml

from app.errors import ConfigurationError
from app.features.plan import FeaturePlan
from app.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

REGISTRY_CHECK = (sys.executable, "-m", "app.features.registry_check")
_TIMEOUT_S = 120

# What tells whether the registry was written: of each file, when and how long.
_Stamp: TypeAlias = tuple[tuple[int, int], ...]


def require_registry(repo: Path) -> None:
    """Raises `ConfigurationError` where the folder's feature_store.yaml names a registry file that
    is not there: Feast would make an empty one. A folder without feature_store.yaml passes."""
    if not _settings(repo).is_file():
        return
    registry = registry_file(repo)
    if registry is not None and not registry.is_file():
        raise ConfigurationError(
            f"{registry}: the registry that {_settings(repo)} names is not there; "
            "`hikyaku features apply` writes it"
        )


def registry_file(repo: Path) -> Path | None:
    """The registry of a folder's feature_store.yaml, None where it is no local file.

    Read without Feast. Raises `ConfigurationError` when feature_store.yaml cannot be read.
    """
    path = _settings(repo)
    try:
        document = yaml.safe_load(os.path.expandvars(path.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as exc:
        raise ConfigurationError(f"{path}: {exc}") from exc
    if not isinstance(document, Mapping):
        raise ConfigurationError(f"{path}: holds no settings")
    registry: Any = document.get("registry", "data/registry.db")
    if isinstance(registry, str):
        registry = {"path": registry}
    if not isinstance(registry, Mapping) or registry.get("registry_type", "file") != "file":
        return None
    location = str(registry.get("path", ""))
    if not location or "://" in location or registry.get("registry_store_type"):
        return None
    return repo / location


class RegistryWatch:
    """Compares the served plans with the registry now and then, and changes nothing.

    It happens in a child process, because it takes Feast; the child is skipped while the registry
    is a local file that nobody has written. Use it as an async context manager: leaving ends the
    child. `every_s` 0 switches it off. `plans` gives the plan of each served model. The first
    comparison comes after `first_after_s`, for the children of several workers to come in turn.
    """

    def __init__(
        self,
        repo: Path,
        every_s: float,
        plans: Callable[[], Mapping[str, FeaturePlan]],
        metrics: Metrics,
        *,
        first_after_s: float = 0.0,
        command: Sequence[str] = REGISTRY_CHECK,
        timeout_s: float = _TIMEOUT_S,
    ) -> None:
        self._repo = repo
        self._every_s = every_s
        self._plans = plans
        self._metrics = metrics
        self._first_after_s = first_after_s
        self._command = command
        self._timeout_s = timeout_s
        self._compared: tuple[_Stamp, Mapping[str, FeaturePlan]] | None = None
        self._task: asyncio.Task[None] | None = None
        self.state = "not done yet" if every_s else "off"
        """`off`, `not done yet`, `done`, or why the last check could not be made."""
        self.outdated: Mapping[str, str] = {}
        """For each model whose plan the registry no longer matches, what differs."""

    async def check(self) -> None:
        """Compare all plans with the registry, unless nothing can have changed since the last time.

        What keeps it from comparing is `state`, and what was found before stays.
        """
        plans = self._plans()
        if not plans:
            self.state = "no model reads stored features"
            return
        if not _settings(self._repo).is_file():
            self._say(f"{_settings(self._repo)} is not there", logging.INFO)
            return
        try:
            require_registry(self._repo)
            stamp = self._stamp()
            if stamp is not None and self._compared == (stamp, plans):
                return
            found = await self._compared_in_child(plans)
        except (ConfigurationError, _CheckFailed, OSError) as exc:
            self._compared = None
            self._say(f"failed: {exc}", logging.ERROR)
            return
        self._compared = None if stamp is None else (stamp, plans)
        self.state = "done"
        self._report(found)

    async def __aenter__(self) -> Self:
        if self._every_s:
            self._task = asyncio.create_task(self._watch(), name="registry watch")
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    async def _watch(self) -> None:
        await asyncio.sleep(self._first_after_s)
        while True:
            await self.check()
            await asyncio.sleep(self._every_s)

    def _stamp(self) -> _Stamp | None:
        """None where the registry is no local file, and may have changed at any time."""
        registry = registry_file(self._repo)
        if registry is None:
            return None
        stats = [path.stat() for path in (_settings(self._repo), registry)]
        return tuple((stat.st_mtime_ns, stat.st_size) for stat in stats)

    async def _compared_in_child(self, plans: Mapping[str, FeaturePlan]) -> Mapping[str, Any]:
        request = {
            "repository": str(self._repo),
            "plans": {model: plan.to_json().decode() for model, plan in plans.items()},
        }
        # Feast leaves files behind where it is killed.
        with TemporaryDirectory(prefix="hikyaku-registry-") as scratch:
            answer = await self._answer(json.dumps(request).encode(), _environment(scratch))
        try:
            found = json.loads(answer)
        except ValueError:
            raise _CheckFailed("its answer is not JSON") from None
        if not isinstance(found, Mapping) or found.keys() != plans.keys():
            raise _CheckFailed("its answer is not about the plans")
        return found

    async def _answer(self, request: bytes, environment: Mapping[str, str]) -> bytes:
        """What the child writes; it ends with this call."""
        child = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=PIPE,
            stdout=PIPE,
            stderr=PIPE,
            env=environment,
            start_new_session=True,  # a Ctrl-C in the terminal is for us, who end it
        )
        try:
            async with asyncio.timeout(self._timeout_s):
                answer, said = await child.communicate(request)
        except TimeoutError:
            raise _CheckFailed(f"not done within {self._timeout_s:.0f} s") from None
        finally:
            if child.returncode is None:
                child.kill()
                await child.wait()
        if child.returncode != 0:
            last = said.decode(errors="replace").strip().rpartition("\n")[2]
            raise _CheckFailed(f"{last or 'no word'} (exit status {child.returncode})")
        return answer

    def _report(self, found: Mapping[str, str | None]) -> None:
        before, self.outdated = self.outdated, {m: text for m, text in found.items() if text}
        for model, text in found.items():
            self._metrics.plan_outdated.labels(model).set(1 if text else 0)
            if text and text != before.get(model):
                log.warning("plan outdated", extra={"model": model, "difference": text})
            elif not text and model in before:
                log.info("plan no longer outdated", extra={"model": model})

    def _say(self, state: str, level: int) -> None:
        if state != self.state:
            log.log(level, "plans are not compared with the registry", extra={"reason": state})
        self.state = state


def _environment(scratch: str) -> dict[str, str]:
    """Ours, without what Feast sets for its metrics where we have imported it: the child would
    write beside them."""
    ours = {name: v for name, v in os.environ.items() if not name.startswith("PROMETHEUS_MULTI")}
    return ours | {"TMPDIR": scratch}


class _CheckFailed(Exception):
    """The child came to no result."""


def _settings(repo: Path) -> Path:
    return repo / "feature_store.yaml"
