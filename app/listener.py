"""The address that a service listens on."""

import socket

from app.errors import ConfigurationError


def bind(host: str, port: int) -> socket.socket:
    """A bound socket. Raises `ConfigurationError` when the address is taken or not ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = _unbound(family)
    try:
        listener.bind((host, port))
    except OSError as exc:
        listener.close()
        raise ConfigurationError(
            f"cannot listen on {host}:{port}: {exc.strerror}; HIKYAKU_PORT names another port"
        ) from exc
    return listener


def one_each(listener: socket.socket, workers: int) -> list[socket.socket]:
    """A socket for each worker: `listener`, which is bound and does not listen yet, and others on
    its address. The kernel spreads connections over those that listen. Raises `OSError`."""
    listeners = [listener]
    if workers > 1:
        # Not before it was bound: it would have joined whoever else listens there.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    while len(listeners) < workers:
        listeners.append(another(listener))
    return listeners


def another(listener: socket.socket) -> socket.socket:
    """On the address of `listener`, one of several workers'. It gets no connections until it
    listens. Raises `OSError`."""
    beside = _unbound(listener.family)
    try:
        beside.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        beside.bind(listener.getsockname())
    except OSError:
        beside.close()
        raise
    return beside


def _unbound(family: socket.AddressFamily) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return listener
