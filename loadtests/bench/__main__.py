"""Hikyaku beside a bare ASGI echo and beside its peers: the same model, the same rows, one worker.

    make bench      (BENCH="--quick", BENCH="--help")

docs/benchmarks.md says how it is measured and what to make of the figures.
"""

import argparse
import json
import os
import platform
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from loadtests.bench.contenders import CONTENDERS
from loadtests.bench.environments import python_of
from loadtests.bench.failure import BenchFailure
from loadtests.bench.figures import GOALS, Rounds, table
from loadtests.bench.server import Reading, Server, running
from loadtests.bench.workload import ModelName, prepare
from loadtests.bench.wrk import find_wrk

_PEERS = tuple(name for name in CONTENDERS if name not in ("echo", "ours"))
_WORK = Path(".hikyaku/bench")
_WARM_UP_S = 1


def main() -> None:
    options = _options()
    machine = _machine()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the servers end with us
    try:
        find_wrk()
        measured = {name: measure(name, options) for name in options.model}
    except BenchFailure as failure:
        sys.exit(f"bench: {failure}")
    except KeyboardInterrupt:
        sys.exit(130)
    titles = {contender.name: contender.title for contender in CONTENDERS.values()}
    print(f"{machine}; {options.rounds} rounds of {options.seconds} s")
    for name, rounds in measured.items():
        print(f"\n{name}\n\n{table(rounds, titles)}")
    if options.json:
        options.json.write_text(json.dumps(_document(measured, machine, options), indent=1))
    if "gbdt" in measured:
        print("\ngbdt, ours:", *(goal.line(measured["gbdt"]) for goal in GOALS), sep="\n")
        sys.exit(not all(goal.met(measured["gbdt"]) for goal in GOALS))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=_positive, default=7)
    parser.add_argument(
        "--seconds", type=_positive, default=2, help="of load at a time (default 2)"
    )
    parser.add_argument("--connections", type=_positive, nargs="+", default=[1, 16, 64])
    parser.add_argument(
        "--model", nargs="+", choices=get_args(ModelName), default=list(get_args(ModelName))
    )
    parser.add_argument(
        "--peers",
        nargs="*",
        choices=_PEERS,
        default=list(_PEERS),
        metavar="PEER",
        help=f"beside the echo and ours (default: all of {', '.join(_PEERS)})",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every reading there")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="unless said otherwise: the echo and ours alone, GBDT, 1 and 64 connections, 5 rounds "
        "of 1 s, which takes half a minute",
    )
    if parser.parse_args().quick:
        quick = {"connections": [1, 64], "rounds": 5, "seconds": 1}
        parser.set_defaults(peers=[], model=["gbdt"], **quick)
    return parser.parse_args()


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


def measure(name: ModelName, options: argparse.Namespace) -> Rounds:
    """Every contender started, its answers checked, and measured in turn, round by round."""
    _say(f"{name}: building and publishing the model")
    workload = prepare(name, _WORK)
    wanted = [CONTENDERS[contender] for contender in ("echo", "ours", *options.peers)]
    rounds: dict[tuple[str, int], list[Reading]] = {
        (contender.name, connections): []
        for contender in wanted
        for connections in options.connections
    }
    with ExitStack() as stack:
        servers = []
        for contender in wanted:
            _say(f"{name}: starting {contender.name} and checking its answers")
            python = python_of(contender.peer, _WORK)
            servers.append(stack.enter_context(running(contender, python, workload)))
        for server in servers:
            server.measure(max(options.connections), _WARM_UP_S)
        for number in range(options.rounds):
            _say(f"{name}: round {number + 1} of {options.rounds}")
            turns = servers if number % 2 == 0 else servers[::-1]
            for connections in options.connections:
                _round(turns, connections, options.seconds, rounds)
    return rounds


def _round(
    turns: Sequence[Server],
    connections: int,
    seconds: int,
    rounds: dict[tuple[str, int], list[Reading]],
) -> None:
    for server in turns:
        reading = server.measure(connections, seconds)
        rounds[server.contender.name, connections].append(reading)


def _machine() -> str:
    """What the figures were taken on, and how busy others kept it."""
    busy = os.getloadavg()[0]
    cores = f"{os.cpu_count()} x {platform.machine()}"
    return f"{cores}, Python {platform.python_version()}, load average {busy:.1f} at the start"


def _document(
    measured: dict[ModelName, Rounds], machine: str, options: argparse.Namespace
) -> dict[str, Any]:
    return {
        "machine": machine,
        "seconds": options.seconds,
        "models": {
            name: [
                {
                    "contender": contender,
                    "connections": connections,
                    "rounds": [asdict(reading) for reading in readings],
                }
                for (contender, connections), readings in rounds.items()
            ]
            for name, rounds in measured.items()
        },
    }


def _say(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
