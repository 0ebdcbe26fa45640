"""Who is told: URLs whose hosts are on a list, read in one strict way."""

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from app.errors import ConfigurationError
from app.events.addresses import Address

MOST_RECEIVERS = 16

# One way only to read it: what else a URL may hold is where readers differ (user names,
# backslashes, numbers as hosts, other scripts), and where a list of hosts is got round. Nor `..` as
# a part of the path, which is taken out on the way.
_URL = re.compile(
    r"(?P<scheme>https?)://"
    r"(?:\[(?P<six>[0-9A-Fa-f:.]+)\]|(?P<name>[0-9A-Za-z.-]+))"
    r"(?::(?P<port>[1-9][0-9]{0,4}))?"
    r"(?P<path>/(?!(?:[^?]*/)?\.\.?(?:[/?]|$))"
    r"(?:[A-Za-z0-9._~!$&'()*+;=:@/-]|%[0-9A-Fa-f]{2})*)?"
    r"(?P<query>\?(?:[A-Za-z0-9._~!$&'()*+;=:@/?-]|%[0-9A-Fa-f]{2})*)?"
)
_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
# The last label begins with a letter: `2130706433`, `127.1` and `0x7f.0.0.1` are numbers to some.
_NAME = re.compile(rf"(?:{_LABEL}\.)*[a-z](?:[a-z0-9-]{{0,61}}[a-z0-9])?")
_LONGEST_NAME = 253
_LOOPBACK_NAME = "localhost"


@dataclass(frozen=True, slots=True)
class Receiver:
    """Where events are told. Its path and query are not shown: they often hold a secret."""

    scheme: str
    host: str
    """A name in lower case, or an address."""
    port: int
    address: Address | None
    """Of a host that is one."""
    target: str = field(repr=False)
    """Path and query."""

    @property
    def is_loopback(self) -> bool:
        if self.address is not None:
            return self.address.is_loopback
        return self.host == _LOOPBACK_NAME

    @property
    def authority(self) -> str:
        """As the header Host has it."""
        return f"{_bracketed(self.host)}:{self.port}"

    def url_at(self, address: str) -> str:
        """Of this receiver, at an address of its host."""
        return f"{self.scheme}://{_bracketed(address)}:{self.port}{self.target}"


def receivers_of(urls: str, hosts: str) -> Sequence[Receiver]:
    """Of URLs, and of the hosts that may be told, with commas between them. Raises
    `ConfigurationError`, which shows no path of a URL."""
    allowed = {_host(name) for name in _listed(hosts)}
    receivers = []
    for number, url in enumerate(_listed(urls), 1):
        receiver = _receiver(url, number)
        if receiver.host not in allowed:
            raise ConfigurationError(
                f"HIKYAKU_WEBHOOKS: {receiver.host} is not in HIKYAKU_WEBHOOK_HOSTS"
            )
        receivers.append(receiver)
    if not 0 < len(receivers) <= MOST_RECEIVERS:
        raise ConfigurationError(f"HIKYAKU_WEBHOOKS: 1 to {MOST_RECEIVERS} URLs")
    return receivers


def _listed(setting: str) -> Sequence[str]:
    return [each for each in (part.strip(" ") for part in setting.split(",")) if each]


def _host(name: str) -> str:
    host, _ = _named(name.removeprefix("[").removesuffix("]"))
    if host is None:
        raise ConfigurationError(
            f"HIKYAKU_WEBHOOK_HOSTS: {name!r} is no name of a host (of another script: its xn--…) "
            "and no address"
        )
    return host


def _receiver(url: str, number: int) -> Receiver:
    parts = _URL.fullmatch(url)
    host, address = (None, None) if parts is None else _named(parts["six"] or parts["name"])
    is_six = address is not None and address.version == 6
    if parts is None or host is None or is_six != (parts["six"] is not None):
        raise ConfigurationError(
            f"HIKYAKU_WEBHOOKS: URL {number} is not of the form https://host[:port]/path, with "
            "nothing else in it"
        )
    default = 443 if parts["scheme"] == "https" else 80
    port = int(parts["port"] or default)
    target = (parts["path"] or "/") + (parts["query"] or "")
    receiver = Receiver(parts["scheme"], host, port, address, target)
    if port > 65_535:
        raise ConfigurationError(f"HIKYAKU_WEBHOOKS: URL {number}: no such port")
    if receiver.scheme == "http" and not receiver.is_loopback:
        raise ConfigurationError(
            f"HIKYAKU_WEBHOOKS: {host} is to be told by https: http is for this machine only"
        )
    return receiver


def _named(host: str) -> tuple[str | None, Address | None]:
    """A name, or an address as it is usually written; neither of what is none."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        name = host.lower()
        is_name = len(name) <= _LONGEST_NAME and _NAME.fullmatch(name) is not None
        return (name if is_name else None), None
    return str(address), address


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
