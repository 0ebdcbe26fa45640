"""Sends one event to one receiver: to addresses that were checked, and to no other."""

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import httpx

from app.errors import ConfigurationError
from app.events.addresses import Reach
from app.events.receivers import Receiver

Resolve: TypeAlias = Callable[[str], Awaitable[Sequence[str]]]
"""The addresses that a name stands for; raises `OSError` where that cannot be told."""

_MOST_ADDRESSES = 4


class Unreachable(Exception):
    """There was no answer; the text says why, and holds nothing of the receiver's path."""


class Answer(NamedTuple):
    """Of a receiver; its body is not read."""

    status: int
    retry_after_s: float | None
    """As long as it asks to be left alone."""


async def system_addresses(host: str) -> Sequence[str]:
    """By the resolver of this machine."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def trusted_authorities() -> ssl.SSLContext:
    """Those of the file SSL_CERT_FILE or the folder SSL_CERT_DIR, else certifi's. Raises
    `ConfigurationError`."""
    try:
        return httpx.create_ssl_context()
    except OSError as exc:
        raise ConfigurationError(f"SSL_CERT_FILE or SSL_CERT_DIR: {exc}") from exc


class Delivery:
    """To one receiver. Of httpx only the transport: a client would follow what its environment says
    of proxies, and log URLs, whose paths may be secret."""

    def __init__(
        self, receiver: Receiver, reach: Reach, resolve: Resolve, authorities: ssl.SSLContext
    ) -> None:
        self.receiver = receiver
        self._reach = reach
        self._resolve = resolve
        # A connection serves once: the next one goes to an address that was checked again.
        limits = httpx.Limits(max_keepalive_connections=0)
        self._transport = httpx.AsyncHTTPTransport(
            verify=authorities, trust_env=False, limits=limits
        )

    async def attempt(self, headers: Mapping[str, str], body: bytes, within_s: float) -> Answer:
        """Send it once; redirects are answers like others. Raises `Unreachable`, or
        `ForbiddenAddress` before anything was connected to."""
        try:
            async with asyncio.timeout(within_s):
                addresses = await self._addresses()
                self._reach.require(
                    self.receiver.host, addresses, loopback=self.receiver.is_loopback
                )
                return await self._send(addresses[:_MOST_ADDRESSES], headers, body)
        except TimeoutError:
            raise Unreachable(f"no answer within {within_s:g} s") from None

    async def _addresses(self) -> Sequence[str]:
        if self.receiver.address is not None:
            return [str(self.receiver.address)]
        try:
            addresses = await self._resolve(self.receiver.host)
        except OSError as exc:
            raise Unreachable(f"its name cannot be resolved: {exc.strerror}") from None
        if not addresses:
            raise Unreachable("its name stands for no address")
        return addresses

    async def _send(
        self, addresses: Sequence[str], headers: Mapping[str, str], body: bytes
    ) -> Answer:
        """To the first address where somebody listens."""
        fault = ""
        for address in addresses:
            try:
                return await self._exchange(address, headers, body)
            except httpx.ConnectError as exc:
                # Said before the path was sent; among others why a certificate is not accepted.
                fault = str(exc)
            except httpx.TransportError as exc:
                raise Unreachable(type(exc).__name__) from None
        raise Unreachable(f"cannot connect: {fault}")

    async def _exchange(self, address: str, headers: Mapping[str, str], body: bytes) -> Answer:
        request = httpx.Request(
            "POST",
            self.receiver.url_at(address),
            headers={"host": self.receiver.authority, **headers},
            content=body,
            # The certificate is to be that of the name, whatever the address.
            extensions={"sni_hostname": self.receiver.host},
        )
        response = await self._transport.handle_async_request(request)
        try:
            return Answer(response.status_code, _seconds(response.headers.get("retry-after", "")))
        finally:
            await response.aclose()

    async def close(self) -> None:
        await self._transport.aclose()


def _seconds(retry_after: str) -> float | None:
    return float(retry_after) if retry_after.isascii() and retry_after.isdigit() else None
