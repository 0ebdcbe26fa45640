"""Hikyaku's ASGI application on uvicorn's own HTTP protocol: what any ASGI server serves of it.

    python -m loadtests.bench.peers.asgi_door PORT

Set as `hikyaku serve` sets it, but for the protocol. No process watches over this one.
"""

import asyncio
import gc
import sys

import uvicorn
import uvloop

from app.config import load_settings
from app.main import create_application
from app.server import GARBAGE_AT_ONCE
from app.telemetry.logs import configure_logging


async def serve(port: int) -> None:
    settings = load_settings()
    configure_logging(settings.log_level)
    application = create_application(settings)
    config = uvicorn.Config(
        application,
        port=port,
        http="httptools",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
    )
    async with application.lifespan():
        gc.collect()
        gc.freeze()
        gc.set_threshold(GARBAGE_AT_ONCE)
        await uvicorn.Server(config).serve()


with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
    runner.run(serve(int(sys.argv[1])))
