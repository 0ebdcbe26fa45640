"""Bounds how many requests are sent again: what is down must not get more work than what is up."""

_SHARE = 0.1
_AT_MOST = 5.0


class RetryBudget:
    """A tenth of the requests may be sent again, five at once."""

    def __init__(self) -> None:
        self._tokens = _AT_MOST

    def earn(self) -> None:
        """A request is sent for the first time."""
        self._tokens = min(self._tokens + _SHARE, _AT_MOST)

    def spend(self) -> bool:
        """Whether one may be sent again, which is then counted."""
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True
