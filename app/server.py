"""Runs the ASGI application with uvicorn on a socket of ours."""

import asyncio
import contextlib
import gc
import socket

import uvicorn
import uvloop

from app.config import Settings
from app.errors import ConfigurationError
from app.main import create_application

_BACKLOG = 2048


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, then answer what is under way.

    Raises `ConfigurationError` when the address cannot be bound, `HikyakuError` when a model cannot
    be served.
    """
    listener = bind(settings.host, settings.port)
    listener.listen(_BACKLOG)  # ours from now on: whoever asks waits until the models are loaded
    # uvicorn raises the signal that stopped it again, once everything is answered.
    with (
        contextlib.suppress(KeyboardInterrupt),
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        runner.run(_serve(settings, listener))


async def _serve(settings: Settings, listener: socket.socket) -> None:
    application = create_application(settings)
    config = uvicorn.Config(
        application,
        http="httptools",
        ws="none",
        # Entered here, so that what stops the start is our own error and not uvicorn's traceback.
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        # Load balancers keep idle connections for 60 s; closing first loses their next request.
        timeout_keep_alive=75,
        timeout_graceful_shutdown=max(1, round(settings.drain_s)),
    )
    async with application.lifespan():
        # What start-up made stays for good: the collector need not walk it again.
        gc.collect()
        gc.freeze()
        try:
            await uvicorn.Server(config).serve(sockets=[listener])
        finally:
            gc.unfreeze()  # or extension modules report what was frozen as leaked


def bind(host: str, port: int) -> socket.socket:
    """A bound socket. Raises `ConfigurationError` when the address is taken or not ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as exc:
        listener.close()
        raise ConfigurationError(
            f"cannot listen on {host}:{port}: {exc.strerror}; HIKYAKU_PORT names another port"
        ) from exc
    return listener
