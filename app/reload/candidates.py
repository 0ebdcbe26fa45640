"""The candidates of one model that are open in this process, and shown requests."""

import asyncio
import hashlib
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Collection, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial

from app.backends.backend import Event
from app.comparison.segments import SegmentReader
from app.contract import Contract, parse_contract
from app.errors import HikyakuError, RepositoryUnavailable
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
_TRIP_DEATHS = 3
_TRIP_S = 60.0


@dataclass(frozen=True, slots=True)
class _Read:
    content: Contract
    sha256: str


@dataclass(slots=True)
class _Deaths:
    all: int = 0
    last_s: deque[float] = field(default_factory=lambda: deque(maxlen=_TRIP_DEATHS))
    """Monotonic."""

    def lately(self, now_s: float) -> int:
        return sum(now_s - at_s < _TRIP_S for at_s in self.last_s)


@dataclass(eq=False, slots=True)
class _Open:
    contract_sha256: str
    candidate: Candidate
    stack: AsyncExitStack
    held: bool = False
    """Somebody may have it wanted yet."""


class Candidates:
    """What the release state asks to be shown is opened, and shown until it asks no more. None of
    them waits for another one that cannot be opened.

    `shadow` is the model's observer in this worker.
    """

    def __init__(self, name: str, shadow: Shadow, source: VersionSource, metrics: Metrics) -> None:
        self._name = name
        self._shadow = shadow
        self._source = source
        self._metrics = metrics
        self._wanted: Sequence[ShadowState] = ()
        self._decided = 0
        self._opening: dict[Chosen, asyncio.Task[None]] = {}
        self._prepared: dict[Chosen, _Open] = {}
        """Open, and not shown anything yet."""
        self._open: dict[Chosen, _Open] = {}
        """Shown requests."""
        self._freeing: set[asyncio.Task[None]] = set()
        self._failed: dict[Chosen, str] = {}
        self._deaths: dict[Chosen, _Deaths] = {}
        """Of the processes of those that are wanted."""
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
        self._deaths = {chosen: of for chosen, of in self._deaths.items() if self._wants(chosen)}
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

    def tripped(self) -> Mapping[str, str]:
        """By the digest of each that is wanted and must not be released: why."""
        now_s = time.monotonic()
        return {
            chosen.sha256: f"{deaths.lately(now_s)} deaths in {_TRIP_S:g} s"
            for chosen, deaths in self._deaths.items()
            if deaths.lately(now_s) >= _TRIP_DEATHS
        }

    def ended(self) -> Mapping[str, int]:
        """By the digest of each that is wanted: how often its process has died since it is."""
        return {chosen.sha256: deaths.all for chosen, deaths in self._deaths.items()}

    async def contract(self) -> Contract:
        """By the present model.yaml. Raises `InvalidModel`, `RepositoryUnavailable`."""
        return (await self._contract()).content

    @asynccontextmanager
    async def prepared(self, chosen: Chosen) -> AsyncIterator[None]:
        """It is open here. When the block has had it wanted, it is shown requests at once.

        Raises `InvalidModel` where it must not be executed or cannot be compared,
        `RepositoryUnavailable` or `ConfigurationError`.
        """
        opened = await self._opened(chosen, await self._contract(), self._source.opener.workers)
        opened.held = True
        self._keep(chosen, opened)
        try:
            yield
        finally:
            opened.held = False
            if self._prepared.get(chosen) is opened and not self._wants(chosen):
                await self._free(self._prepared.pop(chosen))

    async def close(self) -> None:
        if self._task is not None:
            await ended(self._task)
        if self._retry is not None:
            self._retry.cancel()
        for opening in tuple(self._opening.values()):
            await ended(opening)
        await asyncio.gather(
            *map(self._hide, tuple(self._open)), *map(self._free, self._prepared.values())
        )
        self._prepared.clear()
        if self._freeing:
            await asyncio.wait(self._freeing)

    def _wants(self, chosen: Chosen) -> bool:
        return any(state.chosen == chosen for state in self._wanted)

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
        """What needs nothing goes first: the repository may be away."""
        wanted = {state.chosen: state for state in self._wanted}
        await self._leave(wanted)
        for chosen in self._open:
            if self._shadow.candidates[chosen] != wanted[chosen]:
                self._shadow.change(wanted[chosen])
        if not wanted:
            return
        try:
            contract = await self._contract()
        except HikyakuError as exc:
            for chosen in wanted.keys() - self._open.keys():
                self._fail(chosen, exc)
            self._again_later()
            return
        for chosen, opened in tuple(self._open.items()):
            if opened.contract_sha256 != contract.sha256:
                await self._hide(chosen)
        for chosen, state in wanted.items():
            if chosen not in self._open:
                await self._show(state, contract)

    async def _leave(self, wanted: Collection[Chosen]) -> None:
        """What is not wanted any more."""
        for chosen, opening in tuple(self._opening.items()):
            if chosen not in wanted:
                await ended(opening)
        for chosen in self._open.keys() - wanted:
            await self._hide(chosen)
        for chosen, opened in tuple(self._prepared.items()):
            if chosen not in wanted and not opened.held:
                await self._free(self._prepared.pop(chosen))

    async def _contract(self) -> "_Read":
        """The present one."""
        read = partial(self._source.repository.contract, self._name)
        content = await self._source.calls.call(read, READ_WITHIN_S)
        # It may have thousands of columns and labels.
        contract = await asyncio.to_thread(parse_contract, content, f"{self._name}/model.yaml")
        return _Read(contract, hashlib.sha256(content).hexdigest())

    async def _show(self, state: ShadowState, contract: "_Read") -> None:
        """At once where it is open, else as soon as it is."""
        chosen = state.chosen
        opened = self._prepared.pop(chosen, None)
        if opened is not None and opened.contract_sha256 != contract.sha256:
            await self._free(opened)
            opened = None
        if opened is not None:
            self._shadow.show(opened.candidate, state)
            self._open[chosen] = opened
            self._failed.pop(chosen, None)
            extra = {"model": self._name, "version": chosen.version, "share": state.share}
            log.info("a candidate is shown requests", extra=extra)
        elif chosen not in self._opening:
            opening = asyncio.create_task(self._prepare(chosen, contract), name="open a candidate")
            self._opening[chosen] = opening
            opening.add_done_callback(lambda _: self._opening.pop(chosen))

    async def _prepare(self, chosen: Chosen, contract: "_Read") -> None:
        try:
            self._keep(chosen, await self._opened(chosen, contract, workers=1))
        except Exception as exc:  # whatever it is, it may be over the next time
            self._fail(chosen, exc)
            self._again_later()
        else:
            self._due.set()

    def _keep(self, chosen: Chosen, opened: "_Open") -> None:
        """Until it is shown requests, or not wanted. Of two, which others have asked for at the
        same time, the latest."""
        before = self._prepared.pop(chosen, None)
        self._prepared[chosen] = opened
        if before is not None:
            self._freed(before)

    def _fail(self, chosen: Chosen, exc: Exception) -> None:
        known = isinstance(exc, HikyakuError)
        self._failed[chosen] = str(exc) if known else f"{type(exc).__name__}: {exc}"
        log.error(
            "a candidate cannot be shown requests",
            extra={
                "model": self._name,
                "version": chosen.version,
                "reason": self._failed[chosen],
            },
            exc_info=None if known else exc,
        )

    async def _opened(self, chosen: Chosen, contract: "_Read", workers: int) -> "_Open":
        """There is to be room for it in so many workers."""
        source = self._source
        take = partial(source.vault.take, self._name, chosen.version, chosen.sha256)
        vaulted = await source.calls.call(take, TAKE_WITHIN_S)
        async with source.one_at_a_time, AsyncExitStack() as stack:
            verified = await verify_version(vaulted, contract.content, isolated=source.isolated)
            needed_bytes = verified.memory_bytes * workers
            require_room(needed_bytes, f"{self._name} version {chosen.version} as a candidate")
            candidate = await source.opener.open_candidate(
                vaulted, contract.content, partial(self._happened, chosen), stack
            )
            # What tells rows apart must be in them.
            SegmentReader(contract.content, candidate.decoder.required)
            return _Open(contract.sha256, candidate, stack.pop_all())

    async def _hide(self, chosen: Chosen) -> None:
        opened = self._open.pop(chosen)
        await self._free(opened, self._shadow.hide(chosen))
        log.info("a candidate is freed", extra={"model": self._name, "version": chosen.version})

    async def _free(self, opened: "_Open", hidden: Awaitable[None] | None = None) -> None:
        """Once it is hidden. Whoever is cancelled here leaves nothing behind."""
        await asyncio.shield(self._freed(opened, hidden))

    def _freed(
        self, opened: "_Open", hidden: Awaitable[None] | None = None
    ) -> "asyncio.Task[None]":
        async def free() -> None:
            if hidden is not None:
                await hidden
            await opened.stack.aclose()
            # Where the threads are taken it goes back another time.
            with suppress(RepositoryUnavailable):
                await self._source.calls.call(give_back, TAKE_WITHIN_S)

        freeing = asyncio.create_task(free(), name="free a candidate")
        self._freeing.add(freeing)
        freeing.add_done_callback(self._freeing.discard)
        return freeing

    def _happened(self, chosen: Chosen, event: Event) -> None:
        self._metrics.shadow_events.labels(self._name, event).inc()
        if event == "process_ended":
            deaths = self._deaths.setdefault(chosen, _Deaths())
            deaths.all += 1
            deaths.last_s.append(time.monotonic())

    def _again_later(self) -> None:
        """A while after everything that was tried meanwhile."""
        if self._retry is not None:
            self._retry.cancel()
        self._retry = asyncio.get_running_loop().call_later(self._pause_s, self._due.set)
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
