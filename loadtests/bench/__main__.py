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
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import get_args

from loadtests.bench import figures
from loadtests.bench.contenders import CONTENDERS
from loadtests.bench.contest import Measured, Terms, measure
from loadtests.bench.environments import python_of
from loadtests.bench.failure import BenchFailure
from loadtests.bench.figures import GOALS
from loadtests.bench.paced import paced_table
from loadtests.bench.workload import Kind, ModelName
from loadtests.bench.wrk import find_wrk

_WORK = Path(".hikyaku/bench")
_TITLES = {contender.name: contender.title for contender in CONTENDERS.values()}


def main() -> None:
    options = _options()
    machine = _machine()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the servers end with us
    try:
        find_wrk()
        terms = Terms(
            options.contenders, options.connections, options.rounds, options.seconds, options.per_s
        )
        measured = [measure(k, m, terms, _WORK) for k in options.kind for m in options.model]
    except BenchFailure as failure:
        sys.exit(f"bench: {failure}")
    except KeyboardInterrupt:
        sys.exit(130)
    print(f"{machine}; {options.rounds} rounds of {options.seconds} s")
    met = [report(one, options) for one in measured]
    _written(measured, machine, options)
    sys.exit(not all(met))


def report(measured: Measured, options: argparse.Namespace) -> bool:
    """Print the table and what became of the goals. Returns whether none was missed."""
    print(f"\n{measured.kind} → prediction, {measured.model}\n")
    print(figures.table(measured.rounds, _TITLES), end="\n\n")
    if measured.paced:
        print(f"At {options.per_s} requests a second that wait for no answer:\n")
        print(paced_table(measured.paced, _TITLES), end="\n\n")
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
        "--per-s",
        type=float,
        default=200,
        metavar="RATE",
        help="requests a second of the loads that wait for no answer (default 200; 0, as with "
        "--quick: none)",
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
        parser.set_defaults(contenders=["ours"], rounds=5, seconds=1, per_s=0, plot=None)
    return parser.parse_args()


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


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
                "paced": {name: [asdict(p) for p in seen] for name, seen in one.paced.items()},
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


if __name__ == "__main__":
    main()
