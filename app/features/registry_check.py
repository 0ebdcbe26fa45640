"""Compares plans with Feast's registry: a program, because serving does not import Feast.

    python -m app.features.registry_check < request > answer

Request: `{"repository": folder, "plans": {model: plan.json as a text}}`. Answer: `{model: null, or
what differs}`. Where it cannot compare, the last line on standard error says why.
"""

import json
import os
import signal
import sys
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from app.errors import ConfigurationError, InvalidModel
from app.features.plan import FeaturePlan, differences, plan_from_json
from app.priority import put_behind, put_session_behind

if TYPE_CHECKING:
    from feast import FeatureStore

# Of a busy core it gets a tenth: enough to end, too little to be felt.
_NICENESS = 10
# Whoever asked waits no longer, or was killed and did not tell us.
_LONGEST_S = 180


def main() -> None:
    put_behind(os.getpid(), _NICENESS)
    put_session_behind(os.getpid(), _NICENESS)
    _be_the_first_to_go()
    signal.alarm(_LONGEST_S)
    request = json.load(sys.stdin)
    with redirect_stdout(sys.stderr):  # Feast talks
        try:
            answer = _compared(Path(request["repository"]), request["plans"])
        except ConfigurationError as exc:
            sys.exit(str(exc))
    json.dump(answer, sys.stdout)


def _be_the_first_to_go() -> None:
    """Where memory runs out, Linux ends this process and not the one that serves."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def _compared(repo: Path, plans: dict[str, str]) -> dict[str, str | None]:
    from app.features.feast_repo import open_store

    store = open_store(repo, None, online_only=True)
    return {
        model: _difference(store, plan_from_json(document.encode()))
        for model, document in plans.items()
    }


def _difference(store: "FeatureStore", published: FeaturePlan) -> str | None:
    from app.features.feast_plan import compile_plan

    try:
        registry = compile_plan(store, published.feature_service)
    except InvalidModel as exc:
        return str(exc)
    return "; ".join(differences(published, registry)) or None


if __name__ == "__main__":
    main()
