"""Whose rows go first when there are more than an execution takes."""

from enum import IntEnum


class Priority(IntEnum):
    """What a request is for, the most urgent first.

    Under contention each gets a share by its weight, so the last one waits long but never starves.
    """

    LIVE = 0
    CANARY = 1
    SHADOW = 2
    BULK = 3


WEIGHTS = {Priority.LIVE: 16, Priority.CANARY: 8, Priority.SHADOW: 2, Priority.BULK: 1}
