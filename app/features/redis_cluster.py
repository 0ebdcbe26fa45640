"""Reads features from a Redis Cluster: each command goes to the node that holds its key."""

import asyncio
import logging
import random
import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import hiredis
from redis.asyncio import Redis
from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot
from redis.exceptions import RedisError

from app.deadline import Deadline, DeadlineSweep
from app.errors import FeaturesUnavailable
from app.features.redis_address import ClusterAddress, RedisAddress
from app.features.redis_connection import Reading, Reply, command, hand_over
from app.features.redis_features import PATIENCE_S, RedisFeatures
from app.features.redis_py import options

log = logging.getLogger(__name__)

_LEARN_EVERY_S = 0.25
_MAX_REDIRECTIONS = 4


class ClusterFeatures:
    """Reads of one Redis Cluster, from the masters of its slots.

    Each node is a `RedisFeatures` of its own: what is read in one turn of the event loop leaves in
    one write a node, and a node that is down or silent harms its own keys only, whose replies are
    then errors. A redirection is followed; it, a node that fails and a refusal make us ask anew
    which node holds what, at most four times a second. Use it as an async context manager.
    """

    def __init__(self, address: ClusterAddress) -> None:
        self._address = address
        self._nodes: dict[RedisAddress, _Node] = {node: _Node(node) for node in address.nodes}
        self._node_of_slot: list[_Node | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
        self._unknown = "which node holds what is not known yet"
        self._sweep = DeadlineSweep()
        self._under_way: dict[Reading, _Whole] = {}
        self._in_doubt = asyncio.Event()
        self._learning: asyncio.Task[None] | None = None
        self._closed = False

    def read(self, reading: Reading) -> None:
        """Send its commands; its reader is told how it ends. Raises `FeaturesUnavailable` when no
        node that holds its keys can be asked."""
        whole = _Whole(reading)
        parts: dict[_Node | None, list[int]] = {}
        for place, sent in enumerate(reading.commands):
            parts.setdefault(self._node_of_slot[key_slot(_key(sent))], []).append(place)
        reason = ""
        for node, places in parts.items():
            reason = self._send(node, whole, places) or reason
        if not whole.parts:
            raise FeaturesUnavailable(f"Redis Cluster: {reason}")
        self._under_way[reading] = whole

    def check_up(self) -> None:
        """A cluster is down only key by key."""

    def watch(self, answer: "asyncio.Future[Any]", deadline: Deadline) -> None:
        """Fail it with `DeadlineExceeded` at its deadline."""
        self._sweep.watch(answer, deadline)

    def answered(self) -> None:
        """A read was answered in time; each node's part of it has told so already."""

    def late(self, waited_s: float, readings: Collection[Reading]) -> None:
        """A read ran out of time after so long: the fault of the nodes that still owe a part of
        these readings, which are not complete."""
        now_s = time.monotonic()
        owed_s: dict[_Node, float] = {}
        for reading in readings:
            whole = self._under_way.get(reading)
            # None: it has failed since the read ran out of time.
            for part in whole.parts if whole is not None else ():
                owed_s[part.node] = max(now_s - part.since_s, owed_s.get(part.node, 0.0))
        for node, node_owed_s in owed_s.items():
            node.features.late(min(waited_s, node_owed_s), ())

    def refused(self, reason: str) -> None:
        """A node answered that it serves nobody now: perhaps another does."""
        self._in_doubt.set()

    def arrived(self, readings: "Sequence[Reading]") -> None:
        now_s = time.monotonic()
        complete = []
        for part in readings:
            assert isinstance(part, _Part)  # we send no others
            if part not in part.whole.parts:
                continue  # its reading has failed
            try:
                if now_s - part.since_s < PATIENCE_S:
                    part.node.features.answered()
                self._take(part)
            except Exception as exc:  # a defect: nobody may be left waiting
                self._give_up(part.whole, exc)
                continue
            if self._was_last(part):
                complete.append(part.whole.reading)
        hand_over(complete)

    def failed(self, reading: Reading, reason: str) -> None:
        assert isinstance(reading, _Part)  # we send no others
        whole = reading.whole
        if reading not in whole.parts:
            return  # the whole has failed already
        try:
            self._failed(reading.node, whole, reading.places, reason)
        except Exception as exc:  # a defect: nobody may be left waiting
            self._give_up(whole, exc)
            return
        if not self._was_last(reading):
            return
        if whole.failed == len(whole.reading.commands):
            whole.reading.reader.failed(whole.reading, reason)
        else:
            hand_over([whole.reading])

    def _take(self, part: "_Part") -> None:
        """Put its replies where they belong, and follow those that lead elsewhere."""
        # An ASKING before the command has a reply of its own.
        replies = part.replies[-len(part.places) :]
        for place, reply in zip(part.places, replies, strict=True):
            if not self._redirected(part, place, reply):
                part.whole.reading.replies[place] = reply

    def _was_last(self, part: "_Part") -> bool:
        """Whether its reading is complete with it."""
        part.whole.parts.remove(part)
        if part.whole.parts:
            return False
        del self._under_way[part.whole.reading]
        return True

    def _give_up(self, whole: "_Whole", exc: Exception) -> None:
        """Fail the whole reading; what comes of it later is for nobody."""
        log.error("a part of a reading was not understood", exc_info=exc)
        whole.parts.clear()
        del self._under_way[whole.reading]
        whole.reading.reader.failed(whole.reading, f"a defect: {type(exc).__name__}")

    def _send(
        self,
        node: "_Node | None",
        whole: "_Whole",
        places: list[int],
        redirections: int = 0,
        asking: bool = False,
    ) -> str:
        """Send the commands at these places of a reading; else why they are not sent."""
        if node is None:
            reason = self._unknown
        else:
            part = _Part(self, node, whole, places, redirections, asking)
            try:
                node.features.read(part)
            except FeaturesUnavailable as exc:
                reason = str(exc)
            else:
                whole.parts.add(part)
                return ""
        self._failed(node, whole, places, reason)
        return reason

    def _failed(
        self, node: "_Node | None", whole: "_Whole", places: list[int], reason: str
    ) -> None:
        self._in_doubt.set()
        whole.failed += len(places)
        who = node.address if node is not None else "cluster"
        for place in places:
            whole.reading.replies[place] = hiredis.ReplyError(f"UNAVAILABLE {who}: {reason}")

    def _redirected(self, part: "_Part", place: int, reply: Reply) -> bool:
        """Follow `MOVED slot host:port` and `ASK slot host:port`, the answers to one command."""
        if not isinstance(reply, hiredis.ReplyError) or part.redirections == _MAX_REDIRECTIONS:
            return False
        match str(reply).split(" "):
            case ["MOVED" | "ASK" as kind, _, where]:
                host, _, port = where.rpartition(":")
            case _:
                return False
        if not (port.isdecimal() and len(port) <= 5 and 0 < int(port) <= 65_535):
            return False  # it leads nowhere
        if kind == "MOVED":
            self._in_doubt.set()
        node = self._node(host or part.node.address.host, int(port))
        self._send(node, part.whole, [place], part.redirections + 1, kind == "ASK")
        return True

    def _node(self, host: str, port: int) -> "_Node":
        address = replace(self._address.nodes[0], host=host, port=port)
        node = self._nodes.get(address)
        if node is None:
            node = self._nodes[address] = _Node(address)
        return node

    async def _keep_learning(self) -> None:
        # redis-py may swallow a cancellation: asyncio.timeout(0), with which it looks whether a
        # connection still stands, takes one that comes just before for its own (Python 3.11).
        while not self._closed:
            await self._in_doubt.wait()
            self._in_doubt.clear()
            try:
                await self._learn()
            except Exception:  # who learns must survive
                log.exception("the cluster's answer was not understood")
            await asyncio.sleep(_LEARN_EVERY_S)

    async def _learn(self) -> None:
        """Ask one node after the other which node holds what, until one knows."""
        nodes = list(self._nodes.values())
        # At random: one that is cut off from the others may be wrong for long.
        random.shuffle(nodes)
        for node in sorted(nodes, key=lambda node: node.features.is_down):
            try:
                slots = await node.client.execute_command("CLUSTER SLOTS")  # type: ignore[no-untyped-call]  # redis-py's
            except (RedisError, OSError) as exc:
                self._unknown = f"{node.address}: {exc}"
                continue
            if slots:
                await self._use(slots, node.address.host)
                return
            self._unknown = f"{node.address}: knows of no slots"

    async def _use(self, slots: Sequence[Any], told_by: str) -> None:
        """`slots`: of each range the first, the last and the nodes, the master before its
        replicas."""
        node_of_slot: list[_Node | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
        for first, last, (host, port, *_), *_ in slots:
            known = host not in {None, b"", b"?"}  # else it is the one that we asked
            node = self._node(host.decode() if known else told_by, port)
            node_of_slot[first : last + 1] = [node] * (last + 1 - first)
        self._node_of_slot = node_of_slot
        self._unknown = "no node holds its slot"
        in_use = {*node_of_slot, *(self._nodes[seed] for seed in self._address.nodes)}
        for address, node in list(self._nodes.items()):
            if node not in in_use and not node.features.unanswered:
                del self._nodes[address]
                await node.aclose()

    async def __aenter__(self) -> Self:
        await self._learn()
        self._learning = asyncio.create_task(self._keep_learning(), name="learn the cluster")
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._closed = True
        if self._learning is not None:
            self._learning.cancel()
            await asyncio.wait({self._learning})
        for node in self._nodes.values():
            await node.aclose()
        self._sweep.close()


class _Node:
    """One node: what reads from it, and what asks it who the others are."""

    def __init__(self, address: RedisAddress) -> None:
        self.address = address
        self.features = RedisFeatures(address)
        self.client: Redis = Redis(host=address.host, port=address.port, **options(address))

    async def aclose(self) -> None:
        await self.features.aclose()
        await self.client.aclose()


class _Whole:
    """A reading that several nodes answer."""

    __slots__ = ("failed", "parts", "reading")

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        reading.replies = [None] * len(reading.commands)
        self.parts: set[_Part] = set()
        """Those that are under way; none once the reading is complete or has failed."""
        self.failed = 0
        """Commands that no node could be asked."""


class _Part(Reading):
    """The commands of a reading that one node answers."""

    __slots__ = ("node", "places", "redirections", "since_s", "whole")

    def __init__(
        self,
        cluster: ClusterFeatures,
        node: _Node,
        whole: _Whole,
        places: list[int],
        redirections: int,
        asking: bool,
    ) -> None:
        commands = [whole.reading.commands[place] for place in places]
        super().__init__(cluster, [command(b"ASKING"), *commands] if asking else commands)
        self.node = node
        self.whole = whole
        self.places = places
        """Of its commands in the whole."""
        self.redirections = redirections
        self.since_s = time.monotonic()


def _key(sent: bytes) -> bytes:
    """The key of a command in Redis's wire format: its second word."""
    _, _, _, length, rest = sent.split(b"\r\n", 4)
    return rest[: int(length[1:])]
