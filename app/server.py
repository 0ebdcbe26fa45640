"""One worker: runs the ASGI application with uvicorn on the service's socket."""

import asyncio
import contextlib
import gc
import socket
import sys
import time
from functools import partial

import uvicorn
import uvloop

from app.api.http_door import HttpDoor, HttpLimits
from app.api.http_protocol import protocol_of
from app.config import Settings
from app.listener import bind, one_each
from app.main import create_application
from app.runtime import Others
from app.telemetry.metrics import Metrics
from app.telemetry.pace import Pace
from app.worker import BACKLOG, Parent

# At Python's 700 the collector walks the requests under way once in every few dozen: 5 % of the CPU
# time at 64 connections.
GARBAGE_AT_ONCE = 5000
# The event loop waits so long for the interpreter while a thread computes in Python: one that reads
# a version that is to be loaded, say. Python's 5 ms are a request's whole time.
_SWITCH_S = 0.0005
# With 20 models it takes 0.3 ms, with 100 of them 2.5.
_RECORDING_SHARE = 0.003


def serve(settings: Settings, parent: Parent) -> None:
    """Serve until SIGTERM or SIGINT, then answer what is under way.

    Raises `ConfigurationError` when the address cannot be bound, `HikyakuError` when a model cannot
    be served.
    """
    listeners = _listeners(settings, parent)
    parent.tell(settings, listeners)
    sys.setswitchinterval(_SWITCH_S)
    # uvicorn raises the signal that stopped it again, once everything is answered.
    with (
        contextlib.suppress(KeyboardInterrupt),
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        runner.run(_serve(settings, listeners[0], parent))


def _listeners(settings: Settings, parent: Parent) -> list[socket.socket]:
    """Ours, and where we are the first those of the others."""
    if parent.listener is not None:
        return [parent.listener]
    return one_each(bind(settings.host, settings.port), settings.workers)


async def _serve(settings: Settings, listener: socket.socket, parent: Parent) -> None:
    metrics = Metrics(parent.tallies(settings.workers))
    for reason, workers in parent.replaced.items():
        metrics.worker_replacements.labels(reason).reach(workers)
    others = Others(
        parent.place, partial(parent.missing, settings.workers), parent.board.replay_instant
    )
    application = create_application(settings, metrics=metrics, others=others)

    limits = HttpLimits(drain_s=min(1, settings.drain_s / 2))

    # Alone nobody else reads what we record, and a scrape records first.
    pace = Pace(1.0 if settings.workers == 1 else 0.0, 1.0, _RECORDING_SHARE)

    def beaten(lag_s: float) -> None:
        metrics.loop_lag.observe(lag_s)
        if pace.is_due(time.monotonic()):
            began_s = time.thread_time()  # not what others took from us meanwhile
            metrics.record()
            pace.done(time.monotonic(), time.thread_time() - began_s)

    config = uvicorn.Config(
        application,
        http=protocol_of(HttpDoor(application.hot_paths, metrics, limits)),
        ws="none",
        # Entered here, so that what stops the start is our own error and not uvicorn's traceback.
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_graceful_shutdown=max(1, round(settings.drain_s)),
    )
    async with application.lifespan():
        # What start-up made stays for good: the collector need not walk it again.
        gc.collect()
        gc.freeze()
        gc.set_threshold(GARBAGE_AT_ONCE)
        try:
            async with parent.beating(beaten):
                # Only now a listener that our parent gave us listens, if it does not yet.
                await uvicorn.Server(config).serve(sockets=[listener])
        finally:
            gc.unfreeze()  # or extension modules report what was frozen as leaked
