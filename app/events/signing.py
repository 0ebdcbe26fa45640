"""Signs what is told, as Standard Webhooks 1.0 has it."""

import base64
import binascii
import hashlib
import hmac
from collections.abc import Mapping, Sequence

from app.errors import ConfigurationError

_PREFIX = "whsec_"
_LEAST, _MOST = 24, 64  # bytes
_SETTING = "HIKYAKU_WEBHOOK_SECRET"


class Signer:
    """By one secret, or while it is exchanged by the new one and the old one."""

    def __init__(self, secrets: Sequence[bytes]) -> None:
        self._secrets = tuple(secrets)

    @classmethod
    def of(cls, setting: str) -> "Signer":
        """Of one secret or several, with commas or spaces between them. Raises
        `ConfigurationError`, which shows none."""
        given = setting.replace(",", " ").split()
        if not given:
            raise ConfigurationError(
                f"{_SETTING}: is unset, and what is told to HIKYAKU_WEBHOOKS is signed: "
                'echo "whsec_$(openssl rand -base64 32)" makes one'
            )
        return cls([_decoded(secret) for secret in given])

    def headers(self, event_id: str, body: bytes, at_s: float) -> Mapping[str, str]:
        """Of one attempt: `at_s` is now, in seconds since 1970."""
        timestamp = str(int(at_s))
        signed = f"{event_id}.{timestamp}.".encode() + body
        digests = (hmac.digest(secret, signed, hashlib.sha256) for secret in self._secrets)
        return {
            "webhook-id": event_id,
            "webhook-timestamp": timestamp,
            "webhook-signature": " ".join(f"v1,{base64.b64encode(d).decode()}" for d in digests),
        }


def _decoded(secret: str) -> bytes:
    content = b""
    if secret.startswith(_PREFIX):
        try:
            content = base64.b64decode(secret.removeprefix(_PREFIX), validate=True)
        except binascii.Error:
            content = b""
    if not _LEAST <= len(content) <= _MOST:
        raise ConfigurationError(
            f"{_SETTING}: a secret is {_PREFIX} and {_LEAST} to {_MOST} bytes in base64: "
            'echo "whsec_$(openssl rand -base64 32)" makes one'
        )
    return content
