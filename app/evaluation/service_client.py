"""Speaks to a running service, as an application and as its operator do."""

import http.client
import json
import select
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, NamedTuple, Self
from urllib.parse import urlsplit

from app.errors import ConfigurationError, HikyakuError

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
    """Asks for one model of the service at `address`. A context manager, for one thread.

    What is refused but may succeed later, and what gets no answer, is asked again for a minute, as
    `retried` counts: of a request that was lost on the way the service may see two. Methods raise
    `HikyakuError` with what the service said after that, and at once where a retry cannot help.
    """

    def __init__(self, address: str, model: str, *, token: str | None, timeout_ms: int) -> None:
        """`token` is an operator's; a prediction may take `timeout_ms`."""
        self.retried = 0
        self._connections = _Connections(address)
        self._pool = ThreadPoolExecutor(_CONNECTIONS)
        self._model = f"/v1/models/{model}"
        self._headers = {"Content-Type": "application/json"}
        if token is not None:
            self._headers["Authorization"] = f"Bearer {token}"
        self._timeout = {"Request-Timeout-Ms": str(timeout_ms)}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown()
        self._connections.close()

    def predict(self, instances: Iterable[Mapping[str, Any]]) -> list[Answer]:
        """The answers to a request for each instance, in order; several are under way at once."""
        return list(self._pool.map(self._predict, instances))

    def shadow(self, version: str) -> None:
        """Show this version from now on all that the champion answers, in every worker."""
        outcome = self.ask("POST", f"{self._model}:shadow", {"version": version, "share": 1.0})
        if not outcome["converged"]:
            raise HikyakuError(f"version {version} is not shown requests by all workers: {outcome}")

    def comparison(self) -> Any:
        """The document of what candidates would have said."""
        return self.ask("GET", f"{self._model}/comparison")

    def advance_clock(self, to: str) -> None:
        """To an instant in RFC 3339."""
        self.ask("PUT", "/v1/replay-clock", {"now": to})

    def tell(self, labels: Sequence[Label]) -> Sequence[str]:
        """What became of each label: `accepted`, `duplicate` and so on."""
        body = {
            "labels": [
                {"request_id": request_id, "instance": 0, "label": label}
                for request_id, label in labels
            ]
        }
        said = self.ask("POST", f"{self._model}:feedback", body)
        return [result["status"] for result in said["results"]]

    def ask(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> Any:
        """The JSON of an answer with 200."""
        content = json.dumps(body).encode()
        until_s = time.monotonic() + _GIVE_UP_S
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                status, text = self._connections.exchange(
                    method, path, content, {**self._headers, **(headers or {})}
                )
                if status == 200:
                    return json.loads(text)
                may_succeed = _may_succeed_later(status, text)
                fault = f"{status}: {text[:_SHOWN_CHARACTERS].decode(errors='replace')}"
            except (OSError, http.client.HTTPException) as exc:  # a worker is being replaced, say
                may_succeed, fault = True, f"no answer: {exc or type(exc).__name__}"
            if not may_succeed or time.monotonic() > until_s:
                raise HikyakuError(f"{self._connections.address}{path}: {fault}")
            self.retried += 1
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _predict(self, instance: Mapping[str, Any]) -> Answer:
        body = {"instances": [instance]}
        said = self.ask("POST", f"{self._model}:predict", body, self._timeout)
        return Answer(
            said["request_id"], said["model_version"], said["predictions"][0], said["degraded"]
        )


class _Connections:
    """One a thread, kept open. httpx takes ten times the processor time of an exchange."""

    def __init__(self, address: str) -> None:
        parts = urlsplit(address)
        if parts.scheme not in {"http", "https"} or parts.hostname is None:
            raise ConfigurationError(f"{address}: not an address as http://127.0.0.1:8000")
        self.address = address.rstrip("/")
        self._prefix = parts.path.rstrip("/")
        kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
        self._kind = kinds[parts.scheme]
        self._at = parts.hostname, parts.port
        self._own = threading.local()
        self._opened: list[http.client.HTTPConnection] = []

    def exchange(
        self, method: str, path: str, content: bytes, headers: Mapping[str, str]
    ) -> tuple[int, bytes]:
        """Status and body. Raises `OSError` or `HTTPException` where no whole answer comes."""
        connection = self._of_this_thread()
        try:
            connection.request(method, self._prefix + path, content, headers)
            response = connection.getresponse()
            return response.status, response.read()
        except BaseException:
            connection.close()  # the next exchange opens it again
            raise

    def close(self) -> None:
        for connection in self._opened:
            connection.close()

    def _of_this_thread(self) -> http.client.HTTPConnection:
        connection: http.client.HTTPConnection | None = getattr(self._own, "connection", None)
        if connection is None:
            connection = self._own.connection = self._kind(*self._at, timeout=_ANSWER_S)
            self._opened.append(connection)
        # Where nothing was asked only the end can be read: the server has closed it.
        if connection.sock is not None and select.select([connection.sock], [], [], 0)[0]:
            connection.close()
        return connection


def _may_succeed_later(status: int, text: bytes) -> bool:
    """As the refusal says itself; what is not the service's own is taken by its status."""
    try:
        return bool(json.loads(text)["error"]["retryable"])
    except (ValueError, KeyError, TypeError):
        return status in {429, 502, 503, 504}
