"""How often something is done that need not be done at every beat."""


class Pace:
    """As often as it is asked, as long as that takes no more than a share of the time; at least
    once in `longest_s`, and never before `shortest_s` is over."""

    def __init__(self, shortest_s: float, longest_s: float, most_share: float) -> None:
        self._shortest_s = shortest_s
        self._longest_s = longest_s
        self._most_share = most_share
        self._due_s = 0.0

    def is_due(self, now_s: float) -> bool:
        return now_s >= self._due_s

    def done(self, now_s: float, took_s: float) -> None:
        """It took so long, until now."""
        wait_s = max(self._shortest_s, took_s / self._most_share)
        self._due_s = now_s + min(wait_s, self._longest_s)
