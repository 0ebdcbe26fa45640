"""Puts a process behind the others where both want a processor."""

import logging
import os
import sys

log = logging.getLogger(__name__)


def put_behind(process: int, nice: int, *, idle: bool = False) -> None:
    """Both are about the other processes of its session, which it must not have left: Linux may
    share out processors between sessions first (autogroup), and gives a session of one process as
    much as that of a whole server, whatever its `nice`. `idle`: it gets what they leave.

    Call it before the process has a second thread. Where the system refuses, that is logged.
    """
    try:
        os.setpriority(os.PRIO_PROCESS, process, os.getpriority(os.PRIO_PROCESS, process) + nice)
        if idle and sys.platform == "linux":
            os.sched_setscheduler(process, os.SCHED_IDLE, os.sched_param(0))
    except OSError as exc:
        log.warning("a process could not be put behind", extra={"pid": process, "reason": str(exc)})
