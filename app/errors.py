"""The error tree: one class per code a caller may read, and those for the operator.

HikyakuError
├── RequestError          answered to the caller, with a code of a closed list
│   ├── InvalidInput      ├── PayloadTooLarge  ├── NotFound     ├── Conflict
│   ├── Unauthorized      ├── Forbidden        ├── RateLimited  ├── Overloaded
│   ├── FeaturesUnavailable  ├── ModelNotReady ├── ShuttingDown
│   └── DeadlineExceeded  ├── BackendError     └── Internal
├── ConfigurationError    the operator must act before the service can start
├── InvalidModel          a model folder, contract or version that must not be loaded
└── RepositoryUnavailable the model repository cannot be read now; later it may
"""

from typing import ClassVar

_MOST_REASON = 2_000


class HikyakuError(Exception):
    """Base of everything this project raises on purpose."""


class RequestError(HikyakuError):
    """Answered to the caller. `code` is stable; the text is for people.

    `retryable` says whether the same request may succeed later without being changed.
    """

    code: ClassVar[str]
    retryable: ClassVar[bool]


class InvalidInput(RequestError):
    """The request cannot be understood; `field` names the culprit: `instances[3].distance`."""

    code = "invalid_input"
    retryable = False

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class PayloadTooLarge(RequestError):
    """The body or the number of instances is over the limit that the text names."""

    code = "payload_too_large"
    retryable = False


class NotFound(RequestError):
    """No such model, version or path."""

    code = "not_found"
    retryable = False


class Conflict(RequestError):
    """The state changed meanwhile, or the change asked for goes against it."""

    code = "conflict"
    retryable = False


class Unauthorized(RequestError):
    """Nobody said who is calling."""

    code = "unauthorized"
    retryable = False


class Forbidden(RequestError):
    """This caller may not do this."""

    code = "forbidden"
    retryable = False


class RateLimited(RequestError):
    """This caller sent more than its share."""

    code = "rate_limited"
    retryable = True


class Overloaded(RequestError):
    """More work is queued than can be answered in time; `retry_after_s` is a prediction."""

    code = "overloaded"
    retryable = True

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class FeaturesUnavailable(RequestError):
    """The feature store did not answer in time and the contract forbids going on without it."""

    code = "features_unavailable"
    retryable = True


class ModelNotReady(RequestError):
    """The model is known but not yet verified and warm."""

    code = "model_not_ready"
    retryable = True


class ShuttingDown(RequestError):
    """This process is draining; another replica will answer."""

    code = "shutting_down"
    retryable = True


class DeadlineExceeded(RequestError):
    """The request's deadline passed before its answer was there."""

    code = "deadline_exceeded"
    retryable = True


class BackendError(RequestError):
    """The model's execution failed or returned something that must not be passed on."""

    code = "backend_error"
    retryable = False


class Internal(RequestError):
    """A defect of this service; the log has the traceback under the request id."""

    code = "internal"
    retryable = False


class ConfigurationError(HikyakuError):
    """The operator must act before the service can start; the text says how."""


class InvalidModel(HikyakuError):
    """A model folder, contract or version that must not be loaded; the text says why.

    It may quote what somebody has published: it is one line that shows but does nothing, and no
    longer than a person reads.
    """

    def __init__(self, reason: str) -> None:
        line = " ".join(reason[: _MOST_REASON + 1].split())
        super().__init__(
            printable(line if len(line) <= _MOST_REASON else f"{line[:_MOST_REASON]}…")
        )


class RepositoryUnavailable(HikyakuError):
    """The model repository, or the copy on this machine, cannot be read or written now; the text
    says why. Nothing is known about what it holds: it may well be there."""


def printable(text: str) -> str:
    """The text with an escape for each character that a terminal or a log would not show."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
