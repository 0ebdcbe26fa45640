"""A `hikyaku serve` whose workers never let go of a session: what a check of memory must notice."""

import sys

import onnxruntime

from app.cli import main
from app.supervisor import supervise

_kept: list[onnxruntime.InferenceSession] = []


class _KeptSession(onnxruntime.InferenceSession):  # type: ignore[misc]  # it ships no types
    def __init__(self, *arguments: object, **options: object) -> None:
        super().__init__(*arguments, **options)
        _kept.append(self)


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        onnxruntime.InferenceSession = _KeptSession
        main()
    else:
        sys.exit(supervise([sys.executable, "-m", "loadtests.leaking_server", "worker"]))
