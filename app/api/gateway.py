"""The ASGI application: takes the hot operations itself and passes the rest to FastAPI."""

import asyncio
import time
from collections.abc import Mapping, MutableMapping
from contextlib import AbstractAsyncContextManager
from typing import Any

from fastapi import FastAPI
from starlette.types import Receive, Scope, Send

from app.api.answers import Reply
from app.api.body import BodyReader
from app.api.hot_paths import HotPaths, echoed_id, headers_of, leaves_little
from app.api.predictions import predicted_model
from app.errors import RequestError


class Gateway:
    """Every HTTP request is admitted here first, whoever answers it.

    Bodies are bounded in size and time (`BodyReader`) for FastAPI's operations as well: it reads
    without a limit. They find their `Caller` in `request.state.caller`.
    """

    def __init__(self, hot_paths: HotPaths, rest: FastAPI, bodies: BodyReader) -> None:
        self.hot_paths = hot_paths
        self._rest = rest
        self._bodies = bodies

    def lifespan(self) -> AbstractAsyncContextManager[Any]:
        """What an ASGI server's lifespan protocol would open: the models, ready to answer."""
        return self._rest.router.lifespan_context(self._rest)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._rest(scope, receive, send)
            return
        received_s = time.monotonic()
        headers = headers_of(scope["headers"])
        method, path = scope["method"], scope["path"]
        peer = scope["client"][0] if scope.get("client") else ""
        name = predicted_model(path)
        caller = self.hot_paths.admitted(method, path, headers, peer)
        refused = caller if isinstance(caller, Reply) else None
        if refused is None and name is not None:
            refused = self.hot_paths.not_understood(method, path, headers)
        if refused is not None:
            await _send(refused, headers, send, closing=not leaves_little(headers))
        elif name is not None:
            await self._predict(name, path, headers, received_s, peer, receive, send)
        else:
            body = await self._bodies.read(receive)
            if isinstance(body, RequestError):
                refused = self.hot_paths.body_refusal(body, path)
                await _send(refused, headers, send, closing=True)
            elif body is not None:
                scope.setdefault("state", {})["caller"] = caller
                await self._rest(scope, _Replayed(body, receive), send)

    async def _predict(
        self,
        name: str,
        path: str,
        headers: Mapping[bytes, bytes],
        received_s: float,
        peer: str,
        receive: Receive,
        send: Send,
    ) -> None:
        reply: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()

        def answered(answer: Reply) -> None:
            if not reply.done():  # our task was cancelled a moment ago
                reply.set_result(answer)

        call = self.hot_paths.predict.open(name, headers, received_s, peer, answered)
        if call is None:
            await _send(reply.result(), headers, send, closing=not leaves_little(headers))
            return
        try:
            body = await self._bodies.read(receive)
            if isinstance(body, RequestError):
                refused = self.hot_paths.body_refusal(body, path)
                await _send(refused, headers, send, closing=True)
            elif body is not None:
                call.begin(body)
                await _send(await reply, headers, send)
        except asyncio.CancelledError:
            call.leave()
            raise


class _Replayed:
    """Receives the body that was read already, then what the client does."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive

    async def __call__(self) -> MutableMapping[str, Any]:
        if self._body is None:
            return await self._receive()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}


async def _send(
    reply: Reply, request_headers: Mapping[bytes, bytes], send: Send, *, closing: bool = False
) -> None:
    status, body, more, content_type = reply
    headers = [(b"content-type", content_type), (b"content-length", b"%d" % len(body))]
    if more:
        headers += more.items()
    if closing:
        headers.append((b"connection", b"close"))
    client_id = echoed_id(request_headers)
    if client_id is not None:
        headers.append((b"x-request-id", client_id))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
