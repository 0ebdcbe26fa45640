"""A `hikyaku serve` of a later release of the software: its documents have another form."""

import sys

from app.cli import main
from app.release import documents
from app.supervisor import supervise

_LATER_FORM = 1_000

if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        documents._FORM = _LATER_FORM  # nothing else tells it apart
        main()
    else:
        sys.exit(supervise([sys.executable, "-m", "loadtests.newer_server", "worker"]))
