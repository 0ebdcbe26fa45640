"""The address that a service listens on."""

import socket

from app.errors import ConfigurationError


def bind(host: str, port: int) -> socket.socket:
    """A bound socket. Raises `ConfigurationError` when the address is taken or not ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as exc:
        listener.close()
        raise ConfigurationError(
            f"cannot listen on {host}:{port}: {exc.strerror}; HIKYAKU_PORT names another port"
        ) from exc
    return listener
