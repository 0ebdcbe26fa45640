"""The versions of one model that are open in this process, and which of them serves."""

import asyncio
import hashlib
import logging
from collections.abc import Collection, Iterator, MutableMapping
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

from app.contract import parse_contract
from app.errors import InvalidModel
from app.release.state import Chosen
from app.reload.blocking import BlockingCalls
from app.reload.memory import give_back, require_room
from app.repository.load import VersionOpener
from app.repository.store import Repository
from app.repository.vault import Vault
from app.repository.verify import verify_version
from app.served_model import ServedModel
from app.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

READ_WITHIN_S = 10.0
# A version may have to be copied from far away.
TAKE_WITHIN_S = 900.0


@dataclass(frozen=True, slots=True)
class VersionSource:
    """Where versions come from, for all models of this process."""

    repository: Repository
    vault: Vault
    opener: VersionOpener
    calls: BlockingCalls
    one_at_a_time: asyncio.Lock
    """Two that are opened at once might each find the memory that there is for one."""
    isolated: bool
    """Whether a version is first opened in a process of its own; False for models whose author is
    the caller, in tests."""

    async def current(self, name: str) -> Chosen | None:
        """What CURRENT names, with an empty digest where there is no such version. Raises
        `RepositoryUnavailable`, and `InvalidModel` where CURRENT names none."""
        version = await self.calls.call(partial(self.repository.current, name), READ_WITHIN_S)
        if version is None:
            return None
        read = partial(self.repository.manifest, name, version)
        try:
            content = await self.calls.call(read, READ_WITHIN_S)
        except InvalidModel:
            return Chosen(version, "")
        return Chosen(version, hashlib.sha256(content).hexdigest())


@dataclass(eq=False, slots=True)
class Resident:
    """A version that is open, by a contract: another model.yaml makes it another one."""

    chosen: Chosen
    contract_sha256: str
    model: ServedModel
    stack: AsyncExitStack


class Residents:
    """`models` is where requests look their version up: its entry of this name is exchanged in one
    step, and who began with the one before it ends with it."""

    def __init__(
        self,
        name: str,
        models: MutableMapping[str, ServedModel | None],
        source: VersionSource,
        metrics: Metrics,
    ) -> None:
        self.name = name
        self.serving: Resident | None = None
        self._models = models
        self._source = source
        self._metrics = metrics
        self._open: list[Resident] = []
        """In the order in which they were opened."""
        self._pinned: list[Resident] = []
        # A reference: the loop holds tasks only weakly (asyncio docs, create_task).
        self._closing: set[asyncio.Task[None]] = set()
        self._told: set[tuple[str, ...]] = set()
        """The series of `hikyaku_model_info` that there are."""

    @property
    def ready(self) -> tuple[Chosen, ...]:
        """Those that could serve at once."""
        return tuple(dict.fromkeys(resident.chosen for resident in self._open))

    @property
    def begun(self) -> int:
        """Requests that began with one of those that are open."""
        return sum(resident.model.uses.begun for resident in self._open)

    def find(self, chosen: Chosen) -> Resident | None:
        """The one that was opened last, where there are several by different contracts."""
        found = (resident for resident in reversed(self._open) if resident.chosen == chosen)
        return next(found, None)

    async def open(self, version: int, sha256: str | None = None, workers: int = 1) -> Resident:
        """The version by the present model.yaml, verified, warm and ready to serve; the one that is
        open already where that is the same. There is to be room for it in so many `workers`.

        Raises `InvalidModel` with the reason why it must not serve, `RepositoryUnavailable` when
        it cannot be read now, `ConfigurationError` when this process cannot serve it.
        """
        source = self._source
        take = partial(source.vault.take, self.name, version, sha256)
        vaulted = await source.calls.call(take, TAKE_WITHIN_S)
        read = partial(source.repository.contract, self.name)
        content = await source.calls.call(read, READ_WITHIN_S)
        contract_sha256 = hashlib.sha256(content).hexdigest()
        chosen = Chosen(version, vaulted.sha256)
        async with source.one_at_a_time:
            found = self.find(chosen)
            if found is not None and found.contract_sha256 == contract_sha256:
                return found
            # It may have thousands of columns and labels.
            contract = await asyncio.to_thread(parse_contract, content, f"{self.name}/model.yaml")
            verified = await verify_version(vaulted, contract, isolated=source.isolated)
            require_room(verified.memory_bytes * workers, f"{self.name} version {version}")
            async with AsyncExitStack() as stack:
                model = await source.opener.open(vaulted, contract, stack)
                resident = Resident(chosen, contract_sha256, model, stack.pop_all())
            self._open.append(resident)
            return resident

    @contextmanager
    def pinned(self, resident: Resident) -> Iterator[None]:
        """Until the block ends it stays open, whoever is kept."""
        self._pinned.append(resident)
        try:
            yield
        finally:
            self._pinned.remove(resident)

    def serve(self, resident: Resident) -> None:
        """Requests that begin from now on are answered by it."""
        before, self.serving = self.serving, resident
        if before is resident:
            return
        model = resident.model
        if before is not None:
            model.missing.take_over(before.model.missing)
        model.recorder.lead(None if before is None else before.model.recorder)
        self._models[self.name] = model
        queued = self._metrics.queued_rows.labels(self.name)
        queued.set_function(partial(_queued_rows, self._models, self.name))
        self._tell_versions()
        log.info("a version serves", extra=self._named(resident))

    def keep(self, chosen: Collection[Chosen]) -> None:
        """Free what neither serves nor is one of these."""
        of_each = [self.find(each) for each in chosen]
        for resident in tuple(self._open):
            needed = resident is self.serving or resident in self._pinned or resident in of_each
            if not needed:
                self._open.remove(resident)
                task = asyncio.create_task(self._free(resident), name="free a version")
                self._closing.add(task)
                task.add_done_callback(self._closing.discard)
        self._tell_versions()

    async def close(self) -> None:
        """Free all; what is under way is ended as a drain does."""
        if self._closing:
            await asyncio.wait(self._closing)
        for resident in reversed(self._open):
            await resident.stack.aclose()
        self._open.clear()

    async def _free(self, resident: Resident) -> None:
        within_s = resident.model.contract.limits.max_timeout_ms / 1000
        try:
            async with asyncio.timeout(within_s):
                await resident.model.uses.ended()
        except TimeoutError:
            # Every one of them has passed its deadline: whoever still counts is not waiting.
            log.error("requests of a version did not end", extra=self._named(resident))
        await resident.stack.aclose()
        log.info("a version is freed", extra=self._named(resident))
        # What refers to it last is this frame.
        del resident
        await self._source.calls.call(give_back, TAKE_WITHIN_S)

    def _tell_versions(self) -> None:
        """Who serves, and who could at once."""
        told = {
            _labels(resident, "champion" if resident is self.serving else "standby")
            for resident in self._open
        }
        for labels in self._told - told:
            self._metrics.model_info.labels(*labels).forget()
        for labels in told:
            self._metrics.model_info.labels(*labels).set(1)
        self._told = told

    def _named(self, resident: Resident) -> dict[str, object]:
        chosen = resident.chosen
        return {"model": self.name, "version": chosen.version, "sha256": chosen.sha256}


def _labels(resident: Resident, role: str) -> tuple[str, ...]:
    served = resident.model.id
    return (served.model, str(served.version), served.sha256, role)


def _queued_rows(models: MutableMapping[str, ServedModel | None], name: str) -> float:
    model = models[name]
    return 0.0 if model is None else model.batcher.queued_rows
