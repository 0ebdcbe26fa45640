"""One workload, everybody who can answer it, measured in turn."""

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from loadtests.bench.contenders import CONTENDERS, Contender
from loadtests.bench.environments import python_of
from loadtests.bench.paced import Paced
from loadtests.bench.reading import Reading
from loadtests.bench.server import Server, running, turns
from loadtests.bench.workload import WORKLOADS, Kind, ModelName

BASE = "echo"
"""Whose figures those of the others are divided by: it always takes part."""

_OURS = ("ours", "ours-asgi")
_WARM_UP_S = 1


@dataclass(frozen=True)
class Terms:
    """How everybody is measured. `per_s` 0: no loads at a steady rate."""

    contenders: Sequence[str]
    connections: Sequence[int]
    rounds: int
    seconds: int
    per_s: float


@dataclass(frozen=True)
class Measured:
    """What came of it, by contender, one entry a round."""

    kind: Kind
    model: ModelName
    rounds: dict[tuple[str, int], list[Reading]] = field(default_factory=dict)
    """By contender and connections."""
    paced: dict[str, list[Paced]] = field(default_factory=dict)
    """At the steady rate."""
    checked: dict[str, int] = field(default_factory=dict)
    """Right answers of ours between the loads, all rounds together."""


def measure(kind: Kind, model: ModelName, terms: Terms, work: Path) -> Measured:
    """Start every contender that can answer such requests, check its answers, and measure them
    round by round. Raises `BenchFailure` when one does not start, answers wrongly or not at all."""
    title = f"{kind}, {model}"
    _say(f"{title}: building and publishing the model")
    measured = Measured(kind, model)
    with WORKLOADS[kind](model, work) as workload, ExitStack() as stack:
        servers = []
        for contender in _taking_part(kind, terms.contenders):
            _say(f"{title}: starting {contender.name} and checking its answers")
            python = python_of(contender.lock, work)
            servers.append(stack.enter_context(running(contender, python, workload)))
        for server in servers:
            server.measure(max(terms.connections), _WARM_UP_S)
        for number in range(terms.rounds):
            _say(f"{title}: round {number + 1} of {terms.rounds}")
            _round(turns(servers, number), terms, measured)
    return measured


def _taking_part(kind: Kind, names: Sequence[str]) -> Sequence[Contender]:
    wanted = [CONTENDERS[name] for name in CONTENDERS if name in (BASE, *names)]
    return [contender for contender in wanted if kind in contender.kinds]


def _round(servers: Sequence[Server], terms: Terms, measured: Measured) -> None:
    for connections in terms.connections:
        for server in servers:
            reading = server.measure(connections, terms.seconds)
            measured.rounds.setdefault((server.contender.name, connections), []).append(reading)
    for server in servers:
        name = server.contender.name
        if name in _OURS:
            measured.checked[name] = measured.checked.get(name, 0) + server.check()
        if terms.per_s:
            seen = server.paced(terms.per_s, terms.seconds)
            measured.paced.setdefault(name, []).append(seen)


def _say(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)
