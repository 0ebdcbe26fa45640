"""Speaks to a running service, as an application and as its operator do."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self

import httpx

from app.errors import HikyakuError

_CONNECTIONS = 8
_ANSWER_S = 60
_GIVE_UP_S = 60.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 2.0
_SHOWN_CHARACTERS = 500


class Answer(NamedTuple):
    """To a request of one instance."""

    request_id: str
    version: str
    prediction: Mapping[str, Any]
    degraded: bool


class Label(NamedTuple):
    """The truth of the one instance of a request; None: there never will be one."""

    request_id: str
    label: Any


class ServiceClient:
    """Asks for one model of the service at `address`. An async context manager.

    What is refused but may succeed later, and what gets no answer, is asked again for a minute, as
    `retried` counts: of a request that was lost on the way the service may see two. Methods raise
    `HikyakuError` with what the service said after that, and at once where a retry cannot help.
    """

    def __init__(self, address: str, model: str, *, token: str | None, timeout_ms: int) -> None:
        """`token` is an operator's; a prediction may take `timeout_ms`."""
        self.address = address
        self.retried = 0
        self._model = f"/v1/models/{model}"
        self._timeout = {"Request-Timeout-Ms": str(timeout_ms)}
        self._http = httpx.AsyncClient(
            base_url=address,
            timeout=_ANSWER_S,
            trust_env=False,
            headers={} if token is None else {"Authorization": f"Bearer {token}"},
            limits=httpx.Limits(max_connections=_CONNECTIONS),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._http.aclose()

    async def predict(self, instance: Mapping[str, Any]) -> Answer:
        body = {"instances": [instance]}
        said = await self._ask("POST", f"{self._model}:predict", body, self._timeout)
        return Answer(
            said["request_id"], said["model_version"], said["predictions"][0], said["degraded"]
        )

    async def advance_clock(self, to: str) -> None:
        """To an instant in RFC 3339."""
        await self._ask("PUT", "/v1/replay-clock", {"now": to})

    async def tell(self, labels: Sequence[Label]) -> Sequence[str]:
        """What became of each label: `accepted`, `duplicate` and so on."""
        body = {
            "labels": [
                {"request_id": request_id, "instance": 0, "label": label}
                for request_id, label in labels
            ]
        }
        said = await self._ask("POST", f"{self._model}:feedback", body)
        return [result["status"] for result in said["results"]]

    async def _ask(
        self, method: str, path: str, body: Any, headers: Mapping[str, str] | None = None
    ) -> Any:
        until_s = time.monotonic() + _GIVE_UP_S
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                response = await self._http.request(method, path, json=body, headers=headers)
                if response.status_code == 200:
                    return response.json()
                may_succeed = _may_succeed_later(response)
                fault = f"{response.status_code}: {response.text[:_SHOWN_CHARACTERS]}"
            except httpx.TransportError as exc:  # a worker that is being replaced, say
                may_succeed, fault = True, f"no answer: {exc or type(exc).__name__}"
            if not may_succeed or time.monotonic() > until_s:
                raise HikyakuError(f"{self.address}{path}: {fault}")
            self.retried += 1
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def _may_succeed_later(response: httpx.Response) -> bool:
    """As the refusal says itself; what is not the service's own is taken by its status."""
    try:
        return bool(response.json()["error"]["retryable"])
    except (ValueError, KeyError, TypeError):
        return response.status_code in {429, 502, 503, 504}
