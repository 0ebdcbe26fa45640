"""Puts a process that leads a session of its own behind others that want a processor."""

import logging
import os
import sys
from contextlib import suppress
from pathlib import Path

log = logging.getLogger(__name__)


def put_behind(process: int, nice: int, *, idle: bool = False) -> None:
    """Behind us by so much `nice`; with `idle` it gets what all others leave, too (Linux).

    Also the threads that it has. Where the system refuses, that is logged.
    """
    nice += os.getpriority(os.PRIO_PROCESS, 0)
    for thread in _threads(process):
        try:
            with suppress(ProcessLookupError):  # it has just ended
                os.setpriority(os.PRIO_PROCESS, thread, nice)
                if idle and sys.platform == "linux":
                    os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))
        except OSError as exc:
            log.warning("not put behind", extra={"pid": thread, "reason": str(exc)})


def put_session_behind(process: int, nice: int) -> bool:
    """Without this, `put_behind` may be nothing: where Linux shares processors out by sessions
    first (autogroup), one of a single process gets as much as that of a whole server. In the
    server's session the process would use up what that is due while others want it, too.

    False: not now, ask again. Linux changes ten sessions a second for those without privileges.
    """
    try:
        Path(f"/proc/{process}/autogroup").write_text(str(nice))
    except BlockingIOError:
        return False
    except (FileNotFoundError, ProcessLookupError):
        pass  # no such sharing here, or the process has ended
    except OSError as exc:
        log.warning("its session is not put behind", extra={"pid": process, "reason": str(exc)})
    return True


def _threads(process: int) -> list[int]:
    if sys.platform != "linux":
        return [process]
    with suppress(FileNotFoundError):
        return [int(path.name) for path in Path(f"/proc/{process}/task").iterdir()]
    return []
