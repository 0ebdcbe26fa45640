"""Which addresses events may be sent to: public ones, and networks that are named."""

import ipaddress
from collections.abc import Sequence
from typing import TypeAlias

from app.errors import ConfigurationError

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network


def _networks(*names: str) -> tuple[Network, ...]:
    return tuple(map(ipaddress.ip_network, names))


# IANA's special-purpose registries; by hand, since `is_global` differs between Pythons.
_SPECIAL = _networks(
    *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16"),
    *("172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16"),
    *("198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
    # Protocols (Teredo among them), documentation, 6to4: what they embed is another address.
    *("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"),
)
# Of IPv6 nothing else is public: no mapped addresses, NAT64, link-local, unique local, multicast.
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
_PRIVATE = _networks(
    *("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7")
)
# What hands out credentials to whoever asks on this machine: in no network that is named, either.
_METADATA = _networks(
    *("169.254.169.254/32", "100.100.100.200/32", "192.0.0.192/32", "168.63.129.16/32"),
    *("fd00:ec2::254/128", "fd20:ce::254/128"),
)


class ForbiddenAddress(Exception):
    """Nothing is sent to what a host's name stands for; the text says to whom."""


class Reach:
    """Public addresses, and these networks, which are private ones."""

    def __init__(self, networks: Sequence[Network] = ()) -> None:
        self._networks = tuple(networks)

    @classmethod
    def of(cls, setting: str) -> "Reach":
        """Of networks in CIDR notation, with commas between them. Raises `ConfigurationError`."""
        networks = []
        for name in filter(None, map(str.strip, setting.split(","))):
            try:
                network = ipaddress.ip_network(name)
            except ValueError:
                network = None
            if network is None or not any(_within(network, each) for each in _PRIVATE):
                raise ConfigurationError(
                    f"HIKYAKU_WEBHOOK_NETWORKS: {name!r} is no part of a private network "
                    f"({', '.join(map(str, _PRIVATE))})"
                )
            networks.append(network)
        return cls(networks)

    def require(self, host: str, addresses: Sequence[str], *, loopback: bool) -> None:
        """All that the host's name stands for: with one among them that is not allowed, none is.
        Of a `loopback` host every address is one of this machine. Raises `ForbiddenAddress`."""
        for address in addresses:
            if not self.allows(address, loopback=loopback):
                raise ForbiddenAddress(f"{host} is {address}, which is no address to send to")

    def allows(self, text: str, *, loopback: bool = False) -> bool:
        try:
            address = ipaddress.ip_address(text)
        except ValueError:
            return False
        if loopback:
            return address.is_loopback
        if any(address in network for network in _METADATA):
            return False
        if any(address in network for network in self._networks):
            return True
        is_public = address.version == 4 or address in _GLOBAL_UNICAST
        return is_public and not any(address in network for network in _SPECIAL)


def _within(network: Network, other: Network) -> bool:
    # Of the same kind only: `subnet_of` raises for others.
    return (
        network.version == other.version
        and network.network_address in other
        and network.broadcast_address in other
    )
