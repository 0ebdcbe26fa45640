"""Has the service release candidates by itself while the flights of October to December are asked.

    python -m loadtests.prove_flight_release

The champion, trained through August, answers; the candidate, trained through September, is released
by the plan of model.yaml, on labels that come when a flight has landed. Then the same with a
candidate that was trained on two weeks of January only. Exit status 1 unless the first one ends as
the champion and the other one is rolled back, each on the evidence that its decision log gives
again. `--plots`: where the time lines are drawn.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from app.config import Settings, load_settings
from app.contract import load_contract
from app.errors import HikyakuError
from app.evaluation.driver import Replayed, drive, progress
from app.evaluation.own_service import own_service
from app.evaluation.pushes import Pushes
from app.evaluation.request_log import as_microseconds, read_log
from app.evaluation.service_client import ServiceClient
from app.features.feast_repo import open_writer
from app.features.plan import plan_from_json
from app.local.redis_server import own_redis
from app.repository.layout import CONTRACT_FILE
from app.repository.manifest import PLAN_FILE
from app.rollout.decision_log import decided_anew, decisions
from loadtests.flight_versions import MODEL, broken_candidate, champion_and_candidate
from loadtests.release_timeline import Moment, draw

FROM, TO = "2013-10-01T00:00:00-04:00", "2014-01-01T00:00:00-05:00"
AFTERWARDS = timedelta(days=2)
_LOOK_EVERY_S = 1.0
_EXPECTED_PER_S = 100.0


@dataclass
class Outcome:
    """What came of a release."""

    moments: list[Moment]
    served: str
    """The version that serves in the end."""
    quarantined: Sequence[Mapping[str, Any]]
    answered: int
    """Flights that the candidate answered."""
    flights: int
    done: Sequence[str]
    """What was decided, in words."""
    rolls_back_at: float


def main() -> int:
    arguments = _arguments()
    settings = load_settings()
    champion, candidate = champion_and_candidate(settings)
    broken = broken_candidate(settings)
    faults = []
    for version, name, is_good in (
        (candidate, "trained through September", True),
        (broken, "trained on two weeks of January", False),
    ):
        print(f"• a candidate {name}: version {version} against {champion}", flush=True)
        outcome = _released(settings, arguments, champion, version)
        print("\n".join(f"  {line}" for line in outcome.done))
        print(f"  it answered {outcome.answered:,} of {outcome.flights:,} flights")
        plot = arguments.plots / f"release_{'good' if is_good else 'broken'}.svg"
        draw(plot, f"A candidate {name}", outcome.moments, outcome.rolls_back_at)
        print(f"• {plot}")
        if is_good and outcome.served != str(version):
            faults.append(f"version {outcome.served} serves, not the candidate")
        if not is_good and (outcome.served != str(champion) or not outcome.quarantined):
            faults.append(f"version {outcome.served} serves, {outcome.quarantined} in quarantine")
    print("\n".join(f"FAULT: {fault}" for fault in faults) or "both as they should be")
    return 1 if faults else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--from", type=datetime.fromisoformat, dest="start", default=datetime.fromisoformat(FROM)
    )
    parser.add_argument(
        "--to", type=datetime.fromisoformat, dest="end", default=datetime.fromisoformat(TO)
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--plots", type=Path, default=Path("docs"), metavar="FOLDER")
    return parser.parse_args()


def _released(
    settings: Settings, arguments: argparse.Namespace, champion: int, version: int
) -> Outcome:
    folder = Path(settings.model_repository, MODEL)
    contract = load_contract(folder / CONTRACT_FILE)
    plan = plan_from_json((folder / str(champion) / PLAN_FILE).read_bytes())
    log = read_log(folder, contract, plan, arguments.start, arguments.end)
    end_us = as_microseconds(arguments.end + AFTERWARDS)
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hikyaku-")))
        redis_url = stack.enter_context(own_redis(work))
        set_here = {
            "HIKYAKU_WORKERS": str(arguments.workers),
            "HIKYAKU_WORK_DIR": str(work / "service"),
        }
        address = stack.enter_context(own_service(redis_url, redis_url, arguments.start, set_here))
        writer = open_writer(settings.feature_repo, redis_url)
        client = stack.enter_context(
            ServiceClient(address, MODEL, token=None, timeout_ms=contract.limits.max_timeout_ms)
        )
        asked = {"version": str(version), "expected_per_s": _EXPECTED_PER_S}
        begun = client.ask("POST", f"/v1/models/{MODEL}:release", asked)
        print("\n".join(f"  {_need(need)}" for need in begun["needs"]), flush=True)
        watch = _Watch(client)
        replayed = drive(
            log,
            Pushes(writer, plan.feature_service, end_us),
            client,
            start_us=as_microseconds(arguments.start),
            until_us=end_us,
            with_labels=True,
            watch=watch,
        )
        status = client.ask("GET", f"/v1/models/{MODEL}/release")
        served = client.ask("GET", f"/v1/models/{MODEL}")["release"]["champion"]["version"]
        found = list(decisions(work / "service" / "decisions" / f"{MODEL}.jsonl"))
    for decision in found:
        if decided_anew(decision) != decision.verdict:
            raise HikyakuError(f"decided anew it is another verdict: {decision}")
    return Outcome(
        watch.moments,
        str(served),
        status["quarantined"],
        sum(answer.version == str(version) for answer in replayed.answers),
        len(log),
        [f"{d.did}: {'; '.join(d.verdict.reasons[:2])}" for d in found if d.did],
        max(reading.rolls_back_at for d in found for reading in d.verdict.readings),
    )


def _need(need: Mapping[str, Any]) -> str:
    return (
        f"the stage of {need['share']:.0%} needs some {need['requests']:,.0f} flights "
        f"(for {need['because_of']}), in blocks of {need['keys']}"
    )


class _Watch:
    """Looks at the release once a second."""

    def __init__(self, client: ServiceClient) -> None:
        self.moments: list[Moment] = []
        self._client = client
        self._say = progress()
        self._next_s = 0.0

    def __call__(self, at_us: int, replayed: Replayed) -> None:
        self._say(at_us, replayed)
        if time.monotonic() < self._next_s:
            return
        self._next_s = time.monotonic() + _LOOK_EVERY_S
        status = self._client.ask("GET", f"/v1/models/{MODEL}/release")
        champion = self._client.ask("GET", f"/v1/models/{MODEL}")["release"]["champion"]["version"]
        rollout, verdict = status["rollout"], status["verdict"]
        worse, no_worse = {}, {}
        if rollout is not None:
            now = len(rollout["stages"]) - 1
            for reading in verdict["readings"]:
                is_whole = reading["segment"] == "" and reading["stage"] in {None, now}
                if is_whole and reading["decides"]:
                    where = "" if reading["stage"] is None else "exposures: "
                    worse[where + reading["guardrail"]] = reading["worse"]
                    no_worse[where + reading["guardrail"]] = reading["no_worse"]
        share = None if rollout is None else rollout["stages"][-1]["stage"]["share"]
        self.moments.append(Moment(at_us / 1e6, share, champion, worse, no_worse))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except HikyakuError as exc:
        sys.exit(str(exc))
