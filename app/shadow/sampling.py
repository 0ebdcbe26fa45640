"""Which requests a candidate is shown."""

from typing import Protocol

from app.contract import Shadow
from app.request_ids import drawn
from app.routing_key import Lots


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
        self._lots = Lots(salt)
        self._requests = ShareOfRequests(share)

    def admits(self, request_id: str, routing_key: str | None) -> bool:
        if routing_key is None:
            return self._requests.admits(request_id, None)
        return self._lots.draw(routing_key)[0] < self._share


def policy_of(shadow: Shadow, share: float, salt: str) -> SamplingPolicy | None:
    """What the contract asks for, with this share; None where that admits all."""
    if share >= 1:
        return None
    if shadow.by == "routing_key":
        return ShareOfKeys(share, salt)
    return ShareOfRequests(share)
