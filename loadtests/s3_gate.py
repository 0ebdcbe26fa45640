"""An S3 of moto's behind a gate that can fail as a real one does."""

import http.client
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import cast

from moto.server import ThreadedMotoServer


class Gate(ThreadingHTTPServer):
    """Passes requests on to the store, except that `fault` may answer a path with a status.
    `cut`: every listing says that there is more of it. `before` and `after` are asked about each
    request that changes the store, once it has come and once it has taken effect; where one says
    False the request has no effect, or no answer."""

    daemon_threads = True

    def __init__(self, store: tuple[str, int]) -> None:
        super().__init__(("127.0.0.1", 0), _Passing)
        self.store = store
        self.repair()

    def repair(self) -> None:
        self.fault: Callable[[str], int | None] = lambda path: None
        self.cut = False
        self.before: Callable[[], bool] = _go_on
        self.after: Callable[[], bool] = _go_on

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that was killed is none."""
        if not isinstance(sys.exception(), ConnectionError):
            raise

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def s3_behind_a_gate() -> Iterator[Gate]:
    """An empty store; what it holds is gone afterwards."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it would print every request
    store = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    store.start()
    gate = Gate(store.get_host_and_port())
    thread = threading.Thread(target=gate.serve_forever)
    thread.start()
    try:
        yield gate
    finally:
        gate.shutdown()
        thread.join()
        gate.server_close()
        store.stop()


class _Passing(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _pass(self) -> None:
        gate = cast(Gate, self.server)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status = gate.fault(self.path)
        if status is not None:
            self._answer(status, [], b"")
            return
        changes = self.command in {"PUT", "POST", "DELETE"}
        if changes and not gate.before():
            self.close_connection = True
            return
        connection = http.client.HTTPConnection(*gate.store)
        connection.request(self.command, self.path, body, dict(self.headers))
        answer = connection.getresponse()
        content = answer.read()
        if changes and not gate.after():
            self.close_connection = True
            return
        if gate.cut:
            content = content.replace(
                b"<IsTruncated>false</IsTruncated>",
                b"<IsTruncated>true</IsTruncated>"
                b"<NextContinuationToken>more</NextContinuationToken>",
            )
        self._answer(answer.status, answer.getheaders(), content)
        connection.close()

    def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in {"content-length", "connection", "transfer-encoding"}:
                self.send_header(name, value)
        length = dict(headers).get("Content-Length") if self.command == "HEAD" else len(content)
        self.send_header("Content-Length", str(length or 0))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass

    def log_message(self, format: str, *arguments: object) -> None:
        """Not onto the terminal."""


def _go_on() -> bool:
    return True
