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
from app.api.body import BodyReader
from app.api.predictions import PredictOperation, new_request_id, predicted_model
from app.errors import NotFound, RequestError
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
        self._bodies = BodyReader(doorkeeper.max_body_bytes, _MAX_BODY_S)

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
            await self._answer(model, scope, headers, received_s, peer, receive, send)

    async def _answer(
        self,
        model: str,
        scope: Scope,
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

        call = self._predict.open(model, headers, received_s, peer, answered)
        if call is None:
            await _send(await reply, headers, send, (b"connection", b"close"))
            return
        try:
            body = await self._bodies.read(receive)
            if body is None:
                return
            if isinstance(body, RequestError):
                call.refuse(body)
                await _send(await reply, headers, send, (b"connection", b"close"))
                return
            call.begin(body)
            await _send(await reply, headers, send)
        except asyncio.CancelledError:
            call.leave()
            raise

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
    status, body, more, content_type = reply
    headers = [(b"content-type", content_type), (b"content-length", b"%d" % len(body))]
    if more or extra:
        headers += [*more.items(), *extra]
    client_id = request_headers.get(b"x-request-id")
    if client_id is not None and _CLIENT_ID.fullmatch(client_id):
        headers.append((b"x-request-id", client_id))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
