import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from app.errors import ConfigurationError
from app.listener import bind, one_each


@pytest.fixture
def shared() -> Iterator[list[socket.socket]]:
    """The listeners of three workers on a free port."""
    with ExitStack() as stack:
        yield [stack.enter_context(each) for each in one_each(bind("127.0.0.1", 0), 3)]


def test_all_workers_have_one_address_and_each_gets_connections(
    shared: list[socket.socket],
) -> None:
    (address,) = {listener.getsockname() for listener in shared}
    for listener in shared:
        listener.listen()
        listener.setblocking(False)
    with ExitStack() as stack:
        accepted = [0, 0, 0]
        while not all(accepted):
            stack.enter_context(socket.create_connection(address))
            for number, listener in enumerate(shared):
                try:
                    stack.enter_context(listener.accept()[0])
                    accepted[number] += 1
                except BlockingIOError:
                    continue
            assert sum(accepted) < 200


def test_an_address_that_several_workers_share_is_taken_for_another_service(
    shared: list[socket.socket],
) -> None:
    for listener in shared:
        listener.listen()
    host, port = shared[0].getsockname()
    with pytest.raises(ConfigurationError, match="HIKYAKU_PORT"):
        one_each(bind(host, port), 3)


def test_the_address_of_one_worker_is_not_shared() -> None:
    (listener,) = one_each(bind("127.0.0.1", 0), 1)
    with listener, socket.socket() as stranger:
        stranger.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        with pytest.raises(OSError, match="in use"):
            stranger.bind(listener.getsockname())
