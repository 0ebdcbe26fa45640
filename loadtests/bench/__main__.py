"""Hikyaku beside a bare ASGI echo and beside its peers: the same model, the same rows, one worker.

    make bench      (BENCH="--quick", BENCH="--help")

docs/benchmarks.md says how it is measured and what to make of the figures.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from loadtests.bench import figures
from loadtests.bench.contenders import CONTENDERS
from loadtests.bench.environments import python_of
from loadtests.bench.failure import BenchFailure
from loadtests.bench.figures import GOALS, Rounds
from loadtests.bench.server import Reading, running, turns
from loadtests.bench.workload import WORKLOADS, Kind, ModelName
from loadtests.bench.wrk import find_wrk

_BASE = "echo"
_OURS = ("ours", "ours-asgi")
_WORK = Path(".hikyaku/bench")
_WARM_UP_S = 1
_TITLES = {contender.name: contender.title for contender in CONTENDERS.values()}


@dataclass(frozen=True)
class Measured:
    """One table."""

    kind: Kind
    model: ModelName
    rounds: Rounds
    checked: Mapping[str, int]
    """Right answers of ours in the rounds, by contender."""


def main() -> None:
    options = _options()
    machine = _machine()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the servers end with us
    try:
        find_wrk()
        measured = [measure(k, m, options) for k in options.kind for m in options.model]
    except BenchFailure as failure:
        sys.exit(f"bench: {failure}")
    except KeyboardInterrupt:
        sys.exit(130)
    print(f"{machine}; {options.rounds} rounds of {options.seconds} s")
    met = [report(one) for one in measured]
    _written(measured, machine, options)
    sys.exit(not all(met))


def report(measured: Measured) -> bool:
    """Print the table and what became of the goals. Returns whether none was missed."""
    print(f"\n{measured.kind} → prediction, {measured.model}\n")
    print(figures.table(measured.rounds, _TITLES), end="\n\n")
    for name, answers in measured.checked.items():
        print(f"{_TITLES[name]}: {answers:,} answers looked at between the loads, all right")
    if measured.model != "gbdt":
        return True
    goals = [goal for goal in GOALS if goal.kind == measured.kind]
    print("", *(goal.line(measured.rounds) for goal in goals), sep="\n")
    return all(goal.met(measured.rounds) for goal in goals)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=_positive, default=7)
    parser.add_argument(
        "--seconds", type=_positive, default=2, help="of load at a time (default 2)"
    )
    parser.add_argument("--connections", type=_positive, nargs="+", default=[1, 64])
    parser.add_argument(
        "--kind",
        nargs="+",
        choices=get_args(Kind),
        default=list(get_args(Kind)),
        help="what is sent: two entities, whose features are in Redis, or all features (default: "
        "both)",
    )
    parser.add_argument("--model", nargs="+", choices=get_args(ModelName), default=["gbdt"])
    parser.add_argument(
        "--contenders",
        nargs="*",
        choices=tuple(CONTENDERS),
        default=list(CONTENDERS),
        metavar="NAME",
        help=f"beside the echo (default: all of {', '.join(CONTENDERS)})",
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        default=_WORK / "benchmark.json",
        help="every reading is written there (default: %(default)s)",
    )
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        default=_WORK / "benchmark.png",
        help="the ratios are drawn there (default: %(default)s; --quick draws nothing)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="unless said otherwise: the echo and ours alone, 5 rounds of 1 s, half a minute a "
        "kind",
    )
    if parser.parse_args().quick:
        parser.set_defaults(contenders=["ours"], rounds=5, seconds=1, plot=None)
    return parser.parse_args()


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


def measure(kind: Kind, model: ModelName, options: argparse.Namespace) -> Measured:
    """Every contender started, its answers checked, and measured in turn, round by round."""
    _say(f"{kind}, {model}: building and publishing the model")
    wanted = [
        contender
        for contender in CONTENDERS.values()
        if contender.name in (_BASE, *options.contenders) and kind in contender.kinds
    ]
    rounds: dict[tuple[str, int], list[Reading]] = {
        (contender.name, connections): []
        for contender in wanted
        for connections in options.connections
    }
    checked = {contender.name: 0 for contender in wanted if contender.name in _OURS}
    with WORKLOADS[kind](model, _WORK) as workload, ExitStack() as stack:
        servers = []
        for contender in wanted:
            _say(f"{kind}, {model}: starting {contender.name} and checking its answers")
            python = python_of(contender.lock, _WORK)
            servers.append(stack.enter_context(running(contender, python, workload)))
        for server in servers:
            server.measure(max(options.connections), _WARM_UP_S)
        for number in range(options.rounds):
            _say(f"{kind}, {model}: round {number + 1} of {options.rounds}")
            for connections in options.connections:
                for server in turns(servers, number):
                    reading = server.measure(connections, options.seconds)
                    rounds[server.contender.name, connections].append(reading)
            for server in servers:
                if server.contender.name in checked:
                    checked[server.contender.name] += server.check()
    return Measured(kind, model, rounds, checked)


def _machine() -> str:
    """What the figures were taken on, and how busy others kept it."""
    busy = os.getloadavg()[0]
    cores = f"{os.cpu_count()} x {platform.machine()}"
    return f"{cores}, Python {platform.python_version()}, load average {busy:.1f} at the start"


def _written(measured: Sequence[Measured], machine: str, options: argparse.Namespace) -> None:
    """The JSON and the plot of it."""
    document = {
        "machine": machine,
        "rounds": options.rounds,
        "seconds": options.seconds,
        "tables": [
            {
                "kind": one.kind,
                "model": one.model,
                "checked": one.checked,
                "readings": figures.document(one.rounds, _TITLES),
            }
            for one in measured
        ],
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(document, indent=1))
    if options.plot:
        python = python_of("bench-plot", _WORK)
        script = Path(__file__).with_name("plot.py")
        subprocess.run([python, script, options.json, options.plot], check=True)
        print(f"\n{options.plot} shows it, {options.json} has every reading")


def _say(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
