"""The candidates of one model that are open in this process, and shown requests."""

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial

from app.backends.backend import Event
from app.comparison.segments import SegmentReader
from app.contract import Contract, parse_contract
from app.errors import HikyakuError
from app.release.state import Chosen, ShadowState
from app.reload.memory import give_back, require_room
from app.reload.residents import READ_WITHIN_S, TAKE_WITHIN_S, VersionSource
from app.repository.verify import verify_version
from app.served_model import Candidate
from app.shadow.shadow import Shadow
from app.tasks import ended
from app.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 60.0


@dataclass(frozen=True, slots=True)
class _Read:
    content: Contract
    sha256: str


@dataclass(eq=False, slots=True)
class _Open:
    contract_sha256: str
    candidate: Candidate
    stack: AsyncExitStack


class Candidates:
    """What the release state asks to be shown is opened, and shown until it asks no more.

    `shadow` is the model's observer in this worker.
    """

    def __init__(self, name: str, shadow: Shadow, source: VersionSource, metrics: Metrics) -> None:
        self._name = name
        self._shadow = shadow
        self._source = source
        self._metrics = metrics
        self._wanted: Sequence[ShadowState] = ()
        self._decided = 0
        self._open: dict[Chosen, _Open] = {}
        self._prepared: dict[Chosen, _Open] = {}
        """Open, and not shown anything yet."""
        self._failed: dict[Chosen, str] = {}
        self._due = asyncio.Event()
        self._pause_s = _FIRST_PAUSE_S
        self._retry: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None

    def follow(self, shadows: Sequence[ShadowState], decided: int) -> None:
        """These are to be shown requests, and no other ones; `decided` is the generation in which
        the champion was decided on: by then there may be another model.yaml."""
        if (shadows, decided) == (self._wanted, self._decided):
            return
        self._wanted, self._decided = shadows, decided
        self._failed.clear()
        self._pause_s = _FIRST_PAUSE_S
        if shadows or self._open or self._task is not None:
            if self._task is None:
                self._task = asyncio.create_task(self._run(), name="candidates")
            self._due.set()

    def report(self) -> Mapping[str, str]:
        """By the digest of each that is wanted: empty where it is shown requests, or why it is not
        yet."""
        shown = self._shadow.candidates
        return {
            state.chosen.sha256: ""
            if state.chosen in shown
            else self._failed.get(state.chosen, "it is being opened")
            for state in self._wanted
        }

    async def usual_share(self) -> float:
        """Of the requests, by the present model.yaml. Raises `InvalidModel`,
        `RepositoryUnavailable`."""
        return (await self._contract()).content.shadow.share

    @asynccontextmanager
    async def prepared(self, chosen: Chosen) -> AsyncIterator[None]:
        """It is open here. When the block has had it wanted, it is shown requests at once.

        Raises `InvalidModel` where it must not be executed or cannot be compared,
        `RepositoryUnavailable` or `ConfigurationError`.
        """
        opened = self._prepared[chosen] = await self._opened(chosen, await self._contract())
        try:
            yield
        finally:
            wanted = any(state.chosen == chosen for state in self._wanted)
            if not wanted and self._prepared.pop(chosen, None) is opened:
                await opened.stack.aclose()

    async def close(self) -> None:
        if self._task is not None:
            await ended(self._task)
        if self._retry is not None:
            self._retry.cancel()
        for chosen in tuple(self._open):
            await self._hide(chosen)
        for opened in self._prepared.values():
            await opened.stack.aclose()

    async def _run(self) -> None:
        while True:
            await self._due.wait()
            self._due.clear()
            try:
                await self._follow()
            except Exception:  # a defect: others must go on being shown requests
                log.exception("the candidates could not be followed", extra={"model": self._name})
                self._again_later()

    async def _follow(self) -> None:
        wanted = {state.chosen: state for state in self._wanted}
        if wanted:
            contract = await self._contract()
            for chosen, opened in tuple(self._open.items()):
                if opened.contract_sha256 != contract.sha256:
                    await self._hide(chosen)
        for chosen in [chosen for chosen in self._open if chosen not in wanted]:
            await self._hide(chosen)
        for chosen, state in wanted.items():
            if chosen not in self._open:
                await self._show(state, contract)
            elif self._shadow.candidates[chosen] != state:
                self._shadow.change(state)

    async def _contract(self) -> "_Read":
        """The present one."""
        read = partial(self._source.repository.contract, self._name)
        content = await self._source.calls.call(read, READ_WITHIN_S)
        # It may have thousands of columns and labels.
        contract = await asyncio.to_thread(parse_contract, content, f"{self._name}/model.yaml")
        return _Read(contract, hashlib.sha256(content).hexdigest())

    async def _show(self, state: ShadowState, contract: "_Read") -> None:
        chosen = state.chosen
        extra = {"model": self._name, "version": chosen.version}
        opened = self._prepared.pop(chosen, None)
        try:
            if opened is None or opened.contract_sha256 != contract.sha256:
                opened = await self._opened(chosen, contract)
            self._shadow.show(opened.candidate, state)
        except Exception as exc:  # whatever it is, it may be over the next time
            known = isinstance(exc, HikyakuError)
            self._failed[chosen] = str(exc) if known else f"{type(exc).__name__}: {exc}"
            log.error(
                "a candidate cannot be shown requests",
                extra=extra | {"reason": self._failed[chosen]},
                exc_info=None if known else exc,
            )
            self._again_later()
        else:
            self._open[chosen] = opened
            self._failed.pop(chosen, None)
            log.info("a candidate is shown requests", extra=extra | {"share": state.share})

    async def _opened(self, chosen: Chosen, contract: "_Read") -> "_Open":
        source = self._source
        take = partial(source.vault.take, self._name, chosen.version, chosen.sha256)
        vaulted = await source.calls.call(take, TAKE_WITHIN_S)
        async with source.one_at_a_time, AsyncExitStack() as stack:
            verified = await verify_version(vaulted, contract.content, isolated=source.isolated)
            needed_bytes = verified.memory_bytes * source.opener.workers
            require_room(needed_bytes, f"{self._name} version {chosen.version} as a candidate")
            candidate = await source.opener.open_candidate(
                vaulted, contract.content, self._happened, stack
            )
            # What tells rows apart must be in them.
            SegmentReader(contract.content, candidate.decoder.required)
            return _Open(contract.sha256, candidate, stack.pop_all())

    async def _hide(self, chosen: Chosen) -> None:
        opened = self._open.pop(chosen)
        await self._shadow.hide(chosen)
        await opened.stack.aclose()
        log.info("a candidate is freed", extra={"model": self._name, "version": chosen.version})
        await self._source.calls.call(give_back, TAKE_WITHIN_S)

    def _happened(self, event: Event) -> None:
        self._metrics.shadow_events.labels(self._name, event).inc()

    def _again_later(self) -> None:
        """A while after everything that was tried meanwhile."""
        if self._retry is not None:
            self._retry.cancel()
        self._retry = asyncio.get_running_loop().call_later(self._pause_s, self._due.set)
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
