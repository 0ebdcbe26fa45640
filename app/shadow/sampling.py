"""Which requests a candidate is shown."""

import hashlib
from typing import Protocol

from app.contract import Shadow
from app.request_ids import drawn


class SamplingPolicy(Protocol):
    """Decides by what was known before the answer: the same way in every worker."""

    def admits(self, request_id: str, routing_key: str | None) -> bool:
        """Whether the request is shown. `routing_key` is None where it has none."""
        ...


class ShareOfRequests:
    """A share of all requests, each drawn by the random end of its id."""

    def __init__(self, share: float) -> None:
        self._share = share

    def admits(self, request_id: str, routing_key: str | None) -> bool:
        return drawn(request_id) < self._share


class ShareOfKeys:
    """All requests of a share of the routing keys: who is in at 5 % stays in at 10 %. A request
    without a key is drawn by itself."""

    def __init__(self, share: float, salt: str) -> None:
        """Another `salt` draws others."""
        self._share = share
        self._salt = hashlib.sha256(salt.encode()).digest()
        self._requests = ShareOfRequests(share)

    def admits(self, request_id: str, routing_key: str | None) -> bool:
        if routing_key is None:
            return self._requests.admits(request_id, None)
        key = routing_key.encode("utf-8", "surrogatepass")
        digest = hashlib.blake2b(key, digest_size=8, key=self._salt).digest()
        return int.from_bytes(digest) < self._share * 2.0**64


def policy_of(shadow: Shadow, share: float, salt: str) -> SamplingPolicy | None:
    """What the contract asks for, with this share; None where that admits all."""
    if share >= 1:
        return None
    if shadow.by == "routing_key":
        return ShareOfKeys(share, salt)
    return ShareOfRequests(share)
