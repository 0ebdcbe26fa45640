"""The ASGI application: takes the hot operations itself and passes the rest to FastAPI."""

import asyncio
import re
import time
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any

from fastapi import FastAPI
from starlette.types import Receive, Scope, Send

from app.api.admit import Doorkeeper
from app.api.answers import Reply, refusal
from app.api.predictions import PredictOperation, new_request_id, predicted_model
from app.errors import DeadlineExceeded, NotFound, RequestError
from app.telemetry.metrics import Metrics

# A client that drips its body must not keep a connection and a task for ever.
_MAX_BODY_S = 30
_CLIENT_ID = re.compile(rb"[\x21-\x7e]{1,128}")


class Gateway:
    """Every HTTP request is admitted here first, whoever answers it."""

    def __init__(
        self, doorkeeper: Doorkeeper, predict: PredictOperation, rest: FastAPI, metrics: Metrics
    ) -> None:
        self._doorkeeper = doorkeeper
        self._predict = predict
        self._rest = rest
        self._metrics = metrics

    def lifespan(self) -> AbstractAsyncContextManager[Any]:
        """What an ASGI server's lifespan protocol would open: the models, ready to answer."""
        return self._rest.router.lifespan_context(self._rest)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._rest(scope, receive, send)
            return
        received_s = time.monotonic()
        headers = dict(scope["headers"])
        peer = scope["client"][0] if scope.get("client") else ""
        caller = self._doorkeeper.admit(scope["method"], scope["path"], headers, peer)
        model = predicted_model(scope["path"])
        if isinstance(caller, RequestError):
            await self._refuse(caller, scope, headers, send)
        elif model is None:
            await self._rest(scope, receive, send)
        elif scope["method"] != "POST":
            refused = refusal(NotFound("predict takes POST"), new_request_id(), scope["path"])
            await _send(Reply(405, refused.body, {b"allow": b"POST"}), headers, send)
        else:
            body = await self._read_in_time(receive)
            if body is None:
                return
            if isinstance(body, RequestError):
                await self._refuse(body, scope, headers, send)
                return
            reply = await self._predict(model, headers, body, received_s)
            await _send(reply, headers, send)

    async def _read_in_time(self, receive: Receive) -> bytes | RequestError | None:
        try:
            async with asyncio.timeout(_MAX_BODY_S):
                return await self._read(receive)
        except TimeoutError:
            return DeadlineExceeded(f"body: not complete within {_MAX_BODY_S} s")

    async def _read(self, receive: Receive) -> bytes | RequestError | None:
        """The whole body; a refusal as soon as it is over the limit, however it is framed; None
        when the client left before it was complete."""
        chunks: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            if size > self._doorkeeper.max_body_bytes:
                return self._doorkeeper.too_large()
            if not message.get("more_body", False):
                return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    async def _refuse(
        self, error: RequestError, scope: Scope, headers: Mapping[bytes, bytes], send: Send
    ) -> None:
        if (name := predicted_model(scope["path"])) is not None:
            self._metrics.requests.labels(self._predict.label(name), error.code).inc()
        reply = refusal(error, new_request_id(), scope["path"])
        # The body was not read, so the connection cannot carry another request.
        await _send(reply, headers, send, (b"connection", b"close"))


async def _send(
    reply: Reply, request_headers: Mapping[bytes, bytes], send: Send, *extra: tuple[bytes, bytes]
) -> None:
    headers: list[tuple[bytes, bytes]] = [
        (b"content-type", reply.content_type),
        (b"content-length", str(len(reply.body)).encode()),
        *reply.headers.items(),
        *extra,
    ]
    client_id = request_headers.get(b"x-request-id")
    if client_id is not None and _CLIENT_ID.fullmatch(client_id):
        headers.append((b"x-request-id", client_id))
    start: dict[str, Any] = {"type": "http.response.start", "status": reply.status}
    await send(start | {"headers": headers})
    await send({"type": "http.response.body", "body": reply.body})
