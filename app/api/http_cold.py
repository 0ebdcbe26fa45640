"""Hands a request that is not hot to the ASGI application, by uvicorn's own means."""

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Protocol, cast

from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle
from uvicorn.server import ServerState

from app.api.http_head import Head, query, raw_path

_ERRORS = logging.getLogger("uvicorn.error")
_ACCESS = logging.getLogger("uvicorn.access")


class Line(Protocol):
    """What a request needs of its connection."""

    def write(self, data: bytes) -> None: ...
    def is_closing(self) -> bool: ...
    def close(self) -> None:
        """The answer is written and there will be no other one."""

    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...


class ColdRequest:
    """A request at the ASGI application. `answered` is called once its answer is written."""

    def __init__(
        self,
        head: Head,
        line: Line,
        addresses: tuple[Any, Any, str],
        config: Config,
        state: ServerState,
        app_state: dict[str, Any],
        answered: Callable[[], None],
    ) -> None:
        """`addresses`: the server's, the client's, and the scheme."""
        # Both take of a transport what a line has.
        transport = cast(asyncio.Transport, line)
        self.flow = FlowControl(transport)
        server, client, scheme = addresses
        self._cycle = RequestResponseCycle(
            scope={
                "type": "http",
                "asgi": {"version": config.asgi_version, "spec_version": "2.3"},
                "http_version": head.version,
                "method": head.method,
                "server": server,
                "client": client,
                "scheme": scheme,
                "root_path": config.root_path,
                "path": config.root_path + head.path,
                "raw_path": config.root_path.encode() + raw_path(head.url),
                "query_string": query(head.url),
                "headers": head.fields,
                "state": app_state.copy(),
            },
            transport=transport,
            flow=self.flow,
            logger=_ERRORS,
            access_logger=_ACCESS,
            access_log=config.access_log,
            default_headers=state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=head.expects,
            keep_alive=head.version != "1.0" and head.keep_alive,
            on_response=answered,
        )
        task = asyncio.get_running_loop().create_task(self._cycle.run_asgi(config.loaded_app))
        task.add_done_callback(state.tasks.discard)
        state.tasks.add(task)

    @property
    def answering(self) -> bool:
        """Whether the head of the answer is written."""
        return self._cycle.response_started

    @property
    def has_room(self) -> bool:
        """Whether the application took what it got of the body."""
        return len(self._cycle.body) <= HIGH_WATER_LIMIT

    def receive(self, body: bytes, complete: bool) -> None:
        """More of its body."""
        self._cycle.body += body
        self._cycle.more_body = not complete
        if not self.has_room:
            self.flow.pause_reading()  # or the line is not told when the body is taken
        self._cycle.message_event.set()

    def close_after(self) -> None:
        """The answer will say that the connection ends with it."""
        self._cycle.keep_alive = False

    def leave(self) -> None:
        """The client is gone, and what the application still writes goes nowhere."""
        self._cycle.disconnected = True
        self._cycle.message_event.set()
        self.flow.resume_writing()
