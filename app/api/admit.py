"""Who may pass: the one check that every door runs before anything else."""

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass

from app.errors import Forbidden, InvalidInput, PayloadTooLarge, RequestError

_OPERATOR_PATHS = ("/v1/replay-clock",)


@dataclass(slots=True)  # made for every request; a frozen one takes longer to make
class Caller:
    """An admitted caller. `peer` is its address as the socket saw it, `operator` who it is where it
    has an operator's rights."""

    peer: str
    operator: str | None = None


class Doorkeeper:
    """Refuses before the body is read: over the size limit, or for want of rights.

    Operator paths are open to the loopback interface only.
    """

    def __init__(self, max_body_bytes: int) -> None:
        self.max_body_bytes = max_body_bytes

    def admit(
        self, method: str, path: str, headers: Mapping[bytes, bytes], peer: str
    ) -> Caller | RequestError:
        """`headers` have lower-case names, `peer` is the address as the socket saw it."""
        length = headers.get(b"content-length", b"0")
        if not length.isdigit():
            return InvalidInput("content-length: not a number", field="content-length")
        if int(length) > self.max_body_bytes:
            return PayloadTooLarge(f"body: over the limit of {self.max_body_bytes} bytes")
        if path.startswith(_OPERATOR_PATHS) and method != "GET":
            # A proxy on this machine is a loopback peer, whoever it speaks for.
            proxied = any(name in headers for name in (b"forwarded", b"x-forwarded-for"))
            if proxied or not _is_loopback(peer):
                return Forbidden("operator paths are open to the loopback interface only")
        return Caller(peer)


def _is_loopback(peer: str) -> bool:
    try:
        address = ipaddress.ip_address(peer)
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped.is_loopback
    return address.is_loopback
