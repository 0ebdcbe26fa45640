"""Who may change something: holders of a token, or without any this machine."""

import hashlib
import hmac
import ipaddress
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from app.config import Settings
from app.errors import ConfigurationError, Forbidden, RequestError, Unauthorized

_LOOPBACK = "loopback"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
# What a Bearer token may consist of (RFC 6750).
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")
_SHORTEST_TOKEN = 16
_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([0-9A-Za-z.-]+))(?::[0-9]{1,5})?")
_PROXIED = (b"forwarded", b"x-forwarded", b"via", b"x-real-ip", b"x-client-ip", b"true-client-ip")


class Operators(Protocol):
    """Recognises those who may change something."""

    def recognise(self, headers: Mapping[bytes, bytes], peer: str) -> str | RequestError:
        """The operator's name; `Unauthorized` when nobody says who calls, `Forbidden` when that is
        no operator. A header that came twice holds both values."""
        ...


class Token(NamedTuple):
    """Only its digest is kept: what is not here cannot be shown."""

    operator: str
    sha256: bytes


class TokenOperators:
    """Whoever sends one of the tokens."""

    def __init__(self, tokens: Sequence[Token]) -> None:
        self._tokens = tuple(tokens)

    def recognise(self, headers: Mapping[bytes, bytes], peer: str) -> str | RequestError:
        scheme, _, given = headers.get(b"authorization", b"").strip().partition(b" ")
        given = given.strip()
        if scheme.lower() != b"bearer" or not given:
            return Unauthorized("this is for operators: send `Authorization: Bearer <token>`")
        sha256 = hashlib.sha256(given).digest()
        # All are compared, so that the time tells nothing of which one was nearly right.
        found = [token for token in self._tokens if hmac.compare_digest(token.sha256, sha256)]
        return found[0].operator if found else Forbidden("this token is no operator's")


class LoopbackOperator:
    """Whoever runs a program on this machine, where the service listens on loopback only. A browser
    on it may be driven by any page that it shows, and a proxy speaks for others: not these."""

    def recognise(self, headers: Mapping[bytes, bytes], peer: str) -> str | RequestError:
        host = headers.get(b"host", b"").decode("latin-1")
        origin = headers.get(b"origin")
        if not _is_loopback_address(peer):
            return Forbidden("what is for operators is open to the loopback interface only")
        if any(name.startswith(_PROXIED) for name in headers):
            return Forbidden("what is for operators is not open to a proxy without a token")
        # The name of another site may lead here (DNS rebinding).
        named = _HOST.fullmatch(host)
        if named is None or not _is_loopback_name(named[1] or named[2]):
            return Forbidden("what is for operators is open to a Host of this machine only")
        if origin is not None and origin.decode("latin-1").lower() != f"http://{host}".lower():
            return Forbidden("what is for operators is not open to other sites' pages")
        return _LOOPBACK


def operators_of(settings: Settings) -> Operators:
    """Those that the settings name, a line each: `name:token`, or the token alone. Where there is
    none, and the service listens on a loopback address, it is whoever runs programs on this
    machine.

    Raises `ConfigurationError`, which shows no token, when there is neither, or a line cannot be
    used.
    """
    given: list[Token] = []
    tokens, token_file = settings.operator_token, settings.operator_token_file
    if tokens is not None:
        given += _parsed(tokens.get_secret_value(), "HIKYAKU_OPERATOR_TOKEN")
    if token_file is not None:
        given += _parsed(_read(token_file), f"HIKYAKU_OPERATOR_TOKEN_FILE: {token_file}")
    if len({token.sha256 for token in given}) < len(given):
        raise ConfigurationError("HIKYAKU_OPERATOR_TOKEN: the same token twice")
    if given:
        return TokenOperators(given)
    if tokens is not None or token_file is not None:
        raise ConfigurationError("HIKYAKU_OPERATOR_TOKEN: set, but there is no token in it")
    if not _is_loopback_name(settings.host):
        raise ConfigurationError(
            f"HIKYAKU_HOST is {settings.host}, which others may reach, and nothing says who may "
            "load, roll back and release models: set HIKYAKU_OPERATOR_TOKEN (openssl rand -hex 24) "
            "or HIKYAKU_OPERATOR_TOKEN_FILE, or listen on 127.0.0.1"
        )
    return LoopbackOperator()


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "no text"
        raise ConfigurationError(f"HIKYAKU_OPERATOR_TOKEN_FILE: {path}: {reason}") from None


def _parsed(content: str, where: str) -> list[Token]:
    tokens = []
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        name, colon, token = line.strip().partition(":")
        if not colon:
            name, token = "operator", name
        fault = _fault(name, token)
        if fault is not None:
            raise ConfigurationError(f"{where}: line {number}: {fault}")
        tokens.append(Token(name, hashlib.sha256(token.encode()).digest()))
    return tokens


def _fault(name: str, token: str) -> str | None:
    if not _NAME.fullmatch(name):
        return "a name has letters, digits and ._@- only"
    if name == _LOOPBACK:
        return f"the name {_LOOPBACK} means whoever needs no token"
    if len(token) < _SHORTEST_TOKEN:
        return f"a token has at least {_SHORTEST_TOKEN} characters (openssl rand -hex 24)"
    if not _TOKEN.fullmatch(token):
        return "a token has letters, digits and ._~+/- only, and = at its end"
    return None


def _is_loopback_name(name: str) -> bool:
    return name.lower() == "localhost" or _is_loopback_address(name)


def _is_loopback_address(name: str) -> bool:
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped.is_loopback
    return address.is_loopback
